"""Watching training for steps that were left out and for losses that leap, without waiting for the device in a step.

What a step measured is kept in a ring on the device, the row numbers of its images on the host; both are looked at
where metrics are logged anyway.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.runtime.stage_folder import write_json
from wavemim.weights import checkpoint

SPIKE = 6.0  # a loss this many times the usual distance above the median is a spike
REMEMBERED = 200  # steps that the median is taken over


class BlowUpError(RuntimeError):
    """Too many steps in a row had a gradient that is not finite: one line."""

    def __init__(self, message: str, steps: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.steps = steps  # of the row: step, epoch, rows of this worker


@dataclass
class Seen:
    """A step as the host remembers it."""

    step: int
    epoch: int
    rows: torch.Tensor  # (B,) of this worker


@dataclass
class Report:
    """What happened since the last look."""

    skipped: int = 0
    spikes: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """Counts steps that changed nothing, finds spikes, and ends a run that does nothing else any more."""

    def __init__(self, levels: list[int], device: torch.device, world: int, *, every: int, max_skipped: int) -> None:
        """`every` steps at most lie between two looks; more than `max_skipped` in a row are a `BlowUpError`."""
        self.levels, self.world, self.max_skipped = levels, world, max_skipped
        self.ring = torch.zeros(every, len(levels) + 1, device=device)  # losses, gradient norm
        self.steps: list[Seen] = []
        self.usual: deque[float] = deque(maxlen=REMEMBERED)
        self.row: list[dict[str, Any]] = []  # of steps left out, up to now
        self.skipped = 0  # over all of training

    def add(self, step: int, epoch: int, rows: torch.Tensor, losses: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """A step: losses (T,) of this worker and the gradient's norm, still on the device; `rows` (B,) on the host."""
        self.ring[len(self.steps)] = torch.cat((losses, grad_norm[None]))
        self.steps.append(Seen(step, epoch, rows))

    def forget(self) -> None:
        """What is usual is another thing from now on: images have another size."""
        self.usual.clear()

    def look(self, lr: float, ended_after: int | None = None) -> Report:
        """Bring the ring to the host and judge it. Every worker has to call it. Raises BlowUpError.

        `ended_after`: steps of the whole training, at its end: one that only left out steps has failed too.
        """
        values = self.ring[: len(self.steps)]
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        report = Report()
        for seen, line in zip(self.steps, values.tolist(), strict=True):
            *losses, norm = line
            if not _finite(norm):
                report.skipped += 1
                self.row.append({"step": seen.step, "epoch": seen.epoch, "rows": seen.rows.tolist()})
                if len(self.row) > self.max_skipped:
                    raise BlowUpError(self._words(seen, losses, norm, lr), self.row)
                continue
            self.row = []
            if (spike := self._spike(sum(losses))) is not None:
                report.spikes.append({"step": seen.step, "times": spike, "rows": seen.rows.tolist()})
        self.skipped += report.skipped
        if self.skipped and ended_after == self.skipped:
            raise BlowUpError(
                self._words(self.steps[-1], values.tolist()[-1][:-1], values.tolist()[-1][-1], lr), self.row
            )
        self.steps = []
        return report

    def skipped_so_far(self) -> int:
        """Also those since the last look. Waits for the device; the norm is the same on every rank."""
        norms = self.ring[: len(self.steps), -1]
        return self.skipped + int((~norms.isfinite()).sum())

    def _spike(self, loss: float) -> float | None:
        """How many usual distances a loss is above the median of those before it, where that is many."""
        found = None
        if len(self.usual) >= REMEMBERED // 10:
            median = statistics.median(self.usual)
            distance = statistics.median(abs(value - median) for value in self.usual)
            above = (loss - median) / max(distance, 1e-3 * abs(median), 1e-12)
            found = above if above > SPIKE else None
        self.usual.append(loss)
        return found

    def _words(self, seen: Seen, losses: list[float], norm: float, lr: float) -> str:
        at = [f"level {level}" for level, loss in zip(self.levels, losses, strict=True) if not _finite(loss)]
        where = (
            f"the loss of {', '.join(at)} is not finite" if at else f"the gradient's norm is {norm}, losses are finite"
        )
        return (
            f"{len(self.row)} steps in a row changed nothing, up to step {seen.step}: {where}, at learning rate {lr:.3g}; "
            "try a smaller train.lr, a longer train.warmup_epochs, train.clip_grad, or train.precision=float32"
        )


def _finite(value: float) -> bool:
    return value - value == 0


FOLDER, CHECKPOINT, STEPS = "blow-up", "checkpoint", "steps.json"


def keep_blow_up(
    folder: Path, saver: checkpoint.Saver, error: BlowUpError, *, shards: str, rank: int = 0, world: int = 1
) -> None:
    """Write ``blow-up/`` into the stage's folder. Every rank has to call it; `error.args` then names the place.

    ``checkpoint/`` is the model, and ``steps.json`` has of each step its number (from 1), the epoch, and the row numbers
    of all ranks, in their order. `shards` is where the shard set is.
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
        try:
            saver(place / CHECKPOINT)
            write_json(place / STEPS, {"error": str(error), "shards": shards, "workers": world, "steps": steps})
        except Exception as problem:  # of the disk, of safetensors: the run ends by its own reason
            error.args = (f"{error} ({place} could not be written: {problem})",)
            return
    else:
        saver.take_part()
    error.args = (f"{error}; wavemim replay {place} looks into these steps",)
