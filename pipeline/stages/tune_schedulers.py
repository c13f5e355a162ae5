"""What becomes of a trial at its rungs: each measurement goes into the ledger, and a scheduler may stop the trial there."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline.config.recipe import Recipe
from pipeline.stages.tune_rungs import milestones
from pipeline.sweeps.ledger import Measured
from pipeline.sweeps.plan import Plan

NUMBER = "number"
RUNG = "rung"  # in a result that is not a trial's last one
IMAGES = "images"


class Halving:
    """Asynchronous successive halving among the trials of the search, by Ray's ASHAScheduler.

    What it decides follows from the measurements in the ledger and their order alone: after an interruption it decides the
    same again.
    """

    def __init__(self, plan: Plan, *, rungs: int, reduction: float) -> None:
        """Restore it from what the ledger has."""
        self._plan, self._milestones, self._reduction = plan, milestones(rungs, reduction), reduction
        self._asha = ASHAScheduler(
            time_attr=RUNG, metric="objective", mode="max", max_t=rungs, grace_period=1, reduction_factor=reduction
        )
        self._known: set[int] = set()
        self._measured: dict[int, int] = {}  # trials measured at each milestone
        self.stopped: dict[int, str] = {}  # why, by trial
        for measured in plan.ledger.measured.values():
            self.decide(measured)

    def decide(self, measured: Measured) -> None:
        """Take a measurement, once; afterwards `stopped` has the trial if it is to end."""
        number, rung = measured.number, measured.rung
        counts = self._plan.ledger.begun[number].role == "search" and math.isfinite(measured.objective)
        if not counts or rung == 0 or number in self.stopped:
            return
        trial: Any = SimpleNamespace(trial_id=str(number))
        if number not in self._known:
            self._known.add(number)
            self._asha.on_trial_add(None, trial)  # type: ignore[arg-type]
        if rung in self._milestones:
            self._measured[rung] = self._measured.get(rung, 0) + 1
        action = self._asha.on_trial_result(
            None,  # type: ignore[arg-type]
            trial,
            {RUNG: rung, "objective": measured.objective},
        )
        if action == TrialScheduler.STOP:
            self.stopped[number] = (
                f"after {measured.images:,} images not among the best 1/{self._reduction:g} of "
                f"{self._measured.get(rung, 1)} trials"
            )


class RungScheduler(FIFOScheduler):
    """Puts what trials measure on their way into the ledger, and stops those that the search is better without."""

    def __init__(self, plan: Plan, objective: str, halving: Halving | None, on_stop: Callable[[int], None]) -> None:
        super().__init__()
        self._plan, self._objective, self._halving, self._on_stop = plan, objective, halving, on_stop

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves schedulers, but a sweep goes on from its ledger."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if RUNG not in result:
            return TrialScheduler.CONTINUE
        number = int(trial.config[NUMBER])
        measured = Measured(number, int(result[RUNG]), int(result[IMAGES]), float(result[self._objective]))
        new = (number, measured.rung) not in self._plan.ledger.measured
        self._plan.measure(measured)
        if self._halving is None:
            return TrialScheduler.CONTINUE
        if new:
            self._halving.decide(measured)
        if number not in self._halving.stopped:
            return TrialScheduler.CONTINUE
        self._on_stop(number)
        return TrialScheduler.STOP

    def reason(self, number: int) -> str:
        """Why a trial was stopped; "" if it was not."""
        return "" if self._halving is None else self._halving.stopped.get(number, "")


def scheduler_of(recipe: Recipe, plan: Plan, objective: str, on_stop: Callable[[int], None]) -> RungScheduler:
    """The scheduler of a sweep.

    Args:
        recipe: The settings: `tune.scheduler`, `tune.rungs`, `tune.reduction`.
        plan: The plan.
        objective: Name of the objective.
        on_stop: Called with the number of a trial before it is stopped.
    """
    tune = recipe.tune
    halving = Halving(plan, rungs=tune.rungs, reduction=tune.reduction) if tune.scheduler == "asha" else None
    return RungScheduler(plan, objective, halving, on_stop)
