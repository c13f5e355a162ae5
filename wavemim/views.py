"""Views of a batch: from the integers of a shard to image, mask, corrupted image and pyramid.

Legend: B images, C channels, K bands, h·w cells of a level, H = W pixels per side, N cells of the mask, M masks of each
image. Dimension M·B: the whole batch with its first masks, then with its second ones, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wavemim.augment import random_resized_crop
from wavemim.inputs import Crop, Inputs
from wavemim.masking import Frequencies, Masking, corrupt, hidden_frequencies
from wavemim.wavelets import decompose


@dataclass(frozen=True)
class Augment:
    """RandomResizedCrop and mirroring of whole stored images on the device.

    Attributes:
        size: Pixels per side of the result.
        scale: Range of the crop's fraction of the image's area.
        ratio: Range of the crop's width / height.
        flip: Whether to mirror half of the images.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True


@dataclass(frozen=True)
class View:
    """A batch for the model.

    Attributes:
        images: (B, C, H, W), normalised, complete: the source of the targets.
        seen: The encoder's input (M·B, C, H, W): the same, or without the removed frequencies.
        pyramid: {level: (B, C, K, h, w)}, coefficients of the images.
        mask: bool (M·B, N), True = hidden.
        spectrum: bool (M·B, H, W), True = removed; None if masking is not by frequency.
    """

    images: torch.Tensor
    seen: torch.Tensor
    pyramid: dict[int, torch.Tensor]
    mask: torch.Tensor
    spectrum: torch.Tensor | None


def repeated(values: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat a batch.

    Args:
        values: (B, …).
        count: M.

    Returns:
        (M·B, …): the whole batch M times; for M = 1 the batch itself.
    """
    return values if count == 1 else values.repeat(count, *[1] * (values.ndim - 1))


class Views:
    """Makes views. Masks and crops are pure functions of (seed, epoch, row of the image, number of the mask).

    An image is cropped and mirrored once, however many masks it has.
    """

    def __init__(
        self,
        inputs: Inputs,
        masking: Masking,
        *,
        seed: int,
        augment: Augment | None = None,
        frequencies: Frequencies | None = None,
        masks: int = 1,
    ) -> None:
        """Create the views of a run.

        Args:
            inputs: Reconstructs the images.
            masking: Draws the masks.
            seed: Of the run.
            augment: Crops and mirrors whole images, if given.
            frequencies: Masking by frequency; needed if and only if masking.kind is "frequency".
            masks: M.
        """
        assert (masking.kind == "frequency") == (frequencies is not None)
        self.inputs, self.masking, self.seed = inputs, masking, seed
        self.augment, self.frequencies, self.masks = augment, frequencies, masks

    def __call__(
        self, stored: Mapping[int, torch.Tensor], rows: torch.Tensor, *, epoch: int, crop: Crop | None = None
    ) -> View:
        """Make the view of a batch.

        Args:
            stored: Integers {level: (B, C, K, h, w)}, of windows or whole images.
            rows: Row numbers (B,) of the images.
            epoch: Of training.
            crop: Windows to cut, if any.

        Returns:
            The view.
        """
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
        """Make the view of normalised images.

        Args:
            images: (B, C, H, W).
            pyramid: Their coefficients {level: (B, C, K, h, w)}.
            rows: Row numbers (B,).
            epoch: Of training.

        Returns:
            The view.
        """
        with torch.no_grad():
            numbers = range(self.masks)
            mask = torch.cat([self.masking(rows, pyramid, seed=self.seed, epoch=epoch, number=n) for n in numbers])
            seen = repeated(images, self.masks)
            if self.frequencies is None:
                return View(images, seen, pyramid, mask, None)
            spectra = [
                hidden_frequencies(
                    rows,
                    images.shape[-1],
                    radius=self.frequencies.radius,
                    low_pass_share=self.frequencies.low_pass_share,
                    seed=self.seed,
                    epoch=epoch,
                    number=number,
                )
                for number in numbers
            ]
            spectrum = torch.cat(spectra)
            return View(images, corrupt(seen, spectrum), pyramid, mask, spectrum)
