"""Objective against cost: which points no other one beats in both, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.runtime.formatting import scaled, table
from pipeline.sweeps.trials import Sweep, Trial, point_key, short_names, short_value, trial_name

COSTS = {  # in the order of preference: counted FLOPs do not depend on how busy the machine was
    "cost/flops": "counted FLOPs of a trial",
    "cost/gpu_hours": "GPU-hours of a trial",
    "cost/worker_hours": "CPU core-hours of a trial",
    "cost/wall_clock_s": "seconds of a trial",
}
COST_METRICS = {"flops": "cost/flops", "seconds": "cost/wall_clock_s", "gpu_hours": "cost/gpu_hours"}  # tune.cost
Point = tuple[float, float, str, str]  # cost, objective, label, role


def cost_points(sweep: Sweep) -> tuple[str, list[Point]]:
    """Cost and objective of every point, each the mean of its finished trials.

    Args:
        sweep: The trials.

    Returns:
        The cost's name in words, and (cost, objective, label, role) of each point; no points if no cost is known.
    """
    chosen = COST_METRICS.get(sweep.cost or "")
    for key, words in sorted(COSTS.items(), key=lambda item: item[0] != chosen):
        trials = [trial for trial in sweep.finished() if trial.cost.get(key, 0) > 0]
        if not trials:
            continue
        groups: dict[tuple[bool, str], list[Trial]] = {}
        for trial in trials:
            groups.setdefault((trial.role == "recipe", point_key(trial.point)), []).append(trial)
        points: list[Point] = []
        for group in groups.values():
            # The search's own value of a finalist is the highest of many.
            fresh = [trial for trial in group if trial.role == "finalist"] or group
            value = sum(trial.value or 0.0 for trial in fresh) / len(fresh)
            cost = sum(trial.cost[key] for trial in fresh) / len(fresh)
            name = "recipe" if fresh[0].role == "recipe" else trial_name(group[0].number, {})
            points.append((cost, value, name, fresh[0].role))
        return words, points
    return "", []


def pareto_front(points: Sequence[Sequence[Any]]) -> list[int]:
    """Indices of the points that are on the Pareto front, the cheapest first.

    Args:
        points: Cost (lower is better), objective (higher is better) of each point; further values are ignored.

    Returns:
        Those for which no other point is at least as good in both and better in one.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        cost, value = points[index][:2]
        last = points[front[-1]][:2] if front else None
        if last is None or value > last[1] or (cost, value) == last:
            front.append(index)
    return front


def pareto_table(sweep: Sweep) -> str:
    """The points of the Pareto front as a Markdown table, the cheapest first; "" if no cost is known."""
    cost, points = cost_points(sweep)
    settings = {trial_name(trial.number, {}): trial.point for trial in sweep.trials}
    own = next((trial.point for trial in sweep.trials if trial.role == "recipe"), {})
    names = short_names(list(sweep.settings))
    rows = []
    for index in pareto_front(points):
        spent, value, label, _ = points[index]
        point = own if label == "recipe" else settings[label]
        values = (short_value(point[key]) if key in point else "" for key in sweep.settings)
        amount = scaled(spent, 1000) if "FLOPs" in cost else f"{spent:.3g}"
        rows.append((label, *values, amount, f"{value:.2f}"))
    if not rows:
        return ""
    header = ("point", *(names[key] for key in sweep.settings), cost, sweep.objective.removeprefix("eval/"))
    return table(header, rows)
