"""Histograms of oriented gradients (HOG, Dalal and Triggs 2005), as a target: MaskFeat (Wei et al. 2022), LocalMIM.

Legend as in `wavemim.targets.base`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from wavemim.constraints import check_level
from wavemim.data_statistics import Statistics
from wavemim.registry import register_target
from wavemim.targets.base import Loss, Normalise, Tap, Target, from_positions, to_positions

EPSILON = (
    1e-3  # in standard deviations of the pixels: gradients below about a twentieth of a grey level of 256 are flat
)
FIXED_POINT = 2.0**24  # votes are counted in this fraction of the pixels' standard deviation
STROKE = 16  # pixels per side of a cell in pictures, at least


@register_target("hog")
class HOGTarget(Target):
    """A histogram of gradient directions for each cell and channel, as vectors in the order channel, bin, y, x.

    Gradients are central differences x[i+1] − x[i−1] of the normalised image, 0 along the border. Each pixel votes for
    the one bin of its direction with the magnitude of its gradient; a cell's histogram is the mean over its pixels.
    Unsigned bins cover [0, π), where opposite directions are the same; signed bins cover [0, 2π). The first bin starts
    at 0, a gradient along x; a bin includes its lower edge.

    `normalise`: "patch" divides each cell's histogram v by sqrt(|v|² + 0.001²), per channel; "dataset" divides by the
    expected magnitude of a gradient spread evenly over the bins, estimated from the data set's finest H and V (there
    are no statistics of the histograms themselves), so that values are of the order of 1; "none" leaves mean
    magnitudes in units of the pixels' standard deviation.

    With "patch" and 9 bins this equals `skimage.feature.hog` per channel with cells_per_block=(1, 1), block_norm="L2",
    up to its epsilon (1e-5). MaskFeat's code differs: it uses Sobel filters, starts its bins at the other axis, weights
    pixels by a Gaussian in some variants, and has no epsilon.
    """

    def __init__(
        self,
        taps: list[Tap],
        statistics: Statistics,
        *,
        image_size: int,
        token_sizes: Mapping[int, int],
        bins: int = 9,
        signed: bool | None = None,
        normalise: Normalise = "patch",
        loss: Loss = "l2",
    ) -> None:
        """Create the target.

        Args:
            taps: The taps.
            statistics: Statistics of the data set.
            image_size: H = W, in pixels.
            token_sizes: {level: pixels per side of the encoder's tokens at that tap}.
            bins: Bins of a histogram, at least 2 (published: 9 unsigned or 18 signed ones).
            signed: Whether opposite directions differ; None: with 18 bins or more.
            normalise: "patch", "dataset" or "none".
            loss: The error of an element.

        Raises:
            ValueError: If there are fewer than 2 bins, or a tap is at level 0, which has no cells.
        """
        super().__init__(
            taps, statistics, image_size=image_size, token_sizes=token_sizes, normalise=normalise, loss=loss
        )
        if bins < 2:
            raise ValueError(f"target.bins={bins}: a histogram has at least 2 (published: 9, or 18 signed ones)")
        for tap in self.taps:
            check_level(tap.level, 1)
        self.bins = bins
        self.period = 2 * math.pi if (bins >= 18 if signed is None else signed) else math.pi
        finest = min(statistics.std)
        # An H or V of level n is 2^(n-1) times a mean difference over 2^(n-1) pixels; a central difference spans 2.
        slopes = [torch.tensor(statistics.std[finest][band]).float() / 4 ** (finest - 1) for band in "HV"]
        expected = 2 * torch.hypot(*slopes) / self.get_buffer("pixel_std") / bins
        unit = expected.clamp_min(1e-3) if normalise == "dataset" else torch.ones_like(expected)
        self.register_buffer("unit", unit[None, :, None, None, None].clone(), persistent=False)

    def values(self, tap: Tap) -> int:
        """Return D = C · bins · cells²."""
        return self.channels * self.bins * self.cells(tap.level) ** 2

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Compute targets {level: (B, P², D)} of images (B, C, H, W). The pyramid is not used."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            targets = {}
            for level, histograms in self.histograms(images).items():
                if self.normalise == "patch":
                    histograms = histograms / _norm(histograms)
                else:
                    histograms = histograms / self.get_buffer("unit")
                targets[level] = to_positions(histograms, self.cells(level))
            return targets

    def histograms(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Compute histograms before normalisation.

        Args:
            images: Normalised images (B, C, H, W).

        Returns:
            {level: (B, C, bins, h, w)}: mean magnitude per bin in cells of 2^level pixels.
        """
        finest, *coarser = [tap.level for tap in self.taps]
        found = {finest: self._finest(images.float(), 2**finest)}
        for level in coarser:
            fine = found[finest]
            found[level] = F.avg_pool2d(fine.flatten(1, 2), 2 ** (level - finest)).unflatten(1, fine.shape[1:3])
            finest = level
        return found

    def _finest(self, images: torch.Tensor, cell: int) -> torch.Tensor:
        down = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
        right = F.pad(images[..., 2:] - images[..., :-2], (1, 1, 0, 0))
        # Many gradients are parallel to an axis, on the edge of a bin: the offset keeps rounding from moving them.
        turns = torch.atan2(down, right) * (self.bins / self.period) + 1e-5
        place = turns.floor().remainder(self.bins).to(torch.int64)
        side = images.shape[-1] // cell
        at = torch.arange(side, device=images.device).repeat_interleave(cell)
        index = place * side**2 + at[:, None] * side + at
        # Fixed point: sums of integers do not depend on the order, which varies on GPUs.
        votes = (torch.hypot(down, right) * FIXED_POINT).to(torch.int64)
        sums = votes.new_zeros(*images.shape[:2], self.bins * side**2)
        sums = sums.scatter_add(2, index.flatten(2), votes.flatten(2))
        return sums.unflatten(2, (self.bins, side, side)).float() / (FIXED_POINT * cell**2)

    def picture(
        self,
        level: int,
        vectors: torch.Tensor,
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Draw strokes along the edges (across the gradients) of each cell, grey (B, 1, h, w), 16 pixels per cell or more.

        The brightness is the mean magnitude over channels; with normalise="patch" it is scaled by the true magnitude of
        each cell. Arguments as for `Target.picture`.
        """
        truth = self.histograms(images)[level]
        shown = from_positions(vectors.float(), self.channels, self.bins, self.cells(level))
        shown = shown * (_norm(truth) if self.normalise == "patch" else self.get_buffer("unit"))
        strength, peak = shown.mean(1), torch.quantile(truth.mean(1).flatten()[:1_000_000], 0.99).clamp_min(1e-6)
        side = max(2**level, STROKE)
        strokes = self._strokes(side, strength.device)
        drawn = torch.einsum("bkhw,kyx->bhywx", strength / peak, strokes)
        height, width = (cells * side for cells in strength.shape[2:])
        return (255 * drawn.reshape(-1, 1, height, width)).clamp(0, 255)

    def _strokes(self, side: int, device: torch.device) -> torch.Tensor:
        """A line through the centre of a cell for each bin, (bins, side, side) in [0, 1], across the bin's direction."""
        angle = (torch.arange(self.bins, device=device) + 0.5) * (self.period / self.bins)
        at = torch.arange(side, device=device) - (side - 1) / 2
        along_gradient = at[None, :, None] * angle.sin()[:, None, None] + at[None, None, :] * angle.cos()[:, None, None]
        inside = (at[:, None].square() + at[None, :].square()) <= (side / 2 - 1) ** 2
        return (side / 16 + 0.5 - along_gradient.abs()).clamp(0, 1) * inside


def _norm(histograms: torch.Tensor) -> torch.Tensor:
    """Length of each cell's histogram (B, C, 1, h, w), at least EPSILON."""
    return (histograms.square().sum(2, keepdim=True) + EPSILON**2).sqrt()
