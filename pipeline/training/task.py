"""What the training loop trains: the interface that pretraining and fine-tuning implement. No Ray in here."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from torch import nn

from pipeline.runtime.usage import Spent
from pipeline.shards.batches import Batch
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from wavemim.step import StepResult
from wavemim.weights import checkpoint


class Task(Protocol):
    """A model in training, with its data. Workers each have one and call the same methods after the same steps."""

    stage: str  # name of the stage
    shards: ShardSet
    wrapped: nn.Module  # the model, behind DDP where there are several workers
    reader: Reader
    saver: checkpoint.Saver
    image_flops: int  # of a forward and a backward pass of one image, with each of its masks

    def batches(self, epoch: int, start: int) -> Generator[Batch]:
        """Batches of an epoch from batch `start` on; closing the generator ends its threads."""
        ...

    def step(self, batch: Batch, *, epoch: int, step: int) -> StepResult:
        """Do step number `step`, from 0 on."""
        ...

    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        ...

    def metrics(self, losses: list[float]) -> dict[str, float]:
        """Metrics to log, of the mean parts of the loss among others; there are none if all steps were skipped."""
        ...

    def note_cost(self, spent: Spent) -> None:
        """Remember what training has cost so far."""
        ...

    def end_epoch(self, losses: list[float], *, finished: bool) -> dict[str, float]:
        """An epoch, or with `finished` training, has ended; the state still counts this epoch.

        Args:
            losses: Mean parts of the loss over the epoch.
            finished: Training has ended.

        Returns:
            Metrics to log.
        """
        ...
