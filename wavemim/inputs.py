"""From the integers of a shard to what the model sees, on the device: coefficients and normalised images, float32.

Legend: B images, C channels, K bands, h·w cells of a level, H = W pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from wavemim.targets import STD_FLOOR, Statistics
from wavemim.wavelets import decompose, reconstruct


@dataclass(frozen=True)
class Crop:
    """Windows that are still to be cut, out of whole pyramids: for wavelets that do not allow it on coefficients."""

    corners: torch.Tensor  # int64 (B, 2): top and left in pixels, multiples of 2^levels
    mirrored: torch.Tensor  # bool (B,): mirror the whole image horizontally first
    size: int  # side in pixels

    def __getitem__(self, chosen: slice | torch.Tensor) -> Crop:
        """The crops of some of the images."""
        return Crop(self.corners[chosen], self.mirrored[chosen], self.size)


class Inputs(nn.Module):
    """Dequantises stored pyramids and reconstructs the images that belong to them."""

    def __init__(
        self, steps: Mapping[int, float], statistics: Statistics, wavelet: str = "haar", depth: int | None = None
    ) -> None:
        """`steps`: quantisation step of each stored level, in coefficient units. `depth`: levels that every pyramid has
        at least; those that are not stored are computed."""
        super().__init__()
        self.steps, self.wavelet, self.depth = dict(steps), wavelet, depth
        self.register_buffer("mean", torch.tensor(statistics.pixel_mean).float()[None, :, None, None], persistent=False)
        std = torch.tensor(statistics.pixel_std).float().clamp_min(STD_FLOOR)[None, :, None, None]
        self.register_buffer("std", std, persistent=False)

    def pyramid(self, stored: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Coefficients {level: (B, C, K, h, w)} of stored integers, on this module's device."""
        device = self.get_buffer("mean").device
        return {
            level: values.to(device, non_blocking=True).float() * self.steps[level] for level, values in stored.items()
        }

    def pixels(self, pyramid: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Images (B, C, H, W) with values in about [0, 255].

        Without the levels below n they are smaller, 1/2^(n-1) of the side: a level's A, scaled to pixel values.
        """
        finer = min(pyramid) - 1
        return reconstruct(dict(pyramid), self.wavelet, to=finer) / 2**finer

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images as the encoder takes them: zero mean and unit deviation over the data set, per channel."""
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(
        self, stored: Mapping[int, torch.Tensor], crop: Crop | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Normalised images (B, C, H, W) and the pyramid they come from, of stored windows, or windowed by `crop`.

        Of what is stored without its finest levels the images are halved as often, and levels count from these images on.
        """
        pixels, pyramid = self.raw(stored, crop)
        return self.normalise(pixels), pyramid

    def raw(
        self, stored: Mapping[int, torch.Tensor], crop: Crop | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """As `forward`, with the images in pixel values."""
        with torch.no_grad():
            pyramid = self.pyramid(stored)
            pixels = self.pixels(pyramid)
            if crop is not None:
                pixels, pyramid = self._cut(pixels, pyramid, crop)
            return pixels, self._of_halved(pyramid)

    def _of_halved(self, pyramid: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The pyramid of the halved image: its A is halved with each level that is not there, so all of it is."""
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
        """Image and coefficients cut at the same place; of a mirrored image the coefficients are those of the mirror.

        Every level gets its A, cut out of the whole: the inverse of a cut pyramid would differ along its edges.
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


def window_of(values: torch.Tensor, crop: Crop, level: int) -> torch.Tensor:
    """The windows (B, …, h, w) of the values (B, …, H/2^level, W/2^level) of a level."""
    side = crop.size >> level
    corners = (crop.corners >> level).to(values.device, non_blocking=True)
    cells = torch.arange(side, device=values.device)
    rows, columns = corners[:, :1] + cells, corners[:, 1:] + cells
    extra = (1,) * (values.ndim - 3)
    rows = rows.reshape(len(rows), *extra, side, 1).expand(*values.shape[:-2], side, values.shape[-1])
    cut = values.gather(-2, rows)
    columns = columns.reshape(len(columns), *extra, 1, side).expand(*values.shape[:-2], side, side)
    return cut.gather(-1, columns)
