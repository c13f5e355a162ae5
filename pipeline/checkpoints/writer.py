"""Checkpoints of a run in training: written in a thread; the last ones and the best are kept.

Not with Ray's checkpoints: Ray's record of a run names the newest one whether it is complete or not, and a run cannot be
restored once one that the record names is gone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pipeline.checkpoints.find import BEST, best_of, is_better, name_of
from pipeline.retry import attempts
from pipeline.runtime.stage_folder import write_json
from wavemim.atomic import PARTIAL
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)
FAILURES = 3  # checkpoints in a row that could not be written before training ends
_LOOK = 5.0  # seconds between two calls of `waiting`
_RETRIES = (2.0, 10.0, 30.0)  # seconds before further attempts to write the last checkpoint of a run


class Uploader(Protocol):
    """Copies checkpoints of the folder to another place while training runs."""

    lock: threading.Lock
    holding: frozenset[str]  # names of those being copied, which must stay; changed under the lock

    def wake(self) -> None:
        """Report that there is a checkpoint to copy; returns immediately."""

    def finish(self, waiting: Callable[[], None] = lambda: None) -> str:
        """Wait for the last copy. Returns why it failed; "" if it did not."""
        ...


class Keeper:
    """Writes a run's checkpoints in a thread, one at a time, and removes those that are not kept.

    A checkpoint that cannot be written (the disk is full, the folder is gone) does not end training: the next one is tried.

    Attributes:
        given_up: Why training has to end: `FAILURES` checkpoints in a row could not be written; else "".
        uncopied: After `finish`: why the second place lacks the last checkpoint; else "".
    """

    def __init__(self, folder: Path, *, keep: int, best: str | None = None, uploader: Uploader | None = None) -> None:
        """Only rank 0 has a keeper.

        Args:
            folder: The stage's.
            keep: How many of the last checkpoints to keep.
            best: A metric: the checkpoint with its best value is kept too.
            uploader: Copies each checkpoint to another place.
        """
        self.folder, self.keep, self.best = folder, keep, best
        self.failures, self.given_up = 0, ""
        self._thread: threading.Thread | None = None
        self._pending: tuple[checkpoint.Snapshot, float | None] | None = None  # the last one, until it is written
        self._error = ""
        self._values: list[float] = []  # of the metric since the last checkpoint
        for partial in folder.glob(f".images-*{PARTIAL}"):  # left by workers that were killed
            shutil.rmtree(partial, ignore_errors=True)
        self.uploader = uploader
        self._written: int | None = None  # images of the last one that was written
        self.uncopied = ""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record metrics of training: the value of a checkpoint is the mean of the metric `best` since the previous one."""
        if self.best is not None and self.best in metrics:
            self._values.append(float(metrics[self.best]))

    def save(self, saver: checkpoint.Saver) -> None:
        """Copy the state to host memory, and write it in a thread. Waits for the previous checkpoint first."""
        self.wait()
        value = sum(self._values) / len(self._values) if self._values else None
        self._values = []
        self._pending = (saver.snapshot(reuse=True), value)
        self._start()

    def finish(self, waiting: Callable[[], None] = lambda: None) -> str:
        """Wait until the last checkpoint is written and copied, and try again if that failed.

        Args:
            waiting: Called every few seconds while waiting.

        Returns:
            Why the last checkpoint could not be written; "" if it was.
        """
        for attempt in attempts(_RETRIES):
            if attempt:
                self._start()
            self.wait(waiting)
            if self._pending is None:
                break
        if self.uploader is not None:
            self.uncopied = self.uploader.finish(waiting)
            if self._written is not None:
                self._remove(self._written)  # those that had to stay while they were copied
        return "" if self._pending is None else f"the last checkpoint could not be written: {self._error}"

    def wait(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until nothing is being written; `waiting` is called every few seconds."""
        while self._thread is not None and self._thread.is_alive():
            waiting()
            self._thread.join(_LOOK)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._try, name="checkpoint", daemon=True)
        self._thread.start()

    def _try(self) -> None:
        assert self._pending is not None
        snapshot, value = self._pending
        target = self.folder / name_of(snapshot.state["images"])
        try:
            snapshot.write(target)
        except Exception as error:  # of the disk or of safetensors: training continues whatever it is
            self.failures += 1
            self._error = " ".join(str(error).split())
            if self.failures == FAILURES:
                self.given_up = f"{FAILURES} checkpoints in a row could not be written to {self.folder}: {self._error}"
            log.warning("%s could not be written (%s); training continues, the next one is tried", target, self._error)
            return
        self.failures, self._pending, self._written = 0, None, int(snapshot.state["images"])
        with contextlib.suppress(OSError):
            self._note_best(target.name, value)
            self._remove(self._written)
        if self.uploader is not None:
            self.uploader.wake()

    def _note_best(self, name: str, value: float | None) -> None:
        if self.best is None or value is None or not math.isfinite(value):
            return
        known = best_of(self.folder)
        if known is None or known["metric"] != self.best or is_better(self.best, value, known["value"]):
            write_json(self.folder / BEST, {"checkpoint": name, "metric": self.best, "value": value})

    def _remove(self, images: int) -> None:
        """Remove those that are not kept: older ones, and newer ones, which were skipped when the run was resumed."""
        there = checkpoint.seen(self.folder)
        kept = [path.name for seen, path in there if seen <= images][: self.keep]
        best = best_of(self.folder) if self.best is not None else None
        kept += [best["checkpoint"]] if best is not None else []
        with self.uploader.lock if self.uploader is not None else contextlib.nullcontext():
            kept += self.uploader.holding if self.uploader is not None else ()
            for _, path in there:
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)
