"""Square windows of stored images: cut from the coefficients, or as 8-bit pixels.

Letters of shapes: B rows, C channels, K bands, h × w cells of a level's window, H × W pixels.
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
    """Windows as 8-bit images, straight from the row groups; one transform a thread, since it keeps its arrays."""

    def __init__(self, shards: ShardSet, levels: Sequence[int], window: int) -> None:
        self._channels, self._side = shards.channels, window >> (levels[0] - 1)
        self._steps = {level: shards.steps[level] for level in levels}
        self._window = window
        self._own = threading.local()

    def __call__(self, sources: list[tuple[Group, int]], corners: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        """uint8 (B, C, H, W) of the rows `sources`, with corners (B, 2) in pixels of level 0 and mirrored (B,)."""
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
                images[b] = images[b, ..., ::-1].copy()
        return torch.from_numpy(images)


def cut_windows(
    shards: ShardSet,
    sources: list[tuple[Group, int]],
    levels: Sequence[int],
    corners: np.ndarray,
    window: int,
    mirrored: np.ndarray,
) -> tuple[dict[int, torch.Tensor], Crop | None]:
    """Windows (B, C, K, h, w) a level of the rows `sources`, with corners (B, 2) in pixels and mirrored (B,).

    As `wavemim.wavelets.window`, but straight into the batch's memory: mirroring reverses the columns and changes the
    sign of V and D. Where the wavelet does not allow it: whole levels, and the windows that are to be cut. In numpy
    alone: torch would start its own threads in each of the reader's, and they would wait for each other.
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
                np.copyto(values[b], cut[..., ::-1])
                np.negative(values[b, :, -2:], out=values[b, :, -2:])
            else:
                np.copyto(values[b], cut)
        out[level] = torch.from_numpy(values)
    crop = Crop(torch.from_numpy(corners.copy()), torch.from_numpy(mirrored.copy()), window) if whole else None
    return out, crop


def checked_levels(shards: ShardSet, finest: int, window: int) -> list[int]:
    """Levels that are read from `finest` on; the window has to be an exact crop at all of them."""
    assert 1 <= finest <= shards.levels, (finest, shards.levels)
    assert 0 < window <= shards.image_size and window % 2**shards.levels == 0, (window, shards.image_size)
    return list(range(finest, shards.levels + 1))
