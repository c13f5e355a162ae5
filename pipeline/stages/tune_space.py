"""Search spaces of sweeps: which settings vary, in which ranges, and what every trial changes in addition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.checks import check_searchable
from pipeline.config.load import read_yaml, with_overrides
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError

KINDS = ("uniform", "log_uniform", "choice", "int_uniform")
Space = dict[str, dict[str, Any]]  # {setting: {kind of range: values}}


def check_space(recipe: Recipe) -> None:
    """Raise SettingError unless trials of `recipe` can have all values of the search space."""
    for key, entry in read_space(recipe).items():
        _check_entry(recipe, key, entry)


def read_space(recipe: Recipe) -> Space:
    """Read the file of `tune.space`.

    Args:
        recipe: The settings.

    Returns:
        The searched settings and their ranges, without weights of levels that the recipe does not tap.

    Raises:
        SettingError: The file is missing or has no search space for this recipe.
    """
    name = recipe.tune.space
    entries = read_yaml(name, "tune_spaces", "", "tune.space").get("space")
    if not isinstance(entries, dict) or not entries:
        raise SettingError(f"tune.space={name}: the file needs a mapping 'space' of settings to ranges")
    space: Space = {}
    for key, entry in entries.items():
        section, _, last = str(key).rpartition(".")
        if section == "target.weights" and last.isdigit() and int(last) not in recipe.target.taps:
            continue
        space[str(key)] = entry
    if not space:
        raise SettingError(f"tune.space={name}: the recipe taps none of its levels (target.taps)")
    return space


def _check_entry(recipe: Recipe, key: str, entry: Any) -> None:
    """Raise SettingError unless `entry` is a range of values that trials of `recipe` can have for the setting `key`."""
    where = f"tune.space={recipe.tune.space}: {key}"
    check_searchable(key, where)
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise SettingError(f"{where} needs one of {', '.join(KINDS)}, for example {{uniform: [0.4, 0.9]}}")
    kind, values = next(iter(entry.items()))
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise SettingError(f"{where}: choice needs a list of values, got {values}")
    else:
        numbers = isinstance(values, list) and len(values) == 2 and all(type(v) in (int, float) for v in values)
        if not numbers or values[0] >= values[1] or (kind == "log_uniform" and values[0] <= 0):
            above = " above 0" if kind == "log_uniform" else ""
            raise SettingError(f"{where}: {kind} needs [low, high]{above}, got {values}")
        if kind == "int_uniform" and not all(type(value) is int for value in values):
            raise SettingError(f"{where}: int_uniform needs whole numbers, got {values}")
    # Values that are not allowed are found before the sweep, and so are fractions where a whole number is needed.
    between = [values[0] + (values[1] - values[0]) * 0.37] if kind in ("uniform", "log_uniform") else []
    for value in (*values, *between):
        with_overrides(recipe, changes(recipe, {key: value}))


def changes(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a trial changes: its length, one worker, and the searched values."""
    changes = {"train.epochs": recipe.tune.epochs, "train.workers": 1, "tracking.system_metrics": False, **config}
    if "train.warmup_epochs" not in config and recipe.train.warmup_epochs >= changes["train.epochs"]:
        changes["train.warmup_epochs"] = changes["train.epochs"] / 10
    return changes
