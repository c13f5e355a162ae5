"""Divergence: steps that were skipped and loss spikes, found without waiting for the device in a step. No Ray in here.

A step that has no finite gradient changes nothing: it is skipped. What a step measured is kept in a buffer on the device,
the row numbers of its images on the host; both are examined where metrics are logged anyway.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import TrainingEndedError
from pipeline.runtime.stage_folder import write_json
from pipeline.workers.harness import DIVERGED
from wavemim.weights import checkpoint

SPIKE = 6.0  # median absolute deviations above the median from which on a loss is a spike
REMEMBERED = 200  # steps that the median is taken over
FOLDER, CHECKPOINT, STEPS = DIVERGED, "checkpoint", "steps.json"


class DivergedError(TrainingEndedError):
    """Too many steps in a row had no finite gradient: one line."""

    def __init__(self, message: str, steps: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.steps = steps  # that were skipped in a row since this attempt began: step, epoch, rows of this worker


@dataclass
class StepRecord:
    """What the host records of a step."""

    step: int
    epoch: int
    rows: torch.Tensor  # (B,) of this worker


@dataclass
class WindowReport:
    """What happened since the last report."""

    skipped: int = 0
    spikes: list[dict[str, Any]] = field(default_factory=list)


class DivergenceWatch:
    """Counts skipped steps, finds loss spikes, and ends a run in which too many steps in a row are skipped.

    Too many are more than the settings allow and, where training ends, more than half of its steps: a short run that
    diverged does not reach the former.
    """

    def __init__(
        self,
        parts: Sequence[str],
        device: torch.device,
        world: int,
        *,
        every: int,
        max_skipped: int,
        section: str = "train",
    ) -> None:
        """Prepare the buffer.

        Args:
            parts: Names of the parts of the loss, such as "level 2", for messages.
            device: Where the losses are.
            world: Number of workers.
            every: Steps between two reports, at most.
            max_skipped: Steps in a row that may be skipped.
            section: Settings that hold the learning rate and so on, for messages.
        """
        self.parts, self.world, self.max_skipped, self.section = parts, world, max_skipped, section
        self.buffer = torch.zeros(every, len(parts) + 1, device=device)  # losses, gradient norm
        self.steps: list[StepRecord] = []
        self.recent: deque[float] = deque(maxlen=REMEMBERED)  # losses
        self.in_a_row: list[dict[str, Any]] = []  # steps skipped, up to now, since this attempt began
        self.skipped = 0  # during the whole training
        self.before = 0  # steps that an earlier attempt skipped just before those of `in_a_row`

    def add(self, step: int, epoch: int, rows: torch.Tensor, losses: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Record a step: its losses (T,) on this worker and gradient norm (), on the device; its rows (B,) on the host."""
        self.buffer[len(self.steps)] = torch.cat((losses, grad_norm[None]))
        self.steps.append(StepRecord(step, epoch, rows))

    def forget(self) -> None:
        """Forget the recent losses: they are not comparable with those of another image size."""
        self.recent.clear()

    def report(self, lr: float, total_steps: int | None = None) -> WindowReport:
        """Examine the steps since the last report. To be called by every worker.

        Args:
            lr: Learning rate, for messages.
            total_steps: At the end of training, its steps: a run whose last ones, over half, were skipped has failed, too.

        Raises:
            DivergedError: Too many steps in a row were skipped.
        """
        values = self.buffer[: len(self.steps)]
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        report = WindowReport()
        measured = values.tolist()
        for record, (*losses, norm) in zip(self.steps, measured, strict=True):
            if not math.isfinite(norm):
                report.skipped += 1
                self.in_a_row.append({"step": record.step, "epoch": record.epoch, "rows": record.rows.tolist()})
                if self._length() > self.max_skipped:
                    raise DivergedError(self._message(record, losses, norm, lr), self.in_a_row)
                continue
            self.in_a_row, self.before = [], 0
            if (deviations := self._spike(sum(losses))) is not None:
                report.spikes.append({"step": record.step, "times": deviations, "rows": record.rows.tolist()})
        self.skipped += report.skipped
        if total_steps is not None and 2 * self._length() > total_steps:
            *losses, norm = measured[-1]
            raise DivergedError(self._message(self.steps[-1], losses, norm, lr), self.in_a_row)
        self.steps = []
        return report

    def skipped_so_far(self) -> tuple[int, int]:
        """Steps skipped, and how many of them were the last steps in a row; those since the last report included.

        Waits for the device; the same on every worker.
        """
        done = self.buffer[: len(self.steps), -1].isfinite().tolist()
        last = done[::-1].index(True) if True in done else self._length() + len(done)
        return self.skipped + done.count(False), last

    def _length(self) -> int:
        """Steps skipped in a row, up to the last report."""
        return self.before + len(self.in_a_row)

    def _spike(self, loss: float) -> float | None:
        """How many median absolute deviations a loss is above the recent median; None if it is no spike."""
        found = None
        if len(self.recent) >= REMEMBERED // 10:
            median = statistics.median(self.recent)
            deviation = statistics.median(abs(value - median) for value in self.recent)
            above = (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)
            found = above if above > SPIKE else None
        self.recent.append(loss)
        return found

    def _message(self, record: StepRecord, losses: list[float], norm: float, lr: float) -> str:
        parts = [part for part, loss in zip(self.parts, losses, strict=True) if not math.isfinite(loss)]
        of = f" of {', '.join(filter(None, parts))}" if any(parts) else ""
        cause = f"the loss{of} is not finite" if parts else f"the gradient norm is {norm}, the losses are finite"
        section = self.section
        return (
            f"{self._length()} steps in a row were skipped, up to step {record.step}: {cause}, at learning rate "
            f"{lr:.3g}; try a smaller {section}.lr, a longer {section}.warmup_epochs, {section}.clip_grad, or "
            f"{section}.precision=float32"
        )


def notes_of(skipped: int, steps: int) -> list[str]:
    """What is to be said of a run that has ended although some of its steps were skipped."""
    if not skipped:
        return []
    return [f"{skipped:,} of {steps:,} steps were skipped: their loss or gradients were not finite"]


def save_diverged(
    folder: Path,
    saver: checkpoint.Saver,
    error: DivergedError,
    *,
    shards: str,
    stage: str = "pretrain",
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write ``blow-up/`` into the stage's folder. To be called by every worker; the error then names the place.

    ``checkpoint/`` is the model, and ``steps.json`` has of each skipped step its number (from 1), the epoch, and the row
    numbers of all workers, in the order of their ranks.

    Args:
        folder: The stage's folder.
        saver: Takes the checkpoint.
        error: Why training has ended.
        shards: Path or URL of the shard set.
        stage: Name of the stage.
        rank: Rank of this worker.
        world: Number of workers.
    """
    mine = [step["rows"] for step in error.steps]
    rows: list[Any] = [mine]
    if world > 1:
        rows = [None] * world
        dist.all_gather_object(rows, mine)
    place = folder / FOLDER
    if rank == 0:
        steps = [
            {"step": step["step"], "epoch": step["epoch"], "rows": [row for part in rows for row in part[number]]}
            for number, step in enumerate(error.steps)
        ]
        content = {"error": str(error), "stage": stage, "shards": shards, "workers": world, "steps": steps}
        try:
            saver(place / CHECKPOINT)
            write_json(place / STEPS, content)
        except Exception as problem:  # of the disk, of safetensors: the run ends for its own reason
            error.args = (f"{error} ({place} could not be written: {problem})",)
            return
    else:
        saver.take_part()
    advice = (
        f"wavemim replay {place} examines these steps" if stage == "pretrain" else f"the model and rows are in {place}"
    )
    error.args = (f"{error}; {advice}",)
