"""Masks on the token grid, and their hidden fraction on any other grid; masking by frequency.

Legend: B images, N = G·G cells of a mask in row-major order, G cells per side (`grid`): the tokens of a ViT, the finest
features of a hierarchical encoder. A block is `unit` × `unit` cells that are hidden together. C channels, H = W pixels
per side, K bands, h·w coefficients of a level. True means hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F

from wavemim.constraints import check_blocks, check_frequencies, check_ratio, hidden_count
from wavemim.randomness import uniform
from wavemim.wavelets import DETAILS


def random_mask(
    rows: torch.Tensor, grid: int, ratio: float, *, seed: int, epoch: int, unit: int = 1, number: int = 0
) -> torch.Tensor:
    """Draw random masks with an exact ratio (MAE, He et al. 2022), as a pure function of (seed, epoch, row, number).

    Of one image, the visible parts of the first masks are disjoint, as many as fit into it (DMJD, Ma et al. 2023): of the
    first four with a ratio of 0.75. The next ones are again disjoint among themselves, and independent of those before.

    Args:
        rows: Row numbers (B,) of the images.
        grid: G.
        ratio: Fraction of the blocks that is hidden.
        seed: Of the run.
        epoch: Of training.
        unit: Cells per side of a block; above 1, whole blocks are hidden (SimMIM, Xie et al. 2022).
        number: Of the mask, from 0 on, where an image has several.

    Returns:
        bool (B, N).
    """
    assert grid % unit == 0, (grid, unit)
    blocks = (grid // unit) ** 2
    visible = blocks - hidden_count(blocks, ratio)
    draw, place = divmod(number, blocks // max(visible, 1))
    return _hide_first(_noise(rows, grid // unit, seed, epoch, draw), ratio, unit, rolled=place * visible)


def energy_mask(
    energy: torch.Tensor,
    rows: torch.Tensor,
    grid: int,
    ratio: float,
    *,
    strength: float,
    seed: int,
    epoch: int,
    unit: int = 1,
    floor: float = 1.0,
    number: int = 0,
) -> torch.Tensor:
    """Draw masks with an exact ratio that prefer blocks by their wavelet energy.

    Blocks are drawn without replacement, each with probability ∝ energy^strength among the remaining ones (Gumbel top-k:
    Kool et al., Stochastic beams and where to find them, ICML 2019). A pure function of (seed, epoch, row, number,
    energy): it does not depend on the other images of the batch. Several masks of an image are independent draws: if
    their visible parts were disjoint, they would together show all of it, whatever its energy.

    Args:
        energy: (B, N), of `detail_energy`.
        rows: Row numbers (B,) of the images.
        grid: G.
        ratio: Fraction of the blocks that is hidden.
        strength: Above 0, blocks with detail are hidden first, below 0 those without; 0 gives the masks of
            `random_mask`.
        seed: Of the run.
        epoch: Of training.
        unit: Cells per side of a block.
        floor: Added to the energy of each cell. Differences far below it have no effect, and cells without any detail
            are equally likely.
        number: Of the mask, from 0 on, where an image has several.

    Returns:
        bool (B, N).
    """
    assert grid % unit == 0 and floor > 0, (grid, unit, floor)
    if strength == 0:
        return random_mask(rows, grid, ratio, seed=seed, epoch=epoch, unit=unit, number=number)
    noise = _noise(rows, grid // unit, seed, epoch, number)
    blocks = _sum_cells(energy.float().reshape(-1, 1, grid, grid), unit).flatten(1) + floor * unit * unit
    # -log(-log1p(-u)) has Gumbel's distribution and falls with u; half a step of u instead of 0 keeps it finite.
    gumbel = -torch.log(-torch.log1p(-noise.clamp_min(2.0**-25)))
    return _hide_first(-(strength * blocks.log() + gumbel), ratio, unit)


def detail_energy(pyramid: Mapping[int, torch.Tensor], cells: int) -> torch.Tensor:
    """Compute the energy of the details in each cell: the sum of squared H, V, D over channels and levels.

    Only levels whose coefficients are not larger than a cell are used; a coefficient that covers several cells is
    divided among them by area. With a complete Haar pyramid and cells of 2^n pixels this is, by Parseval, the sum of
    squared deviations from the cell's mean, channel by channel. Longer filters blur it over neighbouring cells, ignore
    slopes, and respond to the jump between opposite edges of the image (PyWavelets' periodization).

    Args:
        pyramid: {level: (B, C, K, h, w)} in coefficient units, K = 3 (H, V, D) or 4 (A before them).
        cells: Cells per side.

    Returns:
        (B, cells²).

    Raises:
        ValueError: If no level is fine enough.
    """
    total: list[torch.Tensor] = []
    for level in _levels_within(pyramid, cells):
        details = pyramid[level][:, :, -len(DETAILS) :].float().square().flatten(1, 2)
        # Added one by one: the order of a library's sum, and so its last bit, may depend on the batch size.
        energy = reduce(torch.add, details.unbind(1))[:, None]
        side = energy.shape[-1]
        repeat = cells // math.gcd(cells, side)
        if repeat > 1:
            energy = energy.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3) / repeat**2
        total.append(_sum_cells(energy, side * repeat // cells))
    return reduce(torch.add, total).flatten(1)


@dataclass(frozen=True)
class Masking:
    """The masks of a run.

    Attributes:
        kind: "random"; "block", the same with a larger unit; "energy"; or "frequency", which hides a part of the
            image's spectrum instead of cells, so that every position is predicted.
        ratio: Fraction of the blocks that is hidden.
        grid: G.
        unit: Cells per side of a block.
        strength: Exponent of a block's energy; only for "energy".

    Raises:
        ValueError: If the unit does not divide the grid, or nothing or everything would be hidden.
    """

    kind: Literal["random", "block", "energy", "frequency"]
    ratio: float
    grid: int
    unit: int = 1
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.kind == "frequency":
            return
        check_blocks(self.grid, self.unit)
        check_ratio((self.grid // self.unit) ** 2, self.ratio)

    @property
    def hidden(self) -> int:
        """Hidden cells per image, the same number in each."""
        if self.kind == "frequency":
            return self.grid**2
        return hidden_count((self.grid // self.unit) ** 2, self.ratio) * self.unit**2

    def __call__(
        self, rows: torch.Tensor, pyramid: Mapping[int, torch.Tensor], *, seed: int, epoch: int, number: int = 0
    ) -> torch.Tensor:
        """Draw masks. The floor of "energy" is what rounding to 8 bits leaves in a flat cell: 1/12 per coefficient.

        Args:
            rows: Row numbers (B,) of the images.
            pyramid: Their coefficients {level: (B, C, K, h, w)}; only used by "energy".
            seed: Of the run.
            epoch: Of training.
            number: Of the mask, from 0 on, where an image has several; see `random_mask` and `energy_mask`.

        Returns:
            bool (B, N) on the device of `rows`.
        """
        if self.kind == "frequency":
            return torch.ones(rows.shape[0], self.grid**2, dtype=torch.bool, device=rows.device)
        if self.kind != "energy":
            return random_mask(rows, self.grid, self.ratio, seed=seed, epoch=epoch, unit=self.unit, number=number)
        blocks = self.grid // self.unit
        used = [pyramid[level] for level in _levels_within(pyramid, blocks)]
        coefficients = sum(len(DETAILS) * v.shape[1] * v.shape[3] * v.shape[4] for v in used) / self.grid**2
        energy = detail_energy(pyramid, blocks)  # of levels up to the size of a block: spread evenly over its cells
        energy = energy.reshape(-1, blocks, 1, blocks, 1).expand(-1, -1, self.unit, -1, self.unit) / self.unit**2
        return energy_mask(
            energy.reshape(-1, self.grid**2),
            rows,
            self.grid,
            self.ratio,
            strength=self.strength,
            seed=seed,
            epoch=epoch,
            unit=self.unit,
            floor=coefficients / 12,
            number=number,
        )


def visible_indices_of(mask: torch.Tensor, visible: int) -> torch.Tensor:
    """Return the indices (B, `visible`) of the visible tokens, ascending, without synchronising with the device.

    Args:
        mask: bool (B, N).
        visible: Visible tokens per image.
    """
    return mask.to(torch.uint8).argsort(stable=True, dim=1)[:, :visible]


def share_at(mask: torch.Tensor, grid: int, cells: int) -> torch.Tensor:
    """Compute the hidden fraction of each cell of another grid: repeated on finer grids, averaged on coarser ones.

    Args:
        mask: (B, N), bool or fractions.
        grid: G.
        cells: Cells per side of the other grid, a multiple or divisor of `grid`.

    Returns:
        float32 (B, cells²) in [0, 1].
    """
    assert cells % grid == 0 or grid % cells == 0, (grid, cells)
    share = mask.reshape(-1, 1, grid, grid).to(torch.float32)
    if cells > grid:
        share = share.repeat_interleave(cells // grid, 2).repeat_interleave(cells // grid, 3)
    elif cells < grid:
        share = F.avg_pool2d(share, grid // cells)
    return share.flatten(1)


def filled_in(images: torch.Tensor, hidden: torch.Tensor | float, mask: torch.Tensor) -> torch.Tensor:
    """Replace the hidden parts of images.

    Args:
        images: (B, C, H, W).
        hidden: What replaces them: other images, or one value.
        mask: (B, N), bool or fractions in [0, 1], on any square grid that divides the image.

    Returns:
        (B, C, H, W).
    """
    side = images.shape[-1]
    share = share_at(mask, math.isqrt(mask.shape[1]), side).reshape(-1, 1, side, side)
    return images * (1 - share) + hidden * share


def _noise(rows: torch.Tensor, side: int, seed: int, epoch: int, draw: int) -> torch.Tensor:
    """Uniform random numbers (B, side²), one per block, the same for every kind of mask."""
    return uniform(seed, "mask", epoch, rows, side * side, number=draw)


def _hide_first(keys: torch.Tensor, ratio: float, unit: int, rolled: int = 0) -> torch.Tensor:
    """Masks (B, blocks · unit²) that hide the blocks with the smallest `keys` (B, blocks).

    With `rolled`, so many blocks with the largest keys come first.
    """
    batch, blocks = keys.shape
    order = keys.argsort(stable=True, dim=1).roll(rolled, 1)
    mask = torch.zeros(batch, blocks, dtype=torch.bool, device=keys.device)
    mask = mask.scatter_(1, order[:, : hidden_count(blocks, ratio)], True)
    side = math.isqrt(blocks)
    cells = mask.reshape(batch, side, 1, side, 1).expand(-1, -1, unit, -1, unit)
    return cells.reshape(batch, blocks * unit * unit)


def _sum_cells(values: torch.Tensor, by: int) -> torch.Tensor:
    """Sums of `by` × `by` neighbours of (B, 1, G, G)."""
    return F.avg_pool2d(values, by, divisor_override=1)


def _levels_within(pyramid: Mapping[int, torch.Tensor], cells: int) -> list[int]:
    """Levels whose coefficients are not larger than one of `cells` cells per side, ascending."""
    levels = [level for level, values in sorted(pyramid.items()) if values.shape[-1] >= cells]
    if not levels:
        finest = min(pyramid)
        cell = (pyramid[finest].shape[-1] << finest) / cells
        raise ValueError(
            f"mask.kind=energy: the finest level that is read, {finest}, has cells of {2**finest} pixels, the mask's "
            f"cells have {cell:g}; read finer levels, or choose another mask.kind"
        )
    return levels


def frequency_numbers(size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return signed frequencies in cycles per image, int64 (size,): 0, 1, …, -2, -1, as size · `torch.fft.fftfreq`."""
    places = torch.arange(size, device=device)
    return torch.where(places < (size + 1) // 2, places, places - size)


@dataclass(frozen=True)
class Frequencies:
    """Masking by frequency (MFM): an image keeps a circle of its spectrum, or everything else.

    Attributes:
        radius: Of the circle, in cycles per image.
        low_pass_share: Fraction of the images that keep the circle.
    """

    radius: float = 16.0
    low_pass_share: float = 0.5

    def probability(self, size: int) -> torch.Tensor:
        """Return the probability that `hidden_frequencies` removes each frequency of an image of `size` pixels per side.

        Returns:
            float64 (H, W), in the layout of `torch.fft.fft2`.
        """
        inside = _circle(size, self.radius)
        return torch.where(inside, 1 - self.low_pass_share, self.low_pass_share).double()


def hidden_frequencies(
    rows: torch.Tensor, size: int, *, radius: float, low_pass_share: float, seed: int, epoch: int, number: int = 0
) -> torch.Tensor:
    """Draw the frequencies to remove, as a pure function of (seed, epoch, row, number).

    Args:
        rows: Row numbers (B,) of the images.
        size: H = W, in pixels.
        radius: Of the circle, in cycles per image.
        low_pass_share: Probability that an image only keeps the frequencies u² + v² < radius² (low-pass); otherwise it
            only keeps the others (high-pass).
        seed: Of the run.
        epoch: Of training.
        number: Of the mask, 0 or 1. With a probability of 0.5, the second mask of an image keeps what the first one
            removes; with other probabilities, both are the same for as few images as possible.

    Returns:
        bool (B, H, W), True = removed, in the layout of `torch.fft.fft2`.

    Raises:
        ValueError: If the circle is empty or wider than the spectrum, or the probability is not in [0, 1].
    """
    check_frequencies(radius, low_pass_share, size)
    inside = _circle(size, radius, rows.device)
    drawn = uniform(seed, "frequencies", epoch, rows, 1)
    if number % 2:
        drawn = torch.where(drawn < 0.5, drawn + 0.5, drawn - 0.5)  # exact, and uniform too
    return inside[None] ^ (drawn < low_pass_share)[:, :, None]


def _circle(size: int, radius: float, device: torch.device | None = None) -> torch.Tensor:
    """The frequencies u² + v² < radius², bool (H, W)."""
    squares = frequency_numbers(size, device).square()
    return (squares[:, None] + squares[None, :]) < radius**2


def corrupt(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Remove frequencies from images (MFM, Xie et al. 2023).

    A normalised image whose mean is removed gets that of the data set. The authors' code works on values in [0, 1] and
    clips them, so that such an image becomes mostly black there.

    Args:
        images: (B, C, H, W).
        hidden: bool (B, H, W), True = removed. If it is not symmetric about 0, the real part is returned.

    Returns:
        (B, C, H, W), float32.
    """
    with torch.autocast(images.device.type, enabled=False):
        spectrum = torch.fft.fft2(images.float(), norm="ortho") * ~hidden[:, None]
        return torch.fft.ifft2(spectrum, norm="ortho").real
