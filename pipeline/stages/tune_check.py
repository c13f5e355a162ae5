"""Checks of a search space before its sweep: whether a recipe can have its points, all of them if there are few.

A space with an impossible point is refused. Points are never left out silently: the values that are drawn would then not be
distributed as the file says. What depends on another setting is given a condition (``when:``) in the file.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.behaviour import values_of
from pipeline.config.follow import shortened
from pipeline.config.load import with_overrides
from pipeline.config.recipe import Recipe, behaviour_of
from pipeline.errors import SettingError
from pipeline.models.build import check_model
from pipeline.stages.tune_distributions import RandomTrial, between, enumerated, numbers_between, shown
from pipeline.stages.tune_space import Space, read_space
from pipeline.training.schedule import TrainSchedule

CHECKED = 128  # points of which the settings are checked, beside random ones
AT_RANDOM = 32
BUILT = 16  # points of which the model is built, on the meta device

# Settings that decide whether a model can be built, and the numbers among them that do not.
_MODEL = ("encoder.", "target.", "decoder.", "mask.", "train.optimizer", "train.progressive")
_NOT_MODEL = ("target.weights", "target.tilt", "mask.ratio", "mask.strength")


def check_space(recipe: Recipe) -> None:
    """Check the search space of a recipe.

    Raises:
        SettingError: The space is not valid, or the recipe cannot have one of its points.
    """
    check_points(recipe, read_space(recipe))


def check_points(recipe: Recipe, space: Space) -> None:
    """Check that a recipe can have the points of a space: the ends of each range and every listed value are among them.

    Args:
        recipe: The settings.
        space: The space.

    Raises:
        SettingError: It cannot have one of them. The message names the fewest settings that are impossible together.
    """
    trials_of(recipe, space)
    _check_scheduler(recipe)
    if recipe.tune.scheduler == "pbt":
        _check_population(recipe, space)
    points: list[Mapping[str, Any]] = list(_corners(space))
    points += [space.suggest(RandomTrial(recipe.seed, number)) for number in range(AT_RANDOM)]
    for point in points:
        _check(space, point, lambda point: _check_settings(recipe, point))
    for point in _models(recipe, points):
        _check(space, point, lambda point: check_model(with_overrides(recipe, changes(recipe, point))))


def trials_of(recipe: Recipe, space: Space) -> int:
    """The number of trials: all points of a grid, otherwise `tune.trials`.

    Raises:
        SettingError: The grid has more points than `tune.trials`.
    """
    grid = space.grid()
    if grid is None:
        return recipe.tune.trials
    if len(grid) > recipe.tune.trials:
        raise SettingError(
            f"tune.trials={recipe.tune.trials}: {space.where} is a grid of {len(grid)} points, all of which are tried; "
            f"set tune.trials={len(grid)}"
        )
    return len(grid)


def check_budget(recipe: Recipe, rows: int) -> None:
    """Check that the budget of images is enough for the recipe's seeds, the finalists, and as many points to choose from, and
    the length of a trial for what is to happen at its rungs.

    Args:
        recipe: The settings.
        rows: Images of the train split.

    Raises:
        SettingError: It is not.
    """
    tune = recipe.tune
    fixed = tune.recipe_seeds + tune.finalists * tune.fresh_seeds
    least = fixed + max(1, tune.finalists)
    each = tune.epochs * rows
    if tune.images is not None and tune.images < least * each:
        raise SettingError(
            f"tune.images={tune.images}: a trial sees {each:,.0f} images, and the recipe's seeds and the finalists are "
            f"{fixed} trials; set at least tune.images={math.ceil(least * each)}, fewer tune.epochs, or fewer seeds"
        )
    if tune.scheduler == "pbt":
        steps = TrainSchedule.of(with_overrides(recipe, changes(recipe, {})), rows, 1).total_steps
        if steps < tune.rungs:
            raise SettingError(
                f"tune.rungs={tune.rungs}: a trial has {steps} steps of training, and tune.scheduler=pbt needs one for each "
                "rung; set fewer tune.rungs or more tune.epochs"
            )


def check_gpu_hours(recipe: Recipe, use_gpu: bool) -> None:
    """Check that GPU-hours are asked for only where there are any.

    Args:
        recipe: The settings.
        use_gpu: Whether trials run on GPUs.

    Raises:
        SettingError: They do not.
    """
    none = "trials do not run on GPUs, so there are no GPU-hours; use"
    if not use_gpu and recipe.tune.cost == "gpu_hours":
        raise SettingError(f"tune.cost=gpu_hours: {none} tune.cost=flops or tune.cost=seconds")
    if not use_gpu and recipe.tune.gpu_hours is not None:
        raise SettingError(f"tune.gpu_hours={recipe.tune.gpu_hours:g}: {none} tune.hours")


def _check_scheduler(recipe: Recipe) -> None:
    tune = recipe.tune
    if tune.scheduler != "none" and tune.rungs < 2:
        raise SettingError(
            f"tune.rungs={tune.rungs}: tune.scheduler={tune.scheduler} compares trials before their end; set tune.rungs to 2 "
            "or more"
        )
    if tune.scheduler != "none" and tune.cost is not None:
        does = "stop cheap trials for their accuracy" if tune.scheduler == "asha" else "look at their accuracy alone"
        raise SettingError(
            f"tune.cost={tune.cost}: tune.scheduler={tune.scheduler} would {does}; set tune.scheduler=none or tune.cost=null"
        )
    if recipe.cluster.gpus is False:
        check_gpu_hours(recipe, False)


def _check_population(recipe: Recipe, space: Space) -> None:
    """Check that every searched setting may change during training, and by itself, and that there is a population."""
    pbt, other = "tune.scheduler=pbt", "or set tune.scheduler=none or asha"
    for key in space.settings:
        if key == "train.epochs":
            raise SettingError(
                f"{space.where}: {pbt} compares trials of one length, so {key} cannot be searched; leave it out, {other}"
            )
        if not behaviour_of(key).resumable:
            raise SettingError(
                f"{space.where}: {pbt} changes settings during training, and {key} cannot change there; leave it out, {other}"
            )
    for dimension in space.dimensions:
        for condition in dimension.when:
            raise SettingError(
                f"{dimension.where}: when: {condition.setting}: {pbt} changes each setting by itself; leave the condition "
                f"out, {other}"
            )
    if (trials := trials_of(recipe, space)) < 2:
        raise SettingError(f"tune.trials={trials}: {pbt} needs a population; set tune.trials to 4 or more")


def changes(recipe: Recipe, point: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a trial changes: its length, one worker, and the searched values."""
    changes = {"train.epochs": recipe.tune.epochs, "train.workers": 1, "tracking.system_metrics": False, **point}
    warm_up = shortened(recipe.train.warmup_epochs, changes["train.epochs"])
    return {"train.warmup_epochs": warm_up, **changes}


def _check_settings(recipe: Recipe, point: Mapping[str, Any]) -> None:
    with_overrides(recipe, changes(recipe, point))
    with_overrides(recipe, point)  # what the sweep writes if this is its best point


def _check(space: Space, point: Mapping[str, Any], check: Callable[[Mapping[str, Any]], None]) -> None:
    mistake = _mistake(point, check)
    if mistake is None:
        return
    needed = dict(point)
    for key in point:
        rest = {other: value for other, value in needed.items() if other != key}
        if _mistake(rest, check) == mistake:
            needed = rest
    if all(mistake.startswith(key) for key in needed):  # at most one, and it is named
        raise SettingError(f"{space.where}: {mistake}")
    together = " with ".join(f"{key}={shown(value)}" for key, value in needed.items())
    raise SettingError(
        f"{space.where}: {together} is not possible: {mistake}; leave a value out, or add a condition (when:)"
    )


def _mistake(point: Mapping[str, Any], check: Callable[[Mapping[str, Any]], None]) -> str | None:
    try:
        check(point)
    except SettingError as error:
        return str(error)
    return None


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Points with the ends of ranges, a number between them, and all listed values: all combinations if they are few."""
    points = enumerated(space.suggest, CHECKED, shortened=True)
    if points is not None:
        yield from points
        return
    taken: Counter[tuple[str, Any]] = Counter()
    for number in range(CHECKED):
        yield space.suggest(_EvenTrial(RandomTrial(0, number), taken))


@dataclass
class _EvenTrial:
    """Takes the value that was taken least often so far, so that in a few trials each of them is taken."""

    random: RandomTrial
    taken: Counter[tuple[str, Any]] = field(default_factory=Counter)

    def _take(self, name: str, candidates: Sequence[Any]) -> Any:
        least = min(self.taken[name, candidate] for candidate in candidates)
        rare = [candidate for candidate in candidates if self.taken[name, candidate] == least]
        value = rare[self.random.suggest_int(name, 0, len(rare) - 1)]
        self.taken[name, value] += 1
        return value

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """An end of the range, or a number between them."""
        return float(self._take(name, between(low, high, step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number."""
        return int(self._take(name, numbers_between(low, high, step)))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of several texts."""
        return str(self._take(name, choices))


def _models(recipe: Recipe, points: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The points in which each value that decides about the model occurs, and each pair of searched ones: few, not all."""
    seen = set(_model_values(recipe, {}))
    values = [set(_model_values(recipe, point)) for point in points]
    for _ in range(BUILT):
        number = max(range(len(points)), key=lambda number: len(values[number] - seen))
        if values[number] <= seen:
            return
        seen |= values[number]
        yield points[number]


def _model_values(recipe: Recipe, point: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], ...]]:
    values = values_of(with_overrides(recipe, changes(recipe, point)))
    deciding = [(key, str(value)) for key, value in values.items() if key.startswith(_MODEL) and key not in _NOT_MODEL]
    yield from ((value,) for value in deciding)
    yield from itertools.combinations(((key, value) for key, value in deciding if key in point), 2)
