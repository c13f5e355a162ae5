"""Fine-tuning on Ray Train: the same workers as in pretraining, around the loop of fine-tuning."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints.find import COPIED, WORK
from pipeline.checkpoints.uploader import check_store, opened
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import StageError
from pipeline.models.encoder_source import EncoderSource, build_classifier, find_encoder, finetune_size
from pipeline.models.timm_config import load_call
from pipeline.runtime.progress import following, images_of_run
from pipeline.runtime.ray_session import SessionInfo
from pipeline.runtime.room import check_room
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.tracking.sender import METRICS
from pipeline.tracking.tracker import Tracker
from pipeline.training.divergence import notes_of
from pipeline.training.finetune_loop import TOP1, finetune
from pipeline.training.schedule import TrainSchedule
from pipeline.workers.group import least_workers, train_on_workers
from pipeline.workers.harness import Harness, LoopResult
from wavemim import __version__
from wavemim.evaluation.metrics import Accuracy, class_table
from wavemim.finetune import middle_side
from wavemim.weights import checkpoint
from wavemim.weights.timm_folder import export_timm

CHECKS: tuple[Callable[[Recipe], None], ...] = ()
MODEL, CONFUSION, CLASSES = "model", "confusion.csv", "classes.csv"  # in the stage's folder


@dataclass(frozen=True)
class Checked:
    """What `check` has opened."""

    subject: EncoderSource
    shards: ShardSet


def check(recipe: Recipe) -> Checked:
    """Open the encoder and the shard set, and check that they and the settings fit together.

    Raises:
        SettingError: They do not, or train.checkpoints_at holds checkpoints of other settings.
        StageError: The encoder or the shard set is missing or damaged, or a store does not respond.
    """
    shards = ShardSet.open(recipe.shards_at)
    subject = find_encoder(recipe, shards)
    build_classifier(recipe.finetune, subject, shards)
    TrainSchedule.of_finetuning(recipe, shards.rows["train"])
    check_store(recipe, "finetune", _identity(recipe, subject, shards))
    return Checked(subject, shards)


def run(recipe: Recipe, session: SessionInfo, checked: Checked, *, progress: bool = True) -> dict[str, Any]:
    """Fine-tune the encoder that checkpoint= names, or resume, or find that it is finished.

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
    subject, shards, workers = checked.subject, checked.shards, recipe.finetune.workers
    check_room(recipe, session, least_workers(recipe, workers), "finetune")
    same = _identity(recipe, subject, shards)
    place, home = recipe.stage_dir("finetune"), recipe.stage_home("finetune")
    with (
        stage_folder(place, same, restart=recipe.restart, home=home, left_out=COPIED, work=WORK) as folder,
        opened(recipe, same, folder) as store,
    ):
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        last = checkpoint.latest(folder.path)
        state = checkpoint.read_state(last, verify=False) if last else {}
        rows = shards.rows["train"]
        schedule = TrainSchedule.of_finetuning(recipe, rows, state.get("streams"))
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.weights.checkpoint": subject.place}
        with Tracker.start(
            recipe, "finetune", log_dir=folder.path, tags=tags, dataset=shards.about, wait=False
        ) as tracker:
            with following(
                folder.path / METRICS,
                total=images_of_run(schedule.total_steps, schedule.batches_per_epoch, schedule.batch, rows),
                seen=int(state.get("images", 0)),
                name="finetune",
                run=recipe.name,
                seconds=recipe.train.progress_seconds,
                enabled=progress,
            ):
                counts = train_on_workers(
                    _loop,
                    recipe,
                    session,
                    folder.path,
                    shards=shards,
                    tracker=tracker,
                    store=store,
                    workers=workers,
                    reader_threads=recipe.finetune.reader_threads,
                    what="fine-tuning",
                    subject=subject,
                )
            result = _result(recipe, subject, shards, folder, tracker, counts)
            folder.finish(result)
        return {**result, "state": "new" if last is None else f"continued from {last.name}"}


def _identity(recipe: Recipe, subject: EncoderSource, shards: ShardSet) -> dict[str, Any]:
    """What decides the content of the stage's folder."""
    return {**identity(recipe, "finetune"), "encoder": subject.fingerprint, "shards": shards.fingerprint}


def _loop(recipe: Recipe, harness: Harness, config: Mapping[str, Any]) -> LoopResult:
    """In a worker: fine-tuning; the value is the val images by true and predicted class, int64 (K, K)."""
    tuned = finetune(recipe, config["subject"], ShardSet.open(config["shards"]), **vars(harness))
    return LoopResult(tuned.stopped, None if tuned.counts is None else tuned.counts.numpy())


def _result(
    recipe: Recipe, subject: EncoderSource, shards: ShardSet, folder: StageFolder, tracker: Tracker, counts: np.ndarray
) -> dict[str, Any]:
    """Export the model, write what was measured of it; returns the result."""
    final = checkpoint.latest(folder.path)
    if final is None:
        raise StageError(f"{folder.path} has no complete checkpoint after training")
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
        "encoder": subject.place,
        "encoder_fingerprint": subject.fingerprint,
        "images_seen": state["images"],
        "steps": state["step"],
        "skipped": state["skipped"],
        "history": state["history"],
        "classes": len(names),
        "val_images": n,
        "measured": accuracy.named(TOP1),
        "per_class": [{key: None if value != value else value for key, value in line.items()} for line in table],
        "confusion": CONFUSION,
        "model": recipe.place_of(target),
        "load": load_call(recipe, target),
        "cost": spent_in(folder.path).record(),
        "mlflow_run": tracker.run_id(),
        "shards": shards.fingerprint,
        "recipe": recipe.dump(),
    }


def _line(name: str, counts: list[int]) -> list[Any]:
    return [name, *counts]


def _write_csv(path: Path, lines: list[list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def _export(
    recipe: Recipe, subject: EncoderSource, shards: ShardSet, final: Path, target: Path, measured: dict[str, Any]
) -> None:
    """The fine-tuned model as a folder that timm loads, with the names of its classes."""
    model, name, arguments = build_classifier(recipe.finetune, subject, shards)
    checkpoint.load_trained(final, model)
    side, size = shards.image_size, finetune_size(recipe.finetune, subject)
    about = {"version": __version__, "recipe": recipe.name, "shards": shards.fingerprint, "encoder": subject.place}
    export_timm(
        target,
        model,
        architecture=name,
        arguments=arguments,
        image_size=size,
        pixel_mean=list(subject.pixel_mean),
        pixel_std=list(subject.pixel_std),
        about={**about, **measured},
        classes=shards.classes or (),
        crop_pct=middle_side(side, size) / side,
    )


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """The accuracy that fine-tuning reached, and where the model is."""
    values = result["measured"]
    named = [values[f"eval/finetune_top1{end}"] for end in ("", "_low", "_high")]
    top1, low, high = (f"{value:.1f}" for value in named)
    folder = recipe.place_of(recipe.stage_dir("finetune"))
    line = (
        f"finetune: top-1 {top1} % ({low} to {high}, {result['val_images']:,} val images, {result['classes']} classes) of "
        f"{result['encoder']}\nfinetune: → {folder}: result.json, classes.csv, confusion.csv; "
        f"classifier for timm in {result['model']} ({result['state']})"
    )
    notes = notes_of(result.get("skipped", 0), result.get("steps", 0))  # an older result says neither
    return "\n".join([line, *(f"finetune: warning: {note}" for note in notes)])
