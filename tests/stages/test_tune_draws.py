"""Points of a search, and that a restart forgets none."""

import json

import pytest
from loss_equality.cases import TWO_LEVELS

from pipeline.config.load import load
from pipeline.stages.tune_draws import draws_of
from pipeline.stages.tune_plan import planned_points
from pipeline.stages.tune_space import read_space
from pipeline.sweeps.ledger import Ended

SPACE = """
question: Q?
space:
  mask.ratio: {uniform: [0.25, 0.75]}
  target.kind: {choice: [wavelet, pixels]}
  target.tilt: {choice: [null, 0.5, {0: 0, 1: 1}], when: {target.kind: wavelet}}
  target.weights: {simplex: [3, 4]}
"""
GRID = "question: Q?\nspace: {mask.ratio: {grid: [0.5, 0.6, 0.7]}}\n"


def made(tmp_path, search, text=SPACE):
    (tmp_path / "space.yaml").write_text(text)
    recipe = load(TWO_LEVELS, [f"tune.space={tmp_path}/space.yaml", f"tune.search={search}"])
    return recipe, read_space(recipe)


def drawn(draws, numbers):
    """As the ledger keeps them, through JSON."""
    return [json.loads(json.dumps(draws.draw(number))) for number in numbers]


def test_a_random_search_and_a_grid_go_on_where_they_were(tmp_path):
    for text, count in ((SPACE, 8), (GRID, 3)):
        recipe, space = made(tmp_path, "random", text)
        whole = drawn(draws_of(recipe, space), range(4, 4 + count))
        assert [point for point, _ in whole] == json.loads(json.dumps(planned_points(recipe, space, count)))
        again = draws_of(recipe, space)
        for number, (_, memo) in zip((4, 5), whole, strict=False):
            again.restore(number, memo)
        assert drawn(again, range(6, 4 + count)) == whole[2:]
        assert text == SPACE or again.draw(99) is None


def test_optuna_knows_every_point_and_result_after_a_restart(tmp_path):
    recipe, space = made(tmp_path, "optuna")
    first = draws_of(recipe, space)
    memos = {}
    for number in range(4, 14):
        point, memo = first.draw(number)
        memos[number] = json.loads(json.dumps(memo))
        if number < 12:  # the last two were running when the sweep was interrupted
            first.tell(number, None if number == 7 else Ended(number, "finished", -abs(point["mask.ratio"] - 0.6)))
    again = draws_of(recipe, space)
    for number, memo in memos.items():
        again.restore(number, memo)
    for number in range(4, 12):
        value = first._study.trials[number - 4].value
        again.tell(number, None if value is None else Ended(number, "finished", value))
    before, after = (draws._study.trials for draws in (first, again))
    assert [(t.params, t.distributions, t.value, t.state) for t in after] == [
        (t.params, t.distributions, t.value, t.state) for t in before
    ]
    new = [again.draw(number)[0]["mask.ratio"] for number in range(14, 18)]
    old = {round(t.params["mask.ratio"], 3) for t in before}
    assert not old & {round(value, 3) for value in new}
    for number in (12, 13):  # ends after the restart
        again.tell(number, Ended(number, "finished", -1.0))


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_the_searcher_of_a_space(tmp_path, search):
    recipe, space = made(tmp_path, search)
    point, _ = draws_of(recipe, space).draw(4)
    assert set(point) <= set(space.settings)


def test_trials_that_were_stopped_guide_optuna_by_how_far_they_came(tmp_path):
    from optuna.trial import TrialState

    recipe, space = made(tmp_path, "optuna")
    first = draws_of(recipe, space)
    memo = json.loads(json.dumps(first.draw(4)[1]))
    stopped = Ended(4, "stopped", 2.0, "why", ((0, 1.0), (50, 2.0)))
    again = draws_of(recipe, space)
    again.restore(4, memo)
    for draws in (first, again):
        draws.tell(4, stopped)
        trial = draws._study.trials[0]
        assert (trial.state, trial.intermediate_values, trial.value) == (TrialState.PRUNED, {0: 1.0, 50: 2.0}, 2.0)


@pytest.mark.parametrize(("cost", "metric"), [("flops", "cost/flops"), ("seconds", "cost/wall_clock_s")])
def test_with_a_cost_optuna_looks_for_the_pareto_front(tmp_path, cost, metric):
    """The objective is always the same, the cost grows with the mask ratio: half of the points of a search without it."""
    from optuna.trial import TrialState

    (tmp_path / "space.yaml").write_text("question: Q?\nspace: {mask.ratio: {uniform: [0.1, 0.9]}}\n")
    ratios = {}
    for told in (None, cost):
        options = [f"tune.space={tmp_path}/space.yaml", "tune.trials=16"] + ([f"tune.cost={told}"] if told else [])
        recipe = load("small", options)
        draws = draws_of(recipe, read_space(recipe))
        for number in range(40):
            ratio = draws.draw(number)[0]["mask.ratio"]
            state = "failed" if number == 3 else "finished"
            draws.tell(number, Ended(number, state, 50.0, cost={metric: ratio}))
            ratios.setdefault(told, []).append(ratio)
        assert [t.state for t in draws._study.trials].count(TrialState.FAIL) == 1
    assert sum(ratios[cost][20:]) < 0.6 * sum(ratios[None][20:])
