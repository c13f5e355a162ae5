"""What every target has in common: taps, positions, and the error of predictions at hidden positions.

Legend: B images, C channels, H = W pixels a side, P positions a side of a tap, D values a position, S predicted
positions (P², or a part of them).

A *position* of a tap is what one prediction vector answers for: a token of the encoder at that tap, or, where the cells
of the level are larger than a token, a cell. Cells of level n have 2^n pixels a side; level 0 stands for the token
itself, whatever its size (pixels and Fourier alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from wavemim.constraints import check_cells
from wavemim.data_statistics import STD_FLOOR, Statistics

Normalise = Literal["dataset", "patch", "contrast", "none"]  # contrast: wavelet alone
Loss = Literal["l2", "l1", "smooth_l1"]


@dataclass(frozen=True)
class Tap:
    """A point in the encoder from which one level is predicted."""

    level: int
    block: int  # or stage of a hierarchical encoder; counted from 1
    bands: str = ""  # of A, H, V, D, in this order; wavelet alone


class Target(nn.Module):
    """What the taps of a model are asked for. Everything in here is float32, whatever the network computes in."""

    def __init__(
        self,
        taps: list[Tap],
        statistics: Statistics,
        *,
        image_size: int,
        token_sizes: Mapping[int, int],
        normalise: Normalise = "dataset",
        loss: Loss = "l2",
    ) -> None:
        """`token_sizes`: level -> pixels a side of a token of the encoder at that tap.

        Raises ValueError where a level's cells and the tokens do not divide each other or the image.
        """
        super().__init__()
        self.taps = sorted(taps, key=lambda tap: tap.level)
        self.image_size, self.token_sizes = image_size, dict(token_sizes)
        self.normalise, self.loss = normalise, loss
        self.channels = len(statistics.pixel_mean)
        for tap in self.taps:
            check_cells(tap.level, self.token_sizes[tap.level], image_size)
        self.register_buffer("pixel_mean", torch.tensor(statistics.pixel_mean).float(), persistent=False)
        self.register_buffer(
            "pixel_std", torch.tensor(statistics.pixel_std).float().clamp_min(STD_FLOOR), persistent=False
        )

    def cell_size(self, level: int) -> int:
        """Pixels a side of a cell."""
        return 2**level if level else self.token_sizes[level]

    def positions(self, level: int) -> int:
        """P: positions a side of the tap at `level`."""
        return self.image_size // max(self.token_sizes[level], self.cell_size(level))

    def cells(self, level: int) -> int:
        """Cells a side of one position."""
        return max(self.token_sizes[level] // self.cell_size(level), 1)

    def values(self, tap: Tap) -> int:
        """D: values of one position."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """What predictions are compared with, {level: tensor}, float32 and without gradient.

        `images` (B, C, H, W) are normalised as the encoder takes them, `pyramid` {level: (B, C, K, h, w)} are their
        coefficients. Each tensor is (B, P², D) where the target is compared position by position.
        """
        raise NotImplementedError

    def error(
        self,
        level: int,
        prediction: torch.Tensor,
        target: torch.Tensor,
        share: torch.Tensor,
        index: torch.Tensor | None = None,
        spectrum: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Error of each image (B,) over its hidden positions, float32.

        `prediction` (B, S, D) of all positions, or of those named by `index` (B, S); `target` as of `forward`; `share`
        (B, P²) in [0, 1] is the hidden share of each position and its weight, so that visible ones count nothing
        (LocalMIM, Wang et al. 2023, eq. 3, weights cells that are partly hidden in the same way). `spectrum`
        (B, H, W): the frequencies that were taken away, where masking is done there; for Fourier alone.
        """
        if index is not None:
            target = target.gather(1, index[:, :, None].expand(-1, -1, target.shape[2]))
            share = share.gather(1, index)
        with torch.autocast(prediction.device.type, enabled=False):
            error = elementwise(prediction.float(), target, self.loss).mean(-1)
            return (error * share).sum(1) / share.sum(1)

    def picture(
        self,
        level: int,
        vectors: torch.Tensor,
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """What `vectors` (B, P², D), true or predicted, show of `images`: (B, C or 1, h, w) in about [0, 255].

        Scales that are no part of the vectors (normalise="patch") are taken from the true image. `mask` (B, N) says
        where they were asked for: to a target that does not compare position by position this matters.
        """
        raise NotImplementedError

    def rebuild(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor | None:
        """Images (B, C, H, W) in about [0, 255] of predictions {level: (B, P², D)}; what is visible is the input's.

        `mask` (B, N) on any square grid that divides the image. None where predictions determine no image.
        """
        return None

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) as pixel values."""
        mean, std = (self.get_buffer(name)[None, :, None, None] for name in ("pixel_mean", "pixel_std"))
        return images.float() * std + mean


def elementwise(prediction: torch.Tensor, target: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Error of every element: squared, absolute, or Huber's with threshold 1 (torch's smooth_l1_loss)."""
    if loss == "l2":
        return (prediction - target).square()
    if loss == "l1":
        return (prediction - target).abs()
    return F.smooth_l1_loss(prediction, target, reduction="none")


def to_positions(maps: torch.Tensor, cells: int) -> torch.Tensor:
    """Maps (B, C, K, P·cells, P·cells) as vectors (B, P², C·K·cells²)."""
    b, c, k, h, w = maps.shape
    split = maps.reshape(b, c, k, h // cells, cells, w // cells, cells)
    return split.permute(0, 3, 5, 1, 2, 4, 6).reshape(b, (h // cells) * (w // cells), c * k * cells * cells)


def from_positions(vectors: torch.Tensor, channels: int, bands: int, cells: int) -> torch.Tensor:
    """Inverse of `to_positions`: (B, C, K, P·cells, P·cells)."""
    side = round(vectors.shape[1] ** 0.5)
    split = vectors.reshape(-1, side, side, channels, bands, cells, cells)
    return split.permute(0, 3, 4, 1, 5, 2, 6).reshape(-1, channels, bands, side * cells, side * cells)


def moments(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each vector along its last axis, kept, as MAE normalises patches (unbiased, 1e-6)."""
    return vectors.mean(-1, keepdim=True), (vectors.var(-1, keepdim=True) + 1e-6).sqrt()
