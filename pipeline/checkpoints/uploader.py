"""Copies checkpoints to their second place while training runs; the run locks that place for this time."""

from __future__ import annotations

import contextlib
import json
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoints.find import BEST, best_of, folders, images_of, seen
from pipeline.checkpoints.remote import CheckpointStore, log
from pipeline.checkpoints.writer import FAILURES
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.retry import attempts
from pipeline.runtime.stage_folder import SETTINGS, StageFolder, as_json
from pipeline.storage.locks import claimed, lease_mark
from wavemim.weights import checkpoint

_LEASE = ".store-lease"  # in the stage's folder: the mark with which it owned the store
_RETRIES = (2.0, 10.0, 30.0)  # seconds before further attempts to copy the last checkpoint of a run


def check_store(recipe: Recipe, stage: str, same: Mapping[str, Any]) -> None:
    """Check, before training, whether a stage can use train.checkpoints_at.

    Args:
        recipe: The settings.
        stage: Name of the stage.
        same: The settings that its checkpoints must have been trained with.

    Raises:
        SettingError: It holds checkpoints of other settings, or denies access.
        StorageError: It does not answer.
    """
    store = CheckpointStore.of(recipe, stage)
    finished = (recipe.stage_dir(stage) / "result.json").is_file() and not (recipe.restart or recipe.force)
    if store is not None and not finished:
        store.check(same, restart=recipe.restart, force=recipe.force)


@contextlib.contextmanager
def opened(recipe: Recipe, same: Mapping[str, Any], stage: StageFolder) -> Iterator[CheckpointStore | None]:
    """Own a run's store while the block runs, after downloading its newest checkpoint to the stage's folder.

    Args:
        recipe: The settings of the run.
        same: Those that its checkpoints must have been trained with.
        stage: The stage's folder, which this process owns.

    Yields:
        The store; None if none is set, or the run is finished: then only what the store lacks is copied.

    Raises:
        SettingError: It holds checkpoints of other settings.
        StageError: Another run writes there, or the store does not answer.
    """
    store = CheckpointStore.of(recipe, stage.path.name)
    if store is None:
        yield None
        return
    best = recipe.train.keep_best is not None
    if stage.finished:
        _catch_up(store, recipe, same, stage)
        yield None
        return
    with _owned_home(store, stage) if store.is_home else _claimed(store, stage.path) as store:
        changed = store.check(same, restart=recipe.restart, force=recipe.force)
        if changed:
            log.warning("%s: resuming with changed settings: %s", store, "; ".join(changed))
        if recipe.restart and not store.is_home:
            store.folder.clear()
        store.folder.write(SETTINGS, as_json(same))
        try:
            store.restore(stage.path, best=best)
        except OSError as error:
            raise StageError(f"a checkpoint of {store} cannot be downloaded to {stage.path}: {error}") from None
        yield store


@contextlib.contextmanager
def _owned_home(store: CheckpointStore, stage: StageFolder) -> Iterator[CheckpointStore]:
    """The store that is the stage's own folder, which this process owns already."""
    assert stage.mirror is not None, stage.folder
    yield replace(store, owner=stage.mirror.owner)


def _catch_up(store: CheckpointStore, recipe: Recipe, same: Mapping[str, Any], stage: StageFolder) -> None:
    """Copy the last checkpoint of a finished run to the store if the store lacks it. A failure is only a warning."""
    local = stage.path
    last = checkpoint.latest(local)
    if last is None:
        return
    try:
        store.check(same, restart=False, force=False)
        with contextlib.suppress(FileNotFoundError):
            if store.folder.read(f"{last.name}/{checkpoint.STATE}") == (last / checkpoint.STATE).read_bytes():
                return
        with _owned_home(store, stage) if store.is_home else _claimed(store, local) as store:
            store.folder.write(SETTINGS, as_json(same))
            best = recipe.train.keep_best is not None
            missing = Copier(store, local, keep=recipe.train.keep_checkpoints, best=best).finish()
    except (StageError, SettingError, OSError) as error:
        missing = str(error)
    if missing:
        log.warning("%s", missing)


@contextlib.contextmanager
def _claimed(store: CheckpointStore, local: Path) -> Iterator[CheckpointStore]:
    """Own the store for the folder `local`, which this process owns already. Raises StageError if another run owns it.

    A mark that was made for the same folder belongs to a process that has ended, since its lock on the folder is free.
    """
    with claimed(store.folder, "pretraining", lease=local / _LEASE, other="train.checkpoints_at=") as owner:
        yield replace(store, owner=owner)


class Copier:
    """Copies the last checkpoint of a folder, and the best, to the store in a thread, and removes older ones there.

    One at a time: of the checkpoints that are written during a copy, only the newest is copied. A copy that failed is tried
    again with the next checkpoint, and by `finish`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        local: Path,
        *,
        keep: int,
        best: bool,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            store: The second place.
            local: The folder with the checkpoints.
            keep: How many of the last ones stay in the store.
            best: Whether the best one stays there too.
            before: Called before a copied checkpoint becomes complete, to copy what was logged up to it.
        """
        self.store, self.local, self.keep, self.best, self._before = store, local, keep, best, before
        self.failures, self.error = 0, ""  # attempts in a row that failed, and why the last one did
        self.lock = threading.Lock()
        self.holding: frozenset[str] = frozenset()  # what is being copied and must stay; changed under the lock
        self._lost = False  # another run has taken the store over
        self._asked = False
        self._thread: threading.Thread | None = None
        self.wake()  # for what an earlier process could not copy

    def wake(self) -> None:
        """Report that there is a checkpoint to copy; returns immediately."""
        with self.lock:
            self._asked = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="copy", daemon=True)
                self._thread.start()

    def finish(self, waiting: Callable[[], None] = lambda: None) -> str:
        """Wait for the last copy, and try again if it failed.

        Args:
            waiting: Called every few seconds while waiting.

        Returns:
            Why the store lacks the last checkpoint; "" if it has it.
        """
        for attempt in attempts(_RETRIES):
            if attempt:
                self.wake()
            thread = self._thread
            while thread is not None and thread.is_alive():
                thread.join(timeout=5)
                waiting()
            if not self.error or self._lost:
                break
        if not self.error:
            return ""
        return f"the last checkpoint is only in {self.local}, not in {self.store}: {self.error}"

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self._asked:
                    self._thread = None
                    return
                self._asked = False
            if not self._lost:
                self._try()

    def _try(self) -> None:
        try:
            self._copy()
        except Exception as error:  # of the store or the disk: training continues whatever it is
            self.error = " ".join(str(error).split())
            self.failures += 1
            if self._lost:
                log.error("%s; checkpoints are written only to %s", self.error, self.local)
            elif self.failures < FAILURES:
                log.warning("%s: the last checkpoint could not be copied (%s); trying again", self.store, self.error)
            elif self.failures == FAILURES:
                log.error(
                    "%s: copying a checkpoint failed %d times in a row (%s); training continues, and its checkpoints are only "
                    "in %s until the store takes them again",
                    self.store,
                    FAILURES,
                    self.error,
                    self.local,
                )
            return
        finally:
            with self.lock:
                self.holding = frozenset()
        if self.failures >= FAILURES:
            log.warning("%s accepts checkpoints again and has the latest one", self.store)
        self.failures, self.error = 0, ""

    def _copy(self) -> None:
        with self.lock:
            self.holding = frozenset(path.name for _, path in checkpoint.seen(self.local))
        last = checkpoint.latest(self.local)
        if last is None:
            return
        best = best_of(self.local) if self.best else None
        names = dict.fromkeys([last.name] + ([str(best["checkpoint"])] if best else []))
        with self.lock:
            self.holding = frozenset(names)
        for name in names:
            self._check_owner()
            self._upload(name)
        self._check_owner()
        if best:
            self.store.folder.write(BEST, as_json(best))
        self._remove(images_of(last.name) or 0, str(best["checkpoint"]) if best else None)

    def _check_owner(self) -> None:
        """Raise StageError if another run owns the store now, because this one could not renew its mark for long."""
        found = lease_mark(self.store.folder) if self.store.owner else None
        if found is not None and found != self.store.owner:
            self._lost = True
            raise StageError(f"{self.store} has been taken over by another run")

    def _upload(self, name: str) -> None:
        folder, mark = self.store.folder, f"{name}/{checkpoint.STATE}"
        state = (self.local / mark).read_bytes()
        with contextlib.suppress(FileNotFoundError):
            if folder.read(mark) == state:
                return
            folder.remove(mark)  # of the same name, but trained otherwise: from here on it counts as half-written
        for file in json.loads(state)["files"]:
            with open(self.local / name / file, "rb") as source:
                mapped: Any = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
                folder.write(f"{name}/{file}", mapped)
        self._before()
        folder.write(mark, state)

    def _remove(self, images: int, best: str | None) -> None:
        """Remove what is not kept: older ones, half-written ones, and newer ones, which were skipped when resuming."""
        kept = [name for seen, name in seen(self.store.folder) if seen <= images][: self.keep]
        for name in folders(self.store.folder):
            if name not in kept and name != best:
                self.store.folder.remove(
                    f"{name}/{checkpoint.STATE}"
                )  # first, so that the rest no longer counts as a checkpoint
                self.store.folder.drop(name)
