"""timm models as encoders of masked images: only visible tokens go in, each tapped block gives its tokens.

Legend: B images, N tokens, V visible tokens, E embedding width.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def create_arguments(
    name: str,
    *,
    image_size: int,
    patch_size: int,
    channels: int = 3,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    class_token: bool = True,
) -> dict[str, Any]:
    """Keyword arguments with which ``timm.create_model(name, …)`` makes the encoder.

    Without a classifier, and pooling the normalised patch tokens by their mean: ``model(images)`` are the features that
    `wavemim.evaluate` judges. The final norm stays where pretraining has it (timm would move it behind the pooling).
    """
    arguments: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        "class_token": class_token,
    }
    optional = {"embed_dim": width, "depth": depth, "num_heads": heads}
    return arguments | {key: value for key, value in optional.items() if value is not None}


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest name, unless timm has a model of this name."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"timm has no model '{name}'{hint}")


def sincos_positions(model: VisionTransformer) -> torch.Tensor:
    """Fixed two-dimensional sine-cosine positions (1, prefix + N, E), zero for class and register tokens (MAE)."""
    assert model.pos_embed is not None
    grid = list(model.patch_embed.grid_size)
    positions = build_sincos2d_pos_embed(grid, dim=model.embed_dim, interleave_sin_cos=False)
    prefix = model.pos_embed.shape[1] - positions.shape[0]
    return torch.cat((torch.zeros(prefix, model.embed_dim), positions))[None].to(model.pos_embed.dtype)


class ViTEncoder(nn.Module):
    """A timm VisionTransformer that sees visible patches only (MAE, He et al. 2022) and gives tokens at its taps."""

    def __init__(self, name: str, *, positions: str = "sincos", **arguments: Any) -> None:
        """`arguments` as of `create_arguments`. Raises ValueError where the model is no plain ViT or cannot be built."""
        super().__init__()
        check_name(name)
        self.name, self.arguments = name, create_arguments(name, **arguments)
        try:
            model = timm.create_model(name, **self.arguments)
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"timm cannot build '{name}' with {self.arguments}: {error}") from None
        if not isinstance(model, VisionTransformer) or model.pos_embed is None:
            raise ValueError(f"'{name}' is no plain vision transformer; use a timm model such as vit_base_patch16_224")
        self.model = model
        if positions == "sincos":
            if model.embed_dim % 4:
                raise ValueError(f"width {model.embed_dim} is no multiple of 4, which sine-cosine positions need")
            model.pos_embed = nn.Parameter(sincos_positions(model), requires_grad=False)

    @property
    def width(self) -> int:
        """E: embedding width."""
        return int(self.model.embed_dim)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return int(self.model.patch_embed.grid_size[0])

    def forward(self, images: torch.Tensor, visible: torch.Tensor, blocks: Iterable[int]) -> dict[int, torch.Tensor]:
        """Visible patch tokens {block: (B, V, E)} after each of `blocks` (from 1), of `visible` token indices (B, V).

        The tokens of the last block are normalised by the model's final norm.
        """
        model = self.model
        wanted = set(blocks)
        tokens = model.patch_embed(images)
        prefix: list[torch.Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
        positions = model.pos_embed
        assert positions is not None  # held by __init__
        prefix_positions = positions.shape[1] - tokens.shape[1]
        tokens = tokens + positions[:, prefix_positions:]
        tokens = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        if prefix:
            front = torch.cat(prefix, 1)
            if prefix_positions:
                front = front + positions[:, :prefix_positions]
            tokens = torch.cat((front.expand(tokens.shape[0], -1, -1), tokens), 1)
        tokens = model.norm_pre(model.pos_drop(tokens))
        taps = {}
        for number, block in enumerate(model.blocks, 1):
            tokens = block(tokens)
            if number in wanted:
                out = model.norm(tokens) if number == len(model.blocks) else tokens
                taps[number] = out[:, model.num_prefix_tokens :]
        return taps
