"""The part of a photo that an encoder sees, and which way is up: shared by decoding into shards and by `ImageEncoder`."""

from __future__ import annotations

import numpy as np


def middle_square(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest central square as Pillow's box (left, top, right, bottom); turning the image does not change it."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def turned_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn square pixels (C, H, W) upright. `orientation` is that of EXIF, 1 to 8; any other value means upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
