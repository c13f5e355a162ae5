"""timm models as encoders of masked images: plain vision transformers here, backbones with stages in `hierarchical`.

Legend: B images, C channels, H = W pixels a side, N cells of a mask, T tokens, V visible tokens, R prefix tokens (class
and registers), E embedding width.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from wavemim.positions import sincos
from wavemim.pretrained import fill, one_line

Positions = Literal["sincos", "learned"]
Sees = Literal["visible", "masked", "whole"]

PLAIN = ("vision_transformer", "deit")  # timm's modules of models that ViTEncoder takes
SETTLED = {  # arguments of timm.create_model that are settings of their own, or that the encoder settles
    "img_size": "encoder.image_size",
    "patch_size": "encoder.patch_size",
    "in_chans": "the channels of the shard set",
    "embed_dim": "encoder.width",
    "depth": "encoder.depth",
    "num_heads": "encoder.heads",
    "class_token": "encoder.class_token",
    "pretrained": "encoder.pretrained",
    "patch_drop_rate": "mask.ratio",
    "num_classes": "",
    "global_pool": "",
    "fc_norm": "",
    "features_only": "",
    "checkpoint_path": "",
    "pretrained_cfg": "",
    "pretrained_cfg_overlay": "",
    "dynamic_img_size": "",
    "dynamic_img_pad": "",
}


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest name, unless timm has a model of this name."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"encoder.name: timm has no model '{name}'{hint}")


def is_plain_vit(name: str) -> bool:
    """Whether timm's model of this name is one that `ViTEncoder` takes, by the module it is in."""
    return is_model_in_modules(name, PLAIN)


def check_options(options: Mapping[str, Any], settled: Iterable[str] = SETTLED) -> None:
    """Raise ValueError where an option is a setting of its own, one that the encoder settles, or no rate."""
    for key in options:
        if key in settled:
            instead = f"set {SETTLED[key]} instead" if SETTLED[key] else "the encoder settles it, leave it out"
            raise ValueError(f"encoder.options.{key}={options[key]!r} cannot be set here: {instead}")
        if key.endswith("_rate") and not (isinstance(options[key], int | float) and 0 <= options[key] < 1):
            raise ValueError(f"encoder.options.{key}={options[key]!r}: a rate is a number from 0 to less than 1")


def create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """``timm.create_model(name, **arguments)``; ValueError in one line where timm cannot build it."""
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, AssertionError, RuntimeError, ValueError, ZeroDivisionError, KeyError, AttributeError) as error:
        raise ValueError(f"timm cannot build '{name}' with {dict(arguments)}: {one_line(error)}") from error


class Encoder(nn.Module):
    """A timm model that gives its tokens at tapped points ("blocks": blocks of a ViT, stages of other backbones)."""

    word: ClassVar[str]  # what a tapped point is called

    name: str
    arguments: dict[str, Any]  # of timm.create_model, to build `model` again
    model: nn.Module  # the plain timm model: what is exported
    image_size: int
    depth: int  # tapped points, counted from 1
    cell: int  # pixels a side of the finest cell of a mask
    grid: int  # cells a side: masks are (B, grid²), True = hidden
    drops: bool  # gives visible tokens only
    prefix: int  # R: class and register tokens in front of the others
    default_unit: int  # pixels a side of what a mask hides at once where nothing else is asked for

    def width(self, block: int) -> int:
        """E at this tap."""
        raise NotImplementedError

    def token_size(self, block: int) -> int:
        """Pixels a side of a token at this tap."""
        raise NotImplementedError

    def normalised(self, block: int) -> bool:
        """Whether tokens of this tap already went through the model's final norm."""
        raise NotImplementedError

    def recompute_activations(self) -> None:
        """Keep no activations of blocks for the way back but compute them again: less memory, more time."""
        self.model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's

    def use_channels_last(self, asked: bool | None = None) -> bool:
        """Keep images, feature maps and weights of convolutions with their channels next to each other in memory.

        `asked` None: where the model is one of convolutions. Gives whether it is done. What comes out is the same but
        for rounding; a model of attention alone has nothing to gain.
        """
        return False

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor | None, blocks: Iterable[int]
    ) -> dict[int, torch.Tensor]:
        """Tokens {block: (B, R + V, E)} where hidden ones are dropped, otherwise {block: (B, R + T, E)}, row-major.

        `images` (B, C, H, W) are normalised, `mask` (B, grid²) is True where hidden, `visible` (B, V) are the indices
        of what is not, ascending (needed where `drops`). T = (image size / token size)².
        """
        raise NotImplementedError


def make_encoder(
    name: str,
    *,
    image_size: int,
    patch_size: int | None = None,
    channels: int = 3,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    class_token: bool | None = None,
    positions: Positions | None = None,
    sees: Sees | None = None,
    options: Mapping[str, Any] | None = None,
    pretrained: bool | str = False,
) -> Encoder:
    """The encoder of a timm model: a `ViTEncoder`, or a `HierarchicalEncoder` for every other backbone.

    None stands for the default: of the model (patch size, width, depth, heads), and otherwise a class token, sine-cosine
    positions, and hidden tokens dropped (ViT) or masked (others). Raises ValueError where a setting does not apply.
    """
    from wavemim.hierarchical import HierarchicalEncoder  # which needs Encoder from here

    check_name(name)
    own: dict[str, Any] = {"image_size": image_size, "channels": channels, "pretrained": pretrained}
    own |= {"options": options or {}} | ({} if sees is None else {"sees": sees})
    plain: dict[str, Any] = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    plain |= {"class_token": class_token, "positions": positions}
    given: dict[str, Any] = {key: value for key, value in plain.items() if value is not None}
    if is_plain_vit(name):
        return ViTEncoder(name, **own, **given)
    if given:
        named = ", ".join(f"encoder.{key}={value!r}" for key, value in given.items())
        does = "does" if len(given) == 1 else "do"
        raise ValueError(
            f"{named} {does} not apply to '{name}', only to plain ViTs; set what recipes give those to null"
        )
    return HierarchicalEncoder(name, **own)


class ViTEncoder(Encoder):
    """A plain timm VisionTransformer.

    `sees="visible"`: hidden tokens are dropped (MAE, He et al. 2022). "masked": a learned token stands for the
    embedding of each hidden patch (BEiT, Bao et al. 2022; SimMIM, Xie et al. 2022). "whole": the mask is not looked at,
    for images that were corrupted before (MFM, Xie et al. 2023).
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
        sees: Sees = "visible",
        options: Mapping[str, Any] | None = None,
        pretrained: bool | str = False,
    ) -> None:
        """Raises ValueError where the model is no plain ViT, cannot be built, or `pretrained` does not fit it.

        `options` are further arguments of ``timm.create_model``. `pretrained`: timm's own weights (True), a folder in
        timm's format, or a .safetensors file; positions then come with the weights: "sincos" keeps them as they are,
        "learned" trains them.
        """
        super().__init__()
        options = options or {}
        check_name(name)
        check_options(options)
        if sees not in get_args(Sees):
            raise ValueError(f"encoder.sees={sees!r}: '{name}' takes {', '.join(get_args(Sees))}")
        if positions not in get_args(Positions):
            raise ValueError(f"encoder.positions={positions!r}: must be one of {', '.join(get_args(Positions))}")
        self.name, self.image_size, self.sees = name, image_size, sees
        # Features for judging are the mean of the normalised patch tokens. The final norm stays where pretraining has
        # it: timm would move it behind the pooling.
        pooling = {"num_classes": 0, "global_pool": "avg", "fc_norm": False, "class_token": class_token}
        shape = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
        given = {key: value for key, value in shape.items() if value is not None}
        self.arguments = {"img_size": image_size, **given, "in_chans": channels, **pooling, **options}
        self.model = model = _plain_vit(create(name, self.arguments), name)
        patch = int(model.patch_embed.patch_size[0])
        if image_size % patch or len(set(model.patch_embed.patch_size)) > 1:
            raise ValueError(f"encoder.image_size={image_size} is no multiple of encoder.patch_size={patch}")
        filled = fill(model, name, self.arguments, pretrained)
        if positions == "sincos" and not filled:
            if model.embed_dim % 4:
                raise ValueError(f"encoder.width={model.embed_dim} is no multiple of 4, as sine-cosine positions need")
            assert model.pos_embed is not None
            prefix = model.pos_embed.shape[1] - (image_size // patch) ** 2  # without one where timm gives it none
            model.pos_embed = nn.Parameter(sincos(image_size // patch, model.embed_dim, prefix))
        assert model.pos_embed is not None  # held by _plain_vit
        model.pos_embed.requires_grad_(positions == "learned")
        self.depth, self.cell, self.grid = len(model.blocks), patch, image_size // patch
        self.drops, self.prefix, self.default_unit = sees == "visible", int(model.num_prefix_tokens), patch
        self.mask_token: nn.Parameter | None = None
        if sees == "masked":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, model.embed_dim))
            nn.init.normal_(self.mask_token, std=0.02)

    def width(self, block: int) -> int:
        """E, the same everywhere."""
        return int(self.model.embed_dim)

    def token_size(self, block: int) -> int:
        """The patch, everywhere."""
        return self.cell

    def normalised(self, block: int) -> bool:
        """Only the last block's tokens are, where the model has a final norm."""
        return block == self.depth and not isinstance(self.model.norm, nn.Identity)

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor | None, blocks: Iterable[int]
    ) -> dict[int, torch.Tensor]:
        """Tokens after each of `blocks`, as of `Encoder.forward`; those of the last block are normalised."""
        model, wanted = self.model, set(blocks)
        tokens = model.patch_embed(images)
        if self.mask_token is not None:
            tokens = torch.where(mask[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        positions = model.pos_embed
        assert positions is not None  # held by __init__
        of_prefix = positions.shape[1] - tokens.shape[1]  # 0 where class and register tokens have no positions
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


def _plain_vit(model: nn.Module, name: str) -> VisionTransformer:
    """`model`, where its parts are those that `ViTEncoder.forward` calls; ValueError otherwise."""
    # Subclasses have further tokens. Other patch embeddings (convolutional stems) overlap: hidden pixels would leak.
    plain = type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed
    if not plain or model.pos_embed is None:
        raise ValueError(
            f"encoder.name: '{name}' is no plain vision transformer with absolute positions; "
            "take one such as vit_base_patch16_224, or a backbone with stages such as swin_tiny_patch4_window7_224"
        )
    assert isinstance(model, VisionTransformer)
    return model
