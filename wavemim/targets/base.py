"""The base class of prediction targets: taps, positions, and the error of predictions at hidden positions.

Legend: B images, C channels, H = W pixels per side, P positions per side of a tap, D values per position, S predicted
positions (P², or some of them), N cells of a mask.

A *position* of a tap is what one prediction vector describes: a token of the encoder at that tap or, where the cells of
the level are larger than a token, a cell. Cells of level n have 2^n pixels per side; level 0 stands for the token itself,
whatever its size (pixels, Fourier, and targets of one's own).

A target of one's own implements `values` and `forward`, and is registered by `wavemim.targets.register_target`. The rest
has defaults: the error is compared position by position, `picture` draws the size of the vectors, and `rebuild` makes no
image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from wavemim.constraints import check_cells
from wavemim.data_statistics import STD_FLOOR, Statistics

Normalise = Literal["dataset", "patch", "contrast", "none"]  # contrast: targets that predict bands only
Loss = Literal["l2", "l1", "smooth_l1"]


@dataclass(frozen=True)
class Tap:
    """A point in the encoder from which one level is predicted."""

    level: int
    block: int  # or stage of a hierarchical encoder; counted from 1
    bands: str = ""  # of A, H, V, D, in this order; targets that predict bands only


class Target(nn.Module):
    """What the taps of a model predict. Everything is computed in float32, whatever the network's precision.

    Attributes:
        predicts_bands: Whether each tap predicts bands of its stored wavelet level. Then `target.bands` applies, levels
            are at most those of the shard set, and each `Tap` names its bands.
        taps: The taps, ordered by level.
        image_size: H.
        token_sizes: Level → pixels per side of a token of the encoder at that tap.
        normalise: How targets are normalised.
        loss: Error of each value.
        channels: C.
    """

    predicts_bands: ClassVar[bool] = False

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
        """Create a target.

        Args:
            taps: Where in the encoder which level is predicted.
            statistics: Means and standard deviations of the training images.
            image_size: Pixels per side of the images.
            token_sizes: Level → pixels per side of a token of the encoder at that tap.
            normalise: How targets are normalised; each target defines what this means for it.
            loss: Error of each value.

        Raises:
            ValueError: If the cells of a level and the tokens do not divide each other or the image.
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
        """Return the pixels per side of a cell of `level`."""
        return 2**level if level else self.token_sizes[level]

    def positions(self, level: int) -> int:
        """Return P, the positions per side of the tap at `level`."""
        return self.image_size // max(self.token_sizes[level], self.cell_size(level))

    def cells(self, level: int) -> int:
        """Return the cells per side of one position at `level`."""
        return max(self.token_sizes[level] // self.cell_size(level), 1)

    def values(self, tap: Tap) -> int:
        """Return D, the number of values that `tap` predicts for each position."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Compute what predictions are compared with.

        Args:
            images: (B, C, H, W), normalised as the encoder takes them.
            pyramid: Level → coefficients (B, C, K, h, w) of the images, K bands.

        Returns:
            Level → (B, P², D), float32 and without gradient.
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
        """Compute the error of each image over its hidden positions.

        Args:
            level: The tap's level.
            prediction: (B, S, D), of all positions, or of those that `index` names.
            target: (B, P², D), from `forward`.
            share: (B, P²) in [0, 1], the hidden share of each position. It is the position's weight, so that visible
                positions do not count (LocalMIM, Wang et al. 2023, eq. 3, weights partly hidden cells in the same way).
            index: (B, S), the predicted positions; None: all.
            spectrum: (B, H, W), the frequencies that were removed from the input, where masking is done in the
                spectrum. Used by the Fourier target only.

        Returns:
            (B,), float32.
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
        """Draw vectors as pictures, for the figures that compare ground truth and prediction.

        This default draws the root mean square of each position's values, in grey, as bright as in the ground truth.

        Args:
            level: The tap's level.
            vectors: (B, P², D), ground truth or predictions.
            images: (B, C, H, W), normalised. Scales that are not part of the vectors (normalise="patch") come from them.
            pyramid: As for `forward`.
            mask: (B, N), True where the input was hidden. It matters to targets that do not compare position by position.

        Returns:
            (B, C or 1, h, w), with values in about [0, 255].
        """
        truth = _magnitudes(self.forward(images, pyramid)[level])
        peak = truth.amax(1, keepdim=True).clamp_min(1e-6)
        return (255 * _magnitudes(vectors.float()) / peak).unflatten(1, (1, self.positions(level), -1))

    def rebuild(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor | None:
        """Rebuild images from predictions; visible parts are those of the input.

        Args:
            predictions: Level → (B, P², D).
            images: (B, C, H, W), normalised.
            pyramid: As for `forward`.
            mask: (B, N), on any square grid that divides the image.

        Returns:
            (B, C, H, W), with values in about [0, 255]; None where predictions do not determine an image, which is the
            default.
        """
        return None

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised images (B, C, H, W) as pixel values in about [0, 255]."""
        mean, std = (self.get_buffer(name)[None, :, None, None] for name in ("pixel_mean", "pixel_std"))
        return images.float() * std + mean


def elementwise(prediction: torch.Tensor, target: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Return the error of every element: squared, absolute, or Huber's with threshold 1 (torch's smooth_l1_loss)."""
    if loss == "l2":
        return (prediction - target).square()
    if loss == "l1":
        return (prediction - target).abs()
    return F.smooth_l1_loss(prediction, target, reduction="none")


def to_positions(maps: torch.Tensor, cells: int) -> torch.Tensor:
    """Rearrange maps (B, C, K, P·cells, P·cells) into vectors (B, P², C·K·cells²)."""
    b, c, k, h, w = maps.shape
    split = maps.reshape(b, c, k, h // cells, cells, w // cells, cells)
    return split.permute(0, 3, 5, 1, 2, 4, 6).reshape(b, (h // cells) * (w // cells), c * k * cells * cells)


def from_positions(vectors: torch.Tensor, channels: int, bands: int, cells: int) -> torch.Tensor:
    """Invert `to_positions`: vectors (B, P², C·K·cells²) become maps (B, C, K, P·cells, P·cells)."""
    side = round(vectors.shape[1] ** 0.5)
    split = vectors.reshape(-1, side, side, channels, bands, cells, cells)
    return split.permute(0, 3, 4, 1, 5, 2, 6).reshape(-1, channels, bands, side * cells, side * cells)


def moments(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each vector (..., 1), as MAE normalises patches (unbiased, 1e-6)."""
    return vectors.mean(-1, keepdim=True), (vectors.var(-1, keepdim=True) + 1e-6).sqrt()


def _magnitudes(vectors: torch.Tensor) -> torch.Tensor:
    """Return the root mean square (B, P²) of the values of each position."""
    return vectors.square().mean(-1).sqrt()
