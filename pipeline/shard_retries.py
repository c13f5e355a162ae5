"""A shard that cannot be read while training runs: tried again, then one clear end. No row is ever left out.

A network disk that is away for seconds costs nothing but the wait. What still cannot be read then ends the worker, and
with it the group, which Ray starts anew; before anything is trained again the same rows are read once more, and where
that fails the run ends with the file's name: starting anew again and again would not bring it back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.layout import ShardError
from pipeline.shards import ShardSet, read_group
from pipeline.stage import write_json

PAUSES = (1.0, 4.0, 15.0)  # seconds before rows are read again
NOTE = ".unreadable.json"  # in the stage's folder: what a worker could not read
_REMEDY = "put the file back and call the same command again, which goes on from the last checkpoint"

_log = logging.getLogger(__name__)
_warned: set[str] = set()  # files


class UnreadableError(ShardError):
    """Rows that could not be read, again and again: one line."""

    def __init__(self, message: str, name: str, group: int, levels: Sequence[int]) -> None:
        super().__init__(message, name, group, levels)  # so that it can be pickled
        self.message = message
        self.place = {"name": name, "group": group, "levels": list(levels)}

    def __str__(self) -> str:
        return self.message


def read_patiently(shards: ShardSet, name: str, group: int, levels: Sequence[int], ended: threading.Event) -> Any:
    """`read_group`, tried again after pauses, unless `ended`. Raises UnreadableError."""
    for pause in (*PAUSES, None):
        try:
            return read_group(shards, name, group, levels)
        except ShardError as error:
            if pause is None or ended.is_set():
                raise UnreadableError(str(error), name, group, levels) from None
            if name not in _warned:
                _warned.add(name)
                _log.warning("%s; it is tried again for %.0f s", error, sum(PAUSES))
        ended.wait(pause)
    raise AssertionError


def note(folder: Path, error: UnreadableError) -> None:
    """Remember, for the workers that are started anew, what could not be read."""
    with contextlib.suppress(OSError):
        write_json(folder / NOTE, error.place)


def forget(folder: Path) -> None:
    """A new call of the stage begins without such a note."""
    with contextlib.suppress(OSError):
        (folder / NOTE).unlink(missing_ok=True)


def still_unreadable(folder: Path, shards: str) -> str:
    """Why rows that could not be read before still cannot; nothing where they can, or where there were none."""
    try:
        noted = json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return ""
    try:
        read_group(ShardSet.open(shards), noted["name"], noted["group"], noted["levels"])
    except StageError as error:  # also of a store that does not answer
        return f"{error}; {_REMEDY}"
    forget(folder)
    return ""
