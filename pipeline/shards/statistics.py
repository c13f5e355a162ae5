"""Mean and standard deviation of each level and band of a shard set, from sums that can be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.shards.layout import Layout, band_names

_EXACT_IN_FLOAT32 = 2**24
_AT_ONCE = 2**17  # integers whose sums are computed in one go: more would not fit in the cache


class Moments:
    """Sums and sums of squares of coefficients per level, band and channel, over any number of images.

    For Haar, they are exact sums of the stored integers. Since the transform is orthonormal, those of A at finer levels
    and of the pixels follow: the energy is that of all coarser bands together, the mean that of the coarsest A. For
    other wavelets, all four bands of each level, and the pixels, are summed in float64 before quantisation.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.images = 0
        kind: Any = np.int64 if layout.windows else np.float64
        shapes = {level: (layout.channels, len(band_names(layout, level))) for level in layout.steps}
        # For this process, 64 bits are enough for millions of images. Merged sums are Python integers, without a bound.
        self._sums = {level: np.zeros(shape, kind) for level, shape in shapes.items()}
        self._squares = {level: np.zeros(shape, kind) for level, shape in shapes.items()}
        self._merged: list[Mapping[str, Any]] = []
        self._pixels = np.zeros((2, layout.channels), np.int64)

    def add_stored(self, stored: Mapping[int, np.ndarray]) -> None:
        """Add n images by their stored integers (n, C, K, h, w) of each level; Haar only."""
        self.images += len(stored[1])
        for level, images in stored.items():
            count = max(1, _AT_ONCE // images[0].size)
            for first in range(0, len(images), count):
                total, squares = _exact_sums(images[first : first + count])
                self._sums[level] += total
                self._squares[level] += squares

    def add_found(self, found: Mapping[int, np.ndarray], image: np.ndarray) -> None:
        """Add an image (C, H, W), uint8, with its transform by `PyramidEncoder.analyse`; wavelets other than Haar."""
        self.images += 1
        for level, values in found.items():
            wide = values.astype(np.float64)
            self._sums[level] += wide.sum((-2, -1))
            self._squares[level] += np.einsum("ckhw,ckhw->ck", wide, wide)
        pixels = image.astype(np.int64)
        self._pixels[0] += pixels.sum((-2, -1))
        self._pixels[1] += np.square(pixels).sum((-2, -1))

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the `state` of other moments."""
        self.images += state["images"]
        self._merged.append(state)

    def state(self) -> dict[str, Any]:
        """Everything as JSON values, for `merge`."""
        return {
            "images": self.images,
            "pixels": self._total("pixels", self._pixels).tolist(),
            "sums": {str(level): self._total("sums", values, level).tolist() for level, values in self._sums.items()},
            "squares": {
                str(level): self._total("squares", values, level).tolist() for level, values in self._squares.items()
            },
        }

    def _total(self, what: str, own: np.ndarray, level: int | None = None) -> np.ndarray:
        """The sum of the numbers of this process and all merged ones, as Python numbers."""
        total = own.astype(object)
        for state in self._merged:
            total = total + np.array(state[what] if level is None else state[what][str(level)], object)
        return total

    def statistics(self) -> dict[str, Any]:
        """{"levels": {level: {band: {"mean", "std"}}}, "pixels": {"mean", "std"}}, each a number per channel."""
        sums = {level: self._total("sums", values, level) for level, values in self._sums.items()}
        squares = {level: self._total("squares", values, level) for level, values in self._squares.items()}
        return self._of_haar(sums, squares) if self.layout.windows else self._of_others(sums, squares)

    def _of_haar(self, sums: dict[int, np.ndarray], squares: dict[int, np.ndarray]) -> dict[str, Any]:
        coarsest, steps = self.layout.levels, self.layout.steps
        pixel_sum = sums[coarsest][:, 0] * (steps[coarsest] * 2**coarsest)  # an A is 2^level times a mean of pixels
        energy = squares[coarsest][:, 0] * steps[coarsest] ** 2
        levels: dict[str, Any] = {}
        for level in range(coarsest, 0, -1):
            bands = {"A": _mean_std(pixel_sum / 2**level, energy, self._cells(level))}
            for band in "HVD":
                index = band_names(self.layout, level).index(band)
                of_band = squares[level][:, index] * steps[level] ** 2
                bands[band] = _mean_std(sums[level][:, index] * steps[level], of_band, self._cells(level))
                energy = energy + of_band
            levels[str(level)] = bands
        return {"levels": dict(sorted(levels.items())), "pixels": _mean_std(pixel_sum, energy, self._cells(0))}

    def _of_others(self, sums: dict[int, np.ndarray], squares: dict[int, np.ndarray]) -> dict[str, Any]:
        levels = {
            str(level): {
                band: _mean_std(sums[level][:, index], squares[level][:, index], self._cells(level))
                for index, band in enumerate(band_names(self.layout, level))
            }
            for level in self.layout.steps
        }
        pixel_sum, energy = self._total("pixels", self._pixels)
        return {"levels": levels, "pixels": _mean_std(pixel_sum, energy, self._cells(0))}

    def _cells(self, level: int) -> int:
        return self.images * (self.layout.image_size >> level) ** 2


def pooled(images: Sequence[int], statistics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics of several sets together.

    Args:
        images: Number of train images of each set.
        statistics: `Moments.statistics` of each set, of the same layout.

    Returns:
        `Moments.statistics` of all these images, except for rounding errors.
    """
    weights = np.asarray(images, np.float64) / sum(images)

    def of(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
        means, stds = (np.array([part[which] for part in parts]) for which in ("mean", "std"))
        mean = weights @ means
        return {"mean": mean.tolist(), "std": np.sqrt(weights @ (stds**2 + (means - mean) ** 2)).tolist()}

    levels = {
        level: {band: of([part["levels"][level][band] for part in statistics]) for band in bands}
        for level, bands in statistics[0]["levels"].items()
    }
    return {"levels": levels, "pixels": of([part["pixels"] for part in statistics])}


def _exact_sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact sums and sums of squares (C, K), int64, of integers (n, C, K, h, w).

    Computed by products of float32 blocks, so short that all sums are exact in float32. This is several times faster
    than integer arithmetic in NumPy.
    """
    shape, cells = values.shape[:3], values.shape[-2] * values.shape[-1]
    block = cells
    if values.dtype.itemsize == 1:
        while block % 2 == 0 and block * 128**2 > _EXACT_IN_FLOAT32:
            block //= 2
    if values.dtype.itemsize > 1 or block * 128**2 > _EXACT_IN_FLOAT32:  # float64 is exact for any whole image
        blocks: Any = values.reshape(-1, cells).astype(np.float64)
    else:
        blocks = values.reshape(-1, block).astype(np.float32)
    squares = np.vecdot(blocks, blocks)
    totals = blocks @ np.ones(blocks.shape[-1], blocks.dtype)
    found = [part.astype(np.int64).reshape(*shape, -1).sum((0, 3)) for part in (totals, squares)]
    return found[0], found[1]


def _mean_std(total: np.ndarray, squares: np.ndarray, count: int) -> dict[str, list[float]]:
    mean = np.asarray(total / count, np.float64)
    variance = np.asarray(squares / count, np.float64) - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}
