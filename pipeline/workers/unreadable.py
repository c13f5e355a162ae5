"""Shards that could not be read: noted by the worker that failed, and tried again before training is restarted. No Ray here."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from pipeline.errors import StageError
from pipeline.runtime.stage_folder import write_json
from pipeline.shards.errors import UnreadableError
from pipeline.shards.row_groups import read_group
from pipeline.shards.shard_set import ShardSet

NOTE = ".unreadable.json"  # in the stage's folder
_REMEDY = "restore the file and run the same command again, which resumes from the last checkpoint"


def note(folder: Path, error: UnreadableError) -> None:
    """Record what could not be read, for the workers that are started next."""
    with contextlib.suppress(OSError):
        write_json(folder / NOTE, error.place)


def forget(folder: Path) -> None:
    """Delete that record, at the start of a new call of the stage."""
    with contextlib.suppress(OSError):
        (folder / NOTE).unlink(missing_ok=True)


def still_unreadable(folder: Path, shards: str) -> str:
    """Try to read what could not be read before.

    Args:
        folder: The stage's folder.
        shards: Path or URL of the shard set.

    Returns:
        Why it still cannot be read; nothing if it can, or if all could be read before.
    """
    try:
        noted = json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return ""
    try:
        read_group(ShardSet.open(shards), noted["name"], noted["group"], noted["levels"])
    except StageError as error:  # also of a store that does not respond
        return f"{error}; {_REMEDY}"
    forget(folder)
    return ""
