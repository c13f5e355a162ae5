"""Pretraining on Ray Train: data-parallel workers around the loop, checkpoints and restarts by Ray, metrics to MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from tqdm import tqdm

from pipeline.build import check_model, check_shards
from pipeline.config import Recipe, SettingError, identity, validate
from pipeline.loop import Plan, train
from pipeline.session import SessionInfo
from pipeline.shards import ShardSet
from pipeline.stage import StageError, stage_folder
from pipeline.tracking import RunHandle, Tracker
from wavemim import checkpoint
from wavemim.figures import loss_figure
from wavemim.reconstruction_figure import reconstruction_figure

METRICS = "metrics.jsonl"


def pretrain(recipe: Recipe, session: SessionInfo, *, progress: bool = True) -> dict[str, Any]:
    """Pretrain by `recipe` on its shard set; gives the summary that is also the stage's finishing mark."""
    check_model(recipe)
    shards = ShardSet.open(recipe.shards_at)
    check_shards(recipe, shards)
    check_room(recipe, session, recipe.train.workers)
    plan = Plan.of(recipe, shards.rows["train"])
    same = {**identity(recipe, "pretrain"), "shards": shards.fingerprint}
    with stage_folder(recipe.stage_dir("pretrain"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        last = checkpoint.latest(folder.path)
        tags = {"wavemim.shards": shards.fingerprint}
        with Tracker.start(recipe, "pretrain", log_dir=folder.path, tags=tags) as tracker:
            with _progress_bar(folder.path / METRICS, plan, shards.rows["train"], recipe, enabled=progress):
                _fit(recipe, shards, folder.path, tracker.handle, session)
            final = checkpoint.latest(folder.path)
            if final is None:
                raise StageError(f"{folder.path} has no whole checkpoint after training")
            state = checkpoint.read_state(final)
            picture = folder.path / "reconstruction.png"
            reconstruction_figure(picture, **_figure_inputs(recipe, shards, final))
            losses = folder.path / "losses.png"
            loss_figure(losses, state["history"])
            for figure in (picture, losses):
                tracker.artifact(figure)
            result = {
                "checkpoint": final.name,
                "images_seen": state["images"],
                "steps": state["step"],
                "history": state["history"],
                "reconstruction": picture.name,
                "mlflow_run": tracker.handle.run_id,
                "shards": shards.fingerprint,
                "recipe": recipe.dump(),
            }
            folder.finish(result)
        state_word = "new" if last is None else f"continued from {last.name}"
        return {**result, "state": state_word}


def uses_gpu(recipe: Recipe, session: SessionInfo) -> bool:
    """Whether training runs on GPUs: as set, else where there are any."""
    return session.gpus > 0 if recipe.cluster.gpus is None else recipe.cluster.gpus


def check_room(recipe: Recipe, session: SessionInfo, workers: int) -> None:
    """Raise SettingError where this machine can never hold so many workers; a cluster may still grow."""
    needed = workers * recipe.cluster.cpus_per_worker
    if session.private and needed > session.cpus:
        raise SettingError(
            f"{workers} worker(s) with cluster.cpus_per_worker={recipe.cluster.cpus_per_worker:g} need {needed:g} CPUs, "
            f"this machine has {session.cpus:g}; use fewer with train.workers={max(1, int(session.cpus))}, or a smaller share"
        )
    if session.private and uses_gpu(recipe, session) and workers > session.gpus:
        raise SettingError(
            f"{workers} worker(s) need a GPU each (cluster.gpus={recipe.cluster.gpus}), this machine has {session.gpus:g}; "
            "use fewer with train.workers=, or none with cluster.gpus=false"
        )


def checkpoint_of(recipe: Recipe) -> Path:
    """The checkpoint that a later stage uses: the one named, else the last whole one of the run."""
    if recipe.checkpoint:
        path = Path(recipe.checkpoint)
        found = path if (path / checkpoint.STATE).is_file() else checkpoint.latest(path)
        if found is None:
            raise SettingError(f"checkpoint={path}: neither a checkpoint nor a folder with one in it")
        return found
    found = checkpoint.latest(recipe.stage_dir("pretrain"))
    if found is None:
        raise StageError(
            f"{recipe.stage_dir('pretrain')} has no checkpoint; run wavemim pretrain with the same name= and out= first"
        )
    return found


def recipe_of(checkpoint_path: Path) -> Recipe:
    """The settings with which a checkpoint was trained."""
    return validate(checkpoint.read_state(checkpoint_path, verify=False)["recipe"])


def _fit(recipe: Recipe, shards: ShardSet, folder: Path, handle: RunHandle, session: SessionInfo) -> None:
    """Run the workers. Ray keeps its own record of the run in `folder`, from which it restores an unfinished one."""
    use_gpu = uses_gpu(recipe, session)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.dump(),
            "shards": shards.folder.url,
            "handle": handle,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.train.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=recipe.cluster.max_failures,
                controller_failure_limit=1,  # type: ignore[call-arg]  # of Train V2, whose types Ray hides
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.train.keep_checkpoints),
        ),
    )
    try:
        trainer.fit()
    except SystemExit:
        # Ray Train takes Ctrl-C for itself, and would end the process with 1 and without a word
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise StageError(f"training failed: {root_cause(error)}; what was reached is kept in {folder}") from error


def _worker(config: dict[str, Any]) -> None:
    """One data-parallel worker."""
    recipe = validate(config["recipe"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    tracker = Tracker.attach(config["handle"]) if rank == 0 else None
    with contextlib.ExitStack() as stack:
        stored = ray.train.get_checkpoint()
        resume = Path(stack.enter_context(stored.as_directory())) if stored else None
        train(
            recipe,
            ShardSet.open(config["shards"]),
            device=device,
            rank=rank,
            world=world,
            threads=_reader_threads(recipe, context.get_local_world_size()),
            wrap=(lambda model: ray.train.torch.prepare_model(model, move_to_device=False)) if world > 1 else None,
            resume=resume,
            on_log=tracker.log if tracker else None,
            on_checkpoint=_report,
        )


def _reader_threads(recipe: Recipe, workers_here: int) -> int:
    """A worker's share of the cores that its machine gives it; more than 8 would only wait for memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return recipe.train.reader_threads or min(max(cores // workers_here, 1), 8)


def _report(write: Callable[[Path], None], state: dict[str, Any]) -> None:
    """Hand a checkpoint to Ray Train: rank 0 writes it, every rank reports."""
    metrics = {"images": state["images"], "step": state["step"]}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        write(folder)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"images-{state['images']:012d}",
        )


def _figure_inputs(recipe: Recipe, shards: ShardSet, path: Path) -> dict[str, Any]:
    """Images of the val split (train, where there is none) and the trained model."""
    from pipeline.batches import sequential
    from pipeline.build import build_inputs, build_model, build_views

    model = build_model(recipe, shards)
    checkpoint.load_trained(path, model)
    split = "val" if shards.rows.get("val") else "train"
    batch = next(iter(sequential(shards, split, 4, window=recipe.encoder.image_size, max_rows=4)))
    return {
        "model": model.eval(),
        "views": build_views(recipe, model, build_inputs(shards), augment=False),
        "stored": batch.levels,
        "crop": batch.crop,
        "rows": batch.rows,
        "names": [f"{split} row {row}" for row in batch.rows.tolist()],
    }


@contextlib.contextmanager
def _progress_bar(path: Path, plan: Plan, rows: int, recipe: Recipe, *, enabled: bool) -> Iterator[None]:
    """A bar over images seen, fed by the metrics file that rank 0 writes, wherever it runs."""
    total = round(recipe.train.epochs * rows)
    done = threading.Event()
    bar = tqdm(total=total, desc="pretrain", unit=" images", disable=not enabled, smoothing=0.1)

    def follow() -> None:
        position = path.stat().st_size if path.is_file() else 0
        while not done.wait(0.3):
            position = _advance(path, position, bar)
        _advance(path, position, bar)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        bar.close()


def _advance(path: Path, position: int, bar: tqdm) -> int:
    if not path.is_file():
        return position
    with open(path, encoding="utf-8") as file:
        file.seek(position)
        lines = file.readlines()
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # still being written
        for line in lines:
            record = json.loads(line)
            if "train/loss" in record["metrics"]:
                bar.update(min(record["step"], bar.total) - bar.n)
                bar.set_postfix(loss=f"{float(record['metrics']['train/loss']):.3f}")
        return position + sum(len(line.encode()) for line in lines)


def root_cause(error: BaseException) -> str:
    """The last line of what a worker raised."""
    failures = getattr(error, "worker_failures", None)
    inner: Any = next(iter(failures.values())) if failures else (error.__cause__ or error)
    while getattr(inner, "cause", None) is not None:
        inner = inner.cause
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__
