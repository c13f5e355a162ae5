"""Mean and standard deviation of every level and band of a shard set, from exact sums that merge in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.shards import Layout
from wavemim.wavelets import bands_of


class Moments:
    """Exact sums and sums of squares of the coefficients, per level, band and channel, over any number of images.

    Only stored bands are summed. The transform is orthonormal, so A of every finer level, and the pixels, follow: their
    energy is that of all coarser bands together, and their mean that of the coarsest A.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.images = 0
        shapes = {level: layout.shape(level)[:2] for level in range(1, layout.levels + 1)}
        # Python integers: squares of deep levels outgrow 64 bits in large sets.
        self.sums = {level: np.zeros(shape, object) for level, shape in shapes.items()}
        self.squares = {level: np.zeros(shape, object) for level, shape in shapes.items()}

    def add(self, sums: Mapping[int, np.ndarray]) -> None:
        """Take in the `haar_sums` (C, K, h, w) of one image."""
        self.images += 1
        for level, values in sums.items():
            self.sums[level] += values.sum((-2, -1), dtype=np.int64).astype(object)
            wide = values.astype(np.int64)
            self.squares[level] += np.einsum("ckhw,ckhw->ck", wide, wide).astype(object)

    def merge(self, state: Mapping[str, Any]) -> None:
        """Take in the `state` of other moments."""
        self.images += state["images"]
        for level in self.sums:
            self.sums[level] += np.array(state["sums"][str(level)], object)
            self.squares[level] += np.array(state["squares"][str(level)], object)

    def state(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "images": self.images,
            "sums": {str(level): values.tolist() for level, values in self.sums.items()},
            "squares": {str(level): values.tolist() for level, values in self.squares.items()},
        }

    def statistics(self) -> dict[str, Any]:
        """{"levels": {level: {band: {"mean", "std"}}}, "pixels": {"mean", "std"}}, each a number per channel."""
        coarsest = self.layout.levels
        scale = {level: 2**level for level in self.sums}
        pixel_sum = self.sums[coarsest][:, 0]  # unscaled A: sums of pixels
        energy = self.squares[coarsest][:, 0] / scale[coarsest] ** 2
        levels: dict[str, Any] = {}
        for level in range(coarsest, 0, -1):
            cells = self.images * (self.layout.image_size // scale[level]) ** 2
            bands = {"A": _mean_std(pixel_sum / scale[level], energy, cells)}
            for band in "HVD":
                index = bands_of(level, coarsest).index(band)
                squares = self.squares[level][:, index] / scale[level] ** 2
                bands[band] = _mean_std(self.sums[level][:, index] / scale[level], squares, cells)
                energy = energy + squares
            levels[str(level)] = bands
        pixels = _mean_std(pixel_sum, energy, self.images * self.layout.image_size**2)
        return {"levels": dict(sorted(levels.items())), "pixels": pixels}


def _mean_std(total: np.ndarray, squares: np.ndarray, count: int) -> dict[str, list[float]]:
    mean = np.asarray(total / count, np.float64)
    variance = np.asarray(squares / count, np.float64) - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}
