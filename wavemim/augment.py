"""RandomResizedCrop and mirroring of whole batches on the device, without host synchronisation.

Legend: B images, C channels, H × W pixels. A box is (top, left, height, width) in whole pixels.
"""

from __future__ import annotations

import math

import torch

from wavemim.randomness import uniform

_ATTEMPTS = 10  # torchvision's, before it falls back to a box in the middle


def random_resized_crop(
    pixels: torch.Tensor,
    rows: torch.Tensor,
    *,
    size: int,
    seed: int,
    epoch: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> torch.Tensor:
    """Random boxes of `pixels` (B, C, H, W) in [0, 255], resized to (B, C, size, size) and, with `flip`, half of them
    mirrored. `rows` (B,), on the device of the pixels, and (seed, epoch) alone decide about boxes and mirroring.

    As torchvision's RandomResizedCrop with antialiased bicubic interpolation (Inception: Szegedy et al. 2015).
    """
    height, width = pixels.shape[-2:]
    boxes = boxes_of(rows, height, width, seed=seed, epoch=epoch, scale=scale, ratio=ratio)
    mirrored = uniform(seed, "flip", epoch, rows, 1)[:, 0] < 0.5 if flip else None
    return resized_crop(pixels, boxes, size, mirrored)


def boxes_of(
    rows: torch.Tensor,
    height: int,
    width: int,
    *,
    seed: int,
    epoch: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> torch.Tensor:
    """Boxes (B, 4) float32 with whole values: top, left, height and width in an image of `height` × `width` pixels.

    Distributed as torchvision's: the share of the area uniform in `scale`, the aspect (width / height) log-uniform in
    `ratio`, the first of ten draws that fits the image, at a uniform place; otherwise the largest box in the middle
    whose aspect is allowed.
    """
    assert 0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1], (scale, ratio)
    draws = uniform(seed, "crop", epoch, rows, 2 * _ATTEMPTS + 2)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # of equal values the first
    h, w = h.gather(1, first), w.gather(1, first)
    top = (draws[:, -2:-1] * (height - h + 1)).floor()
    left = (draws[:, -1:] * (width - w + 1)).floor()
    middle = _middle_box(height, width, ratio)
    some = fits.any(1, keepdim=True)
    chosen = zip((top, left, h, w), middle, strict=True)
    return torch.cat([torch.where(some, values, float(other)) for values, other in chosen], 1)


def resized_crop(pixels: torch.Tensor, boxes: torch.Tensor, size: int, mirrored: torch.Tensor | None) -> torch.Tensor:
    """The `boxes` (B, 4) of `pixels` (B, C, H, W) as (B, C, size, size), clamped to [0, 255]; `mirrored` bool (B,).

    Bicubic (Keys 1981, a = -0.5), with the kernel widened where the box is larger than the result: what Pillow makes
    of the cropped image, without its rounding. Pixels outside of a box play no part, and a box of `size` × `size`
    pixels is given back as it is. Float32 (matrix products: with TF32 allowed, to about 0.1 of 255).
    """
    batch, channels, height, width = pixels.shape
    with torch.autocast(pixels.device.type, enabled=False):
        top, left, h, w = boxes.float().unbind(1)
        across, down = _weights(left, w, width, size), _weights(top, h, height, size)
        if mirrored is not None:
            across = torch.where(mirrored[:, None, None], across.flip(1), across)
        rows = pixels.float().reshape(batch, channels * height, width) @ across.mT
        return (down[:, None] @ rows.reshape(batch, channels, height, size)).clamp(0, 255)


def _weights(start: torch.Tensor, length: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Interpolation matrices (B, size, side) along one axis, of boxes from `start` (B,) on with `length` (B,) pixels.

    With u = 2 · size the centre of result i lies at (2 i + 1) · length / u from the start: whole numbers up to the last
    division, so that float32 is exact at any place of the image.
    """
    taps = math.ceil(4 * max(side / size, 1)) + 1
    start, length = start[:, None, None], length[:, None, None]
    places = torch.arange(size, device=start.device, dtype=torch.float32)[:, None]
    centre = (2 * places + 1) * length
    reach = 2 * torch.clamp(length / size, min=1)
    first = (centre / (2 * size) - reach + 0.5).floor()
    pixel = first + torch.arange(taps, device=start.device, dtype=torch.float32)
    distance = ((2 * pixel + 1) * size - centre) / (2 * length.clamp_min(size))
    weights = _cubic(distance.abs()) * ((pixel >= 0) & (pixel < length))
    weights = weights / weights.sum(-1, keepdim=True)
    # With room for the taps that lie outside: every index is in range and occurs once.
    matrix = torch.zeros(start.shape[0], size, side + 2 * taps, device=start.device)
    matrix.scatter_(2, (pixel + start).long() + taps, weights)
    return matrix[:, :, taps : taps + side]


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution kernel with a = -0.5 at distances x ≥ 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _middle_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest box of an allowed aspect in the middle of an image."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w
