"""Where the points of a sweep's search come from: a grid, random numbers, or Optuna. Each goes on after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.stages.tune_distributions import RandomTrial
from pipeline.stages.tune_plan import draws_at_random, optuna_sampler, optuna_study
from pipeline.stages.tune_space import Space
from pipeline.sweeps.ledger import Ended
from pipeline.sweeps.pareto import COST_METRICS
from pipeline.sweeps.plan import Draws

Drawn = tuple[Mapping[str, Any], Mapping[str, Any]]


def draws_of(recipe: Recipe, space: Space) -> Draws:
    """The searcher of a sweep.

    Args:
        recipe: The settings: `tune.search` and the seed.
        space: The search space. Of one that is a grid, all points are drawn in order, whatever `tune.search` says.
    """
    grid = space.grid()
    if grid is not None:
        return _Listed(lambda index: grid[index] if index < len(grid) else None)
    if draws_at_random(recipe):
        return _Listed(lambda index: space.suggest(RandomTrial(recipe.seed, index)))
    return _Optuna(recipe, space)


class _Listed:
    """Points that depend on their place in the search alone."""

    def __init__(self, point: Callable[[int], Mapping[str, Any] | None]) -> None:
        self._point, self._next = point, 0

    def draw(self, number: int) -> Drawn | None:
        point = self._point(self._next)
        self._next += 1
        return None if point is None else (point, {})

    def restore(self, number: int, drawn: Mapping[str, Any]) -> None:
        self._next += 1

    def tell(self, number: int, ended: Ended | None) -> None:
        """Results guide nothing."""


class _Optuna:
    """Optuna's tree-structured Parzen estimator. After a restart it knows every point, and draws others than without one."""

    def __init__(self, recipe: Recipe, space: Space) -> None:
        self._recipe, self._space = recipe, space
        self._cost = None if recipe.tune.cost is None else COST_METRICS[recipe.tune.cost]
        self._study = optuna_study(recipe)
        self._numbers: dict[int, int] = {}  # ours -> Optuna's

    def draw(self, number: int) -> Drawn | None:
        from optuna.distributions import distribution_to_json

        trial = self._study.ask()
        point = self._space.suggest(trial)
        self._numbers[number] = trial.number
        distributions = {name: distribution_to_json(kind) for name, kind in trial.distributions.items()}
        return point, {"params": trial.params, "distributions": distributions}

    def restore(self, number: int, drawn: Mapping[str, Any]) -> None:
        from optuna.distributions import json_to_distribution
        from optuna.trial import TrialState, create_trial

        distributions = {name: json_to_distribution(text) for name, text in drawn["distributions"].items()}
        self._numbers[number] = len(self._study.get_trials(deepcopy=False))
        self._study.add_trial(
            create_trial(state=TrialState.RUNNING, params=dict(drawn["params"]), distributions=distributions)
        )
        # Another seed: the same one would draw the first points again.
        self._study.sampler = optuna_sampler(self._recipe.model_copy(update={"seed": self._recipe.seed + number}))

    def tell(self, number: int, ended: Ended | None) -> None:
        """A trial that was stopped early is pruned: the estimator ranks it by how far it came, below those that finished."""
        from optuna.trial import Trial, TrialState

        ours = self._numbers[number]
        values = self._values(ended)
        if values is not None:
            self._study.tell(ours, values)
        elif ended is not None and ended.state == "stopped" and ended.curve and self._cost is None:
            trial = Trial(self._study, self._study.get_trials(deepcopy=False)[ours]._trial_id)
            for images, objective in ended.curve:
                trial.report(objective, images)
            self._study.tell(ours, state=TrialState.PRUNED)
        else:
            self._study.tell(ours, state=TrialState.FAIL)

    def _values(self, ended: Ended | None) -> list[float] | None:
        """The objectives of a finished trial."""
        if ended is None or ended.state != "finished" or ended.objective is None:
            return None
        if self._cost is None:
            return [ended.objective]
        return [ended.objective, ended.cost[self._cost]] if self._cost in ended.cost else None
