"""Search spaces of sweeps: which settings vary, in which ranges, and under which conditions. Knows neither Ray nor Optuna.

A space is read from files, a question each. `Space.suggest` draws a point, a value for each of the settings that apply, from
anything with the interface of an Optuna trial. `pipeline.stages.tune_check` says whether a recipe can have all its points.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.checks import check_searchable, nearest
from pipeline.config.load import check_key, read_yaml
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.stages.tune_distributions import (
    KINDS,
    Choice,
    Distribution,
    Simplex,
    Trial,
    enumerated,
    parse,
    plain,
    shown,
)

OLD_NAMES = {"int_uniform": "int"}
MOST_POINTS = 10_000  # of a grid
DRAW = "#"  # between a setting and a number or word, in the name of what is drawn for it


@dataclass(frozen=True)
class Question:
    """What a file of a space asks.

    Attributes:
        space: The file's name.
        text: The question.
        unit: The unit of its answer.
    """

    space: str
    text: str
    unit: str


@dataclass(frozen=True)
class Condition:
    """The value that another setting must have.

    Attributes:
        setting: The other setting.
        values: The values of which it must have one.
        otherwise: What it is where the point has no value for it: that of the recipe.
    """

    setting: str
    values: tuple[Any, ...]
    otherwise: Any

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether the setting has one of the values at a point."""
        return point.get(self.setting, self.otherwise) in self.values


@dataclass(frozen=True)
class Dimension:
    """What is drawn for one setting, or for the settings of a simplex.

    Attributes:
        settings: Their dotted keys.
        distribution: What the values are drawn from.
        when: Conditions, all of which must hold.
        name: What Optuna knows it by: the setting, or for alternatives SETTING#NUMBER.
        where: What messages about it begin with.
    """

    settings: tuple[str, ...]
    distribution: Distribution
    when: tuple[Condition, ...]
    name: str
    where: str

    def draw(self, trial: Trial, settings: Sequence[str]) -> dict[str, Any]:
        """Draw values for some of its settings."""
        if isinstance(self.distribution, Simplex):
            shares = self.distribution.draw(trial, [f"{setting}{DRAW}draw" for setting in settings])
            return dict(zip(settings, shares, strict=True))
        return {setting: self.distribution.draw(trial, self.name) for setting in settings}

    def record(self) -> dict[str, Any]:
        """As it is written in a file."""
        conditions = {condition.setting: list(condition.values) for condition in self.when}
        return {**self.distribution.record(), **({"when": conditions} if conditions else {})}


@dataclass(frozen=True)
class Space:
    """A search space for a recipe.

    Attributes:
        questions: What its files ask.
        settings: Dotted keys of all settings that it varies, in the order of the files.
        dimensions: What is drawn, each after those that it depends on.
        taps: The recipe's taps, level → block.
        where: What messages begin with.
    """

    questions: tuple[Question, ...]
    settings: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    taps: Mapping[str, int]
    where: str

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Draw a point.

        Of alternatives for a setting, the first whose conditions hold counts. Weights and bands of levels that the point does
        not tap are left out.

        Args:
            trial: An Optuna trial, or something with its interface.

        Returns:
            A JSON value for each setting that applies; the others have the recipe's value.
        """
        point: dict[str, Any] = {}
        for dimension in self.dimensions:
            wanted = [key for key in dimension.settings if key not in point and self._is_tapped(key, point)]
            if wanted and all(condition.holds(point) for condition in dimension.when):
                point |= dimension.draw(trial, wanted)
        return {key: point[key] for key in self.settings if key in point}

    def grid(self) -> list[dict[str, Any]] | None:
        """All points, if every setting is a grid, or is constant; otherwise None.

        Raises:
            SettingError: There are more than anybody could try.
        """
        kinds = [dimension.distribution for dimension in self.dimensions]
        if not all(isinstance(kind, Choice) and (kind.grid or len(kind.values) == 1) for kind in kinds):
            return None
        points = enumerated(self.suggest, MOST_POINTS)
        if points is None:
            raise SettingError(f"{self.where}: the grid has more than {MOST_POINTS} points; use choice instead of grid")
        return points

    def record(self) -> dict[str, Any]:
        """The space as JSON: which values are drawn for each setting. It is part of a sweep's identity."""
        found: dict[str, Any] = {}
        for dimension in self.dimensions:
            if isinstance(dimension.distribution, Simplex):
                prefix = dimension.settings[0].rpartition(".")[0]
                members = [key.rpartition(".")[2] for key in dimension.settings]
                found.setdefault(prefix, []).append({**dimension.record(), "simplex": members})
            else:
                found.setdefault(dimension.settings[0], []).append(dimension.record())
        return {key: entries[0] if len(entries) == 1 else entries for key, entries in found.items()}

    def _is_tapped(self, key: str, point: Mapping[str, Any]) -> bool:
        """Whether a point taps the level whose weight or bands a setting gives; True for other settings."""
        level = level_of(key)
        taps = point.get("target.taps", self.taps)
        return level is None or f"target.taps.{level}" in point or (isinstance(taps, dict) and level in taps)


def setting_of(name: str) -> str:
    """The setting that Optuna's parameter of this name belongs to."""
    return name.partition(DRAW)[0]


def level_of(key: str) -> str | None:
    """The level whose weight or bands a setting gives; None for other settings."""
    found = re.fullmatch(r"target\.(?:weights|bands)\.(\d+)", key)
    return found[1] if found else None


def names_of_spaces(recipe: Recipe) -> tuple[str, ...]:
    """The files of `tune.space`."""
    given = recipe.tune.space
    return (given,) if isinstance(given, str) else given


def read_space(recipe: Recipe) -> Space:
    """Read the files of `tune.space` and join them.

    Args:
        recipe: The settings.

    Returns:
        The space, without what does not apply to the recipe: weights of levels that no point taps, and settings whose
        conditions the recipe rules out.

    Raises:
        SettingError: A file is missing or is no search space for this recipe, or two of them vary the same setting.
    """
    names = names_of_spaces(recipe)
    where = f"tune.space={' + '.join(names)}"
    questions: list[Question] = []
    dimensions: list[Dimension] = []
    for name in names:
        question, found = _read(name, recipe)
        questions.append(question)
        _refuse_overlaps(dimensions, found)
        dimensions += found
    values = {key for dimension in dimensions for key in dimension.settings}
    dimensions = [kept for dimension in dimensions if (kept := _applicable(dimension, values, dimensions))]
    taps = {str(level): block for level, block in recipe.target.taps.items()}
    tapped = _tapped_levels(dimensions, taps)
    dimensions = [kept for dimension in dimensions if (kept := _with_levels(dimension, tapped))]
    if not dimensions:
        raise SettingError(f"{where}: the recipe taps none of its levels (target.taps), or its conditions never hold")
    settings = dict.fromkeys(key for dimension in dimensions for key in dimension.settings)
    return Space(tuple(questions), tuple(settings), tuple(_in_order(dimensions, where)), taps, where)


def _read(name: str, recipe: Recipe) -> tuple[Question, list[Dimension]]:
    """One file."""
    where = f"tune.space={name}"
    content = read_yaml(name, "tune_spaces", "", "tune.space")
    entries = content.get("space")
    if not isinstance(entries, dict) or not entries:
        raise SettingError(f"{where}: the file needs a mapping 'space' of settings to ranges")
    for key in content:
        if key not in ("question", "unit", "space"):
            near = nearest(str(key), ("question", "unit", "space"), "")
            raise SettingError(f"{where}: unknown key '{key}'{near}; allowed are question, unit and space")
    texts = [content.get(key) or "" for key in ("question", "unit")]
    if not all(isinstance(text, str) for text in texts):
        raise SettingError(f"{where}: question and unit must be texts")
    found: list[Dimension] = []
    for key, entry in entries.items():
        alternatives = entry if isinstance(entry, list) and entry else [entry]
        parsed: list[Dimension] = []
        for number, alternative in enumerate(alternatives, 1):
            dimension = _dimension(str(key), alternative, f"{where}: {key}", recipe)
            if parsed and not parsed[-1].when:
                raise SettingError(
                    f"{where}: {key}: entry {number} is never used, since entry {number - 1} has no condition (when:)"
                )
            name_ = dimension.name if number == 1 else f"{dimension.name}{DRAW}{number}"
            parsed.append(replace(dimension, name=name_))
        _refuse_overlaps(found, parsed)
        found += parsed
    return Question(name, " ".join(texts[0].split()), " ".join(texts[1].split())), found


def _dimension(key: str, entry: Any, where: str, recipe: Recipe) -> Dimension:
    """One entry of a file."""
    if not isinstance(entry, dict):
        check_searchable(key, where)
        raise SettingError(f"{where} needs one of {', '.join(KINDS)}, for example {{uniform: [0.4, 0.9]}}")
    given = {OLD_NAMES.get(str(word), str(word)): value for word, value in entry.items()}
    kinds = [word for word in given if word in KINDS]
    for word in given:
        if word not in (*KINDS, "step", "when"):
            check_searchable(key, where)
            raise SettingError(
                f"{where} needs one of {', '.join(KINDS)}; '{word}' is none of them{nearest(word, KINDS, '')}"
            )
    if len(kinds) != 1:
        raise SettingError(f"{where} needs one of {', '.join(KINDS)}, for example {{uniform: [0.4, 0.9]}}")
    check_searchable(key, where)
    distribution = parse(where, kinds[0], given[kinds[0]], given.get("step"))
    members = distribution.members if isinstance(distribution, Simplex) else ()
    settings = tuple(f"{key}.{member}" for member in members) or (key,)
    for setting in settings:
        check_searchable(setting, where)
        _check_known(setting, where)
    return Dimension(settings, distribution, _conditions(given.get("when"), where, recipe), key, where)


def _check_known(key: str, where: str) -> None:
    try:
        check_key(key)
    except SettingError as error:
        raise SettingError(f"{where.removesuffix(f': {key}')}: {error}") from None


def _conditions(when: Any, where: str, recipe: Recipe) -> tuple[Condition, ...]:
    if when is None:
        return ()
    if not isinstance(when, dict) or not when:
        raise SettingError(f"{where}: when needs a mapping, such as {{target.kind: wavelet}}, got {shown(when)}")
    found = []
    for key, wanted in when.items():
        _check_known(str(key), f"{where}: when")
        values = tuple(plain(value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        found.append(Condition(str(key), values, _value_of(recipe, str(key))))
    return tuple(found)


def _value_of(recipe: Recipe, key: str) -> Any:
    """The recipe's value of a setting; None for an entry that a mapping lacks."""
    value: Any = recipe.dump()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _refuse_overlaps(earlier: Iterable[Dimension], later: Iterable[Dimension]) -> None:
    """Refuse settings that two entries vary, and mappings of which another entry varies a part."""
    before = {key: dimension.where for dimension in earlier for key in dimension.settings}
    for dimension in later:
        for key in dimension.settings:
            for other, where in before.items():
                if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                    same = f"{key} is" if key == other else f"{other} and {key} are"
                    raise SettingError(f"{dimension.where}: {same} varied by {where}, too; leave it out of one of them")


def _applicable(dimension: Dimension, varied: Iterable[str], all_of_them: Sequence[Dimension]) -> Dimension | None:
    """A dimension with the conditions that depend on the point; None if the recipe rules it out."""
    kept = []
    for condition in dimension.when:
        key = condition.setting
        if key in dimension.settings:
            raise SettingError(f"{dimension.where}: when: {key}: a setting cannot depend on itself")
        for other in varied:
            if other != key and (other.startswith(f"{key}.") or key.startswith(f"{other}.")):
                raise SettingError(f"{dimension.where}: when: {key}: the space varies {other}; name that one")
        if key in varied:
            _check_possible(dimension, condition, [one for one in all_of_them if key in one.settings])
            kept.append(condition)
        elif not condition.holds({}):
            return None
    return replace(dimension, when=tuple(kept))


def _check_possible(dimension: Dimension, condition: Condition, sources: Sequence[Dimension]) -> None:
    """Refuse a condition on a value that is never drawn."""
    where = f"{dimension.where}: when: {condition.setting}"
    listed = [shown(value) for one in sources for value in one.record().get("choice", one.record().get("grid", ()))]
    for value in condition.values:
        if value == condition.otherwise or any(one.distribution.has(value) for one in sources):
            continue
        if not listed and not any(one.distribution.record().get("int") for one in sources):
            raise SettingError(f"{where}: it is drawn from a range; conditions need a choice, a grid or an int")
        near = nearest(shown(value), listed, f"; it is drawn from {', '.join(listed)}" if listed else "")
        raise SettingError(f"{where}={shown(value)} is never drawn{near}")


def _tapped_levels(dimensions: Sequence[Dimension], taps: Mapping[str, int]) -> set[str]:
    """Levels that some point taps."""
    found = set() if any(one.name == "target.taps" and not one.when for one in dimensions) else set(taps)
    for dimension in dimensions:
        for key in dimension.settings:
            if key == "target.taps" and isinstance(dimension.distribution, Choice):
                found |= {
                    level for value in dimension.distribution.values if isinstance(value, dict) for level in value
                }
            elif key.startswith("target.taps."):
                found.add(key.rpartition(".")[2])
    return found


def _with_levels(dimension: Dimension, tapped: set[str]) -> Dimension | None:
    """A dimension without weights and bands of levels that no point taps; None if nothing is left."""
    kept = tuple(key for key in dimension.settings if level_of(key) in (None, *tapped))
    if isinstance(dimension.distribution, Simplex) and len(kept) == 1:
        raise SettingError(
            f"{dimension.where}: of its levels the recipe taps only {level_of(kept[0])} (target.taps), "
            "so that there is nothing to divide; tap more of them"
            if level_of(kept[0])
            else f"{dimension.where}: simplex needs at least two settings"
        )
    return replace(dimension, settings=kept) if kept else None


def _in_order(dimensions: Sequence[Dimension], where: str) -> Iterator[Dimension]:
    """Dimensions, each after those that it depends on, otherwise as given."""
    waiting = list(dimensions)
    while waiting:
        left = {key for dimension in waiting for key in dimension.settings}
        ready = next((one for number, one in enumerate(waiting) if _is_ready(one, waiting[:number], left)), None)
        if ready is None:
            raise SettingError(f"{where}: the conditions (when:) of {', '.join(sorted(left))} depend on each other")
        waiting.remove(ready)
        yield ready


def _is_ready(dimension: Dimension, before: Iterable[Dimension], left: set[str]) -> bool:
    """Whether nothing is left that has to be drawn before a dimension: conditions, taps, earlier alternatives."""
    needed = {condition.setting for condition in dimension.when}
    if level_of(dimension.settings[0]):
        needed |= {key for key in left if key == "target.taps" or key.startswith("target.taps.")}
    alternatives = {key for one in before for key in one.settings} & set(dimension.settings)
    return not needed & left and not alternatives
