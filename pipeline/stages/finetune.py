"""Fine-tuning on Ray Train: data-parallel workers around the loop, restarted by Ray from our own checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch

from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import StageError
from pipeline.models.encoder_source import Subject, build_classifier, subject_of
from pipeline.runtime.progress import following, images_of_run
from pipeline.runtime.ray_session import SessionInfo, check_room
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import TrainingMeter, spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.pretrain import METRICS
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.coordination import Orders
from pipeline.training.finetune_loop import TOP1, Finetuned, NotFiniteError, finetune
from pipeline.training.schedule import FinetuneSchedule
from pipeline.workers.group import run_workers
from pipeline.workers.process import alive, asked_to_stop, data_parallel, reader_threads, resume_from
from wavemim import __version__
from wavemim.evaluation.metrics import Accuracy, class_table
from wavemim.finetune import middle_side
from wavemim.weights import checkpoint
from wavemim.weights.timm_folder import export_timm

MODEL, CONFUSION, CLASSES = "model", "confusion.csv", "classes.csv"  # in the stage's folder
_KEPT = 2  # checkpoints


CHECKS = ()


def check(recipe: Recipe) -> tuple[Subject, ShardSet]:
    """The encoder and the shard set of `recipe`, which fit together. Raises SettingError and StageError."""
    shards = ShardSet.open(recipe.shards_at)
    subject = subject_of(recipe, shards)
    build_classifier(recipe.finetune, subject, shards)
    FinetuneSchedule.of(recipe.finetune, shards.rows["train"])
    return subject, shards


def run(
    recipe: Recipe, session: SessionInfo, checked: tuple[Subject, ShardSet], *, progress: bool = True
) -> dict[str, Any]:
    """Fine-tune the encoder that `checkpoint=` names; gives the summary that is also the stage's finishing mark."""
    subject, shards = checked
    check_room(recipe, session, recipe.finetune.workers, "finetune")
    same = {**identity(recipe, "finetune"), "encoder": subject.fingerprint, "shards": shards.fingerprint}
    with stage_folder(recipe.stage_dir("finetune"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        last = checkpoint.latest(folder.path)
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.weights.checkpoint": subject.source}
        with Tracker.start(recipe, "finetune", log_dir=folder.path, tags=tags) as tracker:
            rows, plan = shards.rows["train"], FinetuneSchedule.of(recipe.finetune, shards.rows["train"])
            total = images_of_run(plan.total_steps, plan.batches_per_epoch, plan.batch, rows)
            seen = int(checkpoint.read_state(last, verify=False)["images"]) if last else 0
            with following(folder.path / METRICS, total=total, seen=seen, name="finetune", enabled=progress):
                counts = _fit(recipe, subject, shards, folder.path, tracker.handle, session)
            result = _result(recipe, subject, shards, folder, tracker, counts)
            folder.finish(result)
        return {**result, "state": "new" if last is None else f"continued from {last.name}"}


def _result(
    recipe: Recipe, subject: Subject, shards: ShardSet, folder: StageFolder, tracker: Tracker, counts: np.ndarray
) -> dict[str, Any]:
    """Save the model and what was measured of it; gives the summary."""
    final = checkpoint.latest(folder.path)
    if final is None:
        raise StageError(f"{folder.path} has no whole checkpoint after training")
    state, names = checkpoint.read_state(final), shards.classes or []
    n, correct = int(counts.sum()), int(counts.trace())
    accuracy = Accuracy.of_share(correct / max(n, 1), n)
    table = [asdict(line) for line in class_table(counts, names)]
    target = folder.path / MODEL
    _export(recipe, subject, shards, final, target, {"images_seen": state["images"], **accuracy.named(TOP1)})
    _write_csv(folder.path / CONFUSION, [["true \\ predicted", *names], *map(_line, names, counts.tolist())])
    _write_csv(folder.path / CLASSES, [list(table[0]), *([*line.values()] for line in table)])
    tracker.log(accuracy.named(TOP1), state["images"])
    for path, into in ((folder.path / CONFUSION, None), (folder.path / CLASSES, None), (target, MODEL)):
        tracker.artifact(path, into)
    return {
        "encoder": subject.source,
        "encoder_fingerprint": subject.fingerprint,
        "images_seen": state["images"],
        "history": state["history"],
        "classes": len(names),
        "val_images": n,
        "measured": accuracy.named(TOP1),
        "per_class": [{key: None if value != value else value for key, value in line.items()} for line in table],
        "confusion": CONFUSION,
        "model": str(target),
        "load": f"timm.create_model('local-dir:{target}', pretrained=True)",
        "cost": spent_in(folder.path).record(),
        "mlflow_run": tracker.handle.run_id,
        "shards": shards.fingerprint,
        "recipe": recipe.dump(),
    }


def _line(name: str, counts: list[int]) -> list[Any]:
    return [name, *counts]


def _write_csv(path: Path, lines: list[list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def _export(
    recipe: Recipe, subject: Subject, shards: ShardSet, final: Path, target: Path, measured: dict[str, Any]
) -> None:
    """The fine-tuned model as a folder that timm loads, with the names of its classes."""
    model, name, arguments = build_classifier(recipe.finetune, subject, shards)
    checkpoint.load_trained(final, model)
    side = shards.image_size
    about = {"version": __version__, "recipe": recipe.name, "shards": shards.fingerprint, "encoder": subject.source}
    export_timm(
        target,
        model,
        architecture=name,
        arguments=arguments,
        image_size=subject.image_size,
        pixel_mean=list(subject.pixel_mean),
        pixel_std=list(subject.pixel_std),
        about={**about, **measured},
        classes=shards.classes or (),
        crop_pct=middle_side(side, subject.image_size) / side,
    )


def _fit(
    recipe: Recipe, subject: Subject, shards: ShardSet, folder: Path, handle: RunHandle, session: SessionInfo
) -> np.ndarray:
    """Run the workers to the end; gives val images by true and predicted class. SIGTERM saves a checkpoint and ends."""
    config = {"recipe": recipe.dump(), "subject": subject, "shards": shards.folder.url, "handle": handle}
    ended = run_workers(_worker, config, recipe, session, folder, workers=recipe.finetune.workers, what="fine-tuning")
    return np.asarray(ended["counts"], np.int64)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One data-parallel worker. Gives how it ended: an exception would make Ray begin again."""
    recipe, folder = validate(config["recipe"]), Path(config["folder"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    resume = resume_from(folder, rank)
    tracker = Tracker.attach(config["handle"]) if rank == 0 else None
    keeper = Keeper(folder, keep=_KEPT) if rank == 0 else None
    tuned: Finetuned | None = None
    failed = ""
    with alive(folder, rank, None):
        try:
            tuned = finetune(
                recipe,
                config["subject"],
                ShardSet.open(config["shards"]),
                device=device,
                rank=rank,
                world=world,
                threads=reader_threads(recipe.finetune.reader_threads, context.get_local_world_size()),
                wrap=data_parallel if world > 1 else None,
                resume=resume,
                on_log=tracker.log if tracker is not None else None,
                on_checkpoint=keeper.save if keeper is not None else None,
                orders=Orders(rank, world, stop=lambda: bool(keeper and keeper.given_up) or asked_to_stop(folder)),
                costs=TrainingMeter(
                    device, world=world, rank=rank, cores=recipe.cluster.cpus_per_worker, before=[spent_in(folder)]
                ),
            )
        except NotFiniteError as error:
            failed = str(error)
        finally:
            if keeper is not None:
                keeper.wait()
        if keeper is not None:
            unsaved = keeper.finish()
            failed = failed or keeper.given_up or unsaved
    counts = tuned.counts.numpy() if tuned is not None and tuned.counts is not None else None
    return {"failed": failed, "stopped": tuned is not None and tuned.stopped, "counts": counts}


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What fine-tuning reached, and where it is."""
    values = result["measured"]
    named = [values[f"eval/finetune_top1{end}"] for end in ("", "_low", "_high")]
    top1, low, high = (f"{value:.1f}" for value in named)
    return (
        f"finetune: top-1 {top1} % ({low} to {high}, {result['val_images']:,} val images, {result['classes']} classes) of "
        f"{result['encoder']}\nfinetune: → {recipe.stage_dir('finetune')}: result.json, classes.csv, confusion.csv; "
        f"classifier for timm in {result['model']} ({result['state']})"
    )
