"""What goes wrong with a shard set, as errors of one line each."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import StageError


class ShardError(StageError):
    """A shard set is missing, damaged or of another format."""


class UnreadableError(ShardError):
    """Rows that could not be read, again and again: one line."""

    def __init__(self, message: str, name: str, group: int, levels: Sequence[int]) -> None:
        super().__init__(message, name, group, levels)  # so that it can be pickled
        self.message = message
        self.place = {"name": name, "group": group, "levels": list(levels)}

    def __str__(self) -> str:
        return self.message
