"""What every training worker does around its work, on Ray: it beats, passes its warnings on, and can be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.train.collective
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.heartbeat import Beat, Heart, Pulse, born
from pipeline.worker_log import passing_on

_PATIENCE = 60.0  # seconds for a task that ends a process


@contextlib.contextmanager
def alive(folder: Path, rank: int, limit: float | None) -> Iterator[Pulse]:
    """In a worker: what it begins is written to the stage's `folder`, and what it warns of as well."""
    group = ray.train.collective.broadcast_from_rank_zero(uuid.uuid4().hex)
    with passing_on(folder, rank):
        if limit is None:
            yield lambda doing: None
            return
        with Heart(folder, rank, limit, node=ray.get_runtime_context().get_node_id(), group=group) as heart:
            yield heart


def end_process(beat: Beat) -> bool:
    """On the driver: kill a worker's process on its node, whatever it does; Ray sees that and starts the group anew.
    Gives whether it was still there.

    Ray's own way of ending an actor asks its process, which one that is stopped never answers.
    """
    if beat.node == ray.get_runtime_context().get_node_id():
        return _kill(beat.pid, beat.born)
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    kill = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there)
    return bool(ray.get(kill.remote(beat.pid, beat.born), timeout=_PATIENCE))


def _kill(pid: int, since: str) -> bool:
    if born(pid) != since:  # another process of this number by now, or none
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
