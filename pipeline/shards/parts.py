"""A part of a merged shard set: what its rows and labels are in the whole set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.shards.errors import ShardError


@dataclass(frozen=True, eq=False)
class Part:
    """One of the shard sets that a merged set consists of.

    Attributes:
        row_offset: What is added to its row numbers, so that those of all parts differ.
        labels: Class index in the merged set of each of its own classes, and at the end -1 for no class; None if
            it is unlabelled.
    """

    row_offset: int
    labels: np.ndarray | None  # (classes + 1,), int32

    @classmethod
    def of(cls, entry: Mapping[str, Any], classes: list[str] | None) -> Part:
        """The part that an entry of the manifest describes.

        Args:
            entry: `row_offset` and `labels`.
            classes: Class names of the merged set.
        """
        labels = entry["labels"]
        assert (labels is None) == (classes is None), entry
        assert all(0 <= label < len(classes or ()) for label in labels or ()), entry
        return cls(int(entry["row_offset"]), None if labels is None else np.array([*labels, -1], np.int32))

    def numbered(self, table: pa.Table, shown: str) -> pa.Table:
        """Rows of the part as rows of the merged set.

        Args:
            table: Rows with any columns of a shard.
            shown: The shard, for messages.

        Raises:
            ShardError: There are labels that the part has no class for.
        """
        if "row" in table.column_names:
            table = _with(table, "row", table.column("row").to_numpy() + self.row_offset)
        if self.labels is not None and "label" in table.column_names:
            own, classes = table.column("label").to_numpy(), len(self.labels) - 1
            if own.size and not -1 <= own.min() <= own.max() < classes:
                raise ShardError(
                    f"{shown} has labels from {own.min()} to {own.max()}, but its part has {classes} classes"
                )
            table = _with(table, "label", self.labels[own])
        return table


def _with(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values))
