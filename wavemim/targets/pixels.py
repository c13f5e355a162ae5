"""Pixels, plain or normalised per patch (MAE, He et al. 2022; SimMIM, Xie et al. 2022).

Legend as in `wavemim.targets.base`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wavemim.data_statistics import Statistics
from wavemim.masking import filled_in
from wavemim.registry import register_target
from wavemim.targets.base import Loss, Normalise, Tap, Target, from_positions, moments, to_positions


@register_target("pixels")
class PixelTarget(Target):
    """The pixels of every position, channel by channel: D = C · side², where side is the larger of token and cell.

    `normalise`: "dataset": zero mean and unit standard deviation per channel over the data set; "patch": in addition
    by the mean and standard deviation of each cell over all its C · cell² values (MAE: level 0, where a cell is the
    token); "none": minus the data set's mean per channel, in units of the channels' mean standard deviation, so that
    channels keep their relative contrast and the loss is a plain pixel loss up to a constant.

    Taps at several levels predict the same pixels, grouped and normalised in cells of different sizes (LocalMIM, Wang
    et al. 2023, with pixels). MAE orders a patch's values y, x, channel; here the order is channel, y, x, with the same
    loss.
    """

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
        """Create the target. Arguments and errors are those of `Target`."""
        super().__init__(
            taps, statistics, image_size=image_size, token_sizes=token_sizes, normalise=normalise, loss=loss
        )
        std = self.get_buffer("pixel_std")
        unit = std / std.mean() if normalise == "none" else torch.ones_like(std)
        self.register_buffer("unit", unit[None, :, None, None].clone(), persistent=False)

    def side(self, level: int) -> int:
        """Return the pixels per side of one position."""
        return max(self.token_sizes[level], self.cell_size(level))

    def values(self, tap: Tap) -> int:
        """Return D = C · side²."""
        return self.channels * self.side(tap.level) ** 2

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Compute targets {level: (B, P², D)} of images (B, C, H, W). The pyramid is not used."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            scaled = images.float() * self.get_buffer("unit")
            return {tap.level: self._vectors(tap.level, scaled) for tap in self.taps}

    def picture(
        self,
        level: int,
        vectors: torch.Tensor,
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the pixels (B, C, H, W); with normalise="patch" the mean and scale of each cell are the true ones.

        Arguments as for `Target.picture`.
        """
        return self.to_pixels(self._images(level, vectors, images))

    def rebuild(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Fill hidden pixels with the predictions of the deepest tap (of several at one block, the finest level).

        Arguments as for `Target.rebuild`.
        """
        tap = max((tap for tap in self.taps if tap.level in predictions), key=lambda tap: (tap.block, -tap.level))
        predicted = self._images(tap.level, predictions[tap.level], images)
        return self.to_pixels(filled_in(images.float(), predicted, mask))

    def _vectors(self, level: int, scaled: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in the unit of the target as vectors (B, P², D)."""
        if self.normalise == "patch":
            cells = to_positions(scaled[:, :, None], self.cell_size(level))
            mean, deviation = moments(cells)
            cells = (cells - mean) / deviation
            if self.cell_size(level) == self.side(level):
                return cells
            scaled = from_positions(cells, self.channels, 1, self.cell_size(level))[:, :, 0]
        return to_positions(scaled[:, :, None], self.side(level))

    def _images(self, level: int, vectors: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) of vectors (B, P², D): the inverse of `forward` at one tap."""
        unit, cell = self.get_buffer("unit"), self.cell_size(level)
        found = from_positions(vectors.float(), self.channels, 1, self.side(level))[:, :, 0]
        if self.normalise == "patch":
            mean, deviation = moments(to_positions((images.float() * unit)[:, :, None], cell))
            cells = to_positions(found[:, :, None], cell) * deviation + mean
            found = from_positions(cells, self.channels, 1, cell)[:, :, 0]
        return found / unit
