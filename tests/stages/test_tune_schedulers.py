"""Trials that are stopped at their rungs, decided from the ledger: without a Ray that runs."""

import random
import statistics

import pytest

from pipeline.stages.tune_engine import ended_of
from pipeline.stages.tune_rungs import milestones
from pipeline.stages.tune_schedulers import Halving
from pipeline.sweeps.ledger import Ended, Ledger, Measured
from pipeline.sweeps.plan import Budget, Plan

RUNGS = 8


class Drawn:
    """Points by their number."""

    def draw(self, number):
        return {"mask.ratio": random.Random(number).random()}, {"number": number}

    def restore(self, number, drawn):
        pass

    def tell(self, number, ended):
        pass


class Interrupted(Exception):
    """The driver is killed."""


def value(begun, rung):
    noise = random.Random(f"{begun.number} {rung}").gauss(0, 1)
    return 30 + 3 * rung - 40 * (begun.point["mask.ratio"] - 0.6) ** 2 + noise


def sweep(path, lines=None):
    """Run a sweep, two trials at a time in turn; die once the ledger has so many lines."""

    def check():
        if lines is not None and path.exists() and len(path.read_text().splitlines()) >= lines:
            raise Interrupted

    plan = Plan(Ledger(path), Drawn(), Budget(trials=12), own={"mask.ratio": 0.75}, seed=0)
    halving = Halving(plan, rungs=RUNGS, reduction=2)
    while (begun := plan.next()) is not None:
        check()
        for rung in range(RUNGS):  # a trial that was resumed reports its rungs again
            measured = Measured(begun.number, rung, 100 * rung, value(begun, rung))
            new = (begun.number, rung) not in plan.ledger.measured
            plan.measure(measured)
            check()
            if new:
                halving.decide(measured)
            if begun.number in halving.stopped:
                break
        reason, curve = halving.stopped.get(begun.number, ""), plan.ledger.curve(begun.number)
        state = "stopped" if reason else "finished"
        objective = curve[-1][1] if reason else value(begun, RUNGS)
        plan.end(Ended(begun.number, state, objective, reason, curve))
        check()
    assert plan.done
    return plan.ledger.trials()


def test_only_trials_of_the_search_are_stopped_with_a_reason_and_their_curve(tmp_path):
    trials = sweep(tmp_path / "l")
    stopped = [t for t in trials if t.state == "stopped"]
    assert 4 <= len(stopped) <= 10 and {t.role for t in stopped} == {"search"}
    assert [t.role for t in trials].count("finalist") == 6
    for trial in stopped:
        assert trial.value is None and trial.objective == trial.curve[-1][1]
        assert trial.curve[-1][0] in (100, 200, 400)
        assert trial.reason.startswith(f"after {trial.curve[-1][0]} images not among the best 1/2 of ")
    worse = statistics.fmean(value(t, RUNGS) for t in stopped)
    assert worse < statistics.fmean(t.value for t in trials if t.role == "search" and t.state == "finished")


@pytest.mark.parametrize("lines", [1, 20, 33, 34, 35, 36, 37, 40, 47, 55, 70, 90])
def test_after_a_kill_anywhere_the_same_trials_are_stopped(tmp_path, lines):
    """Between a measurement, the decision that follows from it and the end of the trial too."""
    whole = sweep(tmp_path / "whole")
    with pytest.raises(Interrupted):
        sweep(tmp_path / "cut", lines)
    assert sweep(tmp_path / "cut") == whole


@pytest.mark.parametrize(
    ("rungs", "reduction", "expected"),
    [(4, 2, [1, 2]), (9, 2, [1, 2, 4, 8]), (4, 4, [1]), (2, 3, [1]), (5, 1.5, [1, 2, 3, 4])],
)
def test_rungs_at_which_trials_may_be_stopped(rungs, reduction, expected):
    assert milestones(rungs, reduction) == expected


def test_how_a_trial_ended_that_last_reported_a_rung():
    result = {"rung": 1, "images": 40, "eval/x": 3.0, "cost/flops": 5.0, "mlflow_run": "r"}
    curve = [(0, 1.0), (20, 2.0), (40, 3.0)]
    stopped = ended_of(7, result, "eval/x", error=False, stopped="why", curve=curve)
    assert (stopped.state, stopped.objective, stopped.reason, stopped.curve) == ("stopped", 3.0, "why", tuple(curve))
    assert stopped.cost == {"cost/flops": 5.0} and stopped.metrics == {"images": 40, "mlflow_run": "r"}
    assert ended_of(7, result, "eval/x", error=False, curve=curve) is None  # interrupted: it begins again
    assert ended_of(7, result, "eval/x", error=True, curve=curve).state == "failed"
    final = {"images": 60, "eval/x": 4.0, "curve": [(60, 4.0)]}
    assert ended_of(7, final, "eval/x", error=False, curve=curve).curve == (*curve, (60, 4.0))
