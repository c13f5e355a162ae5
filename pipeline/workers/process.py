"""What every training worker does around its work, on Ray: it beats, passes its warnings on, and can be ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.train.collective
import ray.train.torch
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoints.remote import CheckpointStore
from pipeline.errors import SettingError, StageError
from pipeline.runtime.stage_folder import SETTINGS, write_json
from pipeline.shards.errors import UnreadableError
from pipeline.shards.row_groups import read_group
from pipeline.shards.shard_set import ShardSet
from pipeline.workers.heartbeat import Beat, Heart, Pulse, born
from pipeline.workers.log_forwarding import passing_on
from pipeline.workers.stragglers import BUFFERS_STAY
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)

STOP = ".stop"  # in the stage's folder: asks the workers to save a checkpoint and end
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


def data_parallel(model: torch.nn.Module) -> torch.nn.Module:
    """Behind DDP."""
    return ray.train.torch.prepare_model(model, move_to_device=False, parallel_strategy_kwargs=BUFFERS_STAY)


def resume_from(folder: Path, rank: int, store: CheckpointStore | None = None) -> Path | None:
    """The last whole checkpoint, as rank 0 sees it: also after a crash, whatever Ray remembers."""
    if not (folder / SETTINGS).is_file():
        raise StageError(f"{folder} is not there on a worker's node; out= has to be a folder that all nodes see")
    if rank == 0 and store is not None:
        try:  # whole there, where the last one in the folder is damaged
            store.restore(folder)
        except (StageError, SettingError, OSError) as error:
            log.warning("%s; training goes on from what is in %s", error, folder)
    found = checkpoint.latest(folder) if rank == 0 else None
    name = ray.train.collective.broadcast_from_rank_zero(found.name if found else None)
    return folder / name if name else None


def asked_to_stop(folder: Path) -> bool:
    """Whether the driver asks for it. Listed: a network disk may go on saying for long that a file is not there."""
    try:
        return STOP in os.listdir(folder)
    except OSError:  # the checkpoint will say so
        return False


def reader_threads(wanted: int | None, workers_here: int) -> int:
    """A worker's share of the cores that its machine gives it; more than 8 would only wait for memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or min(max(cores // workers_here, 1), 8)


NOTE = ".unreadable.json"  # in the stage's folder: what a worker could not read
_REMEDY = "put the file back and call the same command again, which goes on from the last checkpoint"


def note(folder: Path, error: UnreadableError) -> None:
    """Remember, for the workers that are started anew, what could not be read."""
    with contextlib.suppress(OSError):
        write_json(folder / NOTE, error.place)


def forget(folder: Path) -> None:
    """A new call of the stage begins without such a note."""
    with contextlib.suppress(OSError):
        (folder / NOTE).unlink(missing_ok=True)


def still_unreadable(folder: Path, shards: str) -> str:
    """Why rows that could not be read before still cannot; nothing where they can, or where there were none."""
    try:
        noted = json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return ""
    try:
        read_group(ShardSet.open(shards), noted["name"], noted["group"], noted["levels"])
    except StageError as error:  # also of a store that does not answer
        return f"{error}; {_REMEDY}"
    forget(folder)
    return ""
