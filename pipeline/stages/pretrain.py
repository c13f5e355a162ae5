"""Pretraining on Ray Train: data-parallel workers around the loop, restarted by Ray from our own checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoints.find import COPIED, WORK
from pipeline.checkpoints.remote import CheckpointStore
from pipeline.checkpoints.uploader import check_store, opened
from pipeline.config.recipe import CHANGEABLE, Recipe, identity
from pipeline.errors import StageError
from pipeline.models.build import build_inputs, check_model, check_shards, model_of_checkpoint
from pipeline.runtime.formatting import duration, scaled
from pipeline.runtime.progress import following, images_of_run
from pipeline.runtime.ray_session import SessionInfo
from pipeline.runtime.room import check_room
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.tracking.sender import METRICS
from pipeline.tracking.tracker import Tracker
from pipeline.training.divergence import notes_of
from pipeline.training.online_eval import draw_val, monitoring, newest_of
from pipeline.training.pretrain_loop import train
from pipeline.training.schedule import TrainSchedule
from pipeline.workers.group import least_workers, train_on_workers
from pipeline.workers.harness import Harness, LoopResult
from wavemim.weights import checkpoint

CHECKS = (check_model,)


@dataclass(frozen=True)
class Checked:
    """What `check` has opened."""

    shards: ShardSet


def check(recipe: Recipe) -> Checked:
    """Open the shard set and check that the recipe can be trained on it.

    Raises:
        SettingError: The settings do not fit the shard set, or the checkpoints that train.checkpoints_at holds.
        StageError: The shard set is missing or damaged, or a store does not respond.
    """
    shards = ShardSet.open(recipe.shards_at)
    check_shards(recipe, shards)
    TrainSchedule.of(recipe, shards.rows["train"])
    check_store(recipe, "pretrain", _identity(recipe, shards))
    return Checked(shards)


def run(recipe: Recipe, session: SessionInfo, checked: Checked, *, progress: bool = True) -> dict[str, Any]:
    """Pretrain, or resume, or find that it is finished.

    Args:
        recipe: The settings.
        session: The running Ray.
        checked: The value of `check`.
        progress: Show a progress bar or lines.

    Returns:
        The result that is also the stage's finishing mark, with its "state".

    Raises:
        SettingError: The folder holds work of other settings, or there is no room for the workers.
        StageError: Training has failed.
        KeyboardInterrupt: Training was stopped.
    """
    shards, workers = checked.shards, recipe.train.workers
    check_room(recipe, session, least_workers(recipe, workers))
    same = _identity(recipe, shards)
    place, home = recipe.stage_dir("pretrain"), recipe.stage_home("pretrain")
    with (
        stage_folder(
            place,
            same,
            restart=recipe.restart,
            changeable=CHANGEABLE,
            force=recipe.force,
            home=home,
            left_out=COPIED,
            work=WORK,
        ) as folder,
        opened(recipe, same, folder) as store,
    ):
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        last = checkpoint.latest(folder.path)
        tags = {"wavemim.shards": shards.fingerprint}
        with Tracker.start(
            recipe, "pretrain", log_dir=folder.path, tags=tags, dataset=shards.about, wait=False
        ) as tracker:
            remote = store if recipe.home is not None and not session.private else None
            with _following(recipe, shards, folder.path, last, tracker, remote, progress=progress):
                train_on_workers(
                    _loop,
                    recipe,
                    session,
                    folder.path,
                    shards=shards,
                    tracker=tracker,
                    store=store,
                    workers=workers,
                    reader_threads=recipe.train.reader_threads,
                    what="training",
                )
            result = _result(recipe, shards, folder, tracker)
            folder.finish(result)
        return {**result, "state": "new" if last is None else f"continued from {last.name}"}


def _identity(recipe: Recipe, shards: ShardSet) -> dict[str, Any]:
    """What decides the content of the stage's folder."""
    return {**identity(recipe, "pretrain"), "shards": shards.fingerprint}


def _loop(recipe: Recipe, harness: Harness, config: Mapping[str, Any]) -> LoopResult:
    """In a worker: pretraining."""
    trained = train(recipe, ShardSet.open(config["shards"]), **vars(harness))
    return LoopResult(trained.stopped)


@contextlib.contextmanager
def _following(
    recipe: Recipe,
    shards: ShardSet,
    folder: Path,
    last: Path | None,
    tracker: Tracker,
    store: CheckpointStore | None,
    *,
    progress: bool,
) -> Iterator[None]:
    """Progress, and from time to time a picture and a probe, while the workers train.

    `store`: where the newest checkpoint is, if rank 0 may be on another node.
    """
    rows = shards.rows["train"]
    state = checkpoint.read_state(last, verify=False) if last else {}
    schedule = TrainSchedule.of(recipe, rows, state.get("streams"))
    labelled = shards.classes is not None and bool(shards.rows.get("val"))
    with (
        following(
            folder / METRICS,
            total=images_of_run(schedule.total_steps, schedule.batches_per_epoch, schedule.batch, rows),
            seen=int(state.get("images", 0)),
            run=recipe.name,
            seconds=recipe.train.progress_seconds,
            enabled=progress,
        ),
        monitoring(
            folder,
            shards.folder.url,
            labelled=labelled,
            log=tracker.log,
            artifact=tracker.artifact,
            minutes=recipe.train.monitor_minutes,
            newest=None if store is None else partial(_newest, folder, store, []),
        ),
    ):
        yield


def _newest(folder: Path, store: CheckpointStore, before: list[str]) -> Path | None:
    """The newest checkpoint, downloaded if only the store has it, in place of the ones `before` that were downloaded."""
    name = store.restore(folder)
    if name is not None:
        for old in before:
            shutil.rmtree(folder / old, ignore_errors=True)
        before[:] = [name]
    return newest_of(folder)


def _result(recipe: Recipe, shards: ShardSet, folder: StageFolder, tracker: Tracker) -> dict[str, Any]:
    """Draw the figures of the last checkpoint; returns the result."""
    from wavemim.figures.plots import loss_figure  # needed here only, and slow to import

    final = checkpoint.latest(folder.path)
    if final is None:
        raise StageError(f"{folder.path} has no complete checkpoint after training")
    state = checkpoint.read_state(final)
    picture, losses = folder.path / "reconstruction.png", folder.path / "losses.png"
    model, _, _ = model_of_checkpoint(final)
    draw_val(picture, model, build_inputs(shards), recipe, shards)
    loss_figure(losses, state["history"])
    for figure in (picture, losses):
        tracker.artifact(figure)
    return {
        "checkpoint": final.name,
        "images_seen": state["images"],
        "steps": state["step"],
        "skipped": state["skipped"],
        "history": state["history"],
        "parts": state["parts"],
        "cost": spent_in(folder.path).record(),
        "reconstruction": picture.name,
        "mlflow_run": tracker.run_id(),
        "shards": shards.fingerprint,
        "recipe": recipe.dump(),
    }


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What pretraining wrote, and where."""
    folder = recipe.stage_dir("pretrain")
    last, picture = (recipe.place_of(folder / result[name]) for name in ("checkpoint", "reconstruction"))
    line = (
        f"pretrain: {result['images_seen']:,} images seen → {last} ({result['state']}); "
        f"picture: {picture}{_parts(result.get('parts', []))}"
    )
    notes = notes_of(result.get("skipped", 0), result["steps"])
    return "\n".join([line, *(f"pretrain: warning: {note}" for note in notes)])


def _parts(parts: Sequence[Mapping[str, float]]) -> str:
    """What each image size has cost, if there were several."""
    if len(parts) < 2:
        return ""
    lines = [
        f"\n  {part['image_size']} px: {part['images_seen']:,} images, {scaled(part['flops'], 1000)}FLOP, "
        f"{scaled(part['bytes_read'], 1024)}B read, {duration(part['wall_clock_s'])}"
        for part in parts
    ]
    return "".join(lines)
