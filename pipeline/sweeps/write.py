"""Writes the results of a sweep: first the table, the report and the recipe, then the figures, which may fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.sweeps.answer import Answer, answer
from pipeline.sweeps.axes import axes_of, observed
from pipeline.sweeps.best import best_recipe
from pipeline.sweeps.importance import Importance, importance
from pipeline.sweeps.pareto import cost_points, pareto_front
from pipeline.sweeps.report import CURVES, description, measured_on, report, trials_csv
from pipeline.sweeps.response import Responses, responses
from pipeline.sweeps.trials import ROLES, Sweep, short_name
from wavemim.atomic import new_file
from wavemim.figures.sweeps import (
    Dot,
    Line,
    Panel,
    importance_figure,
    learning_figure,
    pareto_figure,
    response_figure,
)

TABLE, REPORT, BEST = "trials.csv", "report.md", "best.yaml"
RESPONSE, IMPORTANCE, PARETO = "sweep.png", "importance.png", "pareto.png"
_FEWEST_COSTS, _SAME_COST = 3, 0.02  # points and relative difference for which a figure of costs says anything
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What was found and written.

    Attributes:
        answer: The comparison with the recipe.
        description: The report in the length that fits a run's description in MLflow.
        sentences: The answer and what is known of each setting, in words.
        files: The files by name, those that could be written.
    """

    answer: Answer
    description: str
    sentences: tuple[str, ...]
    files: dict[str, Path]


def write_results(folder: Path, recipe: Recipe, sweep: Sweep) -> Written:
    """Analyse a sweep and write trials.csv, report.md, best.yaml, and the figures. A figure that fails costs a warning.

    Args:
        folder: The sweep's folder.
        recipe: Its settings.
        sweep: The trials.

    Returns:
        The answer, and the files.
    """
    files: dict[str, Path] = {}

    def save(name: str, text: str) -> None:
        with new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8", newline="")
        files[name] = folder / name

    save(TABLE, trials_csv(sweep))
    found = answer(sweep)
    try:
        save(BEST, best_recipe(recipe, found.chosen, [_origin(recipe, sweep), *found.sentences]))
    except SettingError as error:
        _log.warning(
            "%s was not written: the values of the best point are not possible at full length: %s", BEST, error
        )
    curves = _guarded("the fitted responses", lambda: responses(sweep.constant, found.resolution), Responses((), ()))
    shares = _guarded("importance", lambda: importance(sweep.constant), Importance(note="It could not be computed."))
    figures = _guarded("the figures", lambda: _figures(sweep, found, curves, shares), ())
    missing = {figure.name: figure.missing for figure in figures if figure.missing}
    save(REPORT, report(sweep, found, curves, shares, missing=missing))
    for figure in figures:
        path = folder / figure.name
        path.unlink(missing_ok=True)
        if not figure.missing and _guarded(figure.name, lambda draw=figure.draw, path=path: draw(path) or True, False):  # type: ignore[misc]
            files[figure.name] = path
    sentences = (*found.sentences, *(curve.sentence for curve in curves.curves), *curves.notes)
    return Written(found, description(sweep, found, curves, shares), sentences, files)


def _origin(recipe: Recipe, sweep: Sweep) -> str:
    return f"Recommended by a sweep of {len(sweep.trials)} trials of {recipe.name}, ranked by {sweep.objective}."


def _guarded(what: str, call: Callable[[], Any], otherwise: Any) -> Any:
    """The result of `call`, or `otherwise` with a warning line if it fails: the results are worth more than a picture."""
    try:
        return call()
    except Exception as error:
        _log.warning(
            "sweep: %s failed (%s: %s); the results are not affected", what, type(error).__name__, _line(error)
        )
        return otherwise


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@dataclass(frozen=True)
class _Figure:
    """A figure, and why it is not drawn; "" if it is."""

    name: str
    missing: str
    draw: Callable[[Path], object]


def _figures(sweep: Sweep, found: Answer, curves: Responses, shares: Importance) -> Sequence[_Figure]:
    """The figures. One that would have nothing to show is not drawn."""
    objective = sweep.objective.removeprefix("eval/") + (" (%)" if sweep.unit else "")
    lines = [
        Line(trial.curve, trial.role, trial.state, trial.value, short_name(trial.number)) for trial in sweep.trials
    ]
    during, at_end = measured_on(sweep)
    panels = _panels(sweep.constant, found, curves)
    cost, points = cost_points(sweep.constant)
    no_costs = f"fewer than {_FEWEST_COSTS} points have a known cost" if len(points) < _FEWEST_COSTS else ""
    if not no_costs and max(points)[0] < (1 + _SAME_COST) * min(points)[0]:
        no_costs = "all points cost about the same"
    return (
        _Figure(
            RESPONSE,
            "" if panels else "no setting had different values in finished trials",
            lambda path: response_figure(path, panels, objective=objective),
        ),
        _Figure(
            IMPORTANCE,
            "" if shares.shares else "the importance of the settings is not known",
            lambda path: importance_figure(path, shares.shares, objective=sweep.objective),
        ),
        _Figure(
            CURVES,
            "" if sweep.has_curves else "no trial was measured more than once",
            lambda path: learning_figure(path, lines, objective=objective, during=during, at_end=at_end),
        ),
        _Figure(
            PARETO,
            no_costs,
            lambda path: pareto_figure(path, points, pareto_front(points), objective=objective, cost=cost),
        ),
    )


def _panels(sweep: Sweep, found: Answer, curves: Responses) -> list[Panel]:
    fitted = {curve.axis.keys: curve for curve in curves.curves}
    half = stats.t.isf(0.025, found.freedom) * found.noise if found.noise else None
    panels = []
    # The search's value of a finalist stays a point of its own, since it was chosen as high.
    groups = {role: observed(sweep.finished(role)) for role in ROLES}
    for axis in axes_of(sweep):
        dots = [
            Dot(
                axis.value(point.point), point.mean, role, half / point.count**0.5 if half and point.count > 1 else None
            )
            for role, points in groups.items()
            for point in points
        ]
        curve = fitted.get(axis.keys)
        drawn = (curve.values, list(curve.mean), list(curve.low), list(curve.high)) if curve else None
        panels.append(Panel(axis.name, dots, axis.log, axis.shown, drawn))
    return panels
