"""Settings that follow others: where the one that was given leaves a single sensible value for the other, that is taken.

A shorter training shortens its warm-up, a smaller batch has fewer workers. A value that was given itself, on the command line
or in a recipe of one's own, is never changed: if it contradicts another one, `checks` refuses them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pipeline.config.recipe import BEHAVIOURS, Recipe

WARM_UP = 10  # a warm-up that does not fit is shortened to this part of the training


class Rule(NamedTuple):
    """A setting that follows others."""

    setting: str
    follows: tuple[str, ...]  # one of which was given
    value: Callable[[Recipe], Any]  # that fits; the present one if it does


def shortened(warmup_epochs: float, epochs: float) -> float:
    """The warm-up of a training of so many epochs: as it is where it fits, else a tenth of them."""
    return warmup_epochs if warmup_epochs < epochs else epochs / WARM_UP


def _divisor(number: int, most: int | None) -> int | None:
    """The largest divisor of `number` up to `most`."""
    return most and max(part for part in range(1, most + 1) if number % part == 0)


def _at_most(value: int | None, most: int) -> int | None:
    return value and min(value, most)


def _normalisation(recipe: Recipe) -> str:
    """As it is where the target allows it: contrast is for targets with bands."""
    target = recipe.target
    if target.normalise != "contrast" or _has_bands(recipe):
        return target.normalise
    return "dataset" if target.kind == "fourier" else "patch"


def _has_bands(recipe: Recipe) -> bool:
    """Whether the target predicts bands; true where its module cannot be imported, which `checks` says."""
    try:
        return recipe.target.predicts_bands
    except ValueError:
        return True


WARM_UPS = (
    Rule("train.warmup_epochs", ("train.epochs",), lambda r: shortened(r.train.warmup_epochs, r.train.epochs)),
    Rule(
        "finetune.warmup_epochs", ("finetune.epochs",), lambda r: shortened(r.finetune.warmup_epochs, r.finetune.epochs)
    ),
)
WEIGHTS = Rule(
    "target.weights",
    ("target.taps",),
    lambda r: {level: weight for level, weight in r.target.weights.items() if level in r.target.taps},
)
BY_KIND = (
    Rule("target.normalise", ("target.kind",), _normalisation),
    Rule("target.tilt", ("target.kind",), lambda r: r.target.tilt if _has_bands(r) else None),
)
RULES = (
    *WARM_UPS,
    WEIGHTS,
    *BY_KIND,
    Rule("train.workers", ("train.batch",), lambda r: min(r.train.workers, r.train.batch)),
    Rule("finetune.workers", ("finetune.batch",), lambda r: _divisor(r.finetune.batch, r.finetune.workers)),
    Rule(
        "train.optimizer",
        ("train.parallel",),
        lambda r: "adamw" if r.train.parallel == "fsdp" else r.train.optimizer,
    ),
    Rule("encoder.image_size", ("data.image_size",), lambda r: min(r.encoder.image_size, r.data.image_size)),
    Rule("finetune.image_size", ("data.image_size",), lambda r: _at_most(r.finetune.image_size, r.data.image_size)),
    Rule("encoder.heads", ("encoder.width",), lambda r: _divisor(r.encoder.width or 1, r.encoder.heads)),
    Rule("decoder.heads", ("decoder.width",), lambda r: _divisor(r.decoder.width, r.decoder.heads)),
    Rule("target.loss", ("target.kind",), lambda r: "l2" if r.target.kind == "fourier" else r.target.loss),
    Rule(
        "target.average",
        ("target.kind", "mask.kind"),
        lambda r: r.target.average if (r.target.kind, r.mask.kind) == ("fourier", "frequency") else "image",
    ),
)


def setting_of(key: str) -> str:
    """The setting that a dotted key names, of which it may be an entry: target.weights of target.weights.3."""
    while key not in BEHAVIOURS and "." in key:
        key = key.rpartition(".")[0]
    return key


def following(
    recipe: Recipe, leading: Iterable[str], fixed: Iterable[str], rules: Iterable[Rule] = RULES
) -> tuple[dict[str, Any], list[str]]:
    """What the settings that were given change in others.

    Args:
        recipe: All settings.
        leading: Keys of the settings that others follow, dotted; also those of single entries of mappings.
        fixed: Keys of the settings that follow no others.
        rules: What follows what.

    Returns:
        Values by dotted key, and a few words about each.
    """
    lead, stay = ({setting_of(key) for key in keys} for keys in (leading, fixed))
    changes, words = {}, []
    for rule in rules:
        leaders = [key for key in rule.follows if key in lead]
        before = operator.attrgetter(rule.setting)(recipe)
        if not leaders or rule.setting in stay:
            continue
        value = rule.value(recipe)
        if value != before:
            changes[rule.setting] = value
            leading = ", ".join(f"{key}={_shown(operator.attrgetter(key)(recipe))}" for key in leaders)
            words.append(f"{rule.setting}={_shown(value)} instead of {_shown(before)}, to fit {leading}")
    return changes, words


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
