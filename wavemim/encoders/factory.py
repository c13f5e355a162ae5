"""Creates the encoder of a timm model by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wavemim.encoders.base import Encoder, Positions, Sees, check_name, is_plain_vit
from wavemim.encoders.hierarchical import HierarchicalEncoder
from wavemim.encoders.vit import ViTEncoder
from wavemim.initial_weights import Init


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
    init: Init | None = None,
    sees: Sees | None = None,
    options: Mapping[str, Any] | None = None,
    pretrained: bool | str = False,
) -> Encoder:
    """Create the encoder of a timm model: a `ViTEncoder`, or a `HierarchicalEncoder` for every other backbone.

    Args:
        name: timm's name of the model.
        image_size: Pixels per side, H = W.
        patch_size: Pixels per side of a patch; None: the model's. This and all arguments up to `init` only apply
            to plain ViTs, except `channels`.
        channels: C.
        width: Embedding width; None: the model's.
        depth: Number of blocks; None: the model's.
        heads: Attention heads; None: the model's.
        class_token: Whether there is a class token; None: yes.
        positions: "sincos" or "learned"; None: "sincos".
        init: Initial weights without `pretrained`, as of `wavemim.initial_weights.initialise_vit`; None: "timm".
        sees: What happens to hidden tokens: "visible" drops them, "masked" replaces them by a mask token, "whole"
            ignores the mask. None: "visible" for a ViT, "masked" for others.
        options: Further arguments of ``timm.create_model``.
        pretrained: Initial weights: False for none, True for timm's, or the path of a folder in timm's format or of a
            .safetensors file.

    Returns:
        The encoder.

    Raises:
        ValueError: If timm has no such model or cannot build it, or a setting does not apply to it.
    """
    check_name(name)
    own: dict[str, Any] = {"image_size": image_size, "channels": channels, "pretrained": pretrained}
    own |= {"options": options or {}} | ({} if sees is None else {"sees": sees})
    plain: dict[str, Any] = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    plain |= {"class_token": class_token, "positions": positions, "init": init}
    given: dict[str, Any] = {key: value for key, value in plain.items() if value is not None}
    if is_plain_vit(name):
        return ViTEncoder(name, **own, **given)
    if given:
        named = ", ".join(f"encoder.{key}={value!r}" for key, value in given.items())
        does = "does" if len(given) == 1 else "do"
        timm_init = ", encoder.init to timm" if "init" in given else ""
        raise ValueError(
            f"{named} {does} not apply to '{name}', only to plain ViTs; set those that a recipe sets to null{timm_init}"
        )
    return HierarchicalEncoder(name, **own)
