"""Square windows of stored images, as coefficients or as 8-bit pixels.

Dimensions: B rows, C channels, K bands, h × w cells of a level's window, H × W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.shards.pages import concatenated
from pipeline.shards.row_groups import Group
from pipeline.shards.shard_set import ShardSet
from wavemim.integer_haar import HaarPixels


class PixelWindows:
    """Reconstructs windows of rows as 8-bit pixels (Haar only). Each thread has a transform, which reuses memory."""

    def __init__(self, shards: ShardSet, levels: Sequence[int], window: int) -> None:
        self._channels, self._side = shards.channels, window >> (levels[0] - 1)
        self._steps = {level: shards.steps[level] for level in levels}
        self._window = window
        self._own = threading.local()

    def __call__(self, sources: list[tuple[Group, int]], corners: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        """Reconstruct windows.

        Args:
            sources: (row group, row in it) of B rows.
            corners: Top and left of each window (B, 2), in pixels of the stored image.
            mirrored: Whether each window is mirrored horizontally (B,), bool.

        Returns:
            Pixels (B, C, H, W), uint8.
        """
        if not hasattr(self._own, "transform"):
            self._own.transform = HaarPixels(self._channels, self._window, self._steps)
        images = np.empty((len(sources), self._channels, self._side, self._side), np.uint8)
        for b, ((_, _, pyramid), i) in enumerate(sources):
            top, left = corners[b].tolist()
            cut = {}
            for level in self._steps:
                rows, columns = (slice(at >> level, (at + self._window) >> level) for at in (top, left))
                cut[level] = pyramid[level][i, :, :, rows, columns]
            self._own.transform(cut, out=images[b])
            if mirrored[b]:
                reverse_columns(images[b].copy(), images[b])
        return torch.from_numpy(images)


def gathered(
    shards: ShardSet, sources: Sequence[tuple[Group, int]], levels: Sequence[int], corner: int, window: int
) -> dict[int, torch.Tensor]:
    """Copy the same window of several rows into the memory of a batch.

    Args:
        shards: The shard set.
        sources: (row group, row in it) of B rows.
        levels: The levels.
        corner: Top and left of the windows, in pixels of the stored image, a multiple of 2^levels.
        window: Side of the windows in pixels of the stored image.

    Returns:
        Stored integers (B, C, K, h, w) of each level.
    """
    out: dict[int, torch.Tensor] = {}
    for level in levels:
        cells = slice(corner >> level, (corner + window) >> level)
        parts = [pyramid[level][i : i + 1, :, :, cells, cells] for (_, _, pyramid), i in sources]
        out[level] = torch.from_numpy(concatenated(parts))
    return out


def reverse_columns(values: np.ndarray, out: np.ndarray) -> None:
    """Copy bytes (..., w) with their columns reversed, as whole words: NumPy reverses single ones at a third of the speed."""
    width = values.shape[-1]
    word = next((word for word in (np.uint64, np.uint32) if width % np.dtype(word).itemsize == 0), None)
    if word is None:
        np.copyto(out, values[..., ::-1])
        return
    other = np.dtype(word).newbyteorder()  # copied into the order of the machine, a word is reversed
    np.copyto(out.view(word), values.view(other)[..., ::-1])


def checked_levels(shards: ShardSet, finest: int, window: int) -> list[int]:
    """The levels from `finest` to the coarsest. The window has to be a whole number of cells at all of them."""
    assert 1 <= finest <= shards.levels, (finest, shards.levels)
    assert 0 < window <= shards.image_size and window % 2**shards.levels == 0, (window, shards.image_size)
    return list(range(finest, shards.levels + 1))
