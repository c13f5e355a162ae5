"""What the network sees of a batch, and what it is asked for: integers of a shard → image, mask, corrupted image, pyramid.

Legend: B images, C channels, K bands, H = W pixels a side, N cells of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wavemim.augment import random_resized_crop
from wavemim.inputs import Crop, Inputs
from wavemim.masking import Masking, corrupt, hidden_frequencies
from wavemim.wavelets import decompose


@dataclass(frozen=True)
class Augment:
    """RandomResizedCrop and mirroring on the device, out of whole stored images."""

    size: int  # pixels a side of what comes out
    scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    flip: bool = True


@dataclass(frozen=True)
class Frequencies:
    """Masking in the spectrum (MFM): a circle is kept, or all but the circle."""

    radius: float = 16.0  # in cycles an image
    low_pass_share: float = 0.5  # share of images that keep the circle


@dataclass(frozen=True)
class View:
    """A batch as the model takes it."""

    images: torch.Tensor  # (B, C, H, W) normalised, whole: what targets are made of
    seen: torch.Tensor  # the same, or without the frequencies that were taken away: what goes into the encoder
    pyramid: dict[int, torch.Tensor]  # {level: (B, C, K, h, w)} of the images
    mask: torch.Tensor  # bool (B, N), True = hidden
    spectrum: torch.Tensor | None  # bool (B, H, W), True = taken away


class Views:
    """Makes views; masks and crops are a pure function of (seed, epoch, row of the image)."""

    def __init__(
        self,
        inputs: Inputs,
        masking: Masking,
        *,
        seed: int,
        augment: Augment | None = None,
        frequencies: Frequencies | None = None,
    ) -> None:
        """`frequencies` is needed where masking.kind is "frequency"."""
        assert (masking.kind == "frequency") == (frequencies is not None)
        self.inputs, self.masking, self.seed = inputs, masking, seed
        self.augment, self.frequencies = augment, frequencies

    def __call__(
        self, stored: Mapping[int, torch.Tensor], rows: torch.Tensor, *, epoch: int, crop: Crop | None = None
    ) -> View:
        """The view of stored windows, or whole images, with row numbers (B,), in `epoch`."""
        with torch.no_grad():
            pixels, pyramid = self.inputs.raw(stored, crop)
            rows = rows.to(pixels.device, non_blocking=True)
            if self.augment is not None:
                pixels = random_resized_crop(
                    pixels,
                    rows,
                    size=self.augment.size,
                    seed=self.seed,
                    epoch=epoch,
                    scale=self.augment.scale,
                    ratio=self.augment.ratio,
                    flip=self.augment.flip,
                )
                pyramid = decompose(pixels, max(pyramid), self.inputs.wavelet)
            return self.of(self.inputs.normalise(pixels), pyramid, rows, epoch=epoch)

    def of(self, images: torch.Tensor, pyramid: dict[int, torch.Tensor], rows: torch.Tensor, *, epoch: int) -> View:
        """The view of normalised images and their pyramids."""
        with torch.no_grad():
            mask = self.masking(rows, pyramid, seed=self.seed, epoch=epoch)
            if self.frequencies is None:
                return View(images, images, pyramid, mask, None)
            spectrum = hidden_frequencies(
                rows,
                images.shape[-1],
                radius=self.frequencies.radius,
                low_pass_share=self.frequencies.low_pass_share,
                seed=self.seed,
                epoch=epoch,
            )
            return View(images, corrupt(images, spectrum), pyramid, mask, spectrum)
