"""Errors of shard sets, each with a message of one line."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import SettingError, StageError


class ShardError(StageError):
    """A shard set is missing, damaged or of another format."""


class NoShardSetError(ShardError, SettingError):
    """What `shards` or `out` names does not exist or is something else: a mistake in the settings."""


class UnreadableError(ShardError):
    """A row group could not be read, even after several attempts.

    Attributes:
        message: The error of the last attempt.
        place: `name` of the shard, number of the row `group` and `levels`: the arguments of `read_group`.
    """

    def __init__(self, message: str, name: str, group: int, levels: Sequence[int]) -> None:
        super().__init__(message, name, group, levels)  # all arguments, so that it can be pickled
        self.message = message
        self.place = {"name": name, "group": group, "levels": list(levels)}

    def __str__(self) -> str:
        return self.message
