"""What every encoder of masked images has: its interface, and how timm models are created and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn

from wavemim.encoders.pretrained import one_line

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
