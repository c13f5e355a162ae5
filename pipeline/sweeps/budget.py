"""What a sweep may use: images, wall-clock time, GPU-hours. Decides from the ledger whether another point can be searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.sweeps.ledger import Ended


@dataclass(frozen=True)
class Limits:
    """The limits of a sweep. None: no limit.

    Attributes:
        images: Images that all trials together are trained on.
        hours: Wall-clock hours of the sweep.
        gpu_hours: GPU-hours of all trials together.
        images_each: Images that a trial is expected to be trained on while none has finished.
        concurrent: Trials at the same time.
    """

    images: int | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    images_each: float = 0.0
    concurrent: int = 1


def fits(limits: Limits, ended: Sequence[Ended], *, running: int, to_come: int, elapsed: float) -> bool:
    """Whether another point of the search is within the limits.

    A trial is expected to use what finished ones did on average. Before one has finished, its images follow from the
    settings, and nothing is known of its time.

    Args:
        limits: The limits.
        ended: The trials that have ended, without finalists.
        running: Trials that have begun and not ended, without finalists.
        to_come: Trials that have not begun and are run in any case.
        elapsed: Wall-clock hours that the sweep has taken.
    """
    more = running + to_come + 1
    if limits.images is not None:
        each = _mean(ended, "images", limits.images_each)
        if sum(_used(one, "images") for one in ended) + more * each > limits.images:
            return False
    if limits.gpu_hours is not None:
        each = _mean(ended, "gpu_hours", 0.0)
        used = sum(_used(one, "gpu_hours") for one in ended)
        if used + more * each > limits.gpu_hours or used >= limits.gpu_hours:
            return False
    if limits.hours is not None:
        rounds = -(-more // limits.concurrent)
        if elapsed + rounds * _mean(ended, "hours", 0.0) > limits.hours or elapsed >= limits.hours:
            return False
    return True


def _mean(ended: Sequence[Ended], what: str, otherwise: float) -> float:
    """Mean of the trials that ran to their end."""
    values = [_used(one, what) for one in ended if one.state == "finished"]
    return sum(values) / len(values) if values else otherwise


def _used(ended: Ended, what: str) -> float:
    if what == "images":
        return float(ended.metrics.get("images", 0))
    if what == "hours":
        return ended.cost.get("cost/wall_clock_s", 0.0) / 3600
    return ended.cost.get("cost/gpu_hours", 0.0)
