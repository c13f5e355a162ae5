"""Pretraining on Ray Train: data-parallel workers around the loop, restarted by Ray from our own checkpoints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch

from pipeline.checkpoints.remote import CheckpointStore
from pipeline.checkpoints.uploader import Copier, check_store, opened
from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate
from pipeline.config.recipe import CHANGEABLE, Recipe, identity
from pipeline.errors import StageError
from pipeline.models.build import build_inputs, check_model, check_shards, model_of_checkpoint
from pipeline.runtime.formatting import duration, scaled
from pipeline.runtime.progress import following, images_of_run
from pipeline.runtime.ray_session import SessionInfo, check_room
from pipeline.runtime.stage_folder import stage_folder
from pipeline.runtime.usage import spent_in
from pipeline.shards.shard_set import ShardSet, UnreadableError
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.coordination import Minutes, Orders
from pipeline.training.divergence import BlowUpError, keep_blow_up
from pipeline.training.online_eval import draw_val, monitoring
from pipeline.training.pretrain_loop import Trained, train
from pipeline.training.schedule import TrainSchedule
from pipeline.workers.group import run_workers
from pipeline.workers.heartbeat import CHECKPOINT, Pulse, watching
from pipeline.workers.process import (
    alive,
    asked_to_stop,
    data_parallel,
    end_process,
    forget,
    note,
    reader_threads,
    resume_from,
    still_unreadable,
)
from wavemim.figures.plots import loss_figure
from wavemim.weights import checkpoint

METRICS = "metrics.jsonl"
_LEAVING = 10 / 60  # minutes between checkpoints once a node is known to go away

log = logging.getLogger(__name__)


CHECKS = (check_model,)


def check(recipe: Recipe) -> ShardSet:
    """The shard set, which the recipe can train on. Raises SettingError and StageError."""
    shards = ShardSet.open(recipe.shards_at)
    check_shards(recipe, shards)
    TrainSchedule.of(recipe, shards.rows["train"])
    check_store(recipe)
    return shards


def run(recipe: Recipe, session: SessionInfo, checked: ShardSet, *, progress: bool = True) -> dict[str, Any]:
    """Pretrain by `recipe` on its shard set; gives the summary that is also the stage's finishing mark."""
    shards = checked
    check_room(recipe, session, recipe.cluster.min_workers or recipe.train.workers)
    same = {**identity(recipe, "pretrain"), "shards": shards.fingerprint}
    with (
        stage_folder(
            recipe.stage_dir("pretrain"), same, restart=recipe.restart, changeable=CHANGEABLE, force=recipe.force
        ) as folder,
        opened(recipe, same, folder) as store,
    ):
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        last = checkpoint.latest(folder.path)
        tags = {"wavemim.shards": shards.fingerprint}
        with Tracker.start(recipe, "pretrain", log_dir=folder.path, tags=tags) as tracker:
            with _followed(recipe, shards, folder.path, last, tracker, progress=progress):
                _fit(recipe, shards, folder.path, tracker.handle, session, store)
            final = checkpoint.latest(folder.path)
            if final is None:
                raise StageError(f"{folder.path} has no whole checkpoint after training")
            state = checkpoint.read_state(final)
            picture = folder.path / "reconstruction.png"
            model, _, _ = model_of_checkpoint(final)
            draw_val(picture, model, build_inputs(shards), recipe, shards)
            losses = folder.path / "losses.png"
            loss_figure(losses, state["history"])
            for figure in (picture, losses):
                tracker.artifact(figure)
            result = {
                "checkpoint": final.name,
                "images_seen": state["images"],
                "steps": state["step"],
                "history": state["history"],
                "parts": state["parts"],
                "cost": spent_in(folder.path).record(),
                "reconstruction": picture.name,
                "mlflow_run": tracker.handle.run_id,
                "shards": shards.fingerprint,
                "recipe": recipe.dump(),
            }
            folder.finish(result)
        state_word = "new" if last is None else f"continued from {last.name}"
        return {**result, "state": state_word}


@contextlib.contextmanager
def _followed(
    recipe: Recipe, shards: ShardSet, folder: Path, last: Path | None, tracker: Tracker, *, progress: bool
) -> Iterator[None]:
    """Progress and now and then a picture and a probe, while the workers train."""
    rows, train_ = shards.rows["train"], recipe.train
    state = checkpoint.read_state(last, verify=False) if last else {}
    plan = TrainSchedule.of(recipe, rows, state.get("streams"))
    total = images_of_run(plan.total_steps, plan.batches_per_epoch, plan.batch, rows)
    seen = int(state.get("images", 0))
    labelled = shards.classes is not None and bool(shards.rows.get("val"))
    with (
        following(folder / METRICS, total=total, seen=seen, seconds=train_.progress_seconds, enabled=progress),
        monitoring(
            folder,
            shards.folder.url,
            labelled=labelled,
            log=tracker.log,
            artifact=tracker.artifact,
            minutes=train_.monitor_minutes,
        ),
    ):
        yield


def _fit(
    recipe: Recipe,
    shards: ShardSet,
    folder: Path,
    handle: RunHandle,
    session: SessionInfo,
    store: CheckpointStore | None = None,
) -> None:
    """Run the workers to the end of training; SIGTERM makes them save a checkpoint and end, as KeyboardInterrupt."""
    config = {"recipe": recipe.dump(), "shards": shards.folder.url, "handle": handle, "store": store}
    forget(folder)
    with watching(folder, recipe.train.hang_timeout, end_process):
        run_workers(
            _worker,
            config,
            recipe,
            session,
            folder,
            workers=recipe.train.workers,
            least=recipe.cluster.min_workers,
            what="training",
        )


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One data-parallel worker. Gives how it ended: an exception would make Ray begin again."""
    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    with alive(folder, rank, config["recipe"]["train"]["hang_timeout"]) as beat:
        lost = still_unreadable(folder, config["shards"]) if rank == 0 else ""
        if lost := ray.train.collective.broadcast_from_rank_zero(lost):
            return {"failed": lost}
        try:
            return _train(config, beat)
        except UnreadableError as error:
            note(folder, error)
            raise


def _train(config: dict[str, Any], beat: Pulse) -> dict[str, Any]:
    """Training in a worker, from the last whole checkpoint on."""
    recipe, folder = validate(config["recipe"]), Path(config["folder"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    store: CheckpointStore | None = config["store"]
    resume = resume_from(folder, rank, store)
    tracker = Tracker.attach(config["handle"]) if rank == 0 else None
    keep, best = recipe.train.keep_checkpoints, recipe.train.keep_best
    uploader = Copier(store, folder, keep=keep, best=best is not None) if rank == 0 and store is not None else None
    keeper = Keeper(folder, keep=keep, best=best, uploader=uploader) if rank == 0 else None
    due, leaving = Minutes(recipe.train.checkpoint_minutes), Minutes(_LEAVING)

    def on_log(metrics: dict[str, float], images: int) -> None:
        assert tracker is not None and keeper is not None
        tracker.log(metrics, images)
        keeper.log(metrics)

    def on_checkpoint(saver: checkpoint.Saver, state: dict[str, Any]) -> None:
        due.saved()
        leaving.saved()
        if keeper is not None:
            keeper.save(saver)
        else:
            saver.take_part()

    def stop() -> bool:
        return bool(keeper and keeper.given_up) or asked_to_stop(folder)

    trained: Trained | None = None
    failed = ""
    try:
        trained = train(
            recipe,
            ShardSet.open(config["shards"]),
            device=device,
            rank=rank,
            world=world,
            threads=reader_threads(recipe.train.reader_threads, context.get_local_world_size()),
            wrap=data_parallel if world > 1 else None,
            resume=resume,
            on_log=on_log if rank == 0 else None,
            on_checkpoint=on_checkpoint,
            on_blow_up=lambda saver, error: keep_blow_up(
                folder, saver, error, shards=config["shards"], rank=rank, world=world
            ),
            orders=Orders(rank, world, stop=stop, save=lambda: due() or (_node_goes_away() and leaving())),
            beat=beat,
            spent=spent_in(folder),
        )
    except BlowUpError as error:
        failed = str(error)
    finally:
        if keeper is not None:
            keeper.wait(lambda: beat(CHECKPOINT))
    if keeper is not None:
        unsaved = keeper.finish(lambda: beat(CHECKPOINT))
        ended_early = trained is None or trained.stopped  # else the last one is there, whatever became of others
        failed = failed or unsaved or (keeper.given_up if ended_early else "")
    uncopied = keeper.uncopied if keeper is not None else ""
    return {"failed": failed, "stopped": trained is not None and trained.stopped, "uncopied": uncopied}


def _node_goes_away() -> bool:
    """Whether Ray knows that a node of this run is about to be taken away. Its public question is one to all ranks."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What pretrain wrote where."""
    folder = recipe.stage_dir("pretrain")
    return (
        f"pretrain: {result['images_seen']:,} images seen → {folder / result['checkpoint']} ({result['state']}); "
        f"picture: {folder / result['reconstruction']}{_parts(result.get('parts', []))}"
    )


def _parts(parts: Sequence[Mapping[str, float]]) -> str:
    """What each image size has cost, where there were several."""
    if len(parts) < 2:
        return ""
    lines = [
        f"\n  {part['image_size']} px: {part['images_seen']:,} images, {scaled(part['flops'], 1000)}FLOP, "
        f"{scaled(part['bytes_read'], 1024)}B read, {duration(part['wall_clock_s'])}"
        for part in parts
    ]
    return "".join(lines)
