"""How an image is stored: its wavelet pyramid as integers, with a column per level. No Ray and no files in here.

Dimensions: n images, C channels, H × W pixels, K bands (H, V, D; at the coarsest level A, H, V, D), h × w cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pywt

from pipeline.shards.errors import ShardError
from wavemim.integer_haar import HaarSums, sums_dtype
from wavemim.wavelets import BANDS, MODE, bands_of, coefficient_bound, is_haar

DIGEST_BYTES = 16  # xxh3_128
# The forward Haar of more bytes of pixels than _LARGE fills the cache. Of what is smaller, up to _TOGETHER images of in all
# _AT_ONCE values are transformed in one call, where else NumPy's calls would take most of the time.
_LARGE, _TOGETHER, _AT_ONCE = 2**17, 8, 2**19


@dataclass(frozen=True)
class Layout:
    """How the pyramid of an image is stored.

    Attributes:
        image_size: Side of the image in pixels.
        channels: Number of channels.
        steps: Quantisation step of each level, from 1, the finest.
        wavelet: PyWavelets' name of the wavelet.
    """

    image_size: int
    channels: int
    steps: Mapping[int, float]
    wavelet: str = "haar"

    def __post_init__(self) -> None:
        # 4 and 4.0 are the same step, in JSON as well.
        object.__setattr__(self, "steps", {level: float(step) for level, step in sorted(self.steps.items())})
        assert list(self.steps) == list(range(1, len(self.steps) + 1)), self.steps
        object.__setattr__(self, "_dtypes", {})  # found so far: readers ask for every row group

    @property
    def levels(self) -> int:
        """Number of levels, and thus the coarsest level."""
        return len(self.steps)

    @property
    def windows(self) -> bool:
        """Whether cropping and mirroring can be done on the coefficients, without an inverse transform: Haar only."""
        return is_haar(self.wavelet)

    def shape(self, level: int) -> tuple[int, int, int, int]:
        """The shape (C, K, h, w) of a level."""
        side = self.image_size >> level
        return self.channels, len(bands_of(level, self.levels)), side, side

    def dtype(self, level: int) -> np.dtype[Any]:
        """The smallest integer type for all quantised coefficients that 8-bit images can have at a level.

        Raises:
            ShardError: The step is so small that 32 bits are not enough.
        """
        found: dict[int, np.dtype[Any]] = self.__dict__["_dtypes"]
        if level not in found:
            found[level] = self._smallest_dtype(level)
        return found[level]

    def _smallest_dtype(self, level: int) -> np.dtype[Any]:
        bands = bands_of(level, self.levels)
        peak = max(coefficient_bound(level, band, self.wavelet) for band in bands) / self.steps[level]
        for kind in ("<i1", "<i2", "<i4"):
            # Values up to max + 0.5 are rounded to max; the factor allows for rounding errors of the bound.
            if peak * (1 - 1e-9) <= np.iinfo(kind).max + 0.5:
                return np.dtype(kind)
        raise ShardError(f"step {self.steps[level]} of level {level} is too small: values would exceed 32 bits")

    def row_bytes(self, level: int) -> int:
        """Bytes of a level in a row, before compression."""
        return int(np.prod(self.shape(level))) * self.dtype(level).itemsize

    def schema(self) -> pa.Schema:
        """The Arrow schema of a shard."""
        fields = [pa.field("row", pa.int64()), pa.field("path", pa.string()), pa.field("label", pa.int32())]
        fields.append(pa.field("pixels", pa.binary(DIGEST_BYTES)))
        for level in range(1, self.levels + 1):
            fields.append(pa.field(f"level{level}", pa.binary(self.row_bytes(level))))
        return pa.schema([field.with_nullable(False) for field in fields])

    def empty(self, count: int) -> dict[int, np.ndarray]:
        """Uninitialised arrays (n, C, K, h, w) of every level, for `PyramidEncoder.quantise` to fill."""
        return {level: np.empty((count, *self.shape(level)), self.dtype(level)) for level in self.steps}

    def decode(self, data: pa.RecordBatch | pa.Table, levels: Iterable[int] | None = None) -> dict[int, np.ndarray]:
        """View rows of a shard as arrays, without copying.

        Args:
            data: n rows with the columns of these levels.
            levels: The levels; None for all.

        Returns:
            Stored integers (n, C, K, h, w) of each level, read-only.

        Raises:
            ShardError: A column has another type than the layout says.
        """
        wanted = range(1, self.levels + 1) if levels is None else levels
        return {level: self._view(data.column(f"level{level}"), level) for level in wanted}

    def _view(self, column: pa.Array | pa.ChunkedArray, level: int) -> np.ndarray:
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        width = self.row_bytes(level)
        if column.type != pa.binary(width):
            raise ShardError(f"column level{level} holds {column.type}, the manifest says {pa.binary(width)}")
        return self.shaped(
            np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width), level
        )

    def shaped(self, content: np.ndarray, level: int) -> np.ndarray:
        """View the bytes (n · bytes of a row,), uint8, of a level's column as integers (n, C, K, h, w)."""
        return content.view(self.dtype(level)).reshape(-1, *self.shape(level))


class PyramidEncoder:
    """Turns pixels into stored integers.

    Haar works on sums, which are integers and 2^level times the coefficients: level 1 of a large image by itself, which
    fills the cache, all that is smaller for several images in one call. Other wavelets work on float32 coefficients.

    Attributes:
        together: Images that are encoded in one call of the transform.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # coefficient = result of the transform / scale; stored integer = coefficient / step, rounded
        self.scale = {level: 2**level if layout.windows else 1 for level in layout.steps}
        self._scratch: dict[tuple[int, ...], np.ndarray] = {}
        self.together = 1
        if not layout.windows:
            return
        channels, size, levels = layout.channels, layout.image_size, layout.levels
        large = channels * size**2 > _LARGE and levels > 1
        self._finest = HaarSums(channels, size, 1) if large else None
        side = size // 2 if large else size
        self.together = max(1, min(_TOGETHER, _AT_ONCE // (channels * side**2)))
        self._others = HaarSums(self.together * channels, size, levels, first=2 if large else 1)
        self._inputs = np.zeros((self.together, channels, side, side), sums_dtype(1) if large else np.uint8)

    def encode(
        self, images: Sequence[np.ndarray], out: Mapping[int, np.ndarray] | None = None
    ) -> dict[int, np.ndarray]:
        """Encode n images (C, H, W), uint8; Haar is fastest for a multiple of `together`.

        Args:
            images: Their pixels.
            out: Where to write the integers; None: new arrays.

        Returns:
            The integers (n, C, K, h, w) of each level.
        """
        out = dict(out) if out is not None else self.layout.empty(len(images))
        for first in range(0, len(images), self.together):
            some = images[first : first + self.together]
            rows = {level: values[first : first + len(some)] for level, values in out.items()}
            if self.layout.windows:
                self._encode_haar(some, rows)
                continue
            for number, image in enumerate(some):
                self.quantise(self.analyse(image), {level: values[number] for level, values in rows.items()})
        return out

    def _encode_haar(self, images: Sequence[np.ndarray], out: Mapping[int, np.ndarray]) -> None:
        """Encode up to `together` images."""
        for number, image in enumerate(images):
            assert image.dtype == np.uint8, image.dtype
            if self._finest is None:
                self._inputs[number] = image
                continue
            sums = self._finest(np.ascontiguousarray(image))[1]
            self._divide(1, sums[:, 1:], out[1][number])
            self._inputs[number] = sums[:, 0]
        for level, sums in self._others(self._inputs.reshape(-1, *self._inputs.shape[2:])).items():
            several = sums.reshape(self.together, self.layout.channels, *sums.shape[1:])[: len(images)]
            self._divide(level, several, out[level])

    def analyse(self, image: np.ndarray) -> dict[int, np.ndarray]:
        """Transform an image (C, H, W), uint8, with another wavelet than Haar.

        Returns:
            Per level: float32 coefficients (C, K, h, w) with K = A, H, V, D always.
        """
        found = {}
        approximation = image.astype(np.float32)
        for level in range(1, self.layout.levels + 1):
            approximation, details = pywt.dwt2(approximation, self.layout.wavelet, mode=MODE, axes=(-2, -1))
            found[level] = np.stack((approximation, *details), axis=-3)
        return found

    def quantise(self, found: Mapping[int, np.ndarray], out: Mapping[int, np.ndarray]) -> None:
        """Write the integers of what `analyse` found to `out`: (C, K, h, w) for each level."""
        for level in self.layout.steps:
            self._divide(level, found[level][:, -len(bands_of(level, self.layout.levels)) :], out[level])

    def _divide(self, level: int, values: np.ndarray, out: np.ndarray) -> None:
        """Write round(coefficient / step), with halves towards zero, to `out`."""
        divisor = self.scale[level] * self.layout.steps[level]
        if divisor == 1 and values.dtype.kind == "i":
            np.copyto(out, values, casting="unsafe")
            return
        whole = int(divisor)
        room = values.dtype.kind == "i" and 255 * 4**level + whole // 2 <= np.iinfo(values.dtype).max
        if room and divisor == whole and whole & (whole - 1) == 0:
            # By shifting, twice as fast as floats: for d = 2h, floor((s + h - 1) / d), and floor((s + h) / d) if s < 0.
            key = level, *values.shape
            if key not in self._scratch:
                self._scratch[key] = np.empty(values.shape, values.dtype)
            rounded = self._scratch[key]
            np.right_shift(values, 8 * values.itemsize - 1, out=rounded)
            np.subtract(values, rounded, out=rounded)
            rounded += whole // 2 - 1
            np.right_shift(rounded, whole.bit_length() - 1, out=out, casting="unsafe")
            return
        scaled = values.astype(np.float64)
        scaled /= divisor
        np.copysign(np.ceil(np.abs(scaled) - 0.5), scaled, out=scaled)
        np.copyto(out, scaled, casting="unsafe")


def band_names(layout: Layout, level: int) -> str:
    """Names of the bands along axis K at a level: of stored integers for Haar, else of `PyramidEncoder.analyse`."""
    return bands_of(level, layout.levels) if layout.windows else BANDS
