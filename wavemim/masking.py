"""Masks at the token grid, and their share at any other grid.

Legend: B images, N = G·G cells of a mask in row-major order, G cells a side (`grid`): the tokens of a ViT, the finest
features of a hierarchical encoder. A block is `unit` × `unit` cells that are hidden together. C channels, K bands, h·w
coefficients of a level. True means hidden.
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


def random_mask(rows: torch.Tensor, grid: int, ratio: float, *, seed: int, epoch: int, unit: int = 1) -> torch.Tensor:
    """Random masks (B, N), exact in ratio (MAE, He et al. 2022): a pure function of (seed, epoch, row of the image).

    `unit` > 1 hides whole blocks (SimMIM, Xie et al. 2022), exact in ratio over the (G / unit)² blocks.
    """
    assert grid % unit == 0, (grid, unit)
    return _hide_first(_noise(rows, grid // unit, seed, epoch), ratio, unit)


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
) -> torch.Tensor:
    """Masks (B, N), exact in ratio, that prefer blocks by their wavelet energy; `energy` (B, N) as `detail_energy`.

    Blocks are drawn one after another without replacement, each with probability ∝ energy^strength among those that are
    left (Gumbel top-k: Kool et al., Stochastic beams and where to find them, ICML 2019). `strength` > 0 hides where
    the detail is, < 0 where it is not; 0 gives the very masks of `random_mask`. `floor` is added to the energy of each
    cell: differences far below it do not count, and cells without any detail are equals.
    A pure function of (seed, epoch, row, energy): other images of the batch play no part.
    """
    assert grid % unit == 0 and floor > 0, (grid, unit, floor)
    if strength == 0:
        return random_mask(rows, grid, ratio, seed=seed, epoch=epoch, unit=unit)
    noise = _noise(rows, grid // unit, seed, epoch)
    blocks = _sum_cells(energy.float().reshape(-1, 1, grid, grid), unit).flatten(1) + floor * unit * unit
    # -log(-log1p(-u)) has Gumbel's distribution and falls with u; half a step of u instead of 0 keeps it finite.
    gumbel = -torch.log(-torch.log1p(-noise.clamp_min(2.0**-25)))
    return _hide_first(-(strength * blocks.log() + gumbel), ratio, unit)


def detail_energy(pyramid: Mapping[int, torch.Tensor], cells: int) -> torch.Tensor:
    """Energy (B, cells²) of the details in each cell: the sum of squared H, V, D over channels and levels.

    `pyramid` {level: (B, C, K, h, w)} in coefficient units, K = 3 (H, V, D) or 4 (A before them). Levels count whose
    coefficients are not larger than a cell; a coefficient across the edges of cells counts to each by its share.
    With Haar's whole pyramid and 2^n-pixel cells this is, by Parseval, the sum of squared deviations from the cell's
    mean, a channel at a time. Longer filters blur it over neighbours, do not see slopes, and see the jump from one edge
    of the image to the opposite one (periodization). Raises ValueError where no level is fine enough.
    """
    total: list[torch.Tensor] = []
    for level in _levels_within(pyramid, cells):
        details = pyramid[level][:, :, -len(DETAILS) :].float().square().flatten(1, 2)
        # Added one by one: the order of a library's sum, and so its last bit, may depend on the size of the batch.
        energy = reduce(torch.add, details.unbind(1))[:, None]
        side = energy.shape[-1]
        repeat = cells // math.gcd(cells, side)
        if repeat > 1:
            energy = energy.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3) / repeat**2
        total.append(_sum_cells(energy, side * repeat // cells))
    return reduce(torch.add, total).flatten(1)


@dataclass(frozen=True)
class Masking:
    """The masks of a run: "random" and "block" (the same, with a larger unit), "energy", or "frequency".

    "frequency" asks for every position: what is hidden there is a part of the image's spectrum, not of its cells.
    """

    kind: Literal["random", "block", "energy", "frequency"]
    ratio: float
    grid: int  # cells a side
    unit: int = 1  # cells a side of a block
    strength: float = 1.0  # of "energy" alone: the exponent of a block's energy

    def __post_init__(self) -> None:
        """Raises ValueError where the unit does not divide the grid, or where nothing or everything would be hidden."""
        if self.kind == "frequency":
            return
        check_blocks(self.grid, self.unit)
        check_ratio((self.grid // self.unit) ** 2, self.ratio)

    @property
    def hidden(self) -> int:
        """Hidden cells of an image: the same number in each."""
        if self.kind == "frequency":
            return self.grid**2
        return hidden_count((self.grid // self.unit) ** 2, self.ratio) * self.unit**2

    def __call__(
        self, rows: torch.Tensor, pyramid: Mapping[int, torch.Tensor], *, seed: int, epoch: int
    ) -> torch.Tensor:
        """Masks (B, N) of the images `rows` (B,), on their device; their `pyramid` is read by "energy" alone.

        Its floor is the energy that rounding to 8 bits leaves in a flat cell: 1/12 for each coefficient.
        """
        if self.kind == "frequency":
            return torch.ones(rows.shape[0], self.grid**2, dtype=torch.bool, device=rows.device)
        if self.kind != "energy":
            return random_mask(rows, self.grid, self.ratio, seed=seed, epoch=epoch, unit=self.unit)
        blocks = self.grid // self.unit
        used = [pyramid[level] for level in _levels_within(pyramid, blocks)]
        coefficients = sum(len(DETAILS) * v.shape[1] * v.shape[3] * v.shape[4] for v in used) / self.grid**2
        energy = detail_energy(pyramid, blocks)  # of levels as coarse as a block: spread evenly over its cells
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
        )


def visible_indices_of(mask: torch.Tensor, visible: int) -> torch.Tensor:
    """Indices (B, `visible`) of the visible tokens, ascending; no host synchronisation."""
    return mask.to(torch.uint8).argsort(stable=True, dim=1)[:, :visible]


def share_at(mask: torch.Tensor, grid: int, cells: int) -> torch.Tensor:
    """Share of each cell that is hidden, (B, cells·cells) in [0, 1]: repeated where finer, averaged where coarser.

    `cells` has to be a multiple or a divisor of `grid`.
    """
    assert cells % grid == 0 or grid % cells == 0, (grid, cells)
    share = mask.reshape(-1, 1, grid, grid).to(torch.float32)
    if cells > grid:
        share = share.repeat_interleave(cells // grid, 2).repeat_interleave(cells // grid, 3)
    elif cells < grid:
        share = F.avg_pool2d(share, grid // cells)
    return share.flatten(1)


def filled_in(images: torch.Tensor, hidden: torch.Tensor | float, mask: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), where `mask` hides with `hidden` in their place: other images, or one value.

    `mask` (B, N): bool, or shares in [0, 1], on any square grid that divides the image.
    """
    side = images.shape[-1]
    share = share_at(mask, math.isqrt(mask.shape[1]), side).reshape(-1, 1, side, side)
    return images * (1 - share) + hidden * share


def _noise(rows: torch.Tensor, side: int, seed: int, epoch: int) -> torch.Tensor:
    """Uniform numbers (B, side²), one a block: the same for every kind of mask."""
    return uniform(seed, "mask", epoch, rows, side * side)


def _hide_first(keys: torch.Tensor, ratio: float, unit: int) -> torch.Tensor:
    """Masks (B, blocks · unit²) that hide the blocks with the smallest `keys` (B, blocks)."""
    batch, blocks = keys.shape
    order = keys.argsort(stable=True, dim=1)
    mask = torch.zeros(batch, blocks, dtype=torch.bool, device=keys.device)
    mask = mask.scatter_(1, order[:, : hidden_count(blocks, ratio)], True)
    side = math.isqrt(blocks)
    cells = mask.reshape(batch, side, 1, side, 1).expand(-1, -1, unit, -1, unit)
    return cells.reshape(batch, blocks * unit * unit)


def _sum_cells(values: torch.Tensor, by: int) -> torch.Tensor:
    """Sums of `by` × `by` neighbours of (B, 1, G, G)."""
    return F.avg_pool2d(values, by, divisor_override=1)


def _levels_within(pyramid: Mapping[int, torch.Tensor], cells: int) -> list[int]:
    """Levels whose coefficients are not larger than one of `cells` cells a side, ascending."""
    levels = [level for level, values in sorted(pyramid.items()) if values.shape[-1] >= cells]
    if not levels:
        finest = min(pyramid)
        cell = (pyramid[finest].shape[-1] << finest) / cells
        raise ValueError(
            f"mask.kind=energy: the finest level that is read, {finest}, has cells of {2**finest} pixels, and those of "
            f"the mask have {cell:g}; read finer levels, or choose another mask.kind"
        )
    return levels


def frequency_numbers(size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Cycles a side of the image, int64 (size,), with sign: 0, 1, …, -2, -1; `size` · `torch.fft.fftfreq(size)`."""
    places = torch.arange(size, device=device)
    return torch.where(places < (size + 1) // 2, places, places - size)


def hidden_frequencies(
    rows: torch.Tensor, size: int, *, radius: float, low_pass_share: float, seed: int, epoch: int
) -> torch.Tensor:
    """Frequencies that are taken away, bool (B, H, W): a pure function of (seed, epoch, row of the image).

    With probability `low_pass_share` an image keeps the frequencies u² + v² < `radius`² alone (low-pass), otherwise all
    but these (high-pass). Raises ValueError for a circle that is empty or wider than the image, or no probability.
    """
    check_frequencies(radius, low_pass_share, size)
    squares = frequency_numbers(size, rows.device).square()
    inside = (squares[:, None] + squares[None, :]) < radius**2
    low_pass = uniform(seed, "frequencies", epoch, rows, 1) < low_pass_share
    return inside[None] ^ low_pass[:, :, None]


def corrupt(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) without the `hidden` frequencies (B, H, W), float32.

    On normalised images an image whose mean is taken away gets the data set's; the authors' code works on values in
    [0, 1] and clips to them, so that there it turns mostly black. Of a `hidden` that is not symmetric about 0 the
    real part of the result is given.
    """
    with torch.autocast(images.device.type, enabled=False):
        spectrum = torch.fft.fft2(images.float(), norm="ortho") * ~hidden[:, None]
        return torch.fft.ifft2(spectrum, norm="ortho").real
