"""Figures of sweeps: objective against each setting, importance of settings, learning curves, accuracy against cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from wavemim.figures.curves import COLOURS, thousands
from wavemim.figures.plots import plt, save_figure

_COLUMNS = 3  # panels in a row
_RESPONSE = "response at the average of the other settings, 95 % band"
_NEAR = 0.07  # share of the axes within which a second label would cover the first
_ROLES = {  # (colour, marker, size, label)
    "search": (COLOURS[0], "o", 26, "searched"),
    "finalist": (COLOURS[1], "D", 34, "finalist, mean of its seeds"),
    "recipe": ("#000000", "*", 110, "recipe, mean of its seeds"),
}


@dataclass(frozen=True)
class Dot:
    """A point of a sweep in a panel.

    Attributes:
        x: Its number, or its category; None or a number that is not finite: it is not drawn.
        y: Its mean objective.
        role: "search", "finalist" or "recipe".
        error: Half the length of its error bar, or None.
    """

    x: float | str | None
    y: float
    role: str = "search"
    error: float | None = None


@dataclass(frozen=True)
class Panel:
    """The objective against one setting.

    Attributes:
        name: The setting's name.
        dots: The points.
        log: Whether the axis of the setting is logarithmic.
        categories: {category: label} in the order to draw; empty for numbers.
        curve: (values, mean, low, high) of the fitted response, or None.
    """

    name: str
    dots: Sequence[Dot]
    log: bool = False
    categories: Mapping[str, str] | None = None
    curve: tuple[Sequence[Any], Sequence[float], Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Line:
    """The learning curve of a trial.

    Attributes:
        points: (images seen, objective).
        role: "search", "finalist" or "recipe".
        state: "finished", "stopped" or "failed".
        end: The objective that trials are ranked by, measured at the end with other images than the points; None: none.
        name: The trial's name at that value.
    """

    points: Sequence[tuple[float, float]]
    role: str = "search"
    state: str = "finished"
    end: float | None = None
    name: str = ""


def response_figure(path: Path, panels: Sequence[Panel], *, objective: str) -> None:
    """Draw one panel per setting: the objective of every point, and the fitted response with its band.

    Args:
        path: The PNG file to write.
        panels: The panels, at least one.
        objective: The objective's name with its unit.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(3.1 * columns + 0.6, 5.4), 2.9 * rows + 0.5),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    roles = set()
    for axis, panel in zip(axes.flat, panels, strict=False):
        roles |= _draw_panel(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(objective, parse_math=False)
    handles = [_handle(role) for role in _ROLES if role in roles]
    if any(panel.curve is not None for panel in panels):
        handles.append(plt.Line2D([], [], color="#555555", label=_RESPONSE, linewidth=1.5))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), columns + columns // 3),
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, path)


def _draw_panel(axis: Any, panel: Panel) -> set[str]:
    """Draw one setting, and return the roles of its points."""
    order = list(panel.categories or {})

    def place(x: Any) -> float | None:
        if panel.categories is not None:
            return float(order.index(x)) if x in panel.categories else None
        usable = isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not panel.log)
        return float(x) if usable else None

    if panel.curve is not None:
        values, mean, low, high = panel.curve
        places = np.array([place(value) for value in values], dtype=float)
        if panel.categories is None:
            axis.fill_between(places, low, high, color="#555555", alpha=0.15, linewidth=0)
            axis.plot(places, mean, color="#555555", linewidth=1.5)
        else:
            errors = np.clip((np.subtract(mean, low), np.subtract(high, mean)), 0, None)
            axis.errorbar(places + 0.22, mean, errors, fmt="_", color="#555555", capsize=4, markersize=14, zorder=3)
    roles = set()
    for role, (colour, marker, size, _) in _ROLES.items():
        dots = [(at, dot) for dot in panel.dots if dot.role == role and (at := place(dot.x)) is not None]
        if panel.categories is not None:  # side by side, so that they do not cover each other
            aside = [0.04 * ((5 * index) % 7 - 3) for index in range(len(dots))]
            dots = [(at + shift, dot) for (at, dot), shift in zip(dots, aside, strict=True)]
        for at, dot in dots:
            if dot.error is not None:
                axis.errorbar(at, dot.y, dot.error, fmt="none", ecolor=colour, capsize=2.5, linewidth=1, zorder=2)
        if dots:
            roles.add(role)
            heights = [dot.y for _, dot in dots]
            faint = 0.75 if role == "search" else 1.0
            axis.scatter(
                [at for at, _ in dots],
                heights,
                s=size,
                color=colour,
                marker=marker,
                alpha=faint,
                linewidths=0,
                zorder=4,
            )
    if panel.categories is not None:
        labels = [textwrap.fill(label, 12, max_lines=2, placeholder="…") for label in panel.categories.values()]
        axis.set_xticks(range(len(order)), labels, fontsize=8)
        axis.set_xlim(-0.6, len(order) - 0.4)
        for label in axis.get_xticklabels():
            label.set_parse_math(False)
    elif panel.log:
        _log_axis(axis)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel(panel.name, parse_math=False)
    axis.grid(alpha=0.3)
    return roles


def _log_axis(axis: Any) -> None:
    """A logarithmic x axis with numbers in full; with 3 between the powers of ten if it is short."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    within = (1.0, 3.0) if high / low < 100 else (1.0,)
    # A range below a power of ten may hold no tick of a logarithmic locator.
    axis.xaxis.set_major_locator(MaxNLocator(4) if high / low < 10 else LogLocator(subs=within, numticks=9))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-"))
    )
    axis.xaxis.set_minor_formatter(NullFormatter())


def importance_figure(path: Path, shares: Mapping[str, float], *, objective: str) -> None:
    """Draw the importance of the settings as bars.

    Args:
        path: The PNG file to write.
        shares: {setting: share of the variance}, the largest first; at least one.
        objective: The objective's name.
    """
    figure, axis = plt.subplots(figsize=(6, 0.9 + 0.42 * len(shares)), layout="constrained")
    names = [textwrap.fill(name, 34) for name in shares]
    bars = axis.barh(range(len(names)), [100 * share for share in shares.values()], color=COLOURS[0], height=0.6)
    axis.bar_label(bars, [f"{100 * share:.0f} %" for share in shares.values()], padding=3, fontsize=9)
    axis.set_yticks(range(len(names)), names)
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.invert_yaxis()
    axis.set_xlim(0, max(100 * max(shares.values()) * 1.15, 1))
    axis.set_xlabel(f"share of the variance of {objective} (%)", parse_math=False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    save_figure(figure, path)


def learning_figure(
    path: Path,
    lines: Sequence[Line],
    *,
    objective: str,
    during: str = "on fewer images",
    at_end: str = "on more images",
) -> None:
    """Draw the learning curves of all trials, and apart from them the objective at their ends, which is another measure.

    Stopped trials end with a bar, failed ones with a cross.

    Args:
        path: The PNG file to write.
        lines: The curves, at least one with a finite value; those that are not finite are left out.
        objective: The objective's name with its unit.
        during: What the points of the curves are measured on.
        at_end: What the objective at the end is measured on.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    known = [
        replace(line, points=[(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)])
        for line in sorted(lines, key=lambda line: list(_ROLES).index(line.role) if line.role in _ROLES else 0)
    ]
    known = [line for line in known if line.points]
    ended = [line for line in known if line.state == "finished" and math.isfinite(_end_of(line))]
    for line in known:
        colour, symbol, size, label = _ROLES.get(line.role, _ROLES["search"])
        label = label.partition(",")[0]
        x, y = zip(*line.points, strict=True)
        faint: dict[str, Any] = {"color": colour, "alpha": 0.45 if line.role == "search" else 0.9}
        axis.plot(x, y, linewidth=1.1, marker="." if len(x) < 12 else None, markersize=4, **faint)
        own: dict[str, Any] = {"marker": symbol, "markersize": size**0.5, "markeredgewidth": 0} if ended else {}
        handles.setdefault(label, plt.Line2D([], [], color=colour, label=label, **own))
        if line.state != "finished":
            marker = "|" if line.state == "stopped" else "x"
            axis.plot(x[-1:], y[-1:], marker=marker, markersize=9, markeredgewidth=1.6, linestyle="", color=colour)
            mark = plt.Line2D(
                [], [], color="#555555", marker=marker, linestyle="", markeredgewidth=1.6, label=line.state
            )
            handles.setdefault(line.state, mark)
    axis.set_xlabel("images seen in pretraining")
    axis.xaxis.set_major_formatter(FuncFormatter(thousands))
    said = f"curves: measured during training, {during}"
    if ended:
        _draw_ends(axis, ended, max(x for line in known for x, _ in line.points))
        said += f"\nsymbols at the end: the objective, {at_end}; it ranks the trials"
    axis.set_title(said, fontsize=9, loc="left", color="#333333")
    axis.set_ylabel(objective, parse_math=False)
    axis.grid(alpha=0.3)
    figure.legend(
        handles=list(handles.values()), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )
    save_figure(figure, path)


def _draw_ends(axis: Any, lines: Sequence[Line], last: float) -> None:
    """Draw the objectives at the end in a strip of their own, each joined to the end of its curve by dots.

    Args:
        axis: The axes, with the curves.
        lines: Curves with an objective at the end.
        last: Images seen at the end of the longest curve.
    """
    last = last or 1.0
    roles = [role for role in _ROLES if any(line.role == role for line in lines)]
    places = {role: (1.10 + 0.04 * index) * last for index, role in enumerate(roles)}  # side by side: many are equal
    left, beside = 1.04 * last, max(places.values()) + 0.025 * last
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, last) if 0 <= tick <= last]
    axis.set_xticks([*ticks, float(np.mean(list(places.values())))], [*(thousands(tick, 0) for tick in ticks), "end"])
    axis.axvspan(left, beside + 0.12 * last, color="#555555", alpha=0.08, linewidth=0)
    axis.set_xlim(-0.04 * last, beside + 0.12 * last)
    for line in lines:
        colour, marker, size, _ = _ROLES[line.role]
        (x, y), place = line.points[-1], places[line.role]
        axis.plot((x, place), (y, line.end), color=colour, alpha=0.4, linewidth=0.9, linestyle=":")
        faint = 0.75 if line.role == "search" else 1.0
        axis.scatter(place, line.end, s=min(size, 70), color=colour, marker=marker, alpha=faint, linewidths=0, zorder=4)
    low, high = axis.get_ylim()
    labelled: dict[float, list[Line]] = {}
    for line in sorted(lines, key=lambda line: -_end_of(line)):
        near = [height for height in labelled if abs(height - _end_of(line)) < 0.5 * _NEAR * (high - low)]
        if not near or math.isclose(near[-1], _end_of(line)):
            labelled.setdefault(near[-1] if near else _end_of(line), []).append(line)
    for height, equal in labelled.items():
        label = ", ".join(line.name for line in equal[:2]) + ("…" if len(equal) > 2 else "")
        colour = _ROLES[equal[0].role][0]
        axis.text(beside, height, label, fontsize=7, color=colour, va="center", parse_math=False)


def _end_of(line: Line) -> float:
    return math.nan if line.end is None else line.end


def pareto_figure(
    path: Path, points: Sequence[tuple[float, float, str, str]], front: Sequence[int], *, objective: str, cost: str
) -> None:
    """Draw the objective against the cost of a trial, with the Pareto front.

    Args:
        path: The PNG file to write.
        points: (cost, objective, label, role) of each point; at least one.
        front: Indices of the points of the front; they are labelled.
        objective: The objective's name with its unit.
        cost: The cost's name.
    """
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    handles = []
    for role, (colour, marker, size, _) in _ROLES.items():
        of_role = [(x, y) for x, y, _, its in points if its == role]
        if of_role:
            x, y = zip(*of_role, strict=True)
            axis.scatter(x, y, s=size, color=colour, marker=marker, linewidths=0, zorder=3)
            handles.append(_handle(role, short=True))
    steps = sorted(points[index][:2] for index in front)
    axis.step(*zip(*steps, strict=True), where="post", color="#555555", linewidth=1.2, zorder=2)
    handles.append(plt.Line2D([], [], color="#555555", label="Pareto front"))
    for index in _far_apart(points, front):
        cost_there, value, label, _ = points[index]
        axis.annotate(
            label, (cost_there, value), xytext=(5, -11), textcoords="offset points", fontsize=8, parse_math=False
        )
    axis.margins(x=0.12, y=0.12)
    if max(point[0] for point in points) >= 1000:
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.set_xlabel(cost, parse_math=False)
    axis.set_ylabel(objective, parse_math=False)
    axis.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    save_figure(figure, path)


def _far_apart(points: Sequence[tuple[float, float, str, str]], front: Sequence[int]) -> list[int]:
    """Those of the front whose labels do not cover each other, beginning with the best one."""
    spans = [max(max(values) - min(values), 1e-12) for values in ([p[0] for p in points], [p[1] for p in points])]
    chosen: list[int] = []
    for index in reversed(front):
        near = [
            all(abs(points[index][i] - points[other][i]) < _NEAR * spans[i] for i in (0, 1))  # type: ignore[operator]
            for other in chosen
        ]
        if not any(near):
            chosen.append(index)
    return chosen


def _handle(role: str, *, short: bool = False) -> Any:
    colour, marker, size, label = _ROLES[role]
    label = label.partition(",")[0] if short else label
    return plt.Line2D(
        [], [], color=colour, marker=marker, markersize=size**0.5, linestyle="", markeredgewidth=0, label=label
    )
