"""The interface of encoders, and how timm models are created and checked.

Legend: B images, C channels, H = W pixels per side, N = grid² cells of a mask, T tokens, V visible tokens, R prefix
tokens (class and registers), E embedding width.
"""

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

PLAIN = ("vision_transformer", "deit")  # timm's modules whose models ViTEncoder supports
SETTLED = {  # arguments of timm.create_model that are settings of their own ("" if the encoder determines them)
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
    """Check that timm has a model of this name.

    Raises:
        ValueError: If not, with the most similar name.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"encoder.name: timm has no model '{name}'{hint}")


def is_plain_vit(name: str) -> bool:
    """Whether `ViTEncoder` supports timm's model of this name, by the module that defines it."""
    return is_model_in_modules(name, PLAIN)


def check_options(options: Mapping[str, Any], settled: Iterable[str] = SETTLED) -> None:
    """Check ``encoder.options``.

    Args:
        options: Arguments of ``timm.create_model``.
        settled: Names that are not allowed: settings of their own, or determined by the encoder.

    Raises:
        ValueError: If a name is not allowed, or a rate is not in [0, 1).
    """
    for key in options:
        if key in settled:
            instead = f"set {SETTLED[key]} instead" if SETTLED[key] else "the encoder determines it, remove it"
            raise ValueError(f"encoder.options.{key}={options[key]!r} cannot be set here: {instead}")
        if key.endswith("_rate") and not (isinstance(options[key], int | float) and 0 <= options[key] < 1):
            raise ValueError(f"encoder.options.{key}={options[key]!r}: a rate is a number from 0 to less than 1")


def create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call ``timm.create_model(name, **arguments)``.

    Raises:
        ValueError: If timm cannot build the model, with the reason in one line.
    """
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, AssertionError, RuntimeError, ValueError, ZeroDivisionError, KeyError, AttributeError) as error:
        raise ValueError(f"timm cannot build '{name}' with {dict(arguments)}: {one_line(error)}") from error


class Encoder(nn.Module):
    """A timm model that returns its tokens after "blocks": blocks of a ViT, stages of other backbones.

    Attributes:
        word: "block" or "stage", for messages.
        name: timm's name of the model.
        arguments: Arguments of ``timm.create_model`` that build `model` again.
        model: The plain timm model, which is exported.
        image_size: H = W, in pixels.
        depth: Number of blocks; they are counted from 1.
        cell: Pixels per side of the finest cell of a mask.
        grid: Cells per side: masks are (B, grid²), True = hidden.
        drops: Whether only visible tokens are returned.
        prefix: R.
        default_unit: Pixels per side of the blocks that a mask hides, by default.
    """

    word: ClassVar[str]

    name: str
    arguments: dict[str, Any]
    model: nn.Module
    image_size: int
    depth: int
    cell: int
    grid: int
    drops: bool
    prefix: int
    default_unit: int

    def width(self, block: int) -> int:
        """Return E after this block."""
        raise NotImplementedError

    def token_size(self, block: int) -> int:
        """Return the pixels per side of a token after this block."""
        raise NotImplementedError

    def normalised(self, block: int) -> bool:
        """Whether tokens after this block have gone through the model's final norm."""
        raise NotImplementedError

    def recompute_activations(self) -> None:
        """Enable activation checkpointing: less memory, more time."""
        self.model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's

    def use_channels_last(self, asked: bool | None = None) -> bool:
        """Store images, feature maps and convolution weights in the channels-last memory format.

        Results are the same up to rounding. Models of attention only have nothing to gain.

        Args:
            asked: Whether to; None: if the model is a convolutional network.

        Returns:
            Whether the format is used.
        """
        return False

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor | None, blocks: Iterable[int]
    ) -> dict[int, torch.Tensor]:
        """Encode masked images.

        Args:
            images: Normalised images (B, C, H, W).
            mask: bool (B, N), True = hidden.
            visible: (B, V), indices of visible cells, ascending; only needed if `drops`.
            blocks: The blocks whose tokens are returned.

        Returns:
            Tokens in row-major order: {block: (B, R + V, E)} if hidden tokens are dropped, otherwise
            {block: (B, R + T, E)} with T = (image size / token size)².
        """
        raise NotImplementedError
