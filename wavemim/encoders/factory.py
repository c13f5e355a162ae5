"""The encoder that a name and its options stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wavemim.encoders.base import Encoder, Positions, Sees, check_name, is_plain_vit
from wavemim.encoders.vit import ViTEncoder


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
    from wavemim.encoders.hierarchical import HierarchicalEncoder  # which needs Encoder from here

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
