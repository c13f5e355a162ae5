"""RandomResizedCrop and mirroring of whole batches on the device, without host synchronisation.

Legend: B images, C channels, H × W pixels. A box is (top, left, height, width) in whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

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


class RandAugment:
    """Crops and mirrors as `wavemim.augment.random_resized_crop`, then does what a policy of timm's says.

    Boxes and mirroring follow from (seed, epoch, row); what RandAugment draws comes from the generators of Python and
    numpy, in the order in which threads ask for it.
    """

    def __init__(
        self,
        policy: str,
        *,
        size: int,
        seed: int,
        pixel_mean: Sequence[float],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        """`pixel_mean`, of pixels in [0, 255], fills what comes into the image from outside. 1 or 3 channels."""
        assert len(pixel_mean) in (1, 3), pixel_mean
        self.size, self.seed, self.scale, self.ratio, self.flip = size, seed, scale, ratio, flip
        self._transform = rand_augment_transform(
            policy,
            {  # as timm's own training sets them
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(mean)) for mean in pixel_mean),
                "interpolation": Image.Resampling.BICUBIC,
                # At 10, the highest magnitude, timm asks for posterising to 0 bits, which Pillow refuses.
                "magnitude_max": math.nextafter(10.0, 0.0),
            },
        )

    def __call__(self, pixels: torch.Tensor, rows: torch.Tensor, *, epoch: int) -> torch.Tensor:
        """uint8 images (B, C, H, W) → (B, C, size, size); `rows` (B,) on the CPU."""
        boxes = boxes_of(rows, *pixels.shape[-2:], seed=self.seed, epoch=epoch, scale=self.scale, ratio=self.ratio)
        mirrored = (uniform(self.seed, "flip", epoch, rows, 1)[:, 0] < 0.5) & self.flip
        out = np.empty((*pixels.shape[:2], self.size, self.size), np.uint8)
        for b, (image, box) in enumerate(zip(pixels.numpy(), boxes.int().tolist(), strict=True)):
            out[b] = self._augmented(image, box, bool(mirrored[b]))
        return torch.from_numpy(out)

    def _augmented(self, image: np.ndarray, box: list[int], mirrored: bool) -> np.ndarray:
        """One image (C, H, W), the box (top, left, height, width) of it."""
        top, left, height, width = box
        cut = image[:, top : top + height, left : left + width]
        picture = Image.fromarray(np.ascontiguousarray(cut[0] if len(cut) == 1 else cut.transpose(1, 2, 0)))
        picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        done = np.asarray(self._transform(picture))
        return done[None] if done.ndim == 2 else done.transpose(2, 0, 1)
