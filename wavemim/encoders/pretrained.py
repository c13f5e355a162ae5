"""Initial weights: timm's own, a folder in timm's format, or a .safetensors file. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
POOLING = (
    "num_classes",
    "global_pool",
    "fc_norm",
    "class_token",
)  # set by the encoder, whatever the weights were made for


def one_line(error: BaseException) -> str:
    """Return an error's message, or its class if it has none, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def fill(model: nn.Module, name: str, arguments: Mapping[str, Any], pretrained: bool | str) -> bool:
    """Fill a model with pretrained weights.

    timm builds the model of the weights, with their own pooling and classifier, for the image size and channels of
    `arguments`, and loads it strictly: it resamples positions and adapts the first convolution. All weights of `model`
    are copied from there. Under ``torch.device("meta")`` nothing is loaded.

    Args:
        model: The model, made by ``timm.create_model(name, **arguments)``.
        name: timm's name of the model.
        arguments: The arguments it was made with.
        pretrained: False for none, True for timm's weights, or the path of a folder in timm's format or of a
            .safetensors file.

    Returns:
        Whether the model has pretrained weights now.

    Raises:
        ValueError: If the weights cannot be obtained, or lack one of the model's.
    """
    if pretrained is False:
        return False
    if torch.get_default_device().type == "meta":
        return True
    theirs = {key: value for key, value in arguments.items() if key not in POOLING}
    if pretrained is True:
        source = _timm_weights(name, theirs)
    else:
        source = _local_weights(Path(pretrained), name, theirs)
    weights = _as_pooled(source.state_dict(), model)
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in weights]
    if missing:
        hint = "; set encoder.class_token=false" if "cls_token" in missing else ""
        raise ValueError(f"encoder.pretrained={pretrained!r} lacks {', '.join(missing[:3])} of '{name}'{hint}")
    unlike = [key for key, value in wanted.items() if weights[key].shape != value.shape]
    if unlike:
        shapes = f"{tuple(weights[unlike[0]].shape)} instead of {tuple(wanted[unlike[0]].shape)}"
        raise ValueError(f"encoder.pretrained={pretrained!r} does not fit '{name}': {unlike[0]} is {shapes}")
    model.load_state_dict({key: weights[key] for key in wanted})
    return True


def _timm_weights(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # errors of many kinds, from the hub, the network and timm
        if "loading state_dict" in str(error):
            raise ValueError(f"encoder.pretrained=true does not fit '{name}': {one_line(error)}") from None
        raise ValueError(
            f"encoder.pretrained=true: timm's weights of '{name}' cannot be loaded ({one_line(error)}); download them where "
            "there is a network, and set encoder.pretrained to the .safetensors file or folder"
        ) from None


def _local_weights(path: Path, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    config_path, path = (path / CONFIG, path / WEIGHTS) if path.is_dir() else (path.parent / CONFIG, path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"encoder.pretrained='{path}' is neither a folder nor a .safetensors file; other files are not read"
        )
    try:
        weights = load_file(path)
        described = path.name == WEIGHTS and config_path.is_file()
        config = json.loads(config_path.read_text(encoding="utf-8")) if described else {}
        architecture = str(config.get("architecture", name))
        described_by = dict(config.get("pretrained_cfg", {})) if described else _guess(weights, name)
        own = dict(config.get("model_args") or {})
    except (OSError, SafetensorError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"encoder.pretrained: {path} cannot be read as timm weights: {one_line(error)}") from None
    if architecture.partition(".")[0] != name.partition(".")[0]:
        raise ValueError(f"encoder.pretrained: {path} is of '{architecture}', encoder.name is '{name}'")
    if described:
        own.setdefault("num_classes", config.get("num_classes", described_by.get("num_classes", 1000)))
    else:
        own["num_classes"] = described_by["num_classes"]
    overlay = {**described_by, "state_dict": weights, "source": "", "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**own, **arguments})
    except (RuntimeError, TypeError, AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"encoder.pretrained: {path} does not fit '{name}': {one_line(error)}") from None


def _guess(weights: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Channels and classes of weights without a config.json, from their shapes."""
    known = timm.get_pretrained_cfg(name)
    assert known is not None
    size = list(known.input_size)
    first = known.first_conv if isinstance(known.first_conv, str) else next(iter(known.first_conv or ()), "")
    if f"{first}.weight" in weights:
        size[0] = weights[f"{first}.weight"].shape[1]
    classifier = known.classifier if isinstance(known.classifier, str) else ""
    head = weights.get(f"{classifier}.weight")
    return {"input_size": size, "num_classes": 0 if head is None else head.shape[0]}


def _as_pooled(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a ViT with another pooling or without class token, under the names that `model` has."""
    wanted = model.state_dict()
    if "norm.weight" in wanted and "norm.weight" not in weights:  # the norm was behind the pooling
        for end in ("weight", "bias"):
            if f"fc_norm.{end}" in weights:
                weights[f"norm.{end}"] = weights[f"fc_norm.{end}"]
    if "cls_token" in weights and "cls_token" not in wanted and "pos_embed" in wanted:
        surplus = weights["pos_embed"].shape[1] - wanted["pos_embed"].shape[1]
        if surplus == 1:
            weights["pos_embed"] = weights["pos_embed"][:, surplus:]
    return weights
