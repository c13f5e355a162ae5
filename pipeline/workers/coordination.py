"""Decisions of rank 0 during training (save now, stop now), communicated to all ranks after the same step. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

INTERVAL = 1.0  # seconds between two decisions, approximately
_MAX_STEPS = 1000  # between two decisions


class Coordinator:
    """Asks `save` and `stop` on rank 0 about once a second, and gives every rank the answer after the same step.

    With several ranks, rank 0 decides from the pace of the last steps at which step they agree next. They agree over
    the CPU, so that no rank waits for its device; there a rank may only wait for the other ranks.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        stop: Callable[[], bool],
        save: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create one on every rank at the same point of the program: it may need a process group of its own.

        Args:
            rank: Rank of this process.
            world: Number of ranks.
            stop: Whether training should stop. Called on rank 0 only.
            save: Whether a checkpoint is due. Called on rank 0 only.
            clock: Seconds, monotonic.
        """
        self.rank, self.world, self._clock = rank, world, clock
        self._save, self._stop = save, stop
        self._last = clock() - INTERVAL
        self._steps_left = self._interval = 1  # steps until the next decision, and between the last two
        self._group: dist.ProcessGroup | None = None
        if world > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]  # this rank belongs to it

    def after_step(self) -> tuple[bool, bool]:
        """Decide after a step. To be called by every rank after every step.

        Returns:
            Whether to save a checkpoint, and whether to stop: the same on every rank.
        """
        if self.world == 1:
            now = self._clock()
            if now - self._last < INTERVAL:
                return False, False
            self._last = now
            return self._save(), self._stop()
        self._steps_left -= 1
        if self._steps_left:
            return False, False
        decision = torch.zeros(3, dtype=torch.int64)
        if self.rank == 0:
            now = self._clock()
            # At most doubled: the first steps are slower than the rest.
            steps = int(self._interval * INTERVAL / max(now - self._last, 1e-6))
            self._last, self._interval = now, min(max(steps, 1), 2 * self._interval, _MAX_STEPS)
            decision = torch.tensor([self._save(), self._stop(), self._interval], dtype=torch.int64)
        dist.broadcast(decision, 0, group=self._group)
        save, stop, self._steps_left = decision.tolist()
        return bool(save), bool(stop)


class CheckpointTimer:
    """Tells whether a given number of minutes has passed since the last checkpoint."""

    def __init__(self, minutes: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`minutes` between two checkpoints at most; None: no limit."""
        self._seconds = None if minutes is None else 60 * minutes
        self._clock = clock
        self._last = clock()

    def __call__(self) -> bool:
        """Whether a checkpoint is due."""
        return self._seconds is not None and self._clock() - self._last >= self._seconds

    def reset(self) -> None:
        """A checkpoint was taken, for whatever reason."""
        self._last = self._clock()
