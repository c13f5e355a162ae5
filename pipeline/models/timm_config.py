"""timm's descriptions of pretrained weights: their image size, channels, and the pixel statistics they expect."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.shards.shard_set import ShardSet
from wavemim.encoders.base import check_name
from wavemim.encoders.pretrained import CONFIG
from wavemim.weights import checkpoint

TIMM = "timm:"  # checkpoint=timm:NAME


def timm_config(name: str) -> dict[str, Any]:
    """timm's description of its weights of this name. Raises SettingError if it has none."""
    try:
        check_name(name)
    except ValueError as error:
        raise SettingError(f"checkpoint={TIMM}{name}: {str(error).removeprefix('encoder.name: ')}") from None
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        config = None
    if config is None or not config.has_weights:
        tags = timm.list_pretrained(name.partition(".")[0] + ".*")
        hint = f"; available: {', '.join(tags[:4])}" if tags else ""
        raise SettingError(f"checkpoint={TIMM}{name}: timm has no weights with this name{hint}")
    return config.to_dict()


def load_call(recipe: Recipe, folder: Path) -> str:
    """The Python expression that loads a folder in timm's format that a stage wrote.

    From an object store timm loads nothing: the folder is named as it is called once a user has copied it.
    """
    place = folder if recipe.home is None else folder.name
    return f"timm.create_model('local-dir:{place}', pretrained=True)"


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json in a folder in timm's format. Raises SettingError if it is not one."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        described = content["pretrained_cfg"]
        values = [*described["input_size"], *described["mean"], *described["std"]]
        whole = isinstance(content["architecture"], str) and len(described["input_size"]) == 3
        whole &= all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise SettingError(
            f"checkpoint={folder}: its {CONFIG} is not in timm's format, with architecture and pretrained_cfg "
            "(input_size, mean, std); give a checkpoint, timm:NAME, or a folder that wavemim export wrote"
        )
    if not (folder / checkpoint.MODEL).is_file():
        raise SettingError(f"checkpoint={folder}: there is no {checkpoint.MODEL}; weights in other files are not read")
    return dict(content)


def fitting_size(config: Mapping[str, Any], shards: ShardSet | None) -> int:
    """The image size to use: that of the weights, or a smaller one where the shard set stores smaller images.

    Args:
        config: timm's description of the weights.
        shards: The shard set; None for the size of the weights.

    Returns:
        Pixels per side, a multiple of 2^levels.
    """
    own = int(config["input_size"][-1])
    if shards is None:
        return own
    unit = 2**shards.levels
    return max(unit, min(own, shards.image_size) // unit * unit)


def pixel_statistics(
    config: Mapping[str, Any], channels: int, shards: ShardSet | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that images are normalised by.

    Args:
        config: timm's description of the weights.
        channels: Channels of the images.
        shards: The shard set, if any.

    Returns:
        Those of the weights; their mean over channels for grey images; those of the shard set for other numbers of
        channels. In units of pixels in [0, 255].

    Raises:
        SettingError: If the weights are for other channels and there is no shard set.
    """
    mean, std = ([255.0 * float(value) for value in config[key]] for key in ("mean", "std"))
    if channels == 1:
        mean, std = [math.fsum(mean) / len(mean)], [math.fsum(std) / len(std)]
    if len(mean) != channels:
        if shards is None:
            raise SettingError(f"the encoder's config has {len(mean)} pixel means for {channels} channels")
        mean, std = shards.pixel_mean, shards.pixel_std
    return tuple(mean), tuple(std)


def create_arguments(config: Mapping[str, Any], size: int, channels: int) -> dict[str, Any]:
    """Arguments of timm.create_model: with an image size only for models that are built for one."""
    sized = {"img_size": size} if config.get("fixed_input_size") else {}
    return {"num_classes": 0, "in_chans": channels, **sized}
