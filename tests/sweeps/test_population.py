"""Population-based training: what is decided at a rung, and that a sweep in parts goes on after any interruption."""

import math
import random
from dataclasses import replace

import pytest

from pipeline.sweeps.answer import answer
from pipeline.sweeps.importance import Importance
from pipeline.sweeps.ledger import Ended, Ledger, Measured
from pipeline.sweeps.plan import Budget, Plan
from pipeline.sweeps.population import Population, replaced
from pipeline.sweeps.report import report, trials_csv
from pipeline.sweeps.response import Responses
from pipeline.sweeps.trials import Sweep

KEY, OWN, RUNGS, SIZE = "mask.ratio", {"mask.ratio": 0.75}, 4, 6


def nudged(point, numbers):
    return {KEY: round(point[KEY] + numbers.choice([-0.1, 0.1]), 4)}


POPULATION = Population(RUNGS, 0.25, 0, nudged)


def at_rung(scores, rung=1):
    return {number: Measured(number, rung, 100 * rung, score) for number, score in scores.items()}


def points_of(numbers):
    return {number: {KEY: number / 100} for number in numbers}


def test_the_worst_go_on_from_the_best_with_changed_values():
    scores = {3: 5.0, 4: 1.0, 5: 9.0, 6: 8.0, 7: 2.0, 8: 4.0, 9: 3.0, 10: 6.0}
    made = POPULATION.decide(1, at_rung(scores), points_of(scores))
    assert made.rung == 1 and [fork.number for fork in made.forks] == [4, 7]
    for fork in made.forks:
        assert fork.donor in (5, 6) and (fork.rung, fork.images) == (1, 100)
        assert abs(fork.point[KEY] - fork.donor / 100) == pytest.approx(0.1)


def test_a_decision_follows_from_the_measurements_and_the_seed_alone():
    """Would catch: Python's global random numbers, the order in which trials came in, a seed or a rung that is not used."""
    scores = {number: float(number % 7) for number in range(1, 21)}
    first = POPULATION.decide(2, at_rung(scores, 2), points_of(scores))
    for seed in range(5):
        random.seed(seed)
        order = random.sample(sorted(scores), len(scores))
        shuffled = {number: scores[number] for number in order}
        assert POPULATION.decide(2, at_rung(shuffled, 2), points_of(order)) == first
    others = {str(replace(POPULATION, seed=seed).decide(2, at_rung(scores, 2), points_of(scores))) for seed in range(5)}
    assert len(others) == 5
    donors = {
        fork.donor for rung in range(1, 9) for fork in POPULATION.decide(rung, at_rung(scores), points_of(scores)).forks
    }
    assert len(donors) == 5  # each of the best quarter


def test_an_objective_that_is_not_finite_is_the_worst():
    scores = {1: math.nan, 2: -1e9, 3: 1.0, 4: 2.0}
    assert [fork.number for fork in POPULATION.decide(1, at_rung(scores), points_of(scores)).forks] == [1]


@pytest.mark.parametrize(
    ("size", "quantile", "count"), [(1, 0.25, 0), (2, 0.25, 1), (3, 0.5, 1), (8, 0.25, 2), (9, 0.25, 3), (9, 0.5, 4)]
)
def test_no_trial_is_both_replaced_and_a_donor(size, quantile, count):
    assert replaced(size, quantile) == count
    scores = {number: float(number) for number in range(1, size + 1)}
    forks = replace(POPULATION, quantile=quantile).decide(1, at_rung(scores), points_of(scores)).forks
    assert len(forks) == count and not {fork.number for fork in forks} & {fork.donor for fork in forks}


class Drawn:
    """Points by their number."""

    def draw(self, number):
        return {KEY: round(0.3 + 0.6 * random.Random(number).random(), 4)}, {"number": number}

    def restore(self, number, drawn):
        pass

    def tell(self, number, ended):
        pass


class Interrupted(Exception):
    """The driver is killed."""


def reached(lineage, number):
    """The objective after parts with these values."""
    return sum(10 - 40 * (value - 0.5) ** 2 for value in lineage) + random.Random(f"{number} {len(lineage)}").gauss(
        0, 0.1
    )


def sweep(path, disk, lines=None, fails=(), size=SIZE):
    """Run a sweep, two trials at a time in turn; die once the ledger has so many lines.

    `disk` has the checkpoints: {(trial, rung): the values with which its weights were trained, a part each}.
    """

    def check():
        if lines is not None and path.exists() and len(path.read_text().splitlines()) >= lines:
            raise Interrupted

    budget = Budget(trials=size, recipe_seeds=2, finalists=1, fresh_seeds=2)
    plan = Plan(Ledger(path), Drawn(), budget, own=OWN, seed=0, population=POPULATION)
    out = []
    while True:
        while len(out) < 2 and (begun := plan.next()) is not None:
            check()
            out.append((begun, plan.part(begun.number), plan.ledger.forks(begun.number)))
        if not out:
            assert plan.done
            return plan.ledger
        begun, (begin, pause), forks = out.pop(0)
        number = begun.number
        donor = next((fork.donor for fork in forks if fork.rung == begin), number)
        lineage = disk[donor, begin] if begin else []
        if (number, begin) in fails:
            plan.end(Ended(number, "failed", reason=f"out of memory at rung {begin} of {number:b}"))
            check()
            continue
        lineage = [*lineage, *[begun.point[KEY]] * ((pause or RUNGS) - begin)]
        if pause is None:
            curve = plan.ledger.curve(number)
            plan.end(Ended(number, "finished", reached(lineage, number), "", curve, metrics={"lineage": lineage}))
        else:
            assert (number, pause) not in disk or disk[
                number, pause
            ] == lineage  # a part is the same when it is repeated
            disk[number, pause] = lineage
            plan.measure(Measured(number, pause, 100 * pause, reached(lineage, number)))
            check()
            plan.release(number)
        check()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "l"
    return sweep(path, {}), path


def test_a_population_trains_from_rung_to_rung_and_its_last_values_are_the_finalists(whole):
    ledger, path = whole
    trials = ledger.trials()
    assert [t.role for t in trials] == [*["recipe"] * 2, *["search"] * SIZE, *["finalist"] * 2]
    assert sorted(ledger.generations) == [1, 2, 3] and all(len(g.forks) == 2 for g in ledger.generations.values())
    searched = [trial for trial in trials if trial.role == "search"]
    for trial in searched:
        assert [images for images, _ in trial.curve] == [100, 200, 300]
        assert len(trial.metrics["lineage"]) == RUNGS
        values = ledger.begun[trial.number].point[KEY] if not trial.forks else trial.forks[-1].point[KEY]
        assert trial.point == {KEY: values} and trial.metrics["lineage"][-1] == values
    forked = [trial for trial in searched if trial.forks]
    assert forked and any(len(set(trial.metrics["lineage"])) > 1 for trial in forked)
    best = max(searched, key=lambda trial: trial.objective)
    assert {t.point[KEY] for t in trials if t.role == "finalist"} == {best.point[KEY]}
    assert Ledger(path).generations == ledger.generations and Ledger(path).trials() == trials


def test_no_trial_begins_a_part_before_the_whole_population_has_measured_the_rung(whole):
    """From the order of the lines: a measurement at a rung comes after the decision at the one before."""
    _, path = whole
    decided, lines = 0, path.read_text().splitlines()
    for line in lines:
        if '"generation"' in line[:14]:
            decided += 1
        elif '"rung"' in line[:8]:
            assert f'"rung": {decided + 1}}}' in line
    assert decided == RUNGS - 1


@pytest.mark.parametrize("lines", range(1, 41))
def test_after_a_kill_at_any_line_the_decisions_and_the_trials_are_the_same(tmp_path, whole, lines):
    """Would catch: a decision that is made again or left out, a fork from a later checkpoint, a part that is run twice."""
    ledger, path = whole
    total = len(path.read_text().splitlines())
    assert total == 41 == 10 + 10 + 3 * SIZE + 3  # begun, ended, measured, decided
    disk = {}
    with pytest.raises(Interrupted):
        sweep(tmp_path / "cut", disk, lines)
    again = sweep(tmp_path / "cut", disk)
    assert again.generations == ledger.generations and again.trials() == ledger.trials()


def test_a_trial_that_failed_is_out_of_the_population_and_does_not_hold_it_up(tmp_path):
    ledger = sweep(tmp_path / "l", {}, fails={(4, 0), (6, 2)})
    states = {trial.number: trial.state for trial in ledger.trials()}
    assert [number for number, state in states.items() if state == "failed"] == [4, 6]
    assert sorted(ledger.generations) == [1, 2, 3]
    for generation in ledger.generations.values():
        gone = {4} if generation.rung < 3 else {4, 6}
        assert not gone & {one for fork in generation.forks for one in (fork.number, fork.donor)}


def test_trials_that_ended_the_sweep_by_failing_catch_up_in_the_next_call(tmp_path):
    """Three in a row fail after the first decision; begun again, they go on from the rung that they had reached."""
    disk, path, budget = {}, tmp_path / "l", Budget(trials=SIZE, recipe_seeds=2, finalists=1, fresh_seeds=2)
    with pytest.raises(Interrupted):
        sweep(path, disk, 8 + 2 + SIZE + 1)  # begun, ended, measured, decided
    plan = Plan(Ledger(path), Drawn(), budget, own=OWN, seed=0, population=POPULATION)
    assert sorted(plan.ledger.generations) == [1]
    for _ in range(3):
        plan.end(Ended(plan.next().number, "failed", reason="disk is gone"))
    assert plan.failing and plan.next() is None and plan.done
    again = sweep(path, disk)
    assert {trial.state for trial in again.trials()} == {"finished"}
    assert all(len(trial.metrics["lineage"]) == RUNGS for trial in again.trials() if trial.role == "search")


def test_a_population_does_not_grow_once_trials_were_forked(tmp_path, whole):
    _, path = whole
    (tmp_path / "l").write_text(path.read_text())
    ledger = sweep(tmp_path / "l", {}, size=SIZE + 3)
    assert sum(begun.role == "search" for begun in ledger.begun.values()) == SIZE


def test_the_report_says_what_was_forked_and_that_its_last_values_stand_for_it(whole):
    ledger, _ = whole
    found = Sweep("eval/linear_top1_heldout", [KEY], ledger.trials())
    forked = [trial for trial in found.trials if trial.forks]
    said = answer(found)
    assert said.sentences[-1] == (
        f"Population-based training changed the settings of {len(forked)} trials during training; the finalists and the "
        "recommended recipe have the last values of such a trial, constant from the start."
    )
    text = report(found, said, Responses((), ()), Importance(note="x"))
    fork = ledger.generations[1].forks[0]
    row = f"| #{fork.number:02d} | #{fork.donor:02d} | 100 | {fork.point[KEY]:.2g} |"
    assert "## Forks" in text and row in " ".join(text.split())
    assert f"#{fork.donor:02d} after 100 images" in trials_csv(found)
    assert {trial.number for trial in found.constant.trials} == {t.number for t in found.trials} - {
        t.number for t in forked
    }
    without = report(found.constant, answer(found.constant), Responses((), ()), Importance(note="x"))
    assert "Fork" not in without and "Population" not in without and "forked" not in trials_csv(found.constant)
