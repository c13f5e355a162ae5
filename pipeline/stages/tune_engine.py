"""Runs the plan of a sweep on Ray Tune: trials in parallel, lost ones again, and each result in the ledger as it comes.

Ray Tune places trials, reuses their processes, and begins a trial anew whose process or node was lost. What has been run is
known by the ledger alone: a new call does not restore Ray's experiment, it goes on with the plan.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.exceptions
import ray.tune
from ray.tune.search import Searcher

from pipeline.runtime import ray_internals
from pipeline.stages.tune_schedulers import IMAGES, NUMBER, RUNG, RungScheduler
from pipeline.sweeps.ledger import Ended
from pipeline.sweeps.plan import Plan
from pipeline.sweeps.trials import CURVE_IMAGES, OBJECTIVE_IMAGES

FAILED = "failed"  # in a trial's last result: why it failed, in one line
CURVE = "curve"  # in a trial's last result: [(images, objective)]
RAY = "ray"  # in the folder that is given to `run_plan`: Ray's own files
_MEASURED_ON = (OBJECTIVE_IMAGES, CURVE_IMAGES)
_LOST = "its process or node was lost"
# Their tracebacks and their advice to restore Ray's experiment are wrong here; what has happened is said by `_Retries`, the
# results, and the command's last line.
_SILENT = ("ray.tune.tune", "ray.tune.analysis.experiment_analysis", "ray.tune.execution.tune_controller")
_log = logging.getLogger(__name__)


def run_plan(
    plan: Plan,
    trial: Callable[..., None],
    *,
    scheduler: RungScheduler,
    objective: str,
    resources: Mapping[str, float],
    concurrent: Callable[[], int],
    retries: int,
    folder: str,
    on_end: Callable[[Ended], None],
) -> None:
    """Run a plan until it is done.

    Args:
        plan: The plan.
        trial: A trial: a function of its configuration, with `number`, `role`, `point` and `seed`, and of what is to be run of
            it: `begin`, `pause` and `forks` of a `Part`. It reports the objective at each of its rungs, and its results at
            its end, or at the end of a part the objective at its rung.
        scheduler: Takes what trials report at rungs.
        objective: Name of the metric that is the objective.
        resources: What Ray reserves for a trial.
        concurrent: Trials at the same time, now: there may be more when nodes have joined, and fewer when some were lost.
        retries: How often a trial is begun anew whose process or node was lost.
        folder: Folder for Ray's own files.
        on_end: Called when a trial has ended.

    Raises:
        KeyboardInterrupt: The sweep was interrupted; the same plan goes on.
    """
    searcher = _Planned(plan, scheduler, objective, concurrent, on_end)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, dict(resources)),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # until the plan is done
            max_concurrent_trials=plan.total,  # as many may wait for nodes; the searcher decides how many there are
            reuse_actors=True,  # a new process takes many seconds to import what a trial needs
        ),
        run_config=ray.tune.RunConfig(
            name=RAY,
            storage_path=folder,
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=retries),
            callbacks=[_Retries(searcher)],
        ),
    )
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ray_internals.no_credentials_in_trials():
        tuner.fit()
    if not plan.done:
        raise KeyboardInterrupt  # which Ray Tune may catch, and return as if it had finished


class _Planned(Searcher):
    """Asks the plan for trials, and tells it what became of them."""

    def __init__(
        self,
        plan: Plan,
        scheduler: RungScheduler,
        objective: str,
        concurrent: Callable[[], int],
        on_end: Callable[[Ended], None],
    ) -> None:
        super().__init__(metric=objective, mode="max")
        self._plan, self._scheduler, self._objective = plan, scheduler, objective
        self._concurrent, self._on_end = concurrent, on_end
        self._numbers: dict[str, int] = {}  # Ray's trial -> ours
        self.errors: dict[str, str] = {}  # Ray's trial -> why it was begun anew

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as `__getstate__`."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves searchers, but a sweep goes on from its ledger."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # its FINISHED is a text
        """The configuration of the next trial; None while others have to end first."""
        if len(self._numbers) >= self._concurrent():
            return None
        begun = self._plan.next()
        if begun is None:
            return Searcher.FINISHED if self._plan.done else None
        self._numbers[trial_id] = begun.number
        begin, pause = self._plan.part(begun.number)
        forks = [asdict(fork) for fork in self._plan.ledger.forks(begun.number)]
        config = {NUMBER: begun.number, "role": begun.role, "point": dict(begun.point), "seed": begun.seed}
        return {**config, "begin": begin, "pause": pause, "forks": forks}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler takes what trials report before their end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended, was stopped, or its process was lost too often."""
        number = self._numbers.pop(trial_id)
        curve, stopped = self._plan.ledger.curve(number), self._scheduler.reason(number)
        lost = self.errors.pop(trial_id, "")
        ended = ended_of(number, result or {}, self._objective, error=error, lost=lost, stopped=stopped, curve=curve)
        if ended is None:
            self._plan.release(number)
            return
        self._plan.end(ended)
        self._on_end(ended)


class _Retries(ray.tune.Callback):
    """Says why a trial is begun anew, and remembers it for one that is given up in the end."""

    def __init__(self, searcher: _Planned) -> None:
        self._searcher = searcher

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray begins a trial anew."""
        reason = _LOST
        with contextlib.suppress(Exception):  # its error is a file that Ray may not have written
            error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
            if isinstance(error, ray.exceptions.RayTaskError):
                reason = " ".join(str(error.cause).split())[:300] or reason
        self._searcher.errors[trial.trial_id] = reason
        _log.warning("trial #%02d is begun again: %s", trial.config[NUMBER], reason)


def ended_of(
    number: int,
    result: Mapping[str, Any],
    objective: str,
    *,
    error: bool,
    lost: str = "",
    stopped: str = "",
    curve: Sequence[tuple[int, float]] = (),
) -> Ended | None:
    """How a trial ended, from the last result that it reported.

    Args:
        number: Its number.
        result: The result; empty if there is none.
        objective: Name of the objective.
        error: Whether Ray gave it up.
        lost: Why Ray had begun it anew before.
        stopped: Why a scheduler stopped it; "" if it did not.
        curve: (images seen, objective) during its training.

    Returns:
        How it ended; None if it was interrupted at a rung, or pauses there: it then is to begin again.
    """
    names = ("eval/", "train/loss_level", "perf/probe_share")
    at_rung = RUNG in result
    metrics = {name: value for name, value in result.items() if name.startswith(names) and name != objective}
    metrics |= {name: result[name] for name in (IMAGES, "mlflow_run", *_MEASURED_ON) if name in result}
    cost = {name: float(value) for name, value in result.items() if name.startswith("cost/")}
    curve = (*curve, *((int(images), float(value)) for images, value in result.get(CURVE, ())))
    reason = str(result.get(FAILED, "")) or (f"{lost or _LOST}, in every attempt" if error else "")
    value = float(result.get(objective, math.nan))
    if not reason and at_rung:
        if not stopped:
            return None
        images, last = curve[-1]  # a trial that was resumed reports its rungs from the first on
        on = {OBJECTIVE_IMAGES: metrics[CURVE_IMAGES]} if CURVE_IMAGES in metrics else {}
        return Ended(number, "stopped", last, stopped, curve, cost, {**metrics, **on, IMAGES: images})
    if not reason and not math.isfinite(value):
        reason = f"{objective} is not a finite number"
    if reason:
        return Ended(number, "failed", None, reason, curve, cost, metrics)
    return Ended(number, "finished", value, "", curve, cost, metrics)
