"""From arrays of samples (.npy, TIFF of many bits or bands) to uint8 pixels (C, H, W) of one size."""

from __future__ import annotations

import io
import logging
import math
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pipeline.images.observed import Observed
from wavemim.upright import middle_square, turned_upright

NPY_MAGIC = b"\x93NUMPY"
# TIFF compressions, by tag value, whose decoders return at most as much as was requested: none, CCITT, LZW, deflate,
# packbits, LZMA, Zstandard. For JPEG and JPEG 2000 the size is checked first; all others are rejected.
_BOUNDED = {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 50000}
_JPEG = {7, 33007, 34892}
_JPEG_2000 = {33003, 33004, 33005, 34712}
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _YCBCR = 0, 1, 2, 6
_MOST_PAGES = 64  # searched for pages that are bands: there are up to 16, and thumbnails
# Tags that hold one number: width, length, samples, rows per strip, tile sizes, depth. If one were a string,
# multiplying it would repeat the string.
_SIZES = {256, 257, 277, 278, 322, 323, 32997, 32998}
_TAG_TYPE_BYTES = (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 1, 1, 8, 8, 8)  # of one value, by the number of its type


@dataclass(frozen=True)
class Pixels:
    """What an image is turned into, and which images are rejected (see the settings of the section ``data``).

    Attributes:
        size: Side of the square in pixels.
        channels: Number of channels, 1 to 16.
        max_pixels: Images with more pixels are rejected.
        min_side: Images with a shorter side in pixels are rejected.
        value_range: The values that become 0 and 255; None for the range of the integer type.
        nodata: The value of pixels without data, a number or "nan": these, NaN and infinite ones become black. None: an
            image with NaN is rejected.
        observed: Is told the sizes and values of the images, if it is set.
    """

    size: int
    channels: int = 3
    max_pixels: int = 100_000_000
    min_side: int = 8
    value_range: tuple[float, float] | None = None
    nodata: float | str | None = None
    observed: Observed | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.channels <= 16:
            raise ValueError(f"size {self.size} or channels {self.channels} out of range")
        low, high = self.value_range or (0, 1)
        # The width has to be finite and large enough to divide by, too: otherwise values in between would become NaN.
        if low == high or not all(map(math.isfinite, (low, high, high - low, 255 / (float(high - low) or 1e-320)))):
            raise ValueError(f"value_range {self.value_range} is not a range")


class RejectedImage(Exception):
    """An input that cannot be stored. The message is the reason in one line, with details in brackets at the end."""

    def __init__(self, reason: str):
        # The message of a decoder may contain bytes of the file: control characters, or incomplete ones.
        line = "".join(char if char.isprintable() else "?" for char in " ".join(reason.split()))
        super().__init__(line if len(line) <= 160 else f"{line[:156]}…" + ")" * ("(" in line))


@dataclass
class Samples:
    """The bands of one image as they are in the file: arrays (H, W) of one shape and type."""

    bands: list[np.ndarray]
    colour: bool = False  # whether the bands are red, green and blue
    alpha: np.ndarray | None = None  # (H, W)
    premultiplied: bool = False  # whether the bands are multiplied by alpha
    bits: int | None = None  # of unsigned integers that use fewer bits than their type
    inverted: bool = False  # whether zero is white
    orientation: int = 1  # EXIF, 1 to 8


def check_size(width: int, height: int, wanted: Pixels) -> None:
    """Raise RejectedImage if a size in pixels, as the header declares it, is out of bounds."""
    if wanted.observed is not None:
        wanted.observed.size = width, height
    if width * height > wanted.max_pixels:
        raise RejectedImage(f"too large ({width}×{height} pixels, data.max_pixels={wanted.max_pixels})")
    if min(width, height) < max(1, wanted.min_side):
        raise RejectedImage(f"too small ({width}×{height} pixels, data.min_side={wanted.min_side})")


def check_tile(width: int, height: int, image_width: int, image_height: int) -> None:
    """Raise RejectedImage if the tiles of a TIFF are much larger than the image: they would be decoded in full."""
    if width * height > max(2**20, 4 * image_width * image_height):
        raise RejectedImage(f"damaged (TIFF tiles of {width}×{height} pixels)")


def wrong_count(found: int, wanted: Pixels) -> RejectedImage:
    """The error for an image with the wrong number of channels."""
    return RejectedImage(f"wrong channel count ({found}, data.channels={wanted.channels})")


def from_samples(samples: Samples, wanted: Pixels) -> np.ndarray:
    """Crop the central square and resize it in floating point, rounding once.

    Returns:
        Pixels (channels, size, size), uint8.

    Raises:
        RejectedImage: Wrong number of channels, values without a known range, NaN, or a size out of bounds.
    """
    found, first = len(samples.bands), samples.bands[0]
    check_size(first.shape[1], first.shape[0], wanted)
    to_grey = wanted.channels == 1 and samples.colour
    if found != wanted.channels and not to_grey and not (found == 1 and wanted.channels == 3):
        raise wrong_count(found, wanted)
    low, high = _value_range(first.dtype, samples.bits, wanted.value_range)
    hidden = [_without_data(band, wanted.nodata) for band in samples.bands]
    if wanted.observed is not None and wanted.value_range is None:
        wanted.observed.values(samples.bands, hidden, high)
    alpha = None if samples.alpha is None else _opacity(samples.alpha, samples.bits)
    out = np.empty((1 if to_grey else found, wanted.size, wanted.size), np.float32)
    weights = (0.299, 0.587, 0.114) if to_grey else (1.0,) * found
    out[:] = 0
    for number, (band, absent, weight) in enumerate(zip(samples.bands, hidden, weights, strict=True)):
        values = _mapped(band if absent is None else np.where(absent, band.dtype.type(0), band), low, high)
        if samples.inverted:
            values = 255 - values
        if absent is not None:
            values[absent] = 0
        if alpha is not None:
            values = (values if samples.premultiplied else values * alpha) + 255 * (1 - alpha)
        image = Image.fromarray(np.ascontiguousarray(values, np.float32))
        image = image.resize((wanted.size,) * 2, Image.Resampling.BICUBIC, box=middle_square(*image.size))
        out[0 if to_grey else number] += np.asarray(image) * np.float32(weight)
    pixels = np.clip(out + np.float32(0.5), 0, 255).astype(np.uint8)
    if len(pixels) != wanted.channels:
        pixels = np.repeat(pixels, wanted.channels, axis=0)
    return turned_upright(pixels, samples.orientation)


def _value_range(dtype: np.dtype, bits: int | None, value_range: tuple[float, float] | None) -> tuple[float, float]:
    if dtype.kind not in "buif":
        raise RejectedImage(f"unsupported ({dtype} pixels)")
    if value_range is not None:
        return value_range
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 0, 2 ** (bits or 8 * dtype.itemsize) - 1
    width = 8 * dtype.itemsize
    kind = {"f": "floating-point", "i": "signed"}.get(dtype.kind, f"{width}-bit")
    if dtype.kind == "i" and width > 16:
        kind = f"{width}-bit"
    raise RejectedImage(f"{kind} pixels without a known range (set data.value_range)")


def _without_data(band: np.ndarray, nodata: float | str | None) -> np.ndarray | None:
    """Where a band (H, W) has no data, (H, W), bool; None for nowhere. Raises RejectedImage for NaN without the setting."""
    absent = ~np.isfinite(band) if band.dtype.kind == "f" else np.zeros(band.shape, bool)
    if nodata is None:
        if absent.any():
            share = absent.mean()
            raise RejectedImage(
                f"NaN or infinite pixels (set data.nodata=nan to make them black; {share:.1%} of a band)"
            )
        return None
    value = float(nodata)
    if math.isfinite(value):
        absent |= band == value
    if absent.all():
        raise RejectedImage(f"no data (data.nodata={value:g} in all pixels of a band)")
    return absent if absent.any() else None


def _mapped(band: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values (H, W) to float32 (H, W): `low` becomes 0, `high` 255, and the rest is clipped."""
    exact = band.dtype.itemsize <= 2 and band.dtype.kind in "bui"  # representable in float32
    values: np.ndarray = np.array(band, np.float32 if exact else np.float64, order="C")
    with np.errstate(over="ignore"):
        np.subtract(values, low, out=values)
        np.multiply(values, 255 / (high - low), out=values)
    return np.clip(values, 0, 255, out=values).astype(np.float32, copy=False)


def _opacity(alpha: np.ndarray, bits: int | None) -> np.ndarray:
    top = 1.0 if alpha.dtype.kind in "bf" else 2.0**bits - 1 if bits else float(np.iinfo(alpha.dtype).max)
    return np.clip(np.nan_to_num(alpha.astype(np.float32)) / np.float32(top), 0, 1)


# .npy


def npy_samples(data: bytes, wanted: Pixels) -> Samples:
    """The array of a .npy file: (H, W), (H, W, C) or (C, H, W), tried in this order by the number of channels wanted.

    Shape, type and length are checked before any value is read.

    Raises:
        RejectedImage: It is not an image of this kind.
        ValueError: The header is damaged.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except ValueError as error:
        if "EOF: reading" in str(error):
            raise RejectedImage("truncated (in the header of .npy)") from None
        raise
    if dtype.hasobject:
        raise RejectedImage("unsupported (Python objects in .npy)")
    if dtype.kind not in "buif":
        raise RejectedImage(f"unsupported ({str(dtype)[:60]} pixels)")
    if any(side < 0 for side in shape):
        raise RejectedImage("damaged (negative size in .npy)")
    axis = _channel_axis(shape, wanted)
    sides = [side for number, side in enumerate(shape) if number != axis]
    check_size(sides[1], sides[0], wanted)
    _value_range(dtype, None, wanted.value_range)
    missing = math.prod(shape) * dtype.itemsize - (len(data) - stream.tell())
    if missing > 0:
        raise RejectedImage(f"truncated ({missing} bytes of .npy missing)")
    values = np.load(io.BytesIO(data), allow_pickle=False)
    return Samples([values] if axis is None else list(np.moveaxis(values, axis, 0)))


def _channel_axis(shape: tuple[int, ...], wanted: Pixels) -> int | None:
    if len(shape) == 2:
        if wanted.channels not in (1, 3):
            raise wrong_count(1, wanted)
        return None
    if len(shape) != 3:
        raise RejectedImage(f"unsupported (array of {len(shape)} dimensions)")
    for count in (wanted.channels, 1) if wanted.channels == 3 else (wanted.channels,):
        for axis in (2, 0):
            if shape[axis] == count:
                return axis
    raise wrong_count(shape[2] if shape[2] <= shape[0] else shape[0], wanted)


# TIFF


def tiff_samples(data: bytes, wanted: Pixels) -> Samples:
    """The bands of a TIFF: its first page, or, for channels other than 1 and 3, several pages of one band each.

    Sizes in the directory are checked before anything is decoded. Call ``check_tags`` first.

    Raises:
        RejectedImage: It is not an image of this kind.
        Exception: Whatever tifffile raises.
    """
    import tifffile  # takes a fifth of a second to import, and is rarely needed

    # Without a handler its warnings would be printed; the reason for a rejection contains them already.
    if not (log := logging.getLogger("tifffile")).handlers:
        log.addHandler(logging.NullHandler())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages: list[Any] = [file.pages[0]]
        if wanted.channels not in (1, 3) and pages[0].samplesperpixel == 1:
            for number in range(1, _MOST_PAGES):
                try:
                    page: Any = file.pages[number]
                except IndexError:
                    break
                if not page.is_reduced:
                    pages.append(page)
            if len(pages) != wanted.channels or any(
                (page.shape, page.dtype) != (pages[0].shape, pages[0].dtype) for page in pages
            ):
                raise wrong_count(len(pages), wanted)
        for page in pages:
            _check_page(page, wanted)
        samples = _page_samples(pages[0], wanted)
        samples.bands.extend(page.asarray(maxworkers=1) for page in pages[1:])
    return samples


def _check_page(page: Any, wanted: Pixels) -> None:
    """Check a tifffile.TiffPage before it is decoded: sizes, compression, and that the data are inside the file."""
    if page.imagedepth != 1 or page.dtype is None or len(page.shape) not in (2, 3):
        raise RejectedImage(f"unsupported (TIFF of type {page.dtype}, shape {page.shape})")
    check_size(page.imagewidth, page.imagelength, wanted)
    if page.samplesperpixel > 17:  # 16 and alpha
        raise wrong_count(page.samplesperpixel, wanted)
    _value_range(page.dtype, None, wanted.value_range)
    if page.is_tiled:
        check_tile(page.tilewidth, page.tilelength, page.imagewidth, page.imagelength)
    if page.compression not in _BOUNDED | _JPEG | _JPEG_2000:
        raise RejectedImage(f"unsupported (TIFF compression {int(page.compression)})")
    if len(page.dataoffsets) < math.prod(page.chunked) or len(page.databytecounts) < math.prod(page.chunked):
        raise RejectedImage("damaged (TIFF without all its strips or tiles)")
    least = page.imagewidth * page.imagelength * page.samplesperpixel * page.bitspersample // 8
    if page.compression == 1 and all(page.databytecounts) and sum(page.databytecounts) < least:
        raise RejectedImage(f"truncated ({least} bytes of TIFF expected, {sum(page.databytecounts)} found)")
    size = page.parent.filehandle.size
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset + count > size:
            raise RejectedImage("truncated (TIFF data beyond the end of the file)")
        if page.compression in _JPEG | _JPEG_2000:
            page.parent.filehandle.seek(offset)
            found = _coded_size(page.parent.filehandle.read(count))
            if found > 2 * max(math.prod(page.chunks[-3:]), page.imagewidth * page.imagelength, 2**16):
                raise RejectedImage(f"damaged (a TIFF strip or tile of {found} pixels)")


def _coded_size(segment: bytes) -> int:
    """Number of pixels that a JPEG or JPEG 2000 codestream declares; 0 if it declares none, and cannot be decoded."""
    start = segment.find(b"\xff\x4f\xff\x51")
    if start >= 0 and len(segment) >= start + 16:
        width, height = struct.unpack_from(">II", segment, start + 8)
        return width * height
    position, largest = 2, 0
    while position + 9 <= len(segment):
        if segment[position] != 0xFF:
            position += 1  # as decoders do
            continue
        marker = segment[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", segment, position + 5)
            largest = max(largest, width * height)
        elif marker == 0xDA:
            break
        if marker == 0xFF:
            position += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD9:  # markers without a length
            position += 2
        else:
            position += 2 + int.from_bytes(segment[position + 2 : position + 4], "big")
    return largest


def _page_samples(page: Any, wanted: Pixels) -> Samples:
    values = page.asarray(maxworkers=1)
    if values.ndim == 2:
        bands = [values]
    else:
        bands = list(np.moveaxis(values, 0 if page.planarconfig == 2 else 2, 0))
    bits = int(page.bitspersample) if values.dtype.kind == "u" else None
    orientation = page.tags.valueof(274, 1)
    samples = Samples(bands, bits=bits, orientation=orientation if isinstance(orientation, int) else 1)
    if wanted.channels not in (1, 3):
        return samples
    colours = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3}
    if page.photometric == _YCBCR and page.compression in _JPEG:
        colours[_YCBCR] = 3  # its decoder returns RGB
    if page.photometric not in colours:
        raise RejectedImage(f"unsupported (TIFF colours {getattr(page.photometric, 'name', page.photometric)})")
    count = colours[page.photometric]
    extra = tuple(int(kind) for kind in page.extrasamples)
    # RGB with an extra sample is a photo: either with transparency, or with a mask, which is ignored.
    if len(bands) == count + 1 and (extra[:1] in ((1,), (2,)) or count == 3):
        last = bands.pop()
        samples.alpha = last if extra[:1] in ((1,), (2,)) else None
        samples.premultiplied = extra[:1] == (1,)
    samples.colour = count == 3 and len(bands) == 3
    samples.inverted = page.photometric == _MIN_IS_WHITE
    return samples


def check_tags(data: bytes) -> None:
    """Raise RejectedImage for a TIFF whose tags are together much larger than the file, before anything reads them.

    Tags may overlap: 4096 tags that each cover the whole file would be a decompression bomb.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    count_format, tag_format, next_format, header = ("Q", "HHQ8x", "Q", 8) if big else ("H", "HHI4x", "I", 4)
    tag_bytes = struct.calcsize("<" + tag_format)
    (position,) = struct.unpack_from(order + next_format, data, header)
    budget, seen = 4 * len(data), set[int]()
    while position and position not in seen and len(seen) <= _MOST_PAGES:
        seen.add(position)
        if position + struct.calcsize("<" + count_format) > len(data):
            if len(seen) == 1:
                raise RejectedImage("truncated (TIFF directory beyond the end of the file)")
            return
        (count,) = struct.unpack_from(order + count_format, data, position)
        position += struct.calcsize("<" + count_format)
        if count > 4096:
            raise RejectedImage(f"damaged ({count} TIFF tags)")
        if position + count * tag_bytes + struct.calcsize("<" + next_format) > len(data):
            if len(seen) > 1:
                return  # pages after the first may be cut off
            raise RejectedImage("truncated (TIFF tags beyond the end of the file)")
        for _ in range(count):
            code, kind, values = struct.unpack_from(order + tag_format, data, position)
            if code in _SIZES and (values != 1 or kind not in (1, 3, 4, 13, 16)):
                raise RejectedImage(f"damaged (TIFF tag {code} is not a number)")
            budget -= values * (_TAG_TYPE_BYTES[kind] if kind < len(_TAG_TYPE_BYTES) else 1)
            position += tag_bytes
        if budget < 0:
            raise RejectedImage("damaged (TIFF tags larger than the file)")
        (position,) = struct.unpack_from(order + next_format, data, position)
