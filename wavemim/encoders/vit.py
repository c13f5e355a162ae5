"""Plain vision transformers of timm as encoders.

Legend: B images, C channels, H = W pixels per side, N cells of a mask, T tokens, V visible tokens, R prefix tokens
(class and registers), E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from wavemim.constraints import check_image_size
from wavemim.encoders.base import Encoder, Positions, Sees, check_name, check_options, create
from wavemim.encoders.pretrained import fill
from wavemim.initial_weights import Init, initialise_vit
from wavemim.positions import sincos


class ViTEncoder(Encoder):
    """A plain timm VisionTransformer.

    `sees="visible"` drops hidden tokens (MAE, He et al. 2022). "masked" replaces the embedding of each hidden patch by
    a learned mask token (BEiT, Bao et al. 2022; SimMIM, Xie et al. 2022). "whole" ignores the mask, for images that
    were corrupted beforehand (MFM, Xie et al. 2023).
    """

    word = "block"
    model: VisionTransformer

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        patch_size: int | None = None,
        channels: int = 3,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        class_token: bool = True,
        positions: Positions = "sincos",
        init: Init = "timm",
        sees: Sees = "visible",
        options: Mapping[str, Any] | None = None,
        pretrained: bool | str = False,
    ) -> None:
        """Create the encoder. Arguments as for `wavemim.encoders.factory.make_encoder`.

        With `pretrained`, `init` has no effect, and positions are those of the weights: "sincos" keeps them fixed,
        "learned" trains them.

        Raises:
            ValueError: If the model is not a plain ViT, cannot be built, or `pretrained` does not fit it.
        """
        super().__init__()
        options = options or {}
        check_name(name)
        check_options(options)
        if sees not in get_args(Sees):
            raise ValueError(f"encoder.sees={sees!r}: '{name}' needs one of {', '.join(get_args(Sees))}")
        if positions not in get_args(Positions):
            raise ValueError(f"encoder.positions={positions!r}: must be one of {', '.join(get_args(Positions))}")
        self.name, self.image_size, self.sees = name, image_size, sees
        # Features for evaluation are the mean of the normalised patch tokens. The final norm stays in front of the
        # pooling, as in pretraining; timm would move it behind.
        pooling = {"num_classes": 0, "global_pool": "avg", "fc_norm": False, "class_token": class_token}
        shape = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
        given = {key: value for key, value in shape.items() if value is not None}
        self.arguments = {"img_size": image_size, **given, "in_chans": channels, **pooling, **options}
        self.model = model = _plain_vit(create(name, self.arguments), name)
        patch = int(model.patch_embed.patch_size[0])
        check_image_size(image_size, patch)
        if len(set(model.patch_embed.patch_size)) > 1:
            raise ValueError(f"patches of '{name}' are not square")
        if not fill(model, name, self.arguments, pretrained):
            initialise_vit(model, init)
            if positions == "sincos":
                model.pos_embed = _sincos_positions(model, image_size // patch)
        assert model.pos_embed is not None  # ensured by _plain_vit
        model.pos_embed.requires_grad_(positions == "learned")
        self.depth, self.cell, self.grid = len(model.blocks), patch, image_size // patch
        self.drops, self.prefix, self.default_unit = sees == "visible", int(model.num_prefix_tokens), patch
        self.mask_token: nn.Parameter | None = None
        if sees == "masked":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, model.embed_dim))
            nn.init.normal_(self.mask_token, std=0.02)

    def width(self, block: int) -> int:
        """Return E, the same after every block."""
        return int(self.model.embed_dim)

    def token_size(self, block: int) -> int:
        """Return the patch size."""
        return self.cell

    def normalised(self, block: int) -> bool:
        """Whether it is the last block of a model with a final norm."""
        return block == self.depth and not isinstance(self.model.norm, nn.Identity)

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor | None, blocks: Iterable[int]
    ) -> dict[int, torch.Tensor]:
        """Return the tokens after each of `blocks`; those of the last one are normalised.

        Arguments and result as for `Encoder.forward`.
        """
        model, wanted = self.model, set(blocks)
        tokens = model.patch_embed(images)
        if self.mask_token is not None:
            tokens = torch.where(mask[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        positions = model.pos_embed
        assert positions is not None  # ensured by __init__
        of_prefix = positions.shape[1] - tokens.shape[1]  # 0 if class and register tokens have no positions
        tokens = tokens + positions[:, of_prefix:]
        if self.drops:
            assert visible is not None, "visible indices are needed where hidden tokens are dropped"
            tokens = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        prefix: list[torch.Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
        if prefix:
            front = torch.cat(prefix, 1)
            if of_prefix:
                front = front + positions[:, :of_prefix]
            tokens = torch.cat((front.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens), 1)
        tokens = model.norm_pre(model.pos_drop(tokens))
        taps = {}
        for number, block in enumerate(model.blocks, 1):
            again = model.grad_checkpointing and self.training
            tokens = checkpoint(block, tokens, use_reentrant=False) if again else block(tokens)
            if number in wanted:
                taps[number] = model.norm(tokens) if number == self.depth else tokens
        return taps


def _sincos_positions(model: VisionTransformer, grid: int) -> nn.Parameter:
    """Sine-cosine positions of `grid`² patches and of the prefix tokens that have positions in timm."""
    if model.embed_dim % 4:
        raise ValueError(f"encoder.width={model.embed_dim} is not a multiple of 4, as sine-cosine positions need")
    assert model.pos_embed is not None
    prefix = model.pos_embed.shape[1] - grid**2  # 0 if timm gives the prefix no positions
    return nn.Parameter(sincos(grid, model.embed_dim, prefix))


def _plain_vit(model: nn.Module, name: str) -> VisionTransformer:
    """Return `model` if it has the parts that `ViTEncoder.forward` uses; ValueError otherwise."""
    # Subclasses have further tokens. Other patch embeddings (convolutional stems) overlap, so hidden pixels would leak.
    plain = type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed
    if not plain or model.pos_embed is None:
        raise ValueError(
            f"encoder.name: '{name}' is not a plain vision transformer with absolute positions; "
            "use one such as vit_base_patch16_224, or a backbone with stages such as swin_tiny_patch4_window7_224"
        )
    assert isinstance(model, VisionTransformer)
    return model
