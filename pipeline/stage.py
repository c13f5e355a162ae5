"""What every stage does around its work: one owner a folder, a finishing mark written last, and saying which call it is.

A stage folder holds ``settings.json`` (what decides its content, written first) and a finishing mark (written last).
Without the mark nothing in it counts as whole: the same call continues or starts over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import SettingError, differences


class StageError(RuntimeError):
    """A stage cannot go on, for a reason that the user can act on: one line."""


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder while this process owns it."""

    path: Path
    mark: str
    state: str  # "new", "unfinished" or "finished", as it was found

    @property
    def finished(self) -> bool:
        """Whether an earlier call finished exactly this work."""
        return self.state == "finished"

    def clear(self) -> None:
        """Remove what an unfinished call left, but for the settings and hidden marks (which MLflow run it was)."""
        for entry in self.path.iterdir():
            if entry.name != "settings.json" and not entry.name.startswith("."):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the finishing mark."""
        write_json(self.path / self.mark, result)

    def result(self) -> dict[str, Any]:
        """Content of the finishing mark."""
        return read_json(self.path / self.mark)


@contextlib.contextmanager
def stage_folder(
    path: Path, identity: Mapping[str, Any], *, restart: bool = False, mark: str = "result.json"
) -> Iterator[StageFolder]:
    """Own `path` for the work that `identity` describes.

    Raises SettingError where the folder holds other work (unless `restart`, which empties it), and StageError where
    another process owns it. Ownership is a lock that ends with the process, however it ends.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.parent / f".{path.name}.lock"
    with open(lock_path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise StageError(f"{path} is being written by process {owner}; wait for it or give another out=") from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield _open(path, identity, restart, mark)


def _open(path: Path, identity: Mapping[str, Any], restart: bool, mark: str) -> StageFolder:
    state = "new"
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        settings_path = path / "settings.json"
        known = read_json(settings_path) if settings_path.is_file() else None
        if known is None:
            raise SettingError(f"{path} is not empty and not a folder that a stage made; give another out= or name=")
        changed = differences(known, identity)
        if restart:
            shutil.rmtree(path)
        elif changed:
            more = "; …" if len(changed) > 4 else ""
            raise SettingError(
                f"{path} holds the work of other settings ({'; '.join(changed[:4])}{more}); "
                "give another name= or out=, or replace it with restart=true"
            )
        else:
            state = "finished" if (path / mark).is_file() else "unfinished"
    path.mkdir(parents=True, exist_ok=True)
    if state == "new":
        write_json(path / "settings.json", identity)
    return StageFolder(path, mark, state)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that `path` holds either the old content or the whole new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; StageError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise StageError(f"{path} holds no mapping")
    return content
