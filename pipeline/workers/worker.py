"""A training worker on Ray: it reports its progress, resumes, saves, can be stopped, and runs the loop of its stage."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train.collective
import ray.train.torch
import torch

from pipeline.checkpoints.find import fetched
from pipeline.checkpoints.remote import CheckpointStore
from pipeline.checkpoints.uploader import Copier
from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError, TrainingEndedError
from pipeline.runtime.ray_internals import node_is_leaving
from pipeline.runtime.stage_folder import SETTINGS
from pipeline.shards.errors import UnreadableError
from pipeline.tracking.tracker import Tracker
from pipeline.workers.coordination import CheckpointTimer, Coordinator
from pipeline.workers.harness import CONFIG, DIVERGED, Harness, Loop, LoopResult
from pipeline.workers.heartbeat import CHECKPOINT, Heartbeat, ReportActivity
from pipeline.workers.log_forwarding import passing_on
from pipeline.workers.relay import KEPT, STOP, Place, working
from pipeline.workers.stragglers import KEEP_BUFFERS
from pipeline.workers.unreadable import note, still_unreadable
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)

_LEAVING = 10 / 60  # minutes between checkpoints once a node is known to be taken away


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """One data-parallel worker of a training stage, as Ray Train runs it.

    Args:
        config: As `pipeline.workers.group.train_on_workers` makes it, behind a reference.

    Returns:
        How it ended: "failed" and "uncopied" are lines or empty, "stopped" says whether it was asked to stop, "value" is
        the loop's. What it returns ends the run; an exception makes Ray restart the workers.
    """
    config = ray.get(config[CONFIG])
    rank = ray.train.get_context().get_world_rank()
    with (
        working(Path(config["folder"]), config["handle"], config["relay"], config["home"]) as place,
        _reporting(place.folder, rank, config["recipe"]["train"]["hang_timeout"]) as heartbeat,
    ):
        lost = still_unreadable(place.folder, config["shards"]) if rank == 0 else ""
        if lost := ray.train.collective.broadcast_from_rank_zero(lost):
            return {"failed": lost}
        try:
            return _train(config, place, heartbeat)
        except UnreadableError as error:
            note(place.folder, error)
            raise


def train_alone(config: dict[str, Any]) -> dict[str, Any] | None:
    """The only worker, without a group around it: `train_worker` in this process, by Ray Train's local mode."""
    alone = ray.train.torch.TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # it returns something
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=0),
    )
    ended: dict[str, Any] | None = alone.fit().return_value  # type: ignore[attr-defined]  # of V2
    return ended


def _train(config: Mapping[str, Any], place: Place, heartbeat: ReportActivity) -> dict[str, Any]:
    """The loop, from the last whole checkpoint on, and the end of its checkpoints."""
    recipe, folder = validate(config["recipe"]), place.folder
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    store: CheckpointStore | None = config["store"]
    resume = _resume_from(recipe, place, rank, world, store)
    saving = _Saving(recipe, place, rank, store)
    result: LoopResult | None = None
    failed = ""
    try:
        harness = Harness(
            device=device,
            rank=rank,
            world=world,
            wrap=_data_parallel if world > 1 else None,
            threads=reader_threads(config["reader_threads"], context.get_local_world_size()),
            resume=resume,
            folder=folder,
            on_log=saving.on_log,
            on_checkpoint=saving.on_checkpoint,
            coordinator=Coordinator(rank, world, stop=saving.asked_to_stop, save=saving.due),
            heartbeat=heartbeat,
            spent=place.spent,
        )
        loop: Loop = config["loop"]
        result = loop(recipe, harness, config)
    except TrainingEndedError as error:
        failed = _diverged_at_home(str(error), place, store) if rank == 0 else str(error)
    finally:
        saving.wait(heartbeat, copied=place.elsewhere)  # the only copy would be lost with the worker
    ended_early = result is None or result.stopped
    unsaved = saving.finish(heartbeat, ended_early=ended_early)
    if place.elsewhere and (unsaved or saving.uncopied):
        (folder / KEPT).touch()
    return {
        "failed": failed or unsaved,
        "stopped": result is not None and result.stopped,
        "uncopied": saving.uncopied,
        "value": result.value if result is not None else None,
    }


class _Saving:
    """What a worker writes while it trains: on rank 0 metrics and checkpoints; others take part in those."""

    def __init__(self, recipe: Recipe, place: Place, rank: int, store: CheckpointStore | None) -> None:
        self._folder = folder = place.folder
        self._timer, self._leaving = CheckpointTimer(recipe.train.checkpoint_minutes), CheckpointTimer(_LEAVING)
        self._tracker: Tracker | None = None
        self._keeper: Keeper | None = None
        if rank == 0:
            keep, best = recipe.train.keep_checkpoints, recipe.train.keep_best
            uploader = None
            if store is not None:
                uploader = Copier(store, folder, keep=keep, best=best is not None, before=place.copy_journal)
            self._tracker = Tracker.attach(place.handle)
            self._keeper = Keeper(folder, keep=keep, best=best, uploader=uploader)

    def on_log(self, metrics: dict[str, float], images: int) -> None:
        """Metrics, on rank 0."""
        assert self._tracker is not None and self._keeper is not None
        self._tracker.log(metrics, images)
        self._keeper.log(metrics)

    def on_checkpoint(self, saver: checkpoint.Saver, state: dict[str, Any]) -> None:
        """A checkpoint, on every rank."""
        self._timer.reset()
        self._leaving.reset()
        if self._keeper is not None:
            self._keeper.save(saver)
        else:
            saver.take_part()

    def due(self) -> bool:
        """Whether a checkpoint is due for the time that has passed, or because a node is about to be taken away."""
        return self._timer() or (node_is_leaving() and self._leaving())

    def asked_to_stop(self) -> bool:
        """Whether training has to stop: as the driver asks, or since no checkpoint can be written."""
        return bool(self._keeper and self._keeper.given_up) or _asked_to_stop(self._folder)

    def wait(self, heartbeat: ReportActivity, *, copied: bool) -> None:
        """Wait for the checkpoint that is being written, and until it is copied if `copied`."""
        if self._keeper is not None:
            self._keeper.wait(lambda: heartbeat(CHECKPOINT))
            if copied and self._keeper.uploader is not None:
                self._keeper.uploader.finish(lambda: heartbeat(CHECKPOINT))

    def finish(self, heartbeat: ReportActivity, *, ended_early: bool) -> str:
        """Wait for the last checkpoint and its copy. Returns why training has failed for it, or nothing.

        `ended_early`: before the end of training; after it, all that matters is that the last checkpoint is there.
        """
        if self._keeper is None:
            return ""
        unsaved = self._keeper.finish(lambda: heartbeat(CHECKPOINT))
        return unsaved or (self._keeper.given_up if ended_early else "")

    @property
    def uncopied(self) -> str:
        """After `finish`: why the last checkpoint is not in the store."""
        return self._keeper.uncopied if self._keeper is not None else ""


@contextlib.contextmanager
def _reporting(folder: Path, rank: int, limit: float | None) -> Iterator[ReportActivity]:
    """Write this worker's progress, unless `limit` is None, and its warnings to the stage's `folder`."""
    group = ray.train.collective.broadcast_from_rank_zero(uuid.uuid4().hex)
    with passing_on(folder, rank):
        if limit is None:
            yield lambda activity: None
            return
        node = ray.get_runtime_context().get_node_id()
        with Heartbeat(folder, rank, limit, node=node, group=group) as heartbeat:
            yield heartbeat


def _data_parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The model behind DDP."""
    return ray.train.torch.prepare_model(model, move_to_device=False, parallel_strategy_kwargs=KEEP_BUFFERS)


def _resume_from(recipe: Recipe, place: Place, rank: int, world: int, store: CheckpointStore | None) -> Path | None:
    """The last whole checkpoint, as rank 0 sees it: also after a crash, whatever Ray remembers."""
    folder, keep, best = place.folder, recipe.train.keep_checkpoints, recipe.train.keep_best is not None
    if not place.elsewhere and not (folder / SETTINGS).is_file():
        raise StageError(f"{folder} does not exist on a worker's node; out= has to be a folder that all nodes share")
    if rank == 0 and store is not None:
        try:  # the store may have a whole one where the last one in the folder is damaged
            store.restore(folder, best=best)
        except (StageError, SettingError, OSError) as error:
            if place.elsewhere:  # its folder is empty, and the store may hold a checkpoint
                raise
            log.warning("%s; training resumes from what is in %s", error, folder)
    found = checkpoint.latest(folder) if rank == 0 else None
    shares = store is None or recipe.home is None
    if found is not None and world > 1 and store is not None and not shares:  # workers on other nodes fetch it there
        missing = Copier(store, folder, keep=keep, best=best).finish()
        if missing:
            log.warning("%s", missing)
    name = ray.train.collective.broadcast_from_rank_zero(found.name if found else None)
    if not name or rank == 0 or store is None or shares:
        return folder / name if name else None
    return fetched(store.folder.place(name), recipe.local_out, near=None if place.elsewhere else folder)[0]


def _diverged_at_home(failed: str, place: Place, store: CheckpointStore | None) -> str:
    """On rank 0: copy the model that diverged to the store if it is on another node; the message, with its place there."""
    if not place.elsewhere or store is None:
        return failed
    try:
        for path in sorted((place.folder / DIVERGED).rglob("*")):
            if path.is_file():
                store.folder.write(path.relative_to(place.folder).as_posix(), path.read_bytes())
    except (StageError, SettingError, OSError) as error:
        return f"{failed} (it could not be copied: {error})"
    return failed.replace(str(place.folder), str(store))


def _asked_to_stop(folder: Path) -> bool:
    """Whether the driver asks for it. The folder is listed: on a network disk a file may seem to be missing for long."""
    try:
        return STOP in os.listdir(folder)
    except OSError:  # the next checkpoint will report it
        return False


def reader_threads(wanted: int | None, workers_here: int) -> int:
    """Threads that read in a worker.

    Args:
        wanted: As set; None: the worker's share of its machine's cores, at most 8, since more would wait for memory.
        workers_here: Workers on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or min(max(cores // workers_here, 1), 8)
