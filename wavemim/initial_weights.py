"""Initial weights that published methods draw, where they are not those of timm or torch."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Init = Literal["timm", "mae", "beit"]

_STD = 0.02
_RESIDUAL = ("attn.proj", "mlp.fc2")  # the last linear maps of a block's two residual branches


def xavier(module: nn.Module) -> None:
    """Draw the weight of `module` by Xavier's uniform rule, with a zero bias, if it is a linear map (MAE)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise_vit(model: VisionTransformer, init: Init) -> None:
    """Draw the initial weights of a plain ViT. Norms are left as they are.

    - "timm": those that timm has drawn.
    - "mae" (He et al. 2022; also LocalMIM, Wang et al. 2023): Xavier's uniform rule for linear maps and for the patch
      embedding as a linear map of flattened patches; tokens with a deviation of 0.02.
    - "beit" (Bao et al. 2022; also MFM, Xie et al. 2023): a normal distribution of deviation 0.02, cut off at ±0.02, which
      leaves a deviation of 0.0108, for linear maps, patch embedding, tokens and positions; the last linear map of both
      residual branches of block n, counted from 1, is divided by √(2n).

    Args:
        model: The model; its weights are replaced in place.
        init: The rule.

    Raises:
        ValueError: If there is no such rule, or the model's blocks are not of the standard form, which "beit" needs.
    """
    if init not in get_args(Init):
        raise ValueError(f"encoder.init={init!r}: must be one of {', '.join(get_args(Init))}")
    tokens = [token for token in (model.cls_token, model.reg_token) if token is not None]
    if init == "mae":
        model.apply(xavier)
        nn.init.xavier_uniform_(model.patch_embed.proj.weight.data.flatten(1))  # a view of the weight
        for token in tokens:
            nn.init.normal_(token, std=_STD)
    elif init == "beit":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _cut_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tensor in (*tokens, model.pos_embed):
            if tensor is not None:
                _cut_normal(tensor)
        _shrink_residuals(model)


def _cut_normal(tensor: torch.Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=_STD, a=-_STD, b=_STD)


def _shrink_residuals(model: VisionTransformer) -> None:
    for number, block in enumerate(model.blocks, 1):
        for name in _RESIDUAL:
            try:
                layer = block.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"encoder.init='beit': the model's blocks have no {name}; use encoder.init=timm or mae"
                ) from None
            assert isinstance(layer, nn.Linear)
            layer.weight.data.div_(math.sqrt(2 * number))
