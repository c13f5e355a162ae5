"""The plan of a sweep goes on after any interruption as if there had been none."""

import random

import pytest

from pipeline.sweeps.budget import Limits
from pipeline.sweeps.ledger import Begun, Ended, Ledger, Measured
from pipeline.sweeps.plan import Budget, Plan
from pipeline.sweeps.trials import point_key

OWN = {"mask.ratio": 0.75}


class Seeded:
    """Points that depend on the number alone; remembers what it was told."""

    def __init__(self, most=100, values=None):
        self.most, self.values, self.told, self.restored = most, values, {}, []

    def draw(self, number):
        if number > self.most:
            return None
        generator = random.Random(number)
        value = generator.choice(self.values) if self.values else round(generator.random(), 4)
        return {"mask.ratio": value}, {"value": value}

    def restore(self, number, drawn):
        assert drawn
        self.restored.append(number)

    def tell(self, number, ended):
        self.told[number] = ended.objective if ended is not None and ended.state == "finished" else None


def objective(begun):
    """A peak at 0.6, with noise by seed."""
    return 50 - 40 * (begun.point["mask.ratio"] - 0.6) ** 2 + random.Random(f"{begun.seed}").gauss(0, 0.3)


def plan_of(path, budget=None, draws=None, elapsed=lambda: 0.0):
    return Plan(Ledger(path), draws or Seeded(), budget or Budget(trials=6), own=OWN, seed=0, elapsed=elapsed)


def run(plan, at_once=2, stop_after=None):
    """Run trials `at_once` at a time, in the order they were begun; stop with trials running after so many ended."""
    running, ended = [], 0
    while True:
        while len(running) < at_once and (begun := plan.next()) is not None:
            running.append(begun)
        if not running:
            return
        if stop_after is not None and ended == stop_after:
            return
        first = running.pop(0)
        plan.end(Ended(first.number, "finished", objective(first), curve=((10, 1.0),), cost={"cost/flops": 2.0}))
        ended += 1


def rows(path):
    return [(t.number, t.role, point_key(t.point), t.seed, t.state, t.objective) for t in Ledger(path).trials()]


def test_a_sweep_measures_the_recipe_searches_and_runs_finalists_with_fresh_seeds(tmp_path):
    plan = plan_of(tmp_path / "l")
    assert not plan.done
    run(plan)
    assert plan.done and plan.next() is None
    trials = plan.ledger.trials()
    assert [t.role for t in trials] == ["recipe"] * 3 + ["search"] * 6 + ["finalist"] * 6
    assert len(trials) == plan.total
    assert [t.seed for t in trials if t.role == "recipe"] == [0, 1, 2]
    assert {t.seed for t in trials if t.role == "search"} == {0}
    best = sorted((t for t in trials if t.role == "search"), key=lambda t: -t.objective)[:2]
    finalists = [t for t in trials if t.role == "finalist"]
    assert {point_key(t.point) for t in finalists} == {point_key(t.point) for t in best}
    for point in {point_key(t.point) for t in finalists}:
        seeds = [t.seed for t in finalists if point_key(t.point) == point]
        assert len(set(seeds)) == 3 and not set(seeds) & {0, 1, 2}


@pytest.mark.parametrize("stop_after", range(15))
@pytest.mark.parametrize("cut", [0, 7])
def test_after_an_interruption_anywhere_the_same_trials_are_run(tmp_path, stop_after, cut):
    run(plan_of(tmp_path / "whole"), at_once=1)
    path = tmp_path / "cut"
    run(plan_of(path), at_once=1, stop_after=stop_after)
    if cut and path.exists():  # the last line was being written
        path.write_bytes(path.read_bytes()[:-cut])
    run(plan_of(path), at_once=1)
    assert rows(path) == rows(tmp_path / "whole")


def test_trials_that_were_running_begin_again_under_their_number_and_the_searcher_is_restored(tmp_path):
    run(plan_of(tmp_path / "l"), at_once=3, stop_after=4)
    ledger = Ledger(tmp_path / "l")
    running = sorted(ledger.begun.keys() - ledger.ended.keys())
    assert len(running) == 3
    draws = Seeded()
    plan = plan_of(tmp_path / "l", draws=draws)
    assert draws.restored == [n for n, b in sorted(ledger.begun.items()) if b.role == "search"]
    assert draws.told == {n: e.objective for n, e in ledger.ended.items() if ledger.begun[n].role == "search"}
    again = [plan.next() for _ in running]
    assert [begun.number for begun in again] == running
    assert again == [ledger.begun[number] for number in running]
    run(plan, at_once=3)


def test_more_trials_may_be_asked_for_later(tmp_path):
    run(plan_of(tmp_path / "l"))
    before = rows(tmp_path / "l")
    more = plan_of(tmp_path / "l", Budget(trials=9))
    assert not more.done
    run(more)
    after = rows(tmp_path / "l")
    assert after[: len(before)] == before
    assert sum(row[1] == "search" for row in after) == 9 and more.done
    assert len({(row[2], row[3]) for row in after}) == len(after)


def test_no_point_is_run_twice_with_a_seed(tmp_path):
    """Also the recipe's own: a searched point that equals one gets its result, and no place in the statistics."""
    draws = Seeded(values=[0.75, 0.5])
    plan = plan_of(tmp_path / "l", Budget(trials=5), draws)
    run(plan, at_once=1)
    trials = plan.ledger.trials()
    measured = [(point_key(t.point), t.seed) for t in trials if t.value is not None]
    assert len(set(measured)) == len(measured)
    repeated = [t for t in trials if t.state == "stopped"]
    assert len(repeated) == 4 and all(t.reason.startswith("the same point and seed as #") for t in repeated)
    assert all(draws.told[t.number] == plan.ledger.ended[int(t.reason[-2:])].objective for t in repeated)


def test_a_grid_ends_when_its_points_are_used_up(tmp_path):
    plan = plan_of(tmp_path / "l", Budget(trials=50), Seeded(most=6))
    run(plan)
    assert sum(t.role == "search" for t in plan.ledger.trials()) == 3 and plan.done


def test_three_failures_in_a_row_for_the_same_reason_end_the_sweep(tmp_path):
    plan = plan_of(tmp_path / "l")
    for reason in ("out of memory", "loss is NaN", "out of memory", "out of memory"):
        plan.end(Ended(plan.next().number, "failed", reason=reason))
        assert plan.failing is None
    plan.end(Ended(plan.next().number, "failed", reason="out of memory"))
    assert plan.failing == "out of memory" and plan.next() is None and plan.done


def test_trials_that_ended_a_sweep_by_failing_begin_again_in_the_next_call_and_earlier_failures_do_not(tmp_path):
    path, budget = tmp_path / "l", Budget(trials=6, recipe_seeds=2, finalists=0)
    plan = plan_of(path, budget)
    outcomes = ["finished", "failed", "finished", "failed", "failed", "failed"]
    for number, outcome in enumerate(outcomes, start=1):
        assert plan.next().number == number
        reason = f"the loss is not finite at step {number}" if outcome == "failed" else ""  # alike but for numbers
        plan.end(Ended(number, outcome, 1.0 if outcome == "finished" else None, reason))
    assert plan.failing == "the loss is not finite at step 6" and plan.done and plan.next() is None
    again = plan_of(path, budget)  # the cause may be gone
    assert again.failing is None and not again.done
    assert [again.next().number for _ in range(5)] == [4, 5, 6, 7, 8]
    assert again.next() is None and again.ledger.ended[2].state == "failed"


def test_a_sweep_of_which_all_trials_failed_begins_them_again(tmp_path):
    path, budget = tmp_path / "l", Budget(trials=2, recipe_seeds=0, finalists=0)
    plan = plan_of(path, budget)
    for number in (1, 2):
        plan.next()
        plan.end(Ended(number, "failed", None, "out of memory"))
    assert plan.done
    run(plan_of(path, budget))
    assert [row[4] for row in rows(path)] == ["finished", "finished"]


def test_a_grid_of_which_all_trials_failed_begins_them_again(tmp_path):
    """Also where more trials were asked for than it has points: that it ends is known only after its last point."""
    path, budget = tmp_path / "l", Budget(trials=50, recipe_seeds=0, finalists=0)
    plan = plan_of(path, budget, Seeded(most=2))
    for reason in ("out of memory", "another"):
        plan.end(Ended(plan.next().number, "failed", None, reason))
    assert plan.next() is None and plan.done
    run(plan_of(path, budget, Seeded(most=2)))
    assert [row[4] for row in rows(path)] == ["finished", "finished"]


def test_failures_end_a_sweep_although_an_interrupted_trial_is_still_to_be_run(tmp_path):
    """Would catch a sweep that waits for ever for a trial that it does not begin."""
    path = tmp_path / "l"
    run(plan_of(path), at_once=4, stop_after=1)  # four were running
    plan = plan_of(path)
    for _ in range(3):
        plan.end(Ended(plan.next().number, "failed", reason="out of memory"))
    assert plan.next() is None and plan.done


def test_seeds_of_finalists_differ_although_the_recipe_had_more_seeds_before(tmp_path):
    path = tmp_path / "l"
    run(plan_of(path, Budget(trials=3, recipe_seeds=5, finalists=1, fresh_seeds=2)))
    run(plan_of(path, Budget(trials=3, recipe_seeds=4, finalists=1, fresh_seeds=4)))
    seeds = [trial.seed for trial in Ledger(path).trials() if trial.role == "finalist"]
    assert len(seeds) == len(set(seeds)) == 4


def test_failed_and_stopped_trials_are_no_finalists(tmp_path):
    plan = plan_of(tmp_path / "l", Budget(trials=4, recipe_seeds=0, finalists=4, fresh_seeds=1))
    states = iter(["failed", "stopped", "finished", "finished"])
    for state in states:
        begun = plan.next()
        plan.end(Ended(begun.number, state, objective(begun), reason=f"r{begun.number}"))
    run(plan)
    assert sum(t.role == "finalist" for t in plan.ledger.trials()) == 2


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "l"
    ledger = Ledger(path)
    ledger.add(Begun(1, "recipe", OWN, 0))
    path.write_text(path.read_text() + '{"end": {"num')
    again = Ledger(path)
    assert again.begun == ledger.begun and not again.ended
    again.add(Ended(1, "finished", 3.0))
    assert Ledger(path).ended[1].objective == 3.0


def run_limited(path, limits, at_once, stop_after=None, spread=0, elapsed=lambda: 0.0):
    """As `run`: trials of 100 images and an hour on a GPU, those of the search up to `spread` more or less."""
    plan = plan_of(path, Budget(trials=50, limits=limits), elapsed=elapsed)
    running, ended = [], 0
    while True:
        while len(running) < at_once and (begun := plan.next()) is not None:
            running.append(begun)
        if not running or ended == stop_after:
            return plan
        begun = running.pop(0)
        used = 100 + random.Random(begun.number).randint(-spread, spread)
        cost = {"cost/gpu_hours": used / 100, "cost/wall_clock_s": 36 * used}
        plan.end(Ended(begun.number, "finished", objective(begun), cost=cost, metrics={"images": used}))
        ended += 1


@pytest.mark.parametrize("limits", [{"images": 1700, "images_each": 100.0}, {"gpu_hours": 17.0}])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_budget_ends_the_search_and_leaves_enough_for_the_finalists(tmp_path, limits, at_once):
    """Would catch: no reserve for finalists, running trials that are not counted, a search that ends too early."""
    plan = run_limited(tmp_path / "l", Limits(**limits), at_once)
    trials = plan.ledger.trials()
    assert plan.done
    assert [t.role for t in trials].count("finalist") == 6 and [t.role for t in trials].count("search") == 8
    assert sum(t.metrics["images"] for t in trials) == 1700


@pytest.mark.parametrize("stop_after", range(0, 17, 2))
def test_a_budget_is_the_same_after_an_interruption_also_while_finalists_run(tmp_path, stop_after):
    """Finalists that are cheaper than expected, or a restart among them, do not begin the search again."""
    limits = Limits(images=1750, images_each=100.0)
    run_limited(tmp_path / "whole", limits, 1, spread=20)
    run_limited(tmp_path / "cut", limits, 1, stop_after=stop_after, spread=20)
    run_limited(tmp_path / "cut", limits, 1, spread=20)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    roles = [row[1] for row in rows(tmp_path / "whole")]
    assert roles == sorted(roles, key=["recipe", "search", "finalist"].index) and roles.count("search") < 50


def test_a_budget_that_is_raised_lets_the_search_go_on(tmp_path):
    run_limited(tmp_path / "l", Limits(images=1700, images_each=100.0), 1)
    before = rows(tmp_path / "l")
    plan = run_limited(tmp_path / "l", Limits(images=2000, images_each=100.0), 1)
    after = rows(tmp_path / "l")
    assert after[: len(before)] == before and [row[1] for row in after].count("search") == 11 and plan.done


def test_hours_count_trials_at_the_same_time_once(tmp_path):
    """A round of two trials takes an hour: 3 of the recipe, n of the search and 6 finalists are within 10 hours."""
    path = tmp_path / "l"

    def elapsed():
        return len(Ledger(path).ended) / 2

    plan = run_limited(path, Limits(hours=10, concurrent=2), 2, elapsed=elapsed)
    assert plan.done and 9 <= sum(t.role == "search" for t in plan.ledger.trials()) <= 11
    assert 9 <= elapsed() <= 10


def test_what_a_trial_measured_survives_and_counts_once(tmp_path):
    plan = plan_of(tmp_path / "l")
    number = plan.next().number
    for rung, value in ((0, 1.0), (1, 2.0), (1, 9.0)):
        plan.measure(Measured(number, rung, 10 * rung, value))
    again = Ledger(tmp_path / "l")
    assert again.curve(number) == ((0, 1.0), (10, 2.0)) and not again.ended
    assert plan_of(tmp_path / "l").next().number == number
