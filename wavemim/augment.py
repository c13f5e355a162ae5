"""RandomResizedCrop and mirroring of whole batches, without synchronising with the device; RandAugment on the CPU.

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
from wavemim.thread_random import seed_thread

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
    """Crop random boxes and resize them, as torchvision's RandomResizedCrop with antialiased bicubic interpolation.

    Boxes and mirroring are pure functions of (seed, epoch, row). The method is Inception's (Szegedy et al. 2015).

    Args:
        pixels: (B, C, H, W) in [0, 255].
        rows: Row numbers (B,), on the device of the pixels.
        size: Pixels per side of the result.
        seed: Of the run.
        epoch: Of training.
        scale: Range of the box's fraction of the area.
        ratio: Range of the box's width / height.
        flip: Whether to mirror half of the images.

    Returns:
        (B, C, size, size), float32 in [0, 255].
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
    """Draw boxes with torchvision's distribution.

    The fraction of the area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. The first of ten draws that
    fits the image is placed uniformly; if none fits, the box is the largest central one with an allowed aspect ratio.

    Args:
        rows: Row numbers (B,).
        height: H.
        width: W.
        seed: Of the run.
        epoch: Of training.
        scale: Range of the fraction of the area.
        ratio: Range of width / height.

    Returns:
        Boxes (B, 4), float32 with integer values.
    """
    assert 0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1], (scale, ratio)
    draws = uniform(seed, "crop", epoch, rows, 2 * _ATTEMPTS + 2)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # argmax returns the first of equal values
    h, w = h.gather(1, first), w.gather(1, first)
    top = (draws[:, -2:-1] * (height - h + 1)).floor()
    left = (draws[:, -1:] * (width - w + 1)).floor()
    middle = _middle_box(height, width, ratio)
    some = fits.any(1, keepdim=True)
    chosen = zip((top, left, h, w), middle, strict=True)
    return torch.cat([torch.where(some, values, float(other)) for values, other in chosen], 1)


def resized_crop(pixels: torch.Tensor, boxes: torch.Tensor, size: int, mirrored: torch.Tensor | None) -> torch.Tensor:
    """Crop boxes and resize them by bicubic interpolation (Keys 1981, a = -0.5), antialiased when shrinking.

    This equals Pillow's result for the cropped image up to rounding. Pixels outside of a box have no influence, and a
    box of `size` × `size` pixels is returned unchanged. Computed by matrix products in float32 (if TF32 is allowed,
    accurate to about 0.1 of 255).

    Args:
        pixels: (B, C, H, W) in [0, 255].
        boxes: (B, 4).
        size: Pixels per side of the result.
        mirrored: bool (B,), which images to mirror horizontally; None: none.

    Returns:
        (B, C, size, size), float32, clamped to [0, 255].
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
    """Interpolation matrices (B, size, side) along one axis for boxes at `start` (B,) of `length` (B,) pixels.

    With u = 2 · size the centre of output pixel i is at (2 i + 1) · length / u from the start: integers up to the last
    division, so that float32 is exact anywhere in the image.
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
    # Padded by the taps that lie outside: every index is in range and occurs once.
    matrix = torch.zeros(start.shape[0], size, side + 2 * taps, device=start.device)
    matrix.scatter_(2, (pixel + start).long() + taps, weights)
    return matrix[:, :, taps : taps + side]


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution kernel with a = -0.5 at distances x ≥ 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _middle_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest central box with an allowed aspect ratio."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


class RandAugment:
    """Crops and mirrors as `random_resized_crop`, then applies one of timm's RandAugment policies.

    Boxes, mirroring and what RandAugment draws are pure functions of (seed, epoch, row), in any number of threads.
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
        """Create the transform.

        Args:
            policy: timm's name of the policy, such as "rand-m9-mstd0.5".
            size: Pixels per side of the result.
            seed: Of the run.
            pixel_mean: One value per channel (1 or 3) in [0, 255]; fills areas from outside of the image.
            scale: Range of the crop's fraction of the area.
            ratio: Range of the crop's width / height.
            flip: Whether to mirror half of the images.
        """
        assert len(pixel_mean) in (1, 3), pixel_mean
        self.size, self.seed, self.scale, self.ratio, self.flip = size, seed, scale, ratio, flip
        self._transform = rand_augment_transform(
            policy,
            {  # the values of timm's training script
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(mean)) for mean in pixel_mean),
                "interpolation": Image.Resampling.BICUBIC,
                # At 10, the highest magnitude, timm would posterise to 0 bits, which Pillow refuses.
                "magnitude_max": math.nextafter(10.0, 0.0),
            },
        )

    def __call__(self, pixels: torch.Tensor, rows: torch.Tensor, *, epoch: int) -> torch.Tensor:
        """Augment images.

        Args:
            pixels: uint8 (B, C, H, W).
            rows: Row numbers (B,), on the CPU.
            epoch: Of training.

        Returns:
            uint8 (B, C, size, size).
        """
        boxes = boxes_of(rows, *pixels.shape[-2:], seed=self.seed, epoch=epoch, scale=self.scale, ratio=self.ratio)
        mirrored = (uniform(self.seed, "flip", epoch, rows, 1)[:, 0] < 0.5) & self.flip
        out = np.empty((*pixels.shape[:2], self.size, self.size), np.uint8)
        for b, (image, box) in enumerate(zip(pixels.numpy(), boxes.int().tolist(), strict=True)):
            seed_thread(self.seed, "rand_augment", epoch, int(rows[b]))
            out[b] = self._augmented(image, box, bool(mirrored[b]))
        return torch.from_numpy(out)

    def _augmented(self, image: np.ndarray, box: list[int], mirrored: bool) -> np.ndarray:
        """Augment the box (top, left, height, width) of one image (C, H, W)."""
        top, left, height, width = box
        cut = image[:, top : top + height, left : left + width]
        picture = Image.fromarray(np.ascontiguousarray(cut[0] if len(cut) == 1 else cut.transpose(1, 2, 0)))
        picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        done = np.asarray(self._transform(picture))
        return done[None] if done.ndim == 2 else done.transpose(2, 0, 1)
