"""How the objective responds to each searched setting, and one sentence per setting that the data support.

The objective is fitted by least squares as a sum of one smooth function per axis: a polynomial of degree 2 or 3 in the
number or its logarithm, or a mean per category. All statements are contrasts of one axis's coefficients. Their intervals are
Scheffé's, which hold for all contrasts of an axis at once, also for those picked after looking at the data, with
Bonferroni's correction for the number of axes. So under pure noise at most 5 % of sweeps prefer some value of any setting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pipeline.sweeps.axes import Axis, Observed, axes_of, observed
from pipeline.sweeps.trials import WEIGHT, Sweep

LEVEL = 0.05
_GRID = 41  # values at which a curve is evaluated
_PER_CATEGORY = 3  # points per category, on average, below which there is no mean per category


@dataclass(frozen=True)
class Response:
    """The fitted response of one axis.

    Attributes:
        axis: The setting.
        values: Values at which it is given: numbers, or all categories.
        mean: Fitted objective there (values,), at the average of the other settings.
        low: Lower end of its pointwise 95 % band.
        high: Upper end.
        kept: Whether the value is as good as the best one as far as the sweep can tell: it is not surely worse, or by less
            than twice the noise of one point; (values,).
        cost: Largest expected loss against the best value among those that are not kept, its lower bound and its value's index;
            None if all are kept.
        within: No two kept values differ by more, with 95 % confidence for all statements about all axes.
        sentence: What the sweep says of the setting.
    """

    axis: Axis
    values: tuple[Any, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kept: np.ndarray
    cost: tuple[float, float, int] | None
    within: float
    sentence: str


@dataclass(frozen=True)
class Responses:
    """Responses of all axes.

    Attributes:
        curves: Those that could be fitted.
        notes: Why others could not, a sentence each.
        residual: Standard deviation of the points around the fit; None without a fit.
        explained: Share of the variance of the points that the fit explains, adjusted for its size; None without a fit.
    """

    curves: tuple[Response, ...]
    notes: tuple[str, ...]
    residual: float | None = None
    explained: float | None = None


def responses(sweep: Sweep, resolution: float | None = None) -> Responses:
    """Fit the response of every searched setting.

    Args:
        sweep: The trials. Stopped and failed ones are not used.
        resolution: The difference that the sweep can see. A spread above it is not called "no difference". None: two standard
            deviations around the fit.

    Returns:
        The responses, with their sentences.
    """
    points = observed(sweep.trials)
    axes, notes = axes_of(sweep), []
    for axis in [axis for axis in axes if not axis.numeric]:
        present = sum(axis.value(point.point) is not None for point in points)
        if present < _PER_CATEGORY * len(axis.shown or ()):
            axes.remove(axis)
            notes.append(
                f"{axis.name} has {len(axis.shown or ())} values in {present} points: too few points to compare them."
            )
    if not axes:
        return Responses((), tuple(notes))
    fixed = 1 + sum(len(axis.shown or ()) - 1 for axis in axes if not axis.numeric)
    numeric = sum(axis.numeric for axis in axes)
    fewest = 2 * (fixed + 2 * numeric)  # as many points as coefficients are left for the noise
    if len(points) < fewest:
        many = "setting" if len(axes) == 1 else "settings"
        notes.append(
            f"{len(points)} finished points are too few to say how the objective depends on {len(axes)} {many}; "
            f"{fewest} would do."
        )
        return Responses((), tuple(notes))
    degree = 3 if len(points) >= 3 * (fixed + 3 * numeric) else 2
    fit = _Fit(axes, points, degree)
    limit = resolution if resolution is not None else 2 * fit.residual
    curves = []
    for index, axis in enumerate(axes):
        if fit.confounded(index):
            notes.append(
                f"{axis.name} varied only together with other settings, so its effect cannot be separated from theirs."
            )
        else:
            curves.append(_response(fit, index, sweep.unit, limit))
    return Responses(tuple(curves), tuple(notes), fit.residual, fit.explained)


class _Fit:
    """The least-squares fit of an additive model to the points' means."""

    def __init__(self, axes: Sequence[Axis], points: Sequence[Observed], degree: int) -> None:
        self.axes, self.degree = axes, degree
        y = np.array([point.mean for point in points])
        self.ranges = [_range(axis, points) for axis in axes]
        blocks = []
        for index, axis in enumerate(axes):
            rows = [
                self.basis(index, [value])[0] if (value := axis.value(point.point)) is not None else None
                for point in points
            ]
            there = np.array([row is not None for row in rows])
            block = np.zeros((len(points), self.width(index)))
            block[there] = np.array([row for row in rows if row is not None])
            # The effect is measured from its mean over the points where the setting applies.
            block[there] -= block[there].mean(0)
            blocks.append(block)
        self.centres = [self._centre(index, points) for index in range(len(axes))]
        matrix = np.hstack([np.ones((len(y), 1)), *blocks])
        ends = 1 + np.cumsum([0, *(block.shape[1] for block in blocks)])
        self.columns = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        for axis in axes:  # points where a setting does not apply may differ as such
            absent = np.array([[axis.value(point.point) is None] for point in points], dtype=float)
            wider = np.hstack([matrix, absent])
            if np.linalg.matrix_rank(wider) > np.linalg.matrix_rank(matrix):
                matrix = wider
        self.matrix = matrix
        rank = int(np.linalg.matrix_rank(matrix))
        self.inverse = np.linalg.pinv(matrix.T @ matrix)
        self.coefficients = self.inverse @ matrix.T @ y
        self.freedom = max(len(y) - rank, 1)
        errors = float(((y - matrix @ self.coefficients) ** 2).sum())
        total = float(((y - y.mean()) ** 2).sum())
        self.residual = math.sqrt(errors / self.freedom)
        self.explained = 1 - self.residual**2 / (total / (len(y) - 1)) if total > 0 else 0.0

    def width(self, index: int) -> int:
        axis = self.axes[index]
        return self.degree if axis.numeric else len(axis.shown or ()) - 1

    def basis(self, index: int, values: Sequence[Any]) -> np.ndarray:
        """(values, width): polynomials of a number scaled to [-1, 1], or indicators of all categories but the first."""
        axis = self.axes[index]
        if axis.numeric:
            low, high = self.ranges[index]
            scaled = 2 * (np.array([axis.position(value) for value in values]) - low) / (high - low) - 1
            return np.polynomial.legendre.legvander(scaled, self.degree)[:, 1:]
        return np.array([[float(value == name) for name in list(axis.shown or ())[1:]] for value in values])

    def _centre(self, index: int, points: Sequence[Observed]) -> np.ndarray:
        values = [value for point in points if (value := self.axes[index].value(point.point)) is not None]
        return self.basis(index, values).mean(0)

    def confounded(self, index: int) -> bool:
        """Whether the axis's columns are combinations of the others'."""
        others = np.delete(self.matrix, np.r_[self.columns[index]], axis=1)
        return bool(np.linalg.matrix_rank(self.matrix) - np.linalg.matrix_rank(others) < self.width(index))

    def grid(self, index: int) -> tuple[Any, ...]:
        axis = self.axes[index]
        if not axis.numeric:
            return tuple(axis.shown or ())
        positions = np.linspace(*self.ranges[index], _GRID)
        return tuple(float(10**at if axis.log else at) for at in positions)


def _range(axis: Axis, points: Sequence[Observed]) -> tuple[float, float]:
    if not axis.numeric:
        return 0.0, 0.0
    found = [axis.position(value) for point in points if (value := axis.value(point.point)) is not None]
    return min(found), max(found)


def _response(fit: _Fit, index: int, unit: str, limit: float) -> Response:
    axis, values = fit.axes[index], fit.grid(index)
    design = fit.basis(index, values) - fit.centres[index]
    own = fit.columns[index]
    effect = design @ fit.coefficients[own]
    covariance = fit.residual**2 * design @ fit.inverse[own, own] @ design.T
    mean = float(fit.coefficients[0]) + effect
    half = stats.t.isf(LEVEL / 2, fit.freedom) * np.sqrt(np.diag(covariance) + fit.residual**2 / len(fit.matrix))
    # Differences of all pairs, with the factor that holds for all of them and for all axes.
    variance = np.diag(covariance)
    errors = np.sqrt(np.clip(variance[:, None] + variance[None] - 2 * covariance, 0, None))
    width = fit.width(index)
    factor = math.sqrt(width * stats.f.isf(LEVEL / len(fit.axes), width, fit.freedom))
    loss = mean.max() - mean
    surely = loss - factor * errors[int(mean.argmax())]
    kept = ~((surely > 1e-9) & (loss > min(limit, 2 * fit.residual)))
    pairs = np.ix_(kept, kept)
    within = float((np.abs(mean[:, None] - mean[None]) + factor * errors)[pairs].max()) if kept.sum() > 1 else 0.0
    worst = int(np.where(kept, -np.inf, loss).argmax())
    cost = None if kept.all() else (float(loss[worst]), float(surely[worst]), worst)
    return Response(
        axis,
        values,
        mean,
        mean - half,
        mean + half,
        kept,
        cost,
        within,
        _sentence(axis, values, mean, kept, cost, within, unit, limit),
    )


def _sentence(
    axis: Axis,
    values: Sequence[Any],
    mean: np.ndarray,
    kept: np.ndarray,
    cost: tuple[float, float, int] | None,
    within: float,
    unit: str,
    limit: float,
) -> str:
    same = f"no difference above {_up(within)}{unit}"
    unseen = f"differences of up to {_up(within)}{unit} cannot be excluded"
    if not axis.numeric:
        return _sentence_of_categories(axis, values, mean, kept, cost, unit, same if within <= limit else "", unseen)
    ratio = len(axis.keys) == 2
    subject = f"level {axis.keys[0].removeprefix(WEIGHT)}" if ratio else axis.name
    of = f" level {axis.keys[1].removeprefix(WEIGHT)}'s weight" if ratio else ""
    times = f" times{of}" if ratio else ""
    if cost is None:
        span = f"{subject} between {number(values[0])} and {number(values[-1])}{times}"
        if within <= limit:
            return f"{span} makes {same}."
        return f"{span}: the sweep does not say which value is best; {unseen}."
    runs = _runs(kept)
    parts = [_words(values, run) for run in runs]
    wanted = " or ".join(parts) + (f" of{of}" if ratio else "")
    at = f"{'a ratio of ' if ratio else ''}{number(values[cost[2]])}"
    text = f"{subject} wants {wanted}: {at} costs about {cost[0]:.2g}{unit} (at least {cost[1]:.2g})"
    if len(runs) == 1 and kept.sum() > 1:
        text += f"; within, {'it makes ' + same if within <= 2 * limit else unseen}"
    ends = {0: "lowest", len(values) - 1: "highest"}
    best = int(mean.argmax())
    if best in ends:
        return f"{text}. The fit is best at the {ends[best]} value tried, so values beyond it may be better."
    return f"{text}."


def _sentence_of_categories(
    axis: Axis,
    values: Sequence[Any],
    mean: np.ndarray,
    kept: np.ndarray,
    cost: tuple[float, float, int] | None,
    unit: str,
    same: str,
    unseen: str,
) -> str:
    names = [(axis.shown or {})[value] for value in values]
    if cost is None:
        if same:
            return f"{axis.name} makes {same} between {_listed(names)}."
        return f"{axis.name}: the sweep does not say which of {_listed(names)} is best; {unseen}."
    best = [name for name, keep in zip(names, kept, strict=True) if keep]
    text = f"{axis.name} wants {_listed(best, 'or')}: {names[cost[2]]} costs about {cost[0]:.2g}{unit} (at least {cost[1]:.2g})"
    return f"{text}; {unseen} between the former." if len(best) > 1 and not same else f"{text}."


def number(value: float) -> str:
    """A number with two digits, in full."""
    digits = 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(digits, 0)}f}".rstrip("0").rstrip(".") if digits > 0 else f"{round(value, digits):.0f}"


def _up(value: float) -> str:
    """A bound, rounded up to two digits, so that it stays one."""
    if value <= 0:
        return "0"
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return number(math.ceil(value * scale - 1e-9) / scale)


def _runs(kept: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of kept values."""
    edges = np.flatnonzero(np.diff(np.r_[0, kept.astype(int), 0]))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _words(values: Sequence[float], run: tuple[int, int]) -> str:
    first, last = run
    if first == 0:
        return f"at most {number(values[last])}"
    if last == len(values) - 1:
        return f"at least {number(values[first])}"
    return f"{number(values[first])} to {number(values[last])}"


def _listed(words: Sequence[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
