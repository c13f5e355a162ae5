"""The light decoder of a tap: from visible tokens to a prediction for every position.

Legend: B images, N = G·G tokens, V visible tokens, E encoder width, P positions a side, D values a position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn


class TapDecoder(nn.Module):
    """Linear embedding, mask tokens, fixed positions, `depth` transformer blocks, one linear map to all coefficients."""

    def __init__(
        self, encoder_width: int, *, grid: int, positions: int, values: int, width: int, depth: int, heads: int
    ) -> None:
        """`positions` P a side has to divide `grid`; tokens are averaged over the cell of a position."""
        super().__init__()
        assert grid % positions == 0, (grid, positions)
        self.grid, self.pool = grid, grid // positions
        self.norm_in = nn.LayerNorm(encoder_width)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        places = build_sincos2d_pos_embed([grid, grid], dim=width, interleave_sin_cos=False)
        self.register_buffer("places", places[None].float(), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, values)
        self.apply(_initialise)

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Predictions (B, P², D) from visible tokens (B, V, E) and their indices (B, V)."""
        embedded = self.embed(self.norm_in(tokens))
        batch, _, width = embedded.shape
        whole = self.mask_token.to(embedded.dtype).expand(batch, self.grid * self.grid, width)
        whole = whole.scatter(1, visible[:, :, None].expand(-1, -1, width), embedded)
        whole = whole + self.get_buffer("places").to(embedded.dtype)
        for block in self.blocks:
            whole = block(whole)
        if self.pool > 1:
            whole = whole.transpose(1, 2).reshape(batch, width, self.grid, self.grid)
            whole = F.avg_pool2d(whole, self.pool).flatten(2).transpose(1, 2)
        return self.head(self.norm(whole))


def _initialise(module: nn.Module) -> None:
    """Xavier uniform for linear maps, as MAE does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
