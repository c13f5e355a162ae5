"""What each tap is asked for: from a pyramid to {level: target}, in float32.

Legend: B images, C channels, K bands, P positions a side, D values a position.

A *position* of a tap is what one prediction vector answers for. A token of p pixels holds (p/2^level)² cells of the
level's grid; a tap whose cells are larger than a token (2^level > p) has one position a cell, and pools tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from wavemim.wavelets import reconstruct

Normalise = Literal["level", "patch", "none"]


@dataclass(frozen=True)
class Tap:
    """A point in the encoder from which one level is predicted."""

    level: int
    block: int  # counted from 1
    bands: str  # of A, H, V, D, in this order


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of a shard set, in coefficient units.

    `mean` and `std` map level -> band -> one value a channel; `pixel_mean` and `pixel_std` are those of the pixels.
    """

    mean: Mapping[int, Mapping[str, list[float]]]
    std: Mapping[int, Mapping[str, list[float]]]
    pixel_mean: list[float]
    pixel_std: list[float]


class WaveletTarget(nn.Module):
    """Wavelet coefficients of every tapped level, standardised, as vectors a position.

    `normalise`: "level" by the data set's mean and standard deviation per level, band and channel; "patch" in addition
    by those of the position's own vector, as MAE does with pixels; "none" in units of the pixels' standard deviation,
    orthonormal, so that the sum over all levels is a plain pixel loss.
    """

    def __init__(
        self,
        taps: list[Tap],
        statistics: Statistics,
        *,
        image_size: int,
        patch_size: int,
        wavelet: str = "haar",
        normalise: Normalise = "level",
    ) -> None:
        super().__init__()
        self.taps = sorted(taps, key=lambda tap: tap.level)
        self.wavelet, self.normalise = wavelet, normalise
        self.image_size, self.patch_size = image_size, patch_size
        self.channels = len(statistics.pixel_mean)
        pixel_scale = sum(statistics.pixel_std) / self.channels
        for tap in self.taps:
            mean = torch.tensor([statistics.mean[tap.level][band] for band in tap.bands])  # (K, C)
            std = torch.tensor([statistics.std[tap.level][band] for band in tap.bands])
            if normalise == "none":
                mean = torch.where(torch.tensor([[band == "A"] for band in tap.bands]), mean, torch.zeros_like(mean))
                std = torch.full_like(std, pixel_scale)
            self.register_buffer(f"mean{tap.level}", mean.T[None, :, :, None, None].float().clone(), persistent=False)
            # a band that never varies (a data set of flat images) must not become an infinity
            self.register_buffer(
                f"std{tap.level}", std.T[None, :, :, None, None].float().clamp_min(1e-6).clone(), persistent=False
            )

    def positions(self, level: int) -> int:
        """Positions a side of the tap at `level`."""
        return self.image_size // max(self.patch_size, 2**level)

    def cells(self, level: int) -> int:
        """Cells a side of one position."""
        return max(self.patch_size // 2**level, 1)

    def values(self, tap: Tap) -> int:
        """D: values of one position, C · K · cells²."""
        return self.channels * len(tap.bands) * self.cells(tap.level) ** 2

    def forward(self, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Targets {level: (B, P², D)} of a pyramid {level: (B, C, K, h, w)} in coefficient units, without gradient."""
        with torch.no_grad(), torch.autocast(next(iter(pyramid.values())).device.type, enabled=False):
            targets = {}
            for tap in self.taps:
                coefficients = (self._bands(pyramid, tap) - self._mean(tap.level)) / self._std(tap.level)
                vectors = self._to_positions(coefficients, self.cells(tap.level))
                if self.normalise == "patch":
                    mean, variance = vectors.mean(-1, keepdim=True), vectors.var(-1, keepdim=True)
                    vectors = (vectors - mean) / (variance + 1e-6).sqrt()
                targets[tap.level] = vectors
            return targets

    def coefficients(self, predictions: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Predictions {level: (B, P², D)} back as coefficients {level: (B, C, K, h, w)} of each tap's bands.

        With normalise="patch" the scale of a position is not part of the prediction: see `coefficients_like`.
        """
        return {
            tap.level: self._from_positions(predictions[tap.level].float(), tap) * self._std(tap.level)
            + self._mean(tap.level)
            for tap in self.taps
        }

    def coefficients_like(
        self, predictions: Mapping[int, torch.Tensor], pyramid: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """As `coefficients`; where positions were normalised by themselves, with the true mean and scale (figures)."""
        if self.normalise != "patch":
            return self.coefficients(predictions)
        scaled = {}
        for tap in self.taps:
            true = (self._bands(pyramid, tap) - self._mean(tap.level)) / self._std(tap.level)
            vectors = self._to_positions(true, self.cells(tap.level))
            mean, variance = vectors.mean(-1, keepdim=True), vectors.var(-1, keepdim=True)
            scaled[tap.level] = predictions[tap.level].float() * (variance + 1e-6).sqrt() + mean
        return self.coefficients(scaled)

    def _bands(self, pyramid: Mapping[int, torch.Tensor], tap: Tap) -> torch.Tensor:
        """(B, C, K, h, w) of the tap's bands; A of a level that stores none is rebuilt from the coarser levels."""
        stored = pyramid[tap.level]
        details = {"H": stored[:, :, -3], "V": stored[:, :, -2], "D": stored[:, :, -1]}
        if "A" in tap.bands:
            given = stored.shape[2] == 4
            details["A"] = stored[:, :, 0] if given else reconstruct(dict(pyramid), self.wavelet, to=tap.level)
        return torch.stack([details[band] for band in tap.bands], 2).float()

    def _mean(self, level: int) -> torch.Tensor:
        return self.get_buffer(f"mean{level}")

    def _std(self, level: int) -> torch.Tensor:
        return self.get_buffer(f"std{level}")

    @staticmethod
    def _to_positions(coefficients: torch.Tensor, cells: int) -> torch.Tensor:
        """(B, C, K, P·cells, P·cells) to (B, P², C·K·cells²)."""
        b, c, k, h, w = coefficients.shape
        split = coefficients.reshape(b, c, k, h // cells, cells, w // cells, cells)
        return split.permute(0, 3, 5, 1, 2, 4, 6).reshape(b, (h // cells) * (w // cells), c * k * cells * cells)

    def _from_positions(self, vectors: torch.Tensor, tap: Tap) -> torch.Tensor:
        """Inverse of `_to_positions`."""
        cells, side = self.cells(tap.level), self.positions(tap.level)
        split = vectors.reshape(-1, side, side, self.channels, len(tap.bands), cells, cells)
        return split.permute(0, 3, 4, 1, 5, 2, 6).reshape(-1, self.channels, len(tap.bands), side * cells, side * cells)
