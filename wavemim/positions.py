"""Fixed two-dimensional sine-cosine positions as in MAE (He et al. 2022; Vaswani et al. 2017, section 3.5).

Legend: G tokens per side, R prefix tokens (class, registers), E embedding width.
"""

from __future__ import annotations

import math

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn


def sincos(grid: int, width: int, prefix: int = 0) -> torch.Tensor:
    """Compute positions: half of the width encodes the column, half the row.

    Args:
        grid: G.
        width: E, a multiple of 4.
        prefix: R, tokens in front whose positions are zero.

    Returns:
        (1, R + G², E), float32, row-major.
    """
    assert width % 4 == 0, width
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)
    places = torch.cat((columns, rows), 1).float()
    return torch.cat((torch.zeros(prefix, width), places))[None]


_TABLES = ("pos_embed", "places")  # names of position tables (1, R + G², E)
_BIASES = "relative_position_bias_table"  # Swin's


def stretch_positions(model: nn.Module, own_size: int, image_size: int) -> None:
    """Replace a model's fixed positions by those of a model for larger images, resampled to its own grid.

    A place in the image then has about the same position in both. Learned positions are not changed.

    Args:
        model: The model, changed in place.
        own_size: Pixels per side of its images.
        image_size: Pixels per side of the larger images.
    """
    scale = image_size / own_size
    for name, table in model.named_parameters():
        if name.rpartition(".")[2] not in _TABLES or table.requires_grad:
            continue
        grid, prefix = _grid(table)
        own = sincos(grid, table.shape[2], prefix)
        if torch.equal(table.detach().cpu(), own):  # others came with pretrained weights, for this size already
            table.data.copy_(_resampled(sincos(round(grid * scale), table.shape[2], prefix), grid))


def fitted(name: str, values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Fit a stored parameter to a model for another image size.

    Position tables are resampled; sine-cosine positions made by `stretch_positions` are replaced by the model's own
    ones. All other values are returned unchanged, even if their shape does not fit.

    Args:
        name: Name of the parameter.
        values: The stored values.
        own: The model's parameter.

    Returns:
        The values for the model.
    """
    last = name.rpartition(".")[2]
    if values.shape == own.shape:
        return values
    if last == _BIASES and values.ndim == own.ndim == 2:
        side = math.isqrt(own.shape[0])  # of a table for square windows, (2·w - 1)²
        return resize_rel_pos_bias_table(values, ((side + 1) // 2,) * 2, tuple(own.shape))
    if last not in _TABLES or values.ndim != 3 or values.shape[2] != own.shape[2]:
        return values
    grid, prefix = _grid(own)
    there, _ = _grid(values)
    if values.shape[2] % 4 == 0:
        fixed = sincos(grid, values.shape[2], prefix)
        if torch.allclose(values.cpu().float(), _resampled(fixed, there), atol=1e-6):
            return fixed.to(values)
    return _resampled(values, grid)


def _resampled(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Resample (1, R + G², E) to another G, bicubic with antialiasing, as timm does for weights of another size."""
    there, prefix = _grid(table)
    return resample_abs_pos_embed(table, [grid, grid], [there, there], num_prefix_tokens=prefix)


def _grid(table: torch.Tensor) -> tuple[int, int]:
    """G and R of a table: R is smaller than another row and column would be."""
    grid = math.isqrt(table.shape[1])
    return grid, table.shape[1] - grid**2
