"""The trials of a sweep: what was run, with which settings and seed, and what came out."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.config.recipe import Recipe

Role = Literal["recipe", "search", "finalist"]
ROLES: tuple[Role, ...] = ("recipe", "search", "finalist")
State = Literal["finished", "stopped", "failed"]
WEIGHT = "target.weights."
# Metrics of a trial: on how many train images its objective, and on how many each point of its curve was measured. Trials of
# earlier versions have neither.
OBJECTIVE_IMAGES, CURVE_IMAGES = "objective_images", "curve_images"
_MISSING = object()
_GENERIC = ("ratio", "kind")  # last parts of a key that say less than the section


@dataclass(frozen=True)
class Fork:
    """A trial that goes on from another one's checkpoint with changed settings (population-based training).

    Attributes:
        number: The trial's number.
        donor: The other trial's.
        rung: The rung at which it happens: both trials have measured it.
        images: Images that both have seen.
        point: Values of the searched settings from there on, by dotted key.
    """

    number: int
    donor: int
    rung: int
    images: int
    point: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Its number in the sweep.
        role: "recipe": the recipe's own settings, to measure the noise; "search": chosen by the search; "finalist": a
            point that the search found, again with a seed that no trial of this point had before.
        point: Values of the searched settings by dotted key, for the role "recipe" too. A setting that does not apply
            (of a conditional entry of the space) is missing. Values may be numbers, texts, booleans, None, lists and mappings.
            Of a trial with forks, the last values.
        seed: Its seed.
        state: "finished"; "stopped": ended early by a scheduler; or "failed".
        objective: The objective at its end, higher is better; None if it was not measured. Only that of a finished trial
            enters the statistics.
        reason: Why it was stopped or failed, in one line.
        curve: (images seen, objective) during training, its end included, all measured alike. That measure is cheaper than
            the one of `objective`: on `metrics[CURVE_IMAGES]` images instead of `metrics[OBJECTIVE_IMAGES]`.
        cost: Metrics ``cost/…`` by name.
        metrics: Further results for the table, by name.
        forks: Where its weights and settings were replaced during training, in this order.
    """

    number: int
    role: Role
    point: Mapping[str, Any]
    seed: int
    state: State
    objective: float | None = None
    reason: str = ""
    curve: Sequence[tuple[int, float]] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    forks: Sequence[Fork] = ()

    @property
    def value(self) -> float | None:
        """The objective if the trial finished and it is a finite number, else None."""
        known = self.state == "finished" and self.objective is not None and math.isfinite(self.objective)
        return self.objective if known else None


@dataclass(frozen=True)
class Sweep:
    """All trials of a sweep, and what they mean.

    Attributes:
        objective: Name of the objective's metric; higher is better.
        settings: Dotted keys of the searched settings.
        trials: The trials.
        question: The question of the search space.
        log: Searched settings that are drawn uniformly in their logarithm.
        relative: Level weights of which only the ratios matter, since the sweep varies those of all levels.
        cost: The second objective as tune.cost names it; None: there is none.
    """

    objective: str
    settings: Sequence[str]
    trials: Sequence[Trial]
    question: str = ""
    log: Collection[str] = ()
    relative: Sequence[str] = ()
    cost: str | None = None

    @property
    def unit(self) -> str:
        """ " points" for percentages, "" for other measures; it follows a number."""
        return " points" if "top1" in self.objective or "top5" in self.objective else ""

    def images_of(self, name: str) -> int | None:
        """Images of a measurement, OBJECTIVE_IMAGES or CURVE_IMAGES; None if no trial that finished says so, or not
        all that do agree. The objective of a stopped trial is a point of its curve."""
        counts = {trial.metrics[name] for trial in self.trials if name in trial.metrics and trial.state == "finished"}
        return int(counts.pop()) if len(counts) == 1 else None

    @property
    def has_curves(self) -> bool:
        """Whether a trial was measured more than once, with finite values."""
        return any(sum(math.isfinite(value) for _, value in trial.curve) > 1 for trial in self.trials)

    @property
    def constant(self) -> Sweep:
        """The sweep without trials whose settings changed during training: what they reached is due to no one point."""
        return replace(self, trials=[trial for trial in self.trials if not trial.forks])

    def finished(self, *roles: Role) -> list[Trial]:
        """Trials with a value, of some roles or of all."""
        return [trial for trial in self.trials if trial.value is not None and (not roles or trial.role in roles)]


def relative_weights(recipe: Recipe, settings: Sequence[str]) -> list[str]:
    """Level weights of which only the ratios matter: those of all levels that `recipe` taps, if `settings` has them all."""
    every = [f"{WEIGHT}{level}" for level in sorted(recipe.target.taps)]
    return every if len(every) > 1 and set(every) <= set(settings) else []


def own_point(recipe: Recipe, settings: Sequence[str]) -> dict[str, Any]:
    """The recipe's own values of settings; those of which it has none are left out.

    Args:
        recipe: The recipe.
        settings: Dotted keys. Level weights are those that the recipe trains with, given or not.
    """
    every: Mapping[str, Any] = recipe.dump()
    weights = {f"{WEIGHT}{level}": weight for level, weight in recipe.weights_by_level().items()}
    found = {}
    for key in settings:
        value: Any = every
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        value = weights.get(key, value)
        if value is not _MISSING:
            found[key] = value
    return found


def key_of(value: Any) -> str:
    """A value as text in JSON, equal for equal values, and hashable when the value is not."""
    return json.dumps(value, sort_keys=True, default=str)


def point_key(point: Mapping[str, Any]) -> str:
    """A text that is equal for equal points."""
    return key_of(dict(point))


def short_value(value: Any, longest: int = 24) -> str:
    """A value as people read it: two digits of a fraction, lists and mappings without spaces."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float):
        plain = f"{value:.2g}"
        return f"{value:.0f}" if "e+" in plain and abs(value) < 1e6 else plain
    if isinstance(value, Mapping):
        text = "{" + ",".join(f"{key}:{short_value(inner)}" for key, inner in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ",".join(short_value(inner) for inner in value) + "]"
    else:
        text = (
            {None: "null", True: "true", False: "false"}[value]
            if value is None or value is True or value is False
            else str(value)
        )
    return text if len(text) <= longest else text[: longest - 1] + "…"


def short_names(settings: Sequence[str]) -> dict[str, str]:
    """Short names of settings.

    Args:
        settings: Dotted keys.

    Returns:
        {key: name}, all different: "w3" for target.weights.3, "tap3" for target.taps.3, "mask" for mask.ratio, else the
        key's last part. Where that is not unique, the key itself.
    """
    short = {}
    for key in settings:
        head, _, last = key.rpartition(".")
        section = head.rpartition(".")[2]
        if last.isdigit():
            short[key] = f"{ {'weights': 'w', 'taps': 'tap'}.get(section, section) }{last}"
        else:
            short[key] = section if last in _GENERIC and section else last
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key for key, name in short.items()}


def short_name(number: int) -> str:
    """A trial's number as texts, tables and figures have it, such as "#07"."""
    return f"#{number:02d}"


def trial_name(number: int, point: Mapping[str, Any], settings: Sequence[str] | None = None) -> str:
    """Name of a trial by what varies, such as "#07 w1=0.41 w3=2.1 mask=0.67".

    Args:
        number: The trial's number.
        point: Its values by dotted key.
        settings: All searched settings, so that short names are the same for all trials; None: those of the point.

    Returns:
        The name, of 250 characters at most.
    """
    names = short_names(list(settings) if settings is not None else list(point))
    parts = [f"{names.get(key, key)}={short_value(value)}" for key, value in point.items()]
    text = " ".join((short_name(number), *parts))
    return text if len(text) <= 250 else text[:249] + "…"
