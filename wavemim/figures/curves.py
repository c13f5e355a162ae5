"""Figure of metrics of several runs, against images seen and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wavemim.figures.plots import plt, save_figure

COLOURS = ("#4477aa", "#cc3311", "#228833", "#aa3377", "#ccaa22", "#66ccee", "#777777", "#000000")
DASHES = ("-", "--", ":", "-.")  # one style per round of colours
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Point:
    """A value of a metric, and when it was measured.

    Attributes:
        images: Images seen in pretraining.
        seconds: Seconds of pretraining until then; None if unknown.
        value: The value.
        interval: Its confidence interval, if there is one.
    """

    images: int
    seconds: float | None
    value: float
    interval: tuple[float, float] | None = None


def compare_figure(
    path: Path, curves: Mapping[str, Mapping[str, Sequence[Point]]], titles: Mapping[str, str] | None = None
) -> None:
    """Draw one row per metric: its curves against images seen and against wall-clock time.

    Args:
        path: The PNG file to write.
        curves: {metric: {run: points}}. A run with a single point is drawn as a point with its interval.
        titles: Longer names of metrics.
    """
    runs = list(dict.fromkeys(run for of_runs in curves.values() for run in of_runs))
    figure, axes = plt.subplots(
        len(curves),
        2,
        figsize=(10, 0.9 + 3.1 * len(curves) + 0.22 * -(-len(runs) // 3)),
        squeeze=False,
        layout="constrained",
    )
    everything = [point for of_runs in curves.values() for points in of_runs.values() for point in points]
    unit, word = _unit([point.seconds for point in everything if point.seconds is not None])
    ends = (
        max((point.images for point in everything), default=1) or 1,
        max((point.seconds / unit for point in everything if point.seconds is not None), default=1.0) or 1.0,
    )
    for (metric, of_runs), (left, right) in zip(curves.items(), axes, strict=True):
        single = [run for run, points in of_runs.items() if len(points) == 1]
        for run, points in of_runs.items():
            style = _style(runs.index(run))
            # Points of runs with equally many images would hide each other.
            aside = 0.012 * (single.index(run) - (len(single) - 1) / 2) if run in single else 0.0
            _draw(left, [(point.images + aside * ends[0], point) for point in points], style)
            timed = [point for point in points if point.seconds is not None]
            _draw(right, [((point.seconds or 0.0) / unit, point) for point in timed], style)
        left.set_ylabel((titles or {}).get(metric, metric))
        left.set_xlabel("images seen in pretraining")
        right.set_xlabel(f"wall-clock time of pretraining ({word})")
        left.xaxis.set_major_formatter(thousands)
        for axis, end in zip((left, right), ends, strict=True):
            axis.grid(alpha=0.3)
            axis.set_xlim(0, 1.05 * end)
    handles = [plt.Line2D([], [], label=run, **_style(index)) for index, run in enumerate(runs)]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 3), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names may contain dollar signs
    save_figure(figure, path)


def _draw(axis: Any, points: Sequence[tuple[float, Point]], style: Mapping[str, Any]) -> None:
    if not points:
        return
    x = np.array([at for at, _ in points])
    y = np.array([point.value for _, point in points])
    few = len(points) <= 12
    axis.plot(x, y, marker="o" if few else None, markersize=4, linewidth=1.5, **style)
    bounded = [(at, point.value, *point.interval) for at, point in points if point.interval is not None]
    if bounded and few:
        at, middle, low, high = np.array(bounded).T
        errors = np.clip((middle - low, high - middle), 0, None)
        axis.errorbar(at, middle, errors, fmt="none", capsize=3, ecolor=style["color"], linewidth=1)
    elif bounded:
        at, _, low, high = np.array(bounded).T
        axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def _unit(seconds: Sequence[float]) -> tuple[float, str]:
    longest = max(seconds, default=0.0)
    return next(((size, word) for size, word in _UNITS if longest >= 2 * size), _UNITS[-1])


def thousands(value: float, _: Any = None) -> str:
    """A number of images with k, M or G, as matplotlib's formatter of an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
