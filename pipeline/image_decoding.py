"""One image file → uint8 pixels (C, H, W) of one size, or a reason in words why not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

# Raster formats only, as far as this Pillow has them: it would hand EPS and the like to external programs.
Image.init()
_WANTED = {
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
    "TGA",
    "PCX",
    "SGI",
    "QOI",
}
FORMATS = tuple(sorted(_WANTED & Image.OPEN.keys()))
# File name suffixes of these formats, lower case with the dot.
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
# What a TIFF, JPEG or PNG says about its orientation, and the way back.
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class RejectedImage(Exception):
    """An input that cannot be stored, with the reason in words."""


def read_image(path: Path, size: int) -> np.ndarray:
    """The middle square of an image file, resized with antialiasing: uint8 (3, size, size).

    Upright by its EXIF orientation, transparency on white, 16-bit values scaled to 8, of an animation the first frame.
    Raises RejectedImage, whatever goes wrong.
    """
    try:
        if path.stat().st_size == 0:
            raise RejectedImage("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return _middle_square(image, size)
    except RejectedImage:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise RejectedImage(_in_words(error)) from None


def _middle_square(image: Image.Image, size: int) -> np.ndarray:
    image.draft(None, (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 where that is still large enough
    image.load()
    orientation = _orientation(image)
    image = _to_rgb(image)
    # The middle square is the same one before and after turning, and never larger than the image, however narrow.
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF does not make the pixels worse
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise RejectedImage("32-bit pixels without a known range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise RejectedImage("floating-point pixels without a known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow reads"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"too large (more than {Image.MAX_IMAGE_PIXELS} pixels)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if "truncated" in text.lower():
        return f"truncated ({text[:120]})"
    return f"damaged ({type(error).__name__}: {text[:120]})"
