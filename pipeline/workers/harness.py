"""What a training loop receives from its caller, a Ray Train worker, a trial of a sweep or a test, and returns. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.recipe import Recipe
from pipeline.runtime.usage import Spent
from pipeline.workers.coordination import Coordinator
from pipeline.workers.heartbeat import CHECKPOINT, ReportActivity
from wavemim.weights import checkpoint

CONFIG = "config"  # key of the reference to what a worker is given
DIVERGED = "blow-up"  # in the stage's folder: the model and the steps of a run that diverged
LogHook = Callable[[dict[str, float], int], None]
CheckpointHook = Callable[[checkpoint.Saver, dict[str, Any]], None]


@dataclass(frozen=True)
class Harness:
    """The place of one worker in a training run, and the callbacks of its loop. The defaults are for a single process."""

    device: torch.device
    rank: int = 0
    world: int = 1  # number of data-parallel workers
    wrap: Callable[[nn.Module], nn.Module] | None = None  # makes a model exchange its gradients (DDP)
    threads: int = 2  # that read and prepare batches in this process
    resume: Path | None = None  # checkpoint to resume from
    folder: Path | None = None  # where a diverged model is written; None: nowhere
    on_log: LogHook | None = None  # (metrics, images seen): called on rank 0
    on_checkpoint: CheckpointHook | None = None  # (saver, state): called on every rank after the same step
    coordinator: Coordinator | None = None  # when to save outside the schedule, and when to stop
    heartbeat: ReportActivity = lambda activity: None  # is told what the training thread begins
    spent: Spent | None = None  # the last record of what earlier attempts have cost
    gpu_share: float = 1.0  # of a GPU that this worker shares with others

    def log(self, metrics: Mapping[str, float], images: int) -> None:
        """Report metrics after so many images; on rank 0 only. Empty metrics are not reported."""
        if metrics and self.on_log is not None and self.rank == 0:
            self.on_log(dict(metrics), images)

    def save(self, saver: checkpoint.Saver, state: dict[str, Any]) -> None:
        """Take a checkpoint. To be called by every rank after the same step."""
        if self.on_checkpoint is not None:
            self.heartbeat(CHECKPOINT)
            self.on_checkpoint(saver, state)

    def decide(self) -> tuple[bool, bool]:
        """Whether to save now, and whether to stop: the same on every rank. To be called by every rank after every step."""
        return self.coordinator.after_step() if self.coordinator is not None else (False, False)


@dataclass(frozen=True)
class LoopResult:
    """How the loop of a stage ended."""

    stopped: bool  # before its end, as asked
    value: Any = None  # what the stage on the driver is to get; of rank 0


# (settings, this worker, what the stage has handed to its workers): the loop of a stage, a function of its module.
Loop = Callable[[Recipe, Harness, Mapping[str, Any]], LoopResult]
