"""Masks at the token grid, and their share at any other grid.

Legend: B images, N = G·G tokens in row-major order, G tokens a side. True means hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wavemim.randomness import uniform


def hidden_count(tokens: int, ratio: float) -> int:
    """Tokens that a ratio hides: the same number in every image."""
    return round(tokens * ratio)


def random_mask(rows: torch.Tensor, grid: int, ratio: float, *, seed: int, epoch: int) -> torch.Tensor:
    """Random masks (B, N), exact in ratio (MAE, He et al. 2022): a pure function of (seed, epoch, row of the image)."""
    tokens = grid * grid
    noise = uniform(seed, "mask", epoch, rows, tokens)
    order = noise.argsort(stable=True, dim=1)
    mask = torch.zeros(rows.shape[0], tokens, dtype=torch.bool, device=rows.device)
    return mask.scatter_(1, order[:, : hidden_count(tokens, ratio)], True)


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
