"""What rank 0 decides while training runs (save now, stop), told to all ranks so that they do it after the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

EVERY = 1.0  # seconds between two looks, about
_LONGEST = 1000  # steps


class Orders:
    """Asks `save` and `stop` on rank 0 about once a second, and gives every rank the answer after the same step.

    With several ranks the steps at which they agree are settled by rank 0 from the pace of the last ones. They agree
    over the CPU, so that no device is waited for; a rank may only wait for the others there.
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
        """Every rank has to make one, at the same point: they may need a process group of their own."""
        self.rank, self.world, self._clock = rank, world, clock
        self._save, self._stop = save, stop
        self._asked = clock() - EVERY
        self._next = self._pace = 1  # steps until they agree, and how many that were
        self._group: dist.ProcessGroup | None = None
        if world > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]  # this rank is in it

    def after_step(self) -> tuple[bool, bool]:
        """(whether to save a checkpoint, whether to stop) now, the same on every rank. Called after every step."""
        if self.world == 1:
            now = self._clock()
            if now - self._asked < EVERY:
                return False, False
            self._asked = now
            return self._save(), self._stop()
        self._next -= 1
        if self._next:
            return False, False
        answer = torch.zeros(3, dtype=torch.int64)
        if self.rank == 0:
            now = self._clock()
            # Grows slowly: the first steps are the slow ones.
            pace = int(self._pace * EVERY / max(now - self._asked, 1e-6))
            self._asked, self._pace = now, min(max(pace, 1), 2 * self._pace, _LONGEST)
            answer = torch.tensor([self._save(), self._stop(), self._pace], dtype=torch.int64)
        dist.broadcast(answer, 0, group=self._group)
        save, stop, self._next = answer.tolist()
        return bool(save), bool(stop)


class Minutes:
    """Whether so many minutes have passed since the last checkpoint."""

    def __init__(self, minutes: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._clock = clock
        self._last = clock()

    def __call__(self) -> bool:
        """Whether one is due."""
        return self._seconds is not None and self._clock() - self._last >= self._seconds

    def saved(self) -> None:
        """A checkpoint was taken, for whatever reason."""
        self._last = self._clock()
