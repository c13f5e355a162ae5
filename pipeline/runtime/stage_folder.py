"""A stage's folder: one owner at a time, the settings it was made with, and a mark that the work is finished.

The folder holds ``settings.json``, which is written first and says what decides its content, and a finishing mark
(``result.json`` for most stages), which is written last. Without the mark nothing in the folder counts as complete: the
same command resumes or starts over.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, differences
from pipeline.errors import SettingError, StageError
from pipeline.storage.folder import Folder
from pipeline.storage.locks import claimed, owned
from pipeline.storage.mirror import Mirror, mirrored

log = logging.getLogger(__name__)

SETTINGS = "settings.json"


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder while this process owns it."""

    folder: Folder
    mark: str  # name of the finishing mark
    state: str  # how it was found: "new", "unfinished" or "finished"
    mirror: Mirror | None = None  # of the folder in a store of which it is a copy

    @property
    def path(self) -> Path:
        """Its path, for stages that only write to local folders."""
        assert self.folder.local is not None, str(self.folder)
        return self.folder.local

    @property
    def finished(self) -> bool:
        """Whether an earlier call finished this work, with the same settings."""
        return self.state == "finished"

    def clear(self) -> None:
        """Remove what an unfinished call left, except the settings and hidden files (which MLflow run it was)."""
        for entry in self.path.iterdir():
            if entry.name != SETTINGS and not entry.name.startswith("."):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the finishing mark."""
        self.folder.write(self.mark, as_json(result))

    def changed(self) -> None:
        """Report that something was written that must not be lost: it is copied to the store at once, if there is one."""
        if self.mirror is not None:
            self.mirror.wake()

    def result(self) -> dict[str, Any]:
        """Content of the finishing mark."""
        return _read(self.folder, self.mark)


@contextlib.contextmanager
def stage_folder(
    where: Path | str,
    identity: Mapping[str, Any],
    *,
    restart: bool = False,
    mark: str = "result.json",
    changeable: Set[str] = frozenset(),
    force: bool = False,
    home: str | None = None,
    lease: Path | None = None,
    left_out: Collection[str] = (),
    work: Collection[str] | None = None,
) -> Iterator[StageFolder]:
    """Own a stage's folder while the block runs.

    Args:
        where: A path or URL.
        identity: The settings that decide the folder's content.
        home: URL of the folder in a store of which `where`, a path, is this machine's copy (`pipeline.storage.mirror`).
        left_out: Patterns of paths in the folder that are not copied to `home` with the others, as of `Mirror`.
        lease: For a URL: a local file that only this process uses, to recognise the mark of an earlier process.
        work: Patterns of names in the folder that are worth keeping. A folder without any, left by a call that failed early, is
            emptied where the settings differ: they may have been the mistake. None: all is worth keeping.
        restart: Whether to empty a folder that holds something.
        mark: Name of the finishing mark.
        changeable: Names of settings that may change on resume.
        force: Whether to resume although settings in `changeable` differ: the work then counts as unfinished, with these
            settings.

    Yields:
        The folder, with its settings written.

    Raises:
        SettingError: The folder holds work of other settings, or was not made by this stage.
        StageError: Another process owns it, a store does not answer, or it lacks something at the end.
    """
    folder = Folder.at(where)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(folder, "a stage", lease=lease) if lease is not None else owned(folder, "a stage"))
        mirror = None
        if home is not None and folder.local is not None:
            mirror = stack.enter_context(mirrored(Folder.at(home), folder.local, left_out=left_out))
        kept = work if home is None else None  # the store may have what this machine's copy lacks
        opened = replace(_open(folder, identity, restart, mark, changeable, force, kept), mirror=mirror)
        if mirror is not None and restart:
            mirror.clear()
        opened.changed()
        yield opened


@contextlib.contextmanager
def journal_at_home(recipe: Recipe, stage: str) -> Iterator[None]:
    """Own and mirror the folder of a stage whose results are elsewhere, while the block runs; a local one is left as it is."""
    if (home := recipe.stage_home(stage)) is None:
        yield
        return
    local = recipe.stage_dir(stage)
    with owned(Folder.at(local), "a stage"), mirrored(Folder.at(home), local):
        yield


def _open(
    folder: Folder,
    identity: Mapping[str, Any],
    restart: bool,
    mark: str,
    changeable: Set[str],
    force: bool,
    work: Collection[str] | None,
) -> StageFolder:
    state = "new"
    if _holds_something(folder):
        if folder.size(SETTINGS) is None:
            raise SettingError(f"{folder} is not empty and was not made by a stage; give another out= or name=")
        known = _read(folder, SETTINGS)
        changed = differences(known, identity)
        if not known.keys() & identity.keys():  # somebody else's settings.json
            raise SettingError(f"{folder} is not empty and was not made by this stage; give another out= or name=")
        if restart or (changed and _failed_early(folder, mark, work)):
            folder.clear()
        elif changed:
            allowed = all(line.partition(":")[0] in changeable for line in changed)
            if allowed and force:
                log.warning("%s: resuming with changed settings: %s", folder, "; ".join(changed))
                folder.remove(mark)
                folder.write(SETTINGS, as_json(identity))
                return StageFolder(folder, mark, "unfinished")
            other = ", resume with the new settings with force=true," if allowed else ","
            more = "; …" if len(changed) > 4 else ""
            raise SettingError(
                f"{folder} holds the work of other settings ({'; '.join(changed[:4])}{more}); "
                f"give another name= or out={other} or replace it with restart=true"
            )
        else:
            state = "finished" if folder.size(mark) is not None else "unfinished"
    if folder.local is not None:
        folder.local.mkdir(parents=True, exist_ok=True)
    if state == "new":
        folder.write(SETTINGS, as_json(identity))
    return StageFolder(folder, mark, state)


def _failed_early(folder: Folder, mark: str, work: Collection[str] | None) -> bool:
    """Whether the stage's folder holds nothing that is worth keeping."""
    if work is None or folder.size(mark) is not None:
        return False
    return not any(fnmatch.fnmatch(name, each) for name in (*folder.names(), *folder.folders()) for each in work)


def _holds_something(folder: Folder) -> bool:
    if folder.local is not None:  # folders count too, even empty ones
        return folder.local.is_dir() and any(not entry.name.startswith(".") for entry in folder.local.iterdir())
    return next(folder.walk(), None) is not None


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON in the form of all files of stages."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _read(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError) as error:
        raise StageError(f"{folder.shown(name)} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise StageError(f"{folder.shown(name)} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; a reader sees either the old content or all of the new one."""
    Folder.at(path.parent).write(path.name, as_json(content))
