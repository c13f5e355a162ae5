"""Which searched settings matter: fANOVA by Optuna, with a check that there is something to explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.sweeps.axes import Axis, Observed, axes_of, observed
from pipeline.sweeps.trials import Sweep

_FEWEST, _PER_SETTING = 12, 5  # points; fewer say nothing


@dataclass(frozen=True)
class Importance:
    """Importance of the settings.

    Attributes:
        shares: {axis: share of the objective's variance over the space that is due to it alone}, the largest first. The rest
            is due to combinations.
        counts: {axis: number of points}, where a setting did not apply to all points: its share is that among them.
        note: Why there are no shares; "" if there are.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


def importance(sweep: Sweep) -> Importance:
    """Estimate the importance of every searched setting.

    Args:
        sweep: The trials. Stopped and failed ones are not used.

    Returns:
        The shares, or why there are none: too few points, or differences that the settings do not explain.
    """
    points, axes = observed(sweep.trials), axes_of(sweep)
    if not axes:
        return Importance(note="No setting had different values in finished trials.")
    if len(axes) == 1:
        return Importance(note=f"Only {axes[0].name} varied, so there is nothing to compare it with.")
    fewest = max(_FEWEST, _PER_SETTING * len(axes))
    if len(points) < fewest:
        return Importance(note=f"{len(points)} finished points are too few to estimate importance; {fewest} would do.")
    if _explained(axes, points) <= 0:
        return Importance(
            note="The settings do not predict the objective of points left out of the fit, so none is called important."
        )
    everywhere = [axis for axis in axes if all(axis.value(point.point) is not None for point in points)]
    shares = _fanova(everywhere, points) if everywhere else {}
    counts = {}
    for axis in axes:
        there = [point for point in points if axis.value(point.point) is not None]
        if axis not in everywhere and len(there) >= fewest:
            shares[axis.name] = _fanova([*everywhere, axis], there).get(axis.name, 0.0)
            counts[axis.name] = len(there)
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), counts)


def _explained(axes: Sequence[Axis], points: Sequence[Observed]) -> float:
    """R² of a forest on the points that each of its trees has not seen."""
    from sklearn.ensemble import RandomForestRegressor

    columns = []
    for axis in axes:
        values = [axis.value(point.point) for point in points]
        if axis.numeric:
            columns.append([-1e9 if value is None else axis.position(value) for value in values])
        else:
            columns += [[float(value == name) for value in values] for name in axis.shown or ()]
    forest = RandomForestRegressor(100, oob_score=True, random_state=0, min_samples_leaf=2)
    return float(forest.fit(np.array(columns).T, [point.mean for point in points]).oob_score_)


def _fanova(axes: Sequence[Axis], points: Sequence[Observed]) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    rows = [{axis.name: axis.value(point.point) for axis in axes} for point in points]
    spaces: dict[str, BaseDistribution] = {}
    varied = []
    for axis in axes:
        values = [row[axis.name] for row in rows]
        if len(set(values)) < 2:
            continue
        varied.append(axis.name)
        if axis.numeric:
            spaces[axis.name] = FloatDistribution(min(values), max(values), log=axis.log)
        else:
            spaces[axis.name] = CategoricalDistribution(sorted(set(values)))
    if not varied:
        return {}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        for row, point in zip(rows, points, strict=True):
            params = {name: row[name] for name in varied}
            study.add_trial(optuna.create_trial(params=params, distributions=spaces, value=point.mean))
        found = FanovaImportanceEvaluator(seed=0).evaluate(study, params=varied)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {name: float(share) for name, share in found.items()}
