"""Haar pyramids of 8-bit images in integer arithmetic on the CPU: exact, and several times faster than floats.

Both directions reuse their intermediate arrays between calls, because new memory costs as much as the arithmetic.
Results are valid until the next call. The transform is that of `wavemim.wavelets` for ``haar``.

Legend: C channels, H = W pixels per side, K bands, h·w cells of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from wavemim.wavelets import check_levels

# The largest sum of level ℓ is 255 · 4^ℓ, which fits 16 bits up to level 3.
_LAST_LEVEL_OF_16_BITS = 3
_LARGEST_FRACTION_16, _LARGEST_FRACTION_32 = 6, 20


def sums_dtype(level: int) -> Any:
    """The integer type of the sums at a level."""
    return np.int16 if level <= _LAST_LEVEL_OF_16_BITS else np.int32


class HaarSums:
    """The forward transform: unscaled sums as of `wavemim.wavelets.haar_sums`, coefficient = sum / 2^level."""

    def __init__(self, channels: int, size: int, levels: int, *, first: int = 1) -> None:
        """Allocate the arrays.

        Args:
            channels: C; of several images together, if they are transformed in one call.
            size: H = W of the image, in pixels.
            levels: Levels of the pyramid.
            first: The finest level to compute. Above 1 the transform goes on from the sums A of the level before.

        Raises:
            ValueError: If `size` is not a multiple of 2^levels.
        """
        check_levels(size, size, levels)
        self.levels, self.first = levels, first
        self._even: list[np.ndarray] = []
        self._odd: list[np.ndarray] = []
        self._difference: list[np.ndarray] = []
        self._a: list[np.ndarray] = []
        self._out: dict[int, np.ndarray] = {}
        for level in range(first, levels + 1):
            side = size >> level
            kind = sums_dtype(level)
            for part in (self._even, self._odd, self._difference):
                part.append(np.empty((channels, 2 * side, side), kind))
            bands = 4 if level == levels else 3
            self._out[level] = np.empty((channels, bands, side, side), kind)
            self._a.append(self._out[level][:, 0] if bands == 4 else np.empty((channels, side, side), kind))

    def __call__(self, image: np.ndarray) -> dict[int, np.ndarray]:
        """Transform an image.

        Args:
            image: uint8 (C, H, W), contiguous; with `first` above 1, A of the level before, of `sums_dtype`.

        Returns:
            Sums {level: (C, K, h, w)} from `first`, of `sums_dtype`. Valid until the next call.
        """
        assert image.dtype == (np.uint8 if self.first == 1 else sums_dtype(self.first - 1)), image.dtype
        assert image.flags.c_contiguous, image.strides
        finer = image
        for number, level in enumerate(range(self.first, self.levels + 1)):
            even, odd, coarser = self._even[number], self._odd[number], self._a[number]
            if level == 1:  # two pixels form a 16-bit word; splitting words is faster than strided bytes
                words: Any = finer.view("<u2")
                np.bitwise_and(words, 255, out=even.view(np.uint16))
                np.right_shift(words, 8, out=odd.view(np.uint16))
            elif even.dtype == np.int16:
                words = finer.view("<i4")
                np.copyto(even, words, casting="unsafe")  # the low half
                np.copyto(odd, words >> 16, casting="unsafe")
            else:
                even[...] = finer[..., 0::2]
                odd[...] = finer[..., 1::2]
            difference = np.subtract(even, odd, out=self._difference[number])
            total = np.add(even, odd, out=even)
            details = self._out[level][:, -3:]
            np.subtract(total[:, 0::2], total[:, 1::2], out=details[:, 0])
            np.add(difference[:, 0::2], difference[:, 1::2], out=details[:, 1])
            np.subtract(difference[:, 0::2], difference[:, 1::2], out=details[:, 2])
            finer = np.add(total[:, 0::2], total[:, 1::2], out=coarser)
        return self._out


class HaarPixels:
    """The inverse transform: the 8-bit image of a stored pyramid, exact up to the final rounding to whole pixels.

    It works on A / 2^level, the mean of a cell's pixels, in fixed point: the next finer level is A ± H ± V ± D, without
    a division. The number of fractional bits is chosen so that every stored integer is exact; for quantisation steps
    that do not allow this (such as 0.3), each coefficient is rounded once to 1/64 of a pixel value.
    """

    def __init__(self, channels: int, size: int, steps: Mapping[int, float]) -> None:
        """Allocate the arrays.

        Args:
            channels: C.
            size: H = W of the (cropped) image at full resolution, in pixels.
            steps: {level: quantisation step} of all levels that are read, in coefficient units.

        Raises:
            ValueError: If `size` is not a multiple of 2^level of the coarsest level.
        """
        self.finest, self.coarsest = min(steps), max(steps)
        assert sorted(steps) == list(range(self.finest, self.coarsest + 1)), steps
        check_levels(size, size, self.coarsest)
        exact = max(_fraction_bits(step / 2**level) for level, step in steps.items())
        self.bits = exact if exact <= _LARGEST_FRACTION_32 else _LARGEST_FRACTION_16
        kind = np.int16 if self.bits <= _LARGEST_FRACTION_16 else np.int32
        self._factors = {level: step * 2**self.bits / 2**level for level, step in steps.items()}
        self._scaled, self._finer, self._planes = {}, {}, {}
        for level in steps:
            side = size >> level
            self._scaled[level] = np.empty((channels, 4 if level == self.coarsest else 3, side, side), kind)
            self._planes[level] = np.empty((6, channels, side, side), kind)
            if level > self.finest:
                self._finer[level] = np.empty((channels, 2 * side, 2 * side), kind)
        self._shape = (channels, size >> (self.finest - 1), size >> (self.finest - 1))

    def __call__(self, stored: Mapping[int, np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
        """Reconstruct an image.

        Without the finest levels the image is smaller: H = size / 2^(finest - 1), of box-averaged pixels.

        Args:
            stored: Integers {level: (C, K, h, w)}.
            out: uint8 (C, H, W), contiguous; where to write the image. None: a new array.

        Returns:
            uint8 (C, H, W).
        """
        mean: Any = None
        for level in range(self.coarsest, self.finest - 1, -1):
            scaled, factor = self._scaled[level], self._factors[level]
            if factor == int(factor):
                np.copyto(scaled, stored[level], casting="unsafe")
                scaled *= scaled.dtype.type(int(factor))
            else:
                scaled[...] = np.rint(stored[level] * np.float32(factor))
            if mean is None:
                mean = scaled[:, 0]
                mean += (1 << self.bits) >> 1  # rounds every pixel of the cell: each is this mean plus details
            planes = self._quarters(level, mean, scaled[:, -3], scaled[:, -2], scaled[:, -1])
            if level > self.finest:
                mean = self._finer[level]
                for number, plane in enumerate(planes):
                    mean[:, number // 2 :: 2, number % 2 :: 2] = plane
        out = np.empty(self._shape, np.uint8) if out is None else out
        assert out.shape == self._shape and out.flags.c_contiguous, (out.shape, self._shape)
        planes >>= self.bits
        np.clip(planes, 0, 255, out=planes)
        words = out.view("<u2")  # two pixels at a time: joining words is faster than strided bytes
        for row in range(2):
            right = np.left_shift(planes[2 * row + 1], 8, out=planes[2 * row + 1])
            np.copyto(words[:, row::2], np.bitwise_or(planes[2 * row], right, out=right), casting="unsafe")
        return out

    def _quarters(self, level: int, a: np.ndarray, h: np.ndarray, v: np.ndarray, d: np.ndarray) -> np.ndarray:
        """The four pixels of each cell, (4, C, h, w): top left, top right, bottom left, bottom right."""
        planes = self._planes[level]
        top, bottom = np.add(a, h, out=planes[4]), np.subtract(a, h, out=planes[5])
        v_top, v_bottom = np.add(v, d, out=planes[0]), np.subtract(v, d, out=planes[2])
        np.subtract(top, v_top, out=planes[1])
        np.add(top, v_top, out=planes[0])
        np.subtract(bottom, v_bottom, out=planes[3])
        np.add(bottom, v_bottom, out=planes[2])
        return planes[:4]


def _fraction_bits(value: float) -> int:
    """Fractional bits that `value` needs in binary."""
    return Fraction(value).denominator.bit_length() - 1
