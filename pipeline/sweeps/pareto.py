"""Objective against cost: which points no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.sweeps.trials import Sweep, Trial, point_key, trial_name

COSTS = {  # in the order of preference: counted FLOPs do not depend on how busy the machine was
    "cost/flops": "counted FLOPs of a trial",
    "cost/gpu_hours": "GPU-hours of a trial",
    "cost/worker_hours": "CPU core-hours of a trial",
}
Point = tuple[float, float, str, str]  # cost, objective, label, role


def cost_points(sweep: Sweep) -> tuple[str, list[Point]]:
    """Cost and objective of every point, each the mean of its finished trials.

    Args:
        sweep: The trials.

    Returns:
        The cost's name in words, and (cost, objective, label, role) of each point; no points if no cost is known.
    """
    for key, words in COSTS.items():
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
