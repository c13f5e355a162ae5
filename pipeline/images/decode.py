"""Decoding: from the encoded bytes of an image to uint8 pixels (C, H, W) of one size, or the reason why not."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import imagecodecs
import numpy as np
from PIL import Image

from pipeline.images.arrays import (
    NPY_MAGIC,
    Pixels,
    RejectedImage,
    Samples,
    check_size,
    check_tags,
    check_tile,
    from_samples,
    npy_samples,
    tiff_samples,
    wrong_count,
)
from wavemim.upright import resized_middle, turned_upright

# Raster formats that the installed Pillow supports; EPS and similar ones it would pass to external programs. TGA has no
# signature, so it is tried last.
Image.init()
_WANTED = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "AVIF",
    "GIF",
    "TIFF",
    "BMP",
    "DIB",
    "JPEG2000",
    "PPM",
    "PCX",
    "SGI",
    "QOI",
    "TGA",
)
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
# File name suffixes of readable images, in lower case with the dot.
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS) | {".npy"}
# The EXIF tag of the orientation.
ORIENTATION_TAG = 0x0112
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# After a JPEG: whoever reads on has missed its end, and libjpeg refuses a second start. Longer than any of its segments.
_PAST_END = b"\xff\xd8" * 2**15
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _EXTRA_SAMPLES, _SAMPLE_FORMAT = (
    258,
    262,
    322,
    323,
    338,
    339,
)  # TIFF tags
_pillow_limit_lock = threading.Lock()


def decode_image(data: bytes, name: str, wanted: Pixels) -> np.ndarray:
    """Decode an image, crop its central square and resize that with antialiasing.

    The image is turned upright by its EXIF orientation, transparency becomes white, values of more than 8 bits are
    scaled (or mapped by `wanted.value_range`), and of an animation the first frame is used.

    Args:
        data: The encoded image. The format is recognised by its content.
        name: File name, used in reasons only.
        wanted: Size, channels and limits.

    Returns:
        Pixels (channels, size, size), uint8, C-contiguous.

    Raises:
        RejectedImage: Whatever goes wrong, with the reason.
    """
    try:
        if not data:
            raise RejectedImage("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decoded(data, PurePath(name).suffix.lower(), wanted)
    except RejectedImage:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise RejectedImage(_reason(error, data)) from None


def _decoded(data: bytes, suffix: str, wanted: Pixels) -> np.ndarray:
    if data.startswith(NPY_MAGIC) or (suffix == ".npy" and NPY_MAGIC.startswith(data)):
        return from_samples(npy_samples(data, wanted), wanted)
    with _pillow_limit_raised(wanted):
        if data.startswith(_TIFF_MAGIC):
            return _from_tiff(data, wanted)
        with _opened(data, suffix) as image:
            if data.startswith(_PNG_MAGIC) and data[24] == 16 and (data[25] or "transparency" in image.info):
                return _from_deep_png(image, data, wanted)
            return _from_photo(image, data, wanted)


def _opened(data: bytes, suffix: str) -> Image.Image:
    """As `Image.open`, but without its limit on the size: the reason for a rejection needs the size."""
    known = None
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is True:
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # as in Image.open: it is not this format
                known = known or (name if accept else None)
    if known:
        raise RejectedImage(f"damaged (unreadable header of {known})")
    raise RejectedImage("damaged (no header of .npy)" if suffix == ".npy" else "not an image (unknown format)")


@contextmanager
def _pillow_limit_raised(wanted: Pixels) -> Iterator[None]:
    """Raise Pillow's own limit on pixels while decoding an image for which ``max_pixels`` allows more.

    The limit is global, and some formats check it while they decode (an error comes at twice its value). It is changed
    only if it would interfere, for one image and by one thread at a time, so that it is always restored.
    """
    if Image.MAX_IMAGE_PIXELS is None or wanted.max_pixels <= 2 * Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _pillow_limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = wanted.max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _from_photo(image: Image.Image, data: bytes, wanted: Pixels) -> np.ndarray:
    """Pixels of an image that Pillow has opened but not decoded yet; `data` is the whole file."""
    check_size(*image.size, wanted)
    if wanted.channels not in (1, 3):
        raise wrong_count(1 if Image.getmodebase(image.mode) == "L" else 3, wanted)
    if (decoded := _whole_jpeg(image, data, wanted)) is not None:
        return _upright(resized_middle(decoded, wanted.size), _orientation(image))
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is large enough, and for grey only its luminance.
    decode_grey = wanted.channels == 1 and wanted.value_range is None
    image.draft("L" if decode_grey else None, (wanted.size, wanted.size))
    white = _white_in_file(image)
    image.load()
    orientation = _orientation(image)
    if image.mode[0] in "IF" or (image.mode == "1" and wanted.value_range):
        values = np.asarray(image)
        if (
            image.mode == "I" and values.min() >= 0 and values.max() <= 65535
        ):  # a PGM, whose values Pillow scales to 16 bits
            values = np.rint(values * (white / 65535)) if wanted.value_range and white else values.astype(np.uint16)
        return from_samples(Samples([values], orientation=orientation), wanted)
    value_range = wanted.value_range
    if value_range and white:
        value_range = value_range[0] * 255 / white, value_range[1] * 255 / white
    image = _to_mode(image, "L" if wanted.channels == 1 else "RGB", value_range)
    return _upright(resized_middle(image, wanted.size), orientation)


def _whole_jpeg(image: Image.Image, data: bytes, wanted: Pixels) -> np.ndarray | None:
    """Pixels (H, W, 3) of a colour JPEG that is decoded in full size, straight into an array; None for Pillow's way.

    Both use libjpeg-turbo with the same settings and give the same pixels, but Pillow decodes into its own memory with four
    bytes a pixel, which is then copied: a tenth of the time of decoding and resizing. Pillow keeps grey and CMYK, and what is
    damaged, for which it has the reasons.
    """
    width, height = image.size
    scaled = min(width, height) >= 2 * wanted.size  # by `draft`
    plain = image.format == "JPEG" and image.mode == "RGB"
    if scaled or not plain or wanted.channels != 3 or wanted.value_range is not None:
        return None
    try:
        pixels: np.ndarray = imagecodecs.jpeg8_decode(data + _PAST_END)
    except Exception:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return turned_upright(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), orientation)


def _from_tiff(data: bytes, wanted: Pixels) -> np.ndarray:
    """Decode 8-bit photos by Pillow, and by tifffile higher bit depths, many bands and what Pillow does not know."""
    check_tags(data)
    if wanted.channels in (1, 3):
        try:
            image = _opened(data, "")
        except Exception:  # for example a KeyError for an unknown compression
            image = None
        if image is not None and _is_photo(image, wanted):
            tags = image.tag_v2  # type: ignore[attr-defined]
            check_tile(tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0), *image.size)
            return _from_photo(image, data, wanted)
    return from_samples(tiff_samples(data, wanted), wanted)


def _is_photo(image: Image.Image, wanted: Pixels) -> bool:
    """Whether Pillow decodes a TIFF without loss: 8 bits, no more than one extra band."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if wanted.value_range and image.mode == "L" and tags.get(_PHOTOMETRIC) == 0:
        return False  # white is zero: Pillow inverts this, but the range refers to the values in the file
    extra = tags.get(_EXTRA_SAMPLES, ())
    if image.mode == "CMYK":  # also with 16 bits, of which Pillow keeps the upper 8
        return len(extra) <= 1
    eight_bits = max(tags.get(_BITS, (1,))) <= 8 and set(tags.get(_SAMPLE_FORMAT, (1,))) == {1}
    many_bands = len(extra) > 1 or (image.mode == "L" and len(extra) > 0)
    return eight_bits and not many_bands and image.mode[0] not in "IF"


def _from_deep_png(image: Image.Image, data: bytes, wanted: Pixels) -> np.ndarray:
    """A 16-bit PNG that is not plain grey: Pillow reads the metadata, but would drop the lower 8 bits of the values."""
    check_size(*image.size, wanted)
    colour = data[25] in (2, 6)
    if wanted.channels not in (1, 3):
        raise wrong_count(3 if colour else 1, wanted)
    values = imagecodecs.png_decode(data)
    counts = (3, 4) if colour else (1, 2)
    if values.dtype != np.uint16 or values.shape[:2] != image.size[::-1] or values[..., None].shape[2] not in counts:
        raise RejectedImage(f"damaged (16-bit PNG decoded to {values.dtype} {values.shape})")
    bands = list(values.reshape(*values.shape[:2], -1).transpose(2, 0, 1))
    alpha = bands.pop() if len(bands) == counts[1] else None
    return from_samples(Samples(bands, colour=colour, alpha=alpha, orientation=_orientation(image)), wanted)


def _white_in_file(image: Image.Image) -> int | None:
    """The value in the file that Pillow scales to white (255, or 65535 for 16 bits), if any. Call before decoding."""
    args = image.tile[0].args if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    first, *others = args if isinstance(args, tuple) else (args,)
    if image.format == "PPM":
        return others[0] if others and isinstance(others[0], int) and others[0] > 0 else None
    return {"L;2": 3, "L;4": 15}.get(first[:3]) if isinstance(first, str) else None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data do not affect the pixels
        return 1


def _to_mode(image: Image.Image, mode: str, value_range: tuple[float, float] | None) -> Image.Image:
    """Convert an 8-bit image to RGB or L: transparency becomes white, values are mapped by the range, if any."""
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    elif image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    if value_range is not None:
        low, high = value_range
        mapping = np.clip((np.arange(256) - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8).tolist()
        tables = [list(range(256)) if band == "A" else mapping for band in image.getbands()]
        image = image.point([value for one in tables for value in one])
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _reason(error: Exception, data: bytes) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, Image.DecompressionBombError):
        return "too large (a frame exceeds data.max_pixels)"
    if "MAX_TEXT_" in text:
        return f"metadata too large ({text})"
    short_riff = data.startswith(b"RIFF") and 8 + int.from_bytes(data[4:8], "little") > len(data)  # WebP
    if (
        short_riff
        or isinstance(error, EOFError)
        or any(word in text.lower() for word in ("truncated", "stream too small"))
    ):
        return f"truncated ({text})" if text else "truncated"
    return f"damaged ({type(error).__name__}: {text})"
