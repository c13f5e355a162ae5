"""What every stage does around its work: one owner a folder, a finishing mark written last, and saying which call it is.

A stage folder holds ``settings.json`` (what decides its content, written first) and a finishing mark (written last).
Without the mark nothing in it counts as whole: the same call continues or starts over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import differences
from pipeline.errors import SettingError, StageError
from pipeline.storage.folder import Folder
from pipeline.storage.locks import owned

__all__ = ["StageError", "StageFolder", "stage_folder", "write_json"]

log = logging.getLogger(__name__)

SETTINGS = "settings.json"


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder while this process owns it."""

    folder: Folder
    mark: str
    state: str  # "new", "unfinished" or "finished", as it was found

    @property
    def path(self) -> Path:
        """Where it is, for stages that write to local folders only."""
        assert self.folder.local is not None, str(self.folder)
        return self.folder.local

    @property
    def finished(self) -> bool:
        """Whether an earlier call finished exactly this work."""
        return self.state == "finished"

    def clear(self) -> None:
        """Remove what an unfinished call left, but for the settings and hidden marks (which MLflow run it was)."""
        for entry in self.path.iterdir():
            if entry.name != SETTINGS and not entry.name.startswith("."):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the finishing mark."""
        self.folder.write(self.mark, as_json(result))

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
) -> Iterator[StageFolder]:
    """Own the folder at a path or URL for the work that `identity` describes.

    Raises SettingError where the folder holds other work (unless `restart`, which empties it, or `force` where only
    settings differ that are `changeable`: then that work is unfinished again, under these settings), and StageError
    where another process owns it.
    """
    folder = Folder.at(where)
    with owned(folder, "a stage"):
        yield _open(folder, identity, restart, mark, changeable, force)


def _open(
    folder: Folder, identity: Mapping[str, Any], restart: bool, mark: str, changeable: Set[str], force: bool
) -> StageFolder:
    state = "new"
    if _holds_something(folder):
        if folder.size(SETTINGS) is None:
            raise SettingError(f"{folder} is not empty and not a folder that a stage made; give another out= or name=")
        known = _read(folder, SETTINGS)
        changed = differences(known, identity)
        if not known.keys() & identity.keys():  # somebody else's settings.json
            raise SettingError(
                f"{folder} is not empty and not a folder that this stage made; give another out= or name="
            )
        if restart:
            folder.clear()
        elif changed:
            allowed = all(line.partition(":")[0] in changeable for line in changed)
            if allowed and force:
                log.warning("%s goes on with other settings: %s", folder, "; ".join(changed))
                folder.remove(mark)
                folder.write(SETTINGS, as_json(identity))
                return StageFolder(folder, mark, "unfinished")
            other = ", go on with them from where it is with force=true," if allowed else ","
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


def _holds_something(folder: Folder) -> bool:
    if folder.local is not None:  # folders count too, also empty ones
        return folder.local.is_dir() and any(not entry.name.startswith(".") for entry in folder.local.iterdir())
    return next(folder.walk(), None) is not None


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON as all files of stages are written."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _read(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError) as error:
        raise StageError(f"{folder.shown(name)} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise StageError(f"{folder.shown(name)} holds no mapping")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that `path` holds either the old content or the whole new one."""
    Folder.at(path.parent).write(path.name, as_json(content))
