"""Mixes: rows of several row groups, shuffled together in memory.

Each thread that has read a row group moves its rows to their places in the mix, while they may still be in the processor's
cache. A batch of rows that lie in one mix is then a slice of it.

Dimensions: n rows of a mix, B rows of a batch, C channels, K bands, h × w cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.shards.layout import Layout
from pipeline.shards.pages import concatenated, new_array
from pipeline.shards.row_groups import Group


class Mix:
    """Rows of several row groups in a shuffled order. Read it only after every row group has been put in.

    Attributes:
        content: `row` (n,), `label` (n,), and the stored integers (n, C, K, h, w) of each level.
    """

    def __init__(self, layout: Layout, levels: Sequence[int], order: np.ndarray) -> None:
        """Make room for a mix.

        Args:
            layout: How images are stored.
            levels: The levels.
            order: Which of its rows comes when (n,), a permutation; rows are counted through the row groups in turn.
        """
        self._places = np.argsort(order)
        count = len(order)
        found = {level: new_array((count, *layout.shape(level)), layout.dtype(level)) for level in levels}
        self.content: Group = np.empty(count, np.int64), np.empty(count, np.int64), found

    def put(self, first: int, group: Group, low: int, high: int) -> None:
        """Move rows `low` to `high` of a row group, which are rows from `first` on of the mix, to their places."""
        places = self._places[first : first + high - low]
        for mine, given in zip(self.content[:2], group[:2], strict=True):
            mine[places] = given[low:high]
        for level, values in self.content[2].items():
            values[places] = group[2][level][low:high]  # one call: other threads run Python meanwhile


Span = tuple[Mix, int, int, float]  # rows from the one number to the other, and the weight of each


def joined(spans: Sequence[Span], level: int) -> np.ndarray:
    """The stored integers (B, C, K, h, w) of a level: a view of a single span, a copy of several."""
    parts = [mix.content[2][level][first:last] for mix, first, last, _ in spans]
    return parts[0] if len(parts) == 1 else concatenated(parts)
