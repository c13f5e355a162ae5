"""The part of a photo that an encoder sees, its size, and which way is up: shared by decoding and by `ImageEncoder`."""

from __future__ import annotations

import functools
import threading

import numpy as np
from PIL import Image

try:
    import cykooz_resizer as resizer
except ImportError:  # there are no wheels for some platforms
    resizer = None

_own = threading.local()  # each thread has a resizer, which reuses memory


def middle_square(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest central square as Pillow's box (left, top, right, bottom); turning the image does not change it."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resized_middle(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """The central square of an image in another size, by bicubic interpolation with antialiasing (a = -0.5).

    With cykooz.resizer, in a quarter of Pillow's time, where it is installed, else with Pillow. Pillow rounds and clips the
    columns before it resizes the rows, so pixels differ at sharp edges: by at most 15 levels in photos of ImageNet, in 17 %
    of the pixels, by 0.17 levels on average.

    Args:
        image: An image of mode RGB or L, or the pixels (H, W, 3) or (H, W), uint8, of one.
        size: Side of the result in pixels.

    Returns:
        Pixels (size, size, 3) or (size, size), uint8.
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    box = middle_square(width, height)
    if resizer is None:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    if not hasattr(_own, "resizer"):
        _own.resizer = resizer.Resizer()
    colour = image.mode == "RGB" if isinstance(image, Image.Image) else image.ndim == 3
    kind = resizer.PixelType.U8x3 if colour else resizer.PixelType.U8
    source, target = resizer.ImageData(width, height, kind, image.tobytes()), resizer.ImageData(size, size, kind)
    _own.resizer.resize(source, target, _options(box))
    shape = (size, size, 3) if colour else (size, size)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(shape)


@functools.lru_cache(maxsize=256)  # most photos of a set have one of a few sizes
def _options(box: tuple[float, float, float, float]) -> resizer.ResizeOptions:
    left, top, right, bottom = box
    return resizer.ResizeOptions(
        resize_alg=resizer.ResizeAlg.convolution(resizer.FilterType.catmull_rom),
        crop_box=resizer.CropBox(left, top, right - left, bottom - top),
    )


def turned_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn square pixels (C, H, W) upright. `orientation` is that of EXIF, 1 to 8; any other value means upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
