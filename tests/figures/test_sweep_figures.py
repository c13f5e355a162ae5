"""What is on the figures of sweeps, and that no value crashes them."""

import math

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from PIL import Image

from wavemim.figures import sweeps
from wavemim.figures.sweeps import Dot, Line, Panel, importance_figure, learning_figure, pareto_figure, response_figure


@pytest.fixture
def drawn(monkeypatch):
    """The figures, kept in place of being written."""
    kept = []
    monkeypatch.setattr(sweeps, "save_figure", lambda figure, path: kept.append(figure))
    yield kept
    for figure in kept:
        sweeps.plt.close(figure)


def texts(figure):
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(sweeps.plt.Text)]


def test_the_objective_against_each_setting(drawn):
    curve = ([0.01, 0.1, 1.0], [3.0, 4.0, 3.5], [2.5, 3.5, 3.0], [3.5, 4.5, 4.0])
    dots = [
        Dot(0.02, 3.0),
        Dot(0.5, 4.0, "finalist", error=0.3),
        Dot(1.0, 3.3, "recipe", error=0.2),
        Dot(None, 9),
        Dot(-1, 9),
    ]
    named = Panel("a$_$", [Dot("x", 1.0), Dot("y", 2.0), Dot("gone", 3)], categories={"y": "[1,2]", "x": "null"})
    response_figure("p", [Panel("train.lr", dots, log=True, curve=curve), named], objective="top1 (%)")
    (figure,) = drawn
    left, right = figure.axes
    assert left.get_xscale() == "log" and left.get_xlabel() == "train.lr" and left.get_ylabel() == "top1 (%)"
    placed = np.concatenate([found.get_offsets() for found in left.collections if isinstance(found, PathCollection)])
    assert sorted(map(tuple, placed)) == [(0.02, 3.0), (0.5, 4.0), (1.0, 3.3)]  # and none without a place on a log axis
    assert any(list(line.get_ydata()) == curve[1] for line in left.get_lines())
    assert len(left.containers) == 2  # error bars
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["[1,2]", "null"]
    at = next(found for found in right.collections if isinstance(found, PathCollection)).get_offsets()
    assert np.round(at[:, 0]).tolist() == [1, 0] and at[:, 1].tolist() == [1, 2]
    assert {"searched", "finalist, mean of its seeds", "recipe, mean of its seeds"} <= set(texts(figure))


def test_learning_curves_mark_what_was_stopped(drawn):
    lines = [
        Line([(0, 1.0), (1000, 2.0)]), Line([(0, 1.0), (500, math.nan)], state="stopped"), Line([], state="failed"),
        Line([(0, 1.0), (800, 1.5)], "recipe", "failed"),
    ]  # fmt: skip
    learning_figure("p", lines, objective="top1")
    (figure,) = drawn
    ends = {line.get_marker(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}
    assert ends["|"] == ([0], [1.0]) and ends["x"] == ([800], [1.5])
    assert {"searched", "recipe", "stopped", "failed"} <= set(texts(figure)) and "finalist" not in texts(figure)


def test_the_objective_at_the_end_is_apart_from_the_curves_and_says_what_it_is_measured_on(drawn):
    """Would catch: a best trial that is drawn as the one that got worst, since its curve is of another measure."""
    lines = [
        Line([(0, 10.5), (4000, 11.5)], end=14.0, name="#02"), Line([(0, 10.5), (4000, 9.5)], end=14.0, name="#04"),
        Line([(0, 10.5), (2000, 10.0)], "finalist", end=13.0, name="#05"),
        Line([(0, 10.5), (2000, 8.0)], state="stopped", end=8.0, name="#06"), Line([(0, 9.0)], end=math.nan, name="#07"),
    ]  # fmt: skip
    learning_figure(
        "p", lines, objective="top1 (%)", during="by a cheaper probe on 1,000 images", at_end="on 2,000 images"
    )
    learning_figure("p", [Line([(0, 1.0), (9, 2.0)])], objective="top1")
    axis = drawn[0].axes[0]
    symbols = [found for found in axis.collections if isinstance(found, PathCollection)]
    placed = [tuple(at) for found in symbols for at in found.get_offsets()]
    assert sorted(y for _, y in placed) == [13.0, 14.0, 14.0] and all(x > 4000 for x, _ in placed)
    assert len({x for x, _ in placed}) == 2  # the roles stand side by side
    dotted = [line for line in axis.get_lines() if line.get_linestyle() == ":"]
    joins = sorted((line.get_xdata()[0], *map(float, line.get_ydata())) for line in dotted)
    assert joins == [(2000, 10.0, 13.0), (4000, 9.5, 14.0), (4000, 11.5, 14.0)]
    curves = [line for line in axis.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    assert all(max(line.get_xdata()) <= 4000 for line in curves)  # no curve goes on to the other measure
    said = " ".join(texts(drawn[0]))
    assert "during training, by a cheaper probe on 1,000 images" in said and "the objective, on 2,000 images" in said
    assert {"#02, #04", "#05", "end"} <= set(texts(drawn[0])) and not {"#06", "#07"} & set(texts(drawn[0]))
    alone = texts(drawn[1])  # without an objective at the end, there is no strip for it
    assert "end" not in alone and any("on fewer images" in text for text in alone)


def test_the_pareto_front_is_drawn_and_labelled(drawn):
    points = [(1e12, 40.0, "#01", "search"), (2e12, 39.0, "#02", "search"), (3e12, 50.0, "recipe", "recipe")]
    pareto_figure("p", points, [0, 2], objective="top1", cost="FLOPs")
    (figure,) = drawn
    front = next(line for line in figure.axes[0].get_lines())
    assert list(front.get_xdata()) == [1e12, 3e12] and list(front.get_ydata()) == [40, 50]
    assert {"#01", "recipe", "Pareto front", "1 T"} <= set(texts(figure)) and "#02" not in texts(figure)


def test_importance_as_bars(drawn):
    importance_figure("p", {"a$b": 0.62, "c": 0.1}, objective="top1")
    (figure,) = drawn
    assert [round(bar.get_width()) for bar in figure.axes[0].patches] == [62, 10]
    assert {"62 %", "a$b"} <= set(texts(figure))


def test_a_panel_without_a_place_for_its_points_is_drawn(tmp_path):
    panels = [Panel("x$", [], log=True), Panel("y", [Dot(0.0, 1.0)], log=True)]
    response_figure(tmp_path / "a.png", panels, objective="x")
    assert Image.open(tmp_path / "a.png").size[0] > 300
