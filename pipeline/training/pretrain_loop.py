"""Pretraining by the common loop: phases of growing images, and the losses of each level. Knows neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.models.build import check_shards
from pipeline.runtime.usage import Spent
from pipeline.shards.batches import Batch
from pipeline.shards.shard_set import ShardSet
from pipeline.training import loop
from pipeline.training.metrics import Telemetry
from pipeline.training.schedule import Phase, PhaseCost, TrainSchedule, TrainState, phases_of
from pipeline.training.setup import Training, set_up
from pipeline.workers.harness import Harness
from pipeline.workers.heartbeat import MODEL
from wavemim.model import MaskedImageModel
from wavemim.step import StepResult
from wavemim.weights import checkpoint


@dataclass(frozen=True)
class Trained:
    """The outcome of pretraining."""

    model: MaskedImageModel
    position: TrainState
    stopped: bool = False  # before its end, as asked


def train(recipe: Recipe, shards: ShardSet, **options: Any) -> Trained:
    """Pretrain on the train split of a shard set, or resume from a checkpoint. To be called by every worker.

    Args:
        recipe: The settings.
        shards: The shard set.
        **options: The fields of `Harness`, of which only `device` has to be given.

    Returns:
        The model, where training is, and whether it was stopped before its end.

    Raises:
        SettingError: The shard set does not fit the recipe.
        DivergedError: Too many steps in a row were skipped; on every worker after the same step.
    """
    harness = Harness(**options)
    check_shards(recipe, shards)
    state, spent = loop.starting_point(TrainState(), harness)
    # The batch of the workers that began, however many there are now; of an elastic run as if all had.
    begin = recipe.train.workers if recipe.cluster.min_workers else harness.world
    schedule = TrainSchedule.of(recipe, shards.rows["train"], state.streams or begin)
    parts = [f"level {level}" for level in sorted(recipe.target.taps)]
    telemetry = Telemetry(recipe, harness, state, schedule, parts=parts, section="train", spent=spent)
    before: Path | checkpoint.Snapshot | None = harness.resume
    for phase in phases_of(recipe, shards, schedule.total_steps):
        if state.step >= phase.end < schedule.total_steps:
            continue  # done before this attempt
        harness.heartbeat(MODEL)
        training = set_up(
            recipe, phase, schedule, state, shards, harness,
            before=before, about=lambda: {"cost": telemetry.cost.spent().record()},
        )  # fmt: skip
        state.streams = training.reader.streams
        task = PretrainTask(training, phase, state, shards, telemetry.cost.spent())
        if loop.run(task, phase.end, state, schedule, telemetry, harness):
            return Trained(training.model, state, stopped=True)
        if phase.end < schedule.total_steps:
            before = training.saver.snapshot()  # a whole model and its moments
            del training, task  # there may be no room for two models
    return Trained(training.model, state)


class PretrainTask:
    """A masked image model in training, for as long as images have one size (a `pipeline.training.task.Task`)."""

    stage = "pretrain"

    def __init__(self, training: Training, phase: Phase, state: TrainState, shards: ShardSet, spent: Spent) -> None:
        """`spent` is what was spent before this attempt at the phase."""
        self.training, self.phase, self.state, self.shards = training, phase, state, shards
        self.wrapped, self.reader, self.saver = training.wrapped, training.reader, training.saver
        self.image_flops = training.flops
        self._names = [f"train/loss_level{level}" for level in training.model.levels]
        self._cost = PhaseCost(phase.size, spent, state.parts[phase.number :])

    def batches(self, epoch: int, start: int) -> Generator[Batch]:
        """Batches of an epoch from batch `start` on."""
        return self.reader.epoch(epoch, start=start)

    def step(self, batch: Batch, *, epoch: int, step: int) -> StepResult:
        """Do step number `step`, from 0 on."""
        return self.training.step(
            batch.levels, batch.rows, batch.weight, batch.total, epoch=epoch, step=step, crop=batch.crop
        )

    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.training.optimizer.param_groups[0]["lr"])

    def metrics(self, losses: list[float]) -> dict[str, float]:
        """The mean loss and present weight of each level, their weighted sum, and the image size."""
        progress = self.training.step.progress(self.state.step - 1)
        weights = self.training.model.level_weights.effective(progress).tolist()
        found = dict(zip(self._names, losses, strict=True)) if losses else {}
        if losses:
            found["train/loss"] = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        found |= {
            f"train/weight_level{level}": weight
            for level, weight in zip(self.training.model.levels, weights, strict=True)
        }
        return found | {"train/image_size": float(self.phase.size)}

    def note_cost(self, spent: Spent) -> None:
        """Remember what images of this size have cost so far."""
        self.state.parts[self.phase.number :] = [self._cost.read(spent)]

    def end_epoch(self, losses: list[float], *, finished: bool) -> dict[str, float]:
        """Note the mean losses of the epoch."""
        self.state.history.append({"epoch": self.state.epoch + 1, **dict(zip(self._names, losses, strict=True))})
        return {}
