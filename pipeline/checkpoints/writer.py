"""Checkpoints of a run in training: written beside it, the last ones and the best kept, the newest whole one found.

Ray has no part in this: its record of a run names the newest checkpoint whether it is whole or not, and a run cannot
be restored once one that it names is gone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pipeline.checkpoints.find import BEST, best_of, is_better, name_of
from pipeline.runtime.stage_folder import write_json
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)
FAILURES = 3  # checkpoints in a row that could not be written, before training ends
_LOOK = 5.0  # seconds between two signs of life while the last checkpoint is written
_RETRIES = (2.0, 10.0, 30.0)  # seconds before the last checkpoint of a run is tried again


class Uploader(Protocol):
    """Copies checkpoints of the folder to another place, beside training."""

    lock: threading.Lock
    holding: frozenset[str]  # names that are being copied and must stay; changed under the lock

    def wake(self) -> None:
        """There is a checkpoint to copy; returns at once."""

    def finish(self, waiting: Callable[[], None] = lambda: None) -> str:
        """Wait for the last copy. Gives why the last checkpoint is not there; else nothing."""
        ...


class Keeper:
    """Writes a run's checkpoints in a thread, one at a time, and removes those that are not kept.

    What cannot be written (a full disk, a folder that is gone) does not end training: the next one is tried. Once
    `FAILURES` in a row failed, `given_up` says why training has to end; else it is empty.
    """

    def __init__(self, folder: Path, *, keep: int, best: str | None = None, uploader: Uploader | None = None) -> None:
        """`keep` the last ones in `folder`, and that with the best value of the metric `best`. Rank 0 alone has one.

        `uploader` is woken after each, and finished with the last one.
        """
        self.folder, self.keep, self.best = folder, keep, best
        self.failures, self.given_up = 0, ""
        self._thread: threading.Thread | None = None
        self._pending: tuple[checkpoint.Snapshot, float | None] | None = None  # the last one, while it is not written
        self._error = ""
        self._values: list[float] = []  # of the metric since the last checkpoint
        for partial in folder.glob(f".images-*{checkpoint.PARTIAL}"):  # of workers that were killed
            shutil.rmtree(partial, ignore_errors=True)
        self.uploader = uploader
        self._written: int | None = None  # images of the last one that was
        self.uncopied = ""  # after `finish`: why the last one is not in the store

    def log(self, metrics: Mapping[str, float]) -> None:
        """Metrics of training as they are logged: a checkpoint's value is their mean since the one before."""
        if self.best is not None and self.best in metrics:
            self._values.append(float(metrics[self.best]))

    def save(self, saver: checkpoint.Saver) -> None:
        """Copy what has to be saved, and write it beside training; waits for the one before."""
        self.wait()
        value = sum(self._values) / len(self._values) if self._values else None
        self._values = []
        self._pending = (saver.snapshot(reuse=True), value)
        self._thread = threading.Thread(target=self._try, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, waiting: Callable[[], None] = lambda: None) -> str:
        """Wait for the last checkpoint, and try again if it failed. Gives why it is not there; else nothing.

        `waiting` is called now and then while it is written and copied, which may take long.
        """
        self.wait(waiting)
        for pause in _RETRIES:
            if self._pending is None:
                break
            time.sleep(pause)
            self._thread = threading.Thread(target=self._try, name="checkpoint", daemon=True)
            self._thread.start()
            self.wait(waiting)
        if self.uploader is not None:
            self.uncopied = self.uploader.finish(waiting)
            if self._written is not None:
                self._remove(self._written)  # what had to stay while it was copied
        return "" if self._pending is None else f"the last checkpoint could not be written: {self._error}"

    def wait(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until nothing is being written; `waiting` is called now and then."""
        while self._thread is not None and self._thread.is_alive():
            waiting()
            self._thread.join(_LOOK)

    def _try(self) -> None:
        assert self._pending is not None
        snapshot, value = self._pending
        target = self.folder / name_of(snapshot.state["images"])
        try:
            snapshot.write(target)
        except Exception as error:  # of the disk, of safetensors: whatever it is, training goes on
            self.failures += 1
            self._error = " ".join(str(error).split())
            if self.failures == FAILURES:
                self.given_up = f"{FAILURES} checkpoints in a row could not be written to {self.folder}: {self._error}"
            log.warning("%s could not be written (%s); training goes on, the next one is tried", target, self._error)
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
        """Those that are not kept: older ones, and newer ones, which were passed over when this run was gone on with."""
        there = checkpoint.seen(self.folder)
        kept = [path.name for seen, path in there if seen <= images][: self.keep]
        best = best_of(self.folder) if self.best is not None else None
        kept += [best["checkpoint"]] if best is not None else []
        with self.uploader.lock if self.uploader is not None else contextlib.nullcontext():
            kept += self.uploader.holding if self.uploader is not None else ()
            for _, path in there:
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)
