"""What a sweep draws a value from: a range, a list, or the simplex. Knows neither Ray nor Optuna.

Values are drawn from a `Trial`, which has the interface of an Optuna trial: Optuna itself, a seeded generator
(`RandomTrial`), or an enumeration of all values (`enumerated`).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipeline.config.settings import number_like
from pipeline.errors import SettingError


class Trial(Protocol):
    """Where values come from: the part of Optuna's interface that is used here. Both ends of a range are included."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of several texts."""


class RandomTrial:
    """Draws at random. The values are a pure function of the seed and the trial's number."""

    def __init__(self, seed: int, number: int = 0) -> None:
        self._random = np.random.default_rng([seed, number])

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number, uniform or log-uniform in the range."""
        if step is not None:
            return low + step * int(self._random.integers(0, round((high - low) / step), endpoint=True))
        if log:
            return math.exp(self._random.uniform(math.log(low), math.log(high)))
        return float(self._random.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number."""
        return low + step * int(self._random.integers(0, (high - low) // step, endpoint=True))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of several texts."""
        return choices[int(self._random.integers(len(choices)))]


@dataclass
class _ListedTrial:
    """Takes each value from a list of candidates, by the positions in `path`; beyond its end the first one."""

    path: list[int]
    shortened: bool
    sizes: list[int] = field(default_factory=list)

    def _take(self, candidates: Sequence[Any]) -> Any:
        at = len(self.sizes)
        self.sizes.append(len(candidates))
        if at == len(self.path):
            self.path.append(0)
        return candidates[self.path[at]]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """An end of the range, or a number between them."""
        return float(self._take(between(low, high, step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """One of all whole numbers, or of those that stand for them."""
        return int(self._take(numbers_between(low, high, step) if self.shortened else range(low, high + 1, step)))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of all texts."""
        return str(self._take(choices))


MOST = 16  # whole numbers of a range that are all tried in checks


def between(low: float, high: float, step: float | None) -> tuple[float, float, float]:
    """The ends of a range, and a number inside that is not a round one, so that it is wrong where integers are needed."""
    inside = low + (high - low) * 0.37
    return low, high, inside if step is None else low + step * math.floor((inside - low) / step)


def numbers_between(low: int, high: int, step: int) -> Sequence[float]:
    """All whole numbers of a short range; of a long one its ends and a number between them."""
    numbers = range(low, high + 1, step)
    return numbers if len(numbers) <= MOST else between(low, high, step)


def enumerated(
    suggest: Callable[[Trial], dict[str, Any]], most: int, *, shortened: bool = False
) -> list[dict[str, Any]] | None:
    """All points that a function can suggest, where ranges of numbers count as their ends and a number between them.

    Args:
        suggest: Draws a point from a trial. What it draws next may depend on what it has drawn.
        most: Largest number of points.
        shortened: Whether this also holds for long ranges of whole numbers and long lists of a grid.

    Returns:
        The points, each once, in the order of the values; None if there are more than `most`.
    """
    points: dict[str, dict[str, Any]] = {}
    path: list[int] = []
    while True:
        trial = _ListedTrial(path, shortened)
        point = suggest(trial)
        points.setdefault(json.dumps(point, sort_keys=True), point)
        if len(points) > most:
            return None
        while path and path[-1] + 1 == trial.sizes[len(path) - 1]:
            path.pop()
        if not path:
            return list(points.values())
        path[-1] += 1


def plain(value: Any) -> Any:
    """A value as JSON has it, with numbers for texts such as 1e-4, which YAML reads as text."""
    if isinstance(value, str):
        number = number_like(value)
        return number if isinstance(number, str) or math.isfinite(number) else value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as tables and messages show it, in YAML's notation."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(inner) for inner in value)}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: The smallest.
        high: The largest.
        log: Whether the logarithm is uniform, rather than the number.
        whole: Whether only whole numbers are drawn.
        step: Distance of the numbers that are drawn, counted from `low`; None: any.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: float | None = None

    def draw(self, trial: Trial, name: str) -> float:
        """Draw a number. One without a step is rounded to four significant digits, which is what tables show."""
        if self.whole:
            return int(trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1)))
        # Optuna has no steps of logarithmic ranges
        return self.nearest(
            trial.suggest_float(name, self.low, self.high, step=None if self.log else self.step, log=self.log)
        )

    def nearest(self, number: float) -> float:
        """The nearest number that may be drawn."""
        number = min(max(number, self.low), self.high)
        step = self.step or (1 if self.whole else None)
        if step is None:
            return min(max(float(f"{number:.4g}"), self.low), self.high)
        value = self.low + round((number - self.low) / step) * step
        return value if isinstance(value, int) else float(f"{value:.10g}")

    def has(self, value: Any) -> bool:
        """Whether a condition may ask for a value: in a continuous range it would never be drawn."""
        return self.whole and value in range(int(self.low), int(self.high) + 1, int(self.step or 1))

    def record(self) -> dict[str, Any]:
        """As it is written in a file."""
        kind = "int" if self.whole else "log_uniform" if self.log else "uniform"
        return {kind: [self.low, self.high]} | ({} if self.step is None else {"step": self.step})


@dataclass(frozen=True)
class Choice:
    """One of several values. Those of a grid have an order, and all of them are tried where everything is a grid."""

    values: tuple[Any, ...]
    grid: bool = False

    def draw(self, trial: Trial, name: str) -> Any:
        """Draw a value. Nothing is asked of the trial if there is only one."""
        index = 0
        if len(self.values) > 1 and self.grid:
            index = trial.suggest_int(name, 0, len(self.values) - 1)
        elif len(self.values) > 1:
            labels = [shown(value) for value in self.values]  # Optuna stores texts, but no lists and mappings
            index = labels.index(trial.suggest_categorical(name, labels))
        return copy.deepcopy(self.values[index])

    def has(self, value: Any) -> bool:
        """Whether it is one of the values."""
        return value in self.values

    def record(self) -> dict[str, Any]:
        """As it is written in a file."""
        return {"grid" if self.grid else "choice": list(self.values)}


@dataclass(frozen=True)
class Simplex:
    """Shares that sum to 1, one for each of several settings; all divisions are equally likely (Dirichlet with all 1)."""

    members: tuple[str, ...]

    @staticmethod
    def draw(trial: Trial, names: Sequence[str]) -> list[float]:
        """Draw shares, with four decimals: exponentially distributed numbers, divided by their sum.

        Args:
            trial: It draws a uniform number for each share, from which the exponential one is computed.
            names: Of these uniform numbers.

        Returns:
            The shares in the order of the names.
        """
        if len(names) == 1:
            return [1.0]
        uniform = [min(max(trial.suggest_float(name, 0.0, 1.0), 1e-9), 1 - 1e-9) for name in names]
        return Simplex.divided([-math.log1p(-value) for value in uniform])

    @staticmethod
    def divided(parts: Sequence[float]) -> list[float]:
        """Shares with four decimals that sum to 1, in the proportions of some numbers."""
        shares = [round(part / sum(parts), 4) for part in parts]
        largest = max(range(len(shares)), key=shares.__getitem__)
        shares[largest] = round(1 - sum(shares[:largest] + shares[largest + 1 :]), 4)
        return shares

    def has(self, value: Any) -> bool:
        """A condition cannot ask for a share."""
        return False

    def record(self) -> dict[str, Any]:
        """As it is written in a file."""
        return {"simplex": list(self.members)}


Distribution = Range | Choice | Simplex
KINDS = ("uniform", "log_uniform", "int", "choice", "grid", "simplex")
RANGES = ("uniform", "log_uniform", "int")


def parse(where: str, kind: str, values: Any, step: Any = None) -> Distribution:
    """Make a distribution from what a file says.

    Args:
        where: What messages begin with.
        kind: One of `KINDS`.
        values: [low, high] of a range, or the values of a list, or the last parts of the settings of a simplex.
        step: Distance of the numbers of a range.

    Returns:
        The distribution.

    Raises:
        SettingError: The values are not right for the kind.
    """
    if kind in RANGES:
        return _parse_range(where, kind, values, step)
    if step is not None:
        raise SettingError(f"{where}: step is for {', '.join(RANGES)} only, not for {kind}")
    if not isinstance(values, list) or not values:
        what = "settings" if kind == "simplex" else "values"
        raise SettingError(f"{where}: {kind} needs a list of {what}, got {shown(values)}")
    if kind == "simplex":
        members = tuple(str(member) for member in values)
        _refuse_twice(where, kind, members)
        return Simplex(members)
    listed = tuple(plain(value) for value in values)
    _refuse_twice(where, kind, [shown(value) for value in listed])
    return Choice(listed, grid=kind == "grid")


def _refuse_twice(where: str, kind: str, labels: Sequence[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise SettingError(f"{where}: {kind} has {label} twice; give each value once")


def _parse_range(where: str, kind: str, values: Any, step: Any) -> Range:
    numbers = [_number(value) for value in values] if isinstance(values, list) and len(values) == 2 else [None]
    above = " above 0" if kind == "log_uniform" else ""
    if any(number is None for number in numbers) or not _ascending(numbers, positive=bool(above)):
        got = values if isinstance(values, list) else shown(values)
        raise SettingError(f"{where}: {kind} needs [low, high]{above}, got {got}")
    low, high = (number for number in numbers if number is not None)
    distance = None if step is None else _number(step)
    if step is not None and (distance is None or not 0 < distance <= high - low):
        raise SettingError(f"{where}: step needs a number above 0 and at most {high - low:g}, got {shown(step)}")
    if kind == "int" and not all(value is None or float(value).is_integer() for value in (low, high, distance)):
        raise SettingError(f"{where}: int needs whole numbers, got {_with_step(values, step)}")
    if distance is not None:
        count = (high - low) / distance
        if abs(count - round(count)) > 1e-6:
            nearest = [low + distance * whole for whole in (math.floor(count), math.ceil(count))]
            raise SettingError(
                f"{where}: {high:g} is not reached from {low:g} in steps of {distance:g}; "
                f"nearest: {nearest[0]:g} or {nearest[1]:g}"
            )
    if kind == "int":
        return Range(int(low), int(high), whole=True, step=None if distance is None else int(distance))
    return Range(low, high, log=kind == "log_uniform", step=distance)


def _ascending(numbers: Iterable[float | None], *, positive: bool) -> bool:
    low, high = (number or 0 for number in numbers)
    return low < high and (low > 0 or not positive)


def _number(value: Any) -> float | None:
    """The number that a value of a YAML file stands for, or None."""
    value = number_like(value) if isinstance(value, str) else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _with_step(values: Any, step: Any) -> str:
    return f"{values}" if step is None else f"{values} in steps of {step}"
