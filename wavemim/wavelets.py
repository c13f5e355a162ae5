"""Two-dimensional discrete wavelet transforms in PyWavelets' mode ``periodization``.

A *pyramid* is a dictionary {level: array} of arrays (..., K, H/2^level, W/2^level). K is the number of bands of the
level, in the order A, H, V, D: the details H, V, D (PyWavelets' cH, cV, cD) at every level, and before them the
approximation A (cA) at the coarsest level. Level 1 is the finest. The scaling is PyWavelets': Haar is orthonormal, so
energy is preserved.

Every function takes numpy arrays (on the CPU, where shards are written) or torch tensors (on any device, in training)
and returns the same type.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pywt

if TYPE_CHECKING:  # imported when needed: workers that only write shards start in a third of the time
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")

BANDS = "AHVD"
DETAILS = "HVD"
MODE = "periodization"


def bands_of(level: int, levels: int) -> str:
    """Return the bands of `level` in a pyramid of `levels` levels, in the order of axis K: "AHVD" or "HVD"."""
    return BANDS if level == levels else DETAILS


def is_haar(wavelet: str) -> bool:
    """Whether `wavelet` is one of PyWavelets' names of Haar, whose transform commutes with aligned crops and flips."""
    return wavelet in ("haar", "db1", "bior1.1", "rbio1.1")


def check_levels(height: int, width: int, levels: int) -> None:
    """Check that an image of `height` × `width` pixels can be halved `levels` times.

    Raises:
        ValueError: If not.
    """
    if levels < 1 or height % 2**levels or width % 2**levels:
        raise ValueError(
            f"an image of {height}×{width} pixels has no {levels} wavelet levels: "
            f"both sides have to be multiples of 2^{levels} = {2 ** max(levels, 0)}"
        )


def decompose(images: Array, levels: int, wavelet: str = "haar") -> dict[int, Array]:
    """Transform images, as ``pywt.wavedec2(images, wavelet, 'periodization', levels)``.

    Args:
        images: (..., H, W), floats.
        levels: Levels of the pyramid.
        wavelet: PyWavelets' name of a discrete wavelet.

    Returns:
        The pyramid {level: (..., K, H/2^level, W/2^level)}.

    Raises:
        ValueError: If H or W is not a multiple of 2^levels.
    """
    check_levels(images.shape[-2], images.shape[-1], levels)
    pyramid: dict[int, Any] = {}
    approximation: Any = images
    for level in range(1, levels + 1):
        approximation, details = _analyse(approximation, wavelet)
        pyramid[level] = details
    pyramid[levels] = _concatenate([approximation[..., None, :, :], pyramid[levels]])
    return pyramid


def haar_sums(images: Array, levels: int) -> dict[int, Array]:
    """Transform integer images by Haar without scaling: coefficient = sum / 2^level, exactly.

    Args:
        images: (..., H, W), integers of a dtype that can hold max(pixel) · 4^levels.
        levels: Levels of the pyramid.

    Returns:
        The pyramid of sums, of the same dtype.

    Raises:
        ValueError: If H or W is not a multiple of 2^levels.
    """
    check_levels(images.shape[-2], images.shape[-1], levels)
    pyramid: dict[int, Any] = {}
    approximation: Any = images
    for level in range(1, levels + 1):
        approximation, details = _haar_step(approximation)
        pyramid[level] = details
    pyramid[levels] = _concatenate([approximation[..., None, :, :], pyramid[levels]])
    return pyramid


def reconstruct(pyramid: dict[int, Array], wavelet: str = "haar", to: int = 0) -> Array:
    """Invert the transform.

    Args:
        pyramid: {level: (..., K, H/2^level, W/2^level)}, all levels from the coarsest to `to` + 1.
        wavelet: PyWavelets' name of the wavelet.
        to: 0 for the image, or the level whose approximation A is returned. The A of level n is an image with sides
            divided by 2^n and values multiplied by 2^n.

    Returns:
        (..., H/2^to, W/2^to).
    """
    coarsest = max(pyramid)
    finest_needed = to + 1
    approximation: Any = pyramid[coarsest][..., 0, :, :]
    for level in range(coarsest, finest_needed - 1, -1):
        details = pyramid[level][..., -3:, :, :]
        approximation = _synthesise(approximation, details, wavelet)
    return approximation


def window(level_array: Array, level: int, top: int, left: int, size: int, flip: bool = False) -> Array:
    """Crop one level of a Haar pyramid to a window of the image.

    The result equals the transform of the cropped (and then mirrored) image exactly. Mirroring reverses the columns and
    changes the sign of V and D, the differences along rows of pixels.

    Args:
        level_array: (..., K, h, w).
        level: Its level.
        top: Top of the window in pixels, a multiple of 2^level.
        left: Left of the window in pixels, a multiple of 2^level.
        size: Pixels per side of the window, a multiple of 2^level.
        flip: Whether to mirror the window horizontally.

    Returns:
        (..., K, size/2^level, size/2^level).
    """
    scale = 2**level
    assert top % scale == 0 and left % scale == 0 and size % scale == 0, (level, top, left, size)
    rows = slice(top // scale, (top + size) // scale)
    columns = slice(left // scale, (left + size) // scale)
    cut: Any = level_array[..., rows, columns]
    if not flip:
        return cut
    if isinstance(cut, np.ndarray):
        mirrored: Any = cut[..., ::-1].copy()
    else:
        mirrored = cut.flip(-1)
    mirrored[..., -2:, :, :] *= -1
    return mirrored


def coefficient_bound(level: int, band: str, wavelet: str = "haar", peak: float = 255.0) -> float:
    """Compute the largest absolute coefficient of images with values in [0, peak].

    Args:
        level: The level, from 1.
        band: "A", "H", "V" or "D".
        wavelet: PyWavelets' name of the wavelet.
        peak: The largest pixel value.

    Returns:
        The bound, in coefficient units.
    """
    filters = pywt.Wavelet(wavelet)
    low, high = (float(np.abs(taps).sum()) for taps in (filters.dec_lo, filters.dec_hi))
    if band == "A":
        return peak * low ** (2 * level)
    last = low * high if band in "HV" else high * high
    return peak / 2 * low ** (2 * (level - 1)) * last  # details do not depend on the mean: half of the range counts


def _analyse(images: Any, wavelet: str) -> tuple[Any, Any]:
    """One level: (..., H, W) to A (..., H/2, W/2) and H, V, D stacked (..., 3, H/2, W/2)."""
    if is_haar(wavelet):
        approximation, details = _haar_step(images)
        return approximation / 2, details / 2
    if not isinstance(images, np.ndarray):
        import torch

        rows = _matrix(wavelet, images.shape[-2], False, images.device, images.dtype)
        columns = _matrix(wavelet, images.shape[-1], False, images.device, images.dtype)
        mixed = rows @ images @ columns.mT
        h, w = images.shape[-2] // 2, images.shape[-1] // 2
        a, v = mixed[..., :h, :w], mixed[..., :h, w:]
        hh, d = mixed[..., h:, :w], mixed[..., h:, w:]
        return a, torch.stack((hh, v, d), -3)
    approximation, details = pywt.dwt2(images, wavelet, mode=MODE, axes=(-2, -1))
    return approximation, np.stack(details, -3)


def _synthesise(approximation: Any, details: Any, wavelet: str) -> Any:
    """Inverse of `_analyse`."""
    if is_haar(wavelet):
        h, v, d = (details[..., band, :, :] for band in range(3))
        even, odd = approximation + h, approximation - h  # even and odd rows, still summed over pairs of columns
        even_odd, odd_odd = v + d, v - d
        shape = (*approximation.shape[:-2], 2 * approximation.shape[-2], 2 * approximation.shape[-1])
        is_array = isinstance(approximation, np.ndarray)
        images = np.empty(shape, approximation.dtype) if is_array else approximation.new_empty(shape)
        images[..., 0::2, 0::2] = even + even_odd
        images[..., 0::2, 1::2] = even - even_odd
        images[..., 1::2, 0::2] = odd + odd_odd
        images[..., 1::2, 1::2] = odd - odd_odd
        images *= 0.5
        return images
    if not isinstance(approximation, np.ndarray):
        import torch

        h, v, d = details.unbind(-3)
        mixed = torch.cat((torch.cat((approximation, v), -1), torch.cat((h, d), -1)), -2)
        rows = _matrix(wavelet, mixed.shape[-2], True, mixed.device, mixed.dtype)
        columns = _matrix(wavelet, mixed.shape[-1], True, mixed.device, mixed.dtype)
        return rows @ mixed @ columns.mT
    bands = tuple(details[..., band, :, :] for band in range(3))
    return pywt.idwt2((approximation, bands), wavelet, mode=MODE, axes=(-2, -1))


def _haar_step(images: Any) -> tuple[Any, Any]:
    """Unscaled Haar: sums of the four pixels of a 2×2 block with the signs of A, and of H, V, D."""
    top, bottom = images[..., 0::2, :], images[..., 1::2, :]
    total, rows = top + bottom, top - bottom
    a = total[..., 0::2] + total[..., 1::2]
    v = total[..., 0::2] - total[..., 1::2]
    h = rows[..., 0::2] + rows[..., 1::2]
    d = rows[..., 0::2] - rows[..., 1::2]
    if isinstance(images, np.ndarray):
        return a, np.stack((h, v, d), -3)
    import torch

    return a, torch.stack((h, v, d), -3)


def _concatenate(bands: list[Any]) -> Any:
    if isinstance(bands[0], np.ndarray):
        return np.concatenate(bands, -3)
    import torch

    return torch.cat(bands, -3)


@functools.lru_cache(maxsize=64)
def _matrix(wavelet: str, size: int, inverse: bool, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One level on `size` samples as a matrix (size, size), computed by PyWavelets: low-pass half, then high-pass."""
    import torch

    identity = np.eye(size)
    if inverse:
        half = size // 2
        matrix = pywt.idwt(identity[:half], identity[half:], wavelet, mode=MODE, axis=0)
    else:
        matrix = np.concatenate(pywt.dwt(identity, wavelet, mode=MODE, axis=0), 0)
    return torch.as_tensor(matrix, device=device, dtype=dtype)
