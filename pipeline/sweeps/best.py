"""The recipe that a sweep recommends, as a file that works from any folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import with_overrides
from pipeline.config.recipe import BEHAVIOURS, Recipe
from pipeline.tracking.store_uris import absolute_uri, without_password
from wavemim.registry import is_file

# What depends on the machine or was meant for one command only. The number of workers stays: it decides the order of data.
_LEFT_OUT = (
    *("checkpoint", "restart", "force", "cluster"),
    *("train.reader_threads", "finetune.reader_threads", "tune.concurrent"),
)


def best_recipe(recipe: Recipe, point: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """Write a recipe with the values of a point.

    Args:
        recipe: The sweep's settings.
        point: Values by dotted key; empty for the recipe itself, which then keeps its name.
        comments: Lines for its head.

    Returns:
        The recipe as YAML: the sweep's places (shards, out and others) are absolute, settings of the machine and the
        address of an MLflow store that contains a password are left out.

    Raises:
        SettingError: The point is not possible with the recipe's other settings.
    """
    settings = with_overrides(recipe, point).dump()
    settings["shards"] = recipe.shards_at
    for key, behaviour in BEHAVIOURS.items():
        if behaviour.place:
            _change(settings, key, _absolute)
    _change(settings, "target.module", lambda name: _absolute(name) if is_file(name) else name)
    _change(settings, "tune.space", _absolute_space)
    lines = list(comments)
    uri = recipe.tracking.uri
    if uri is not None:
        secret = without_password(uri) != uri
        settings["tracking"]["uri"] = None if secret else absolute_uri(uri)
        if secret:
            lines.append("tracking.uri is left out, since it contains a password: set MLFLOW_TRACKING_URI.")
    for key in _LEFT_OUT:
        section, _, last = key.rpartition(".")
        (settings[section] if section else settings).pop(last, None)
    if point:
        settings["name"] = f"{recipe.name}-tuned"
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _change(settings: dict[str, Any], key: str, change: Any) -> None:
    """Replace the value of a dotted key unless it is None."""
    section, _, last = key.rpartition(".")
    place = settings[section] if section else settings
    if place.get(last) is not None:
        place[last] = change(place[last])


def _absolute(place: Any) -> Any:
    """A path made absolute; URLs, and values that are no text (encoder.pretrained may be true), as they are."""
    return place if not isinstance(place, str) or "://" in place else str(Path(place).expanduser().absolute())


def _absolute_space(space: Any) -> Any:
    """A search space, or a list of them; names of those that come with the project stay."""
    if not isinstance(space, str):
        return [_absolute_space(one) for one in space]
    return _absolute(space) if space.endswith((".yaml", ".yml")) or "/" in space else space
