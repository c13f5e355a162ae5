"""From the integers of a shard to what the model sees, on the device: coefficients and normalised images, float32.

Legend: B images, C channels, K bands, h·w cells of a level, H = W pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from wavemim.targets import Statistics
from wavemim.wavelets import reconstruct


class Inputs(nn.Module):
    """Dequantises stored pyramids and reconstructs the images that belong to them."""

    def __init__(self, steps: Mapping[int, float], statistics: Statistics, wavelet: str = "haar") -> None:
        """`steps`: quantisation step of each stored level, in coefficient units."""
        super().__init__()
        self.steps, self.wavelet = dict(steps), wavelet
        self.register_buffer("mean", torch.tensor(statistics.pixel_mean).float()[None, :, None, None], persistent=False)
        std = torch.tensor(statistics.pixel_std).float().clamp_min(1e-3)[None, :, None, None]
        self.register_buffer("std", std, persistent=False)

    def pyramid(self, stored: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Coefficients {level: (B, C, K, h, w)} of stored integers, on this module's device."""
        device = self.get_buffer("mean").device
        return {
            level: values.to(device, non_blocking=True).float() * self.steps[level] for level, values in stored.items()
        }

    def pixels(self, pyramid: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Images (B, C, H, W) with values in about [0, 255]."""
        return reconstruct(dict(pyramid), self.wavelet)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images as the encoder takes them: zero mean and unit deviation over the data set, per channel."""
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, stored: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Normalised images (B, C, H, W) and the pyramid they come from."""
        with torch.no_grad():
            pyramid = self.pyramid(stored)
            return self.normalise(self.pixels(pyramid)), pyramid
