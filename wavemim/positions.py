"""Fixed two-dimensional sine-cosine positions, as MAE has them (He et al. 2022; Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import torch


def sincos(grid: int, width: int, prefix: int = 0) -> torch.Tensor:
    """Positions (1, prefix + grid², width) float32, row-major: half of the width for the column, half for the row.

    The `prefix` (class and register tokens) is zero. `width` has to be a multiple of 4.
    """
    assert width % 4 == 0, width
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)
    places = torch.cat((columns, rows), 1).float()
    return torch.cat((torch.zeros(prefix, width), places))[None]
