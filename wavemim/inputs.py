"""From the integers of a shard to the model's input, on the device: coefficients and normalised images, float32.

Legend: B images, C channels, K bands, h·w cells of a level, H = W pixels per side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from wavemim.data_statistics import STD_FLOOR, Statistics
from wavemim.wavelets import decompose, is_haar, reconstruct

_WORDS = (torch.int64, torch.int32, torch.int16)


@dataclass(frozen=True)
class Crop:
    """Windows to cut from whole pyramids. Coefficients of Haar can be cut and mirrored as they are stored.

    Attributes:
        corners: int64 (B, 2), top and left in pixels, multiples of 2^levels.
        mirrored: bool (B,), whether to mirror horizontally: with Haar the window, else the whole image first.
        size: Pixels per side of the windows.
    """

    corners: torch.Tensor
    mirrored: torch.Tensor
    size: int

    def __getitem__(self, chosen: slice | torch.Tensor) -> Crop:
        """Return the crops of some of the images."""
        return Crop(self.corners[chosen], self.mirrored[chosen], self.size)


class Inputs(nn.Module):
    """Dequantises stored pyramids and reconstructs their images."""

    def __init__(
        self, steps: Mapping[int, float], statistics: Statistics, wavelet: str = "haar", depth: int | None = None
    ) -> None:
        """Create the module.

        Args:
            steps: {level: quantisation step}, in coefficient units.
            statistics: Statistics of the shard set.
            wavelet: PyWavelets' name of the wavelet.
            depth: Levels of every pyramid, at least; levels that are not stored are computed.
        """
        super().__init__()
        self.steps, self.wavelet, self.depth = dict(steps), wavelet, depth
        self.register_buffer("mean", torch.tensor(statistics.pixel_mean).float()[None, :, None, None], persistent=False)
        std = torch.tensor(statistics.pixel_std).float().clamp_min(STD_FLOOR)[None, :, None, None]
        self.register_buffer("std", std, persistent=False)

    def pyramid(self, stored: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return coefficients {level: (B, C, K, h, w)} of stored integers, on this module's device."""
        device = self.get_buffer("mean").device
        return {
            level: values.to(device, non_blocking=True).float() * self.steps[level] for level, values in stored.items()
        }

    def pixels(self, pyramid: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Reconstruct images (B, C, H, W) with values in about [0, 255].

        If the finest level is n > 1, the images are smaller by 2^(n-1): the A of level n - 1, scaled to pixel values.
        """
        finer = min(pyramid) - 1
        return reconstruct(dict(pyramid), self.wavelet, to=finer) / 2**finer

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise images (B, C, H, W): zero mean and unit standard deviation over the data set, per channel."""
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(
        self, stored: Mapping[int, torch.Tensor], crop: Crop | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Compute normalised images and their pyramids.

        If the finest levels are not read, the images are halved accordingly, and levels are counted from these images.

        Args:
            stored: Integers {level: (B, C, K, h, w)}, of windows or, with `crop`, of whole images.
            crop: The windows to cut.

        Returns:
            Images (B, C, H, W) and coefficients {level: (B, C, K, h, w)}.
        """
        pixels, pyramid = self.raw(stored, crop)
        return self.normalise(pixels), pyramid

    def raw(
        self, stored: Mapping[int, torch.Tensor], crop: Crop | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Do the same as `forward`, with images in pixel values."""
        with torch.no_grad():
            if crop is not None and is_haar(self.wavelet):
                device = self.get_buffer("mean").device
                stored = {level: values.to(device, non_blocking=True) for level, values in stored.items()}
                stored, crop = haar_windows(stored, crop), None
            pyramid = self.pyramid(stored)
            pixels = self.pixels(pyramid)
            if crop is not None:
                pixels, pyramid = self._cut(pixels, pyramid, crop)
            return pixels, self._of_halved(pyramid)

    def _of_halved(self, pyramid: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The pyramid of the halved image: coefficients are halved once for each finest level that is missing."""
        finer = min(pyramid) - 1
        if finer:
            pyramid = {level - finer: values / 2**finer for level, values in pyramid.items()}
        coarsest = max(pyramid)
        if self.depth is not None and coarsest < self.depth:
            deeper = decompose(pyramid[coarsest][:, :, 0], self.depth - coarsest, self.wavelet)
            pyramid |= {coarsest + level: values for level, values in deeper.items()}
        return pyramid

    def _cut(
        self, pixels: torch.Tensor, pyramid: dict[int, torch.Tensor], crop: Crop
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Cut image and coefficients at the same place; a mirrored image is transformed again.

        Every level gets its A, cut from the whole: the inverse of a cut pyramid would differ along its edges.
        """
        finer = min(pyramid) - 1
        if bool(crop.mirrored.any()):  # on the CPU, where the reader made it
            mirrored = crop.mirrored.to(pixels.device, non_blocking=True)[:, None, None, None]
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
            deeper = decompose(pixels * 2**finer, max(pyramid) - finer, self.wavelet)
            pyramid = {level + finer: values for level, values in deeper.items()}
        for level in range(max(pyramid) - 1, finer, -1):
            approximation = reconstruct({level + 1: pyramid[level + 1]}, self.wavelet, to=level)
            pyramid[level] = torch.cat((approximation[:, :, None], pyramid[level]), 2)
        return window_of(pixels, crop, finer), {
            level: window_of(values, crop, level) for level, values in pyramid.items()
        }


def haar_windows(stored: Mapping[int, torch.Tensor], crop: Crop) -> dict[int, torch.Tensor]:
    """Cut windows of Haar pyramids, and mirror them, on the device where they are.

    As `wavemim.wavelets.window`, for a batch and without a transform: a mirrored window has its columns reversed, and
    the signs of V and D changed.

    Args:
        stored: {level: (B, C, K, h, w)}, coefficients or stored integers.
        crop: The windows.

    Returns:
        {level: (B, C, K, crop.size/2^level, crop.size/2^level)}.
    """
    found = {level: window_of(values, crop, level) for level, values in stored.items()}
    mirrored = crop.mirrored.nonzero()[:, 0]  # without waiting for the device: the reader makes them on the CPU
    if not len(mirrored):
        return found
    for level, values in found.items():
        chosen = mirrored.to(values.device, non_blocking=True)
        reverse = values.index_select(0, chosen).flip(-1)
        reverse[:, :, -2:].neg_()
        found[level] = values.clone() if values is stored[level] else values
        found[level][chosen] = reverse
    return found


def window_of(values: torch.Tensor, crop: Crop, level: int) -> torch.Tensor:
    """Cut windows from a level.

    Args:
        values: (B, …, H/2^level, W/2^level).
        crop: The windows.
        level: The level; 0 for images.

    Returns:
        (B, …, crop.size/2^level, crop.size/2^level).
    """
    side = crop.size >> level
    if side == values.shape[-1] == values.shape[-2]:
        return values
    corners = crop.corners >> level
    # Several small integers at once, as one large one, are copied several times as fast.
    unit = math.gcd(side, values.shape[-1], *corners[:, 1].tolist()) * values.element_size()
    word = next((word for word in _WORDS if unit % word.itemsize == 0), None) if values.is_contiguous() else None
    wide = values if word is None else values.view(word)
    cells = values.shape[-1] // wide.shape[-1]
    top, left = corners.to(values.device, non_blocking=True).unbind(1)
    # (B, places, places, …, side, side): a view
    every = wide.unfold(-2, side, 1).unfold(-2, side // cells, 1).movedim((-4, -3), (1, 2))
    return every[torch.arange(len(values), device=values.device), top, left // cells].view(values.dtype)
