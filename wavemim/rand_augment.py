"""RandomResizedCrop, mirroring and RandAugment on the CPU, image by image with Pillow: what timm's RandAugment works on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from wavemim.augment import boxes_of
from wavemim.randomness import uniform


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
