"""What the objective is plotted and fitted against: searched settings, and ratios of level weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.sweeps.trials import WEIGHT, Sweep, Trial, key_of, point_key, short_value

FEWEST_NUMBERS = 4  # different values from which a setting is treated as a number rather than as categories


@dataclass(frozen=True)
class Axis:
    """One searched setting, or the ratio of two level weights.

    Attributes:
        keys: Dotted key of the setting, or of the two weights.
        numeric: Whether its values are numbers; otherwise they are categories, by their text in JSON.
        log: Whether a number enters the fit by its logarithm.
        shown: {category: text for people}, in the order of the figures; empty for numbers.
    """

    keys: tuple[str, ...]
    numeric: bool
    log: bool = False
    shown: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """For figures and tables."""
        if len(self.keys) == 1:
            return self.keys[0]
        first, second = (key.removeprefix(WEIGHT) for key in self.keys)
        return f"weight of level {first} / weight of level {second}"

    def value(self, point: Mapping[str, Any]) -> Any:
        """The value at a point: a number or a category; None if the setting does not apply there."""
        if any(key not in point for key in self.keys):
            return None
        if len(self.keys) == 2:
            return float(point[self.keys[0]]) / float(point[self.keys[1]])
        value = point[self.keys[0]]
        return float(value) if self.numeric else key_of(value)

    def position(self, value: float) -> float:
        """Where a number is on the axis of the fit."""
        return math.log10(value) if self.log else value


def axes_of(sweep: Sweep) -> list[Axis]:
    """The axes of a sweep. Settings with one value in all finished trials are left out.

    Args:
        sweep: The trials.

    Returns:
        An axis per searched setting; of the weights in `sweep.relative` one per ratio to the coarsest level's weight.
    """
    points = [trial.point for trial in sweep.finished()]
    relative = list(sweep.relative)
    weights: list[Any] = [point.get(key) for point in points for key in relative]
    if not all(_is_number(weight) and weight > 0 for weight in weights):
        relative = []
    found = []
    for key in sweep.settings:
        if key in relative:
            if key != relative[-1] and len({point[key] / point[relative[-1]] for point in points}) > 1:
                found.append(Axis((key, relative[-1]), numeric=True, log=True))
            continue
        values = [point[key] for point in points if key in point]
        different = {key_of(value): value for value in values}
        if len(different) < 2:
            continue
        numbers = all(_is_number(value) for value in values)
        if numbers and len(different) >= FEWEST_NUMBERS:
            found.append(Axis((key,), numeric=True, log=key in sweep.log and min(values) > 0))
        else:
            order = sorted(different, key=lambda name: (different[name] if numbers else 0, name))
            found.append(Axis((key,), numeric=False, shown={name: short_value(different[name]) for name in order}))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Observed:
    """A point of the space and what its seeds gave.

    Attributes:
        point: The values of the searched settings.
        mean: Mean objective of its finished trials.
        count: Number of these trials.
        roles: Their roles.
    """

    point: Mapping[str, Any]
    mean: float
    count: int
    roles: frozenset[str]


def observed(trials: Sequence[Trial]) -> list[Observed]:
    """The mean of each point over its finished trials, in the order of the trials."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.value is not None:
            groups.setdefault(point_key(trial.point), []).append(trial)
    return [
        Observed(
            group[0].point,
            float(np.mean([trial.value for trial in group if trial.value is not None])),
            len(group),
            frozenset(trial.role for trial in group),
        )
        for group in groups.values()
    ]
