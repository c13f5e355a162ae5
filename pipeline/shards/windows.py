"""Square windows of stored images, as coefficients or as 8-bit pixels.

Dimensions: B rows, C channels, K bands, h × w cells of a level's window, H × W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.shards.row_groups import Group
from pipeline.shards.shard_set import ShardSet
from wavemim.inputs import Crop
from wavemim.integer_haar import HaarPixels
from wavemim.wavelets import bands_of


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


def cut_windows(
    shards: ShardSet,
    sources: list[tuple[Group, int]],
    levels: Sequence[int],
    corners: np.ndarray,
    window: int,
    mirrored: np.ndarray,
) -> tuple[dict[int, torch.Tensor], Crop | None]:
    """Cut windows from the coefficients of rows.

    As `wavemim.wavelets.window`, but directly into the memory of the batch: mirroring reverses the columns and changes
    the signs of V and D. For wavelets that do not allow this, whole levels are returned, and the windows to be cut.
    Not with torch, which would start its own threads in each thread of the reader.

    Args:
        shards: The shard set.
        sources: (row group, row in it) of B rows.
        levels: The levels.
        corners: Top and left of each window (B, 2), in pixels of the stored image.
        window: Side of the windows in pixels of the stored image.
        mirrored: Whether each window is mirrored horizontally (B,), bool.

    Returns:
        Stored integers (B, C, K, h, w) of each level, and the windows still to be cut, None if they are cut.
    """
    whole = not shards.layout.windows
    out: dict[int, torch.Tensor] = {}
    for level in levels:
        side = (shards.image_size if whole else window) >> level
        cells = (0 * corners if whole else corners >> level).tolist()
        shape = (len(sources), shards.channels, len(bands_of(level, shards.levels)), side, side)
        values = np.empty(shape, shards.layout.dtype(level))
        for b, ((_, _, pyramid), i) in enumerate(sources):
            top, left = cells[b]
            cut = pyramid[level][i, :, :, top : top + side, left : left + side]
            if mirrored[b] and not whole:
                reverse_columns(cut, values[b])
                np.negative(values[b, :, -2:], out=values[b, :, -2:])
            else:
                np.copyto(values[b], cut)
        out[level] = torch.from_numpy(values)
    crop = Crop(torch.from_numpy(corners.copy()), torch.from_numpy(mirrored.copy()), window) if whole else None
    return out, crop


def reverse_columns(values: np.ndarray, out: np.ndarray) -> None:
    """Copy an array (..., w) with its columns reversed, bytes as whole words: NumPy reverses single ones at a third of the speed."""
    width = values.shape[-1]
    word = next((word for word in (np.uint64, np.uint32) if width % np.dtype(word).itemsize == 0), None)
    if word is None or values.itemsize > 1:
        np.copyto(out, values[..., ::-1])
        return
    words = out.view(word)
    np.copyto(words, values.view(word)[..., ::-1])
    words.byteswap(inplace=True)


def checked_levels(shards: ShardSet, finest: int, window: int) -> list[int]:
    """The levels from `finest` to the coarsest. The window has to be a whole number of cells at all of them."""
    assert 1 <= finest <= shards.levels, (finest, shards.levels)
    assert 0 < window <= shards.image_size and window % 2**shards.levels == 0, (window, shards.image_size)
    return list(range(finest, shards.levels + 1))
