"""Measurements of the objective during a trial. What a trial has measured is in its folder, so that it is measured once."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.load import with_overrides
from pipeline.config.recipe import Recipe
from pipeline.models.build import build_blank_model
from pipeline.runtime.usage import Spent
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import changes
from pipeline.stages.tune_parts import CHECKPOINTS, was_stopped
from pipeline.storage.folder import Folder
from pipeline.storage.jsonl import JsonLines
from pipeline.sweeps.ledger import Measured
from pipeline.tracking.tracker import Tracker
from wavemim.flops import cost_of, forward_flops
from wavemim.weights import checkpoint

_FILE = "rungs.jsonl"
# Of the FLOPs of training, how many may compute features for probes. Probes then take at most a fifth of a trial's time: on a
# CPU, features and solvers were measured to run at 0.6 times the rate of training in bfloat16.
SHARE = 0.15
FEWEST = 1000  # images of a measurement: of fewer, a fifth of which is held out, it says too little
FEWEST_AT_END = 5000  # the standard error of 1,000 held-out images is about 1.5 points


@dataclass(frozen=True)
class Measuring:
    """How often and on how many images the trials of a sweep are measured: the same for all of them.

    Attributes:
        rungs: Measurements during training, the one at the end included; the untrained model is measured besides.
        images: Of each of these measurements; 0: only the end is measured, and by the next number of images.
        at_end: Images of the measurement that trials are ranked by.
    """

    rungs: int
    images: int
    at_end: int


def plan_rungs(recipe: Recipe, shards: ShardSet) -> Measuring:
    """How the trials of a sweep are measured.

    So few images are used that all measurements are cheap. Where they would be too few, a trial has fewer rungs, unless a
    scheduler decides at them.

    Args:
        recipe: The settings of the sweep.
        shards: The shard set.
    """
    rows, tune = shards.rows["train"], recipe.tune
    short = with_overrides(recipe, changes(recipe, {}))
    with torch.device("meta"):
        model = build_blank_model(short)
        training = short.train.epochs * rows * cost_of(model, short.mask.count).training_flops
        # Whole images: many times what the encoder computes in training, where it may see a quarter of each.
        each = forward_flops(model.encoder.model, shards.channels, short.encoder.image_size)
    budget = int(SHARE * training / max(each, 1))  # images
    most = min(tune.max_images, rows)
    if tune.rungs == 1:
        return Measuring(1, 0, min(most, max(budget, FEWEST_AT_END)))
    at_end = min(most, max(budget - 2 * FEWEST, FEWEST_AT_END))
    left = max(0, budget - at_end)
    images = min(most, max(left // (tune.rungs + 1), FEWEST))
    rungs = tune.rungs if tune.scheduler != "none" else min(tune.rungs, left // images - 1)
    return Measuring(max(rungs, 1), images, at_end)


def milestones(rungs: int, reduction: float) -> list[int]:
    """The rungs at which ASHA may stop a trial.

    Args:
        rungs: Measurements of a trial, the one at its end included, which stops nothing.
        reduction: The reduction factor.
    """
    found = []
    at = 1.0
    while math.ceil(at) < rungs:
        found.append(math.ceil(at))
        at *= reduction
    return sorted(set(found))


class Rungs:
    """Measures the objective at the rungs of a trial; takes the place of a training loop's `Coordinator`."""

    def __init__(
        self,
        folder: Path,
        number: int,
        *,
        rungs: int,
        total_steps: int,
        step: int,
        model: nn.Module,
        measure: Callable[[nn.Module], float],
        report: Callable[[Measured, Spent | None], None],
        at_start: bool = True,
        pause: int | None = None,
    ) -> None:
        """Report again what the trial measured before it was interrupted, and the model at its start if it was not.

        Args:
            folder: The trial's.
            number: The trial's.
            rungs: Measurements, that of `at_end` included.
            total_steps: Steps of training.
            step: Steps that are done.
            model: A model as at the start of training, to which weights are copied for each measurement.
            measure: Returns the objective of such a model.
            report: Called with each measurement, and the cost of the training up to it, or None for one that was made before
                an interruption. Raises SystemExit where the trial is to end.
            at_start: Whether the untrained model is measured too.
            pause: The rung after which training stops, to go on later; None: there is none.
        """
        self._lines, self._number, self._step = JsonLines(folder / _FILE), number, step
        self._model, self._measure, self._report = model, measure, report
        self.seconds = 0.0  # that measurements have taken, those before an interruption included
        self._due = {max(1, round(total_steps * rung / rungs)): rung for rung in range(1, rungs)}
        self._due.pop(total_steps, None)
        self._pause = {rung: step for step, rung in self._due.items()}[pause] if pause is not None else None
        self._known: dict[int, Measured] = {}
        self._ended = False
        for line, _ in self._lines.read(0):
            self.seconds += line.pop("seconds")
            self._known[line["rung"]] = Measured(**line)
        for known in self._known.values():
            self._report(known, None)
        if 0 not in self._known and step == 0 and at_start:
            self._at(0, 0, Spent())

    @property
    def count(self) -> int:
        """Measurements so far."""
        return len(self._known) + self._ended

    def at_end(self, model: nn.Module) -> float:
        """The objective of the trained model, of the same images as at the rungs: a trial's curve is of one measure."""
        began = time.perf_counter()
        found = self._measure(model)
        self.seconds += time.perf_counter() - began
        self._ended = True
        return found

    @property
    def paused(self) -> bool:
        """Whether training has reached the rung after which it stops."""
        return self._pause is not None and self._step >= self._pause

    def measured(self, rung: int) -> Measured:
        """The measurement at a rung."""
        return self._known[rung]

    def after_step(self) -> tuple[bool, bool]:
        """Whether a checkpoint is due, before which `at_checkpoint` is to be called, and whether training is to stop."""
        self._step += 1
        return self._is_due(self._step) or self.paused, self.paused

    def at_checkpoint(self, saver: checkpoint.Saver, state: dict[str, Any]) -> None:
        """Measure, if this is a rung that has not been measured."""
        if self._is_due(state["step"]):
            snapshot = saver.snapshot()
            checkpoint.load_model(snapshot, self._model)
            self._at(self._due[state["step"]], state["images"], Spent.of(snapshot.state["cost"]))

    def _is_due(self, step: int) -> bool:
        return step in self._due and self._due[step] not in self._known

    def _at(self, rung: int, images: int, spent: Spent) -> None:
        began = time.perf_counter()
        measured = Measured(self._number, rung, images, self._measure(self._model))
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self._known[rung] = measured
        self._lines.append({**vars(measured), "seconds": seconds})
        self._report(measured, spent)


@contextlib.contextmanager
def tracked(tracker: Tracker, folder: Path, place: Folder | None = None) -> Iterator[Tracker]:
    """Track a trial in its folder, whose place in a store may be given. Where its thread is ended from outside, its MLflow run ends as KILLED if a scheduler stopped it; if the
    sweep was interrupted, the run stays as it is and is gone on with later."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracker)
        try:
            yield tracker
        except SystemExit:
            stack.pop_all()
            if was_stopped(folder, place):
                tracker.end("KILLED")
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            raise
