"""Segmentation by a linear head on frozen patch tokens: mean IoU of the trained encoder and of the same one untrained.

Ray Data decodes images and masks and runs the encoders; then one Ray task per encoder fits and scores its head.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from tqdm import tqdm

from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.left_out import left_out, share_without
from pipeline.evaluation.segmentation import (
    SUBJECTS,
    Decoding,
    Encoding,
    FittedHead,
    Row,
    SegmentPlan,
    StoredTokens,
    check_disk,
    check_rejects,
    fit_head,
    plan_segmentation,
    sized,
    table_of,
)
from pipeline.evaluation.subjects import titles_of
from pipeline.images.pairs import Pair, read_pair
from pipeline.runtime import observability
from pipeline.runtime.formatting import table
from pipeline.runtime.ray_session import InActor, SessionInfo, ray_data, root_cause, uses_gpu
from pipeline.runtime.room import check_room
from pipeline.runtime.stage_folder import stage_folder
from pipeline.runtime.usage import TaskMeter, flops_of, measuring_tasks
from pipeline.tracking.tracker import Tracker
from wavemim.evaluation.segmentation import DRAWS, Fitting, interval, measures
from wavemim.figures.segmentation import segmentation_figure

TOKENS = ".tokens"  # in the stage's folder, while heads are fitted
CLASSES, CONFUSION, REJECTED, PICTURE = "classes.csv", "confusion.csv", "rejected.csv", "segmentation.png"
MOST_CLASSES = 1024
PICTURES = 4  # val images in the picture


@dataclass
class Encoded:
    """Encoded pairs: rows of train and val with their pairs, and the values in their masks."""

    rows: dict[str, list[Row]]
    pairs: dict[str, list[Pair]]
    values: dict[str, Counter[int]]  # pixels of each value of the masks
    rejects: list[tuple[str, str]]
    cropped_share: float = 0  # of the pixels of all images


@dataclass(frozen=True)
class Classes:
    """The classes in the order of their numbers."""

    values: tuple[int, ...]  # in the masks
    names: tuple[str, ...]
    only_in_val: tuple[str, ...]  # names of classes that train lacks: they count, but cannot be predicted

    @property
    def numbers(self) -> dict[int, int]:
        """Numbers of the classes by their values."""
        return {value: number for number, value in enumerate(self.values)}


CHECKS = ()


def check(recipe: Recipe) -> SegmentPlan:
    """Find the encoder and the pairs of images and masks, and try the encoder on a blank image.

    Raises:
        SettingError: The settings, the images or the masks cannot be used.
        StageError: There is no checkpoint, or too many pairs are rejected.
    """
    return plan_segmentation(recipe)


def run(recipe: Recipe, session: SessionInfo, checked: SegmentPlan, *, progress: bool = True) -> dict[str, Any]:
    """Fit and evaluate segmentation heads.

    Args:
        recipe: The settings.
        session: The Ray session.
        checked: What `check` returned.
        progress: Whether progress bars are shown.

    Returns:
        What was measured, which is also the stage's finishing mark.

    Raises:
        SettingError: The folder holds results of other settings.
        StageError: A task failed, the disk is too small, or the masks hold too few or too many classes.
    """
    check_room(recipe, session, 1)
    if recipe.home is not None and session.nodes > 1:
        raise SettingError(
            f"out={recipe.home}: segment's tasks share files, and this Ray has {session.nodes} nodes; give a shared folder"
        )
    place, same, home = recipe.stage_dir("segment"), checked.identity(recipe), recipe.stage_home("segment")
    with stage_folder(place, same, restart=recipe.restart, home=home, work=()) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        tokens = folder.path / TOKENS
        shutil.rmtree(tokens, ignore_errors=True)
        check_disk(checked, folder.path)
        tags = {"wavemim.weights.checkpoint": checked.subject.place}
        with Tracker.start(recipe, "segment", log_dir=folder.path, tags=tags, wait=False) as tracker:
            tokens.mkdir()
            images = checked.subject.images_seen or 0
            with measuring_tasks(folder.path, tracker.log, images, folder.mirror) as meter:
                try:
                    encoded = _encode(recipe, checked, session, tokens, meter, progress)
                    classes = _classes(recipe, checked, encoded)
                    found = _fit_heads(recipe, checked, session, tokens, encoded, classes, meter, progress)
                finally:
                    shutil.rmtree(tokens, ignore_errors=True)
            measured = {name: dict(measures(head.scores, recipe.seed)) for name, head in found.items()}
            tracker.log(measured["trained"], images)
            tracker.log({f"{name}_untrained": value for name, value in measured["untrained"].items()}, images)
            _write_tables(folder.path, recipe, encoded, classes, found)
            _draw(folder.path / PICTURE, checked, encoded, classes, found)
            for name in (CLASSES, CONFUSION, REJECTED, PICTURE):
                tracker.artifact(folder.path / name)
            result = {**_result(checked, encoded, classes, found, measured), "cost": meter.read().record()}
            folder.finish(result)
        return {**result, "state": folder.state}


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What segment measured, on what, and its files."""
    rows = []
    for subject, title in result["titles"].items():
        values = result["measured"][subject]
        cells = (
            f"{values[name]:.1f} ({values[f'{name}_low']:.1f} to {values[f'{name}_high']:.1f})"
            for name in ("eval/segment_miou", "eval/segment_pixel_accuracy")
        )
        rows.append((title, *cells))
    shown = table(("", "mIoU % (95 % interval)", "pixel accuracy %"), rows)
    rejected = f", {result['rejected']} rejected (see rejected.csv)" if result["rejected"] else ""
    skipped = f", {result['left_out']:,} skipped (segment.max_images)" if result["left_out"] else ""
    unseen = result["classes_only_in_val"]
    lacking = f" Train lacks {', '.join(unseen[:5])}: never predicted, but counted." if unseen else ""
    lacking += left_out(result, recipe.segment.ignore)
    return (
        f"{shown}\n\n{result['classes']} classes, heads fitted to {result['train_images']:,} images and evaluated on "
        f"{result['val_images']:,} ({result['layout']}{rejected}{skipped}).{lacking}\n"
        f"segment: → {recipe.place_of(recipe.stage_dir('segment'))}: result.json, classes.csv, confusion.csv, "
        f"segmentation.png ({result['state']})"
    )


def _result(
    plan: SegmentPlan,
    encoded: Encoded,
    classes: Classes,
    found: Mapping[str, FittedHead],
    measured: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    return {
        "encoder": plan.subject.place,
        "titles": titles_of(plan.subject),
        "images_seen": plan.subject.images_seen,
        "layout": plan.pairs.layout,
        "image_size": plan.size,
        "blocks": list(plan.blocks),
        "classes": len(classes.values),
        "classes_only_in_val": list(classes.only_in_val),
        "classes_without_val": [
            name for value, name in zip(classes.values, classes.names, strict=True) if not encoded.values["val"][value]
        ],
        "ignored_share": {split: share_without(counts, classes.values) for split, counts in encoded.values.items()},
        "cropped_share": encoded.cropped_share,
        "train_images": len(encoded.rows["train"]),
        "val_images": len(encoded.rows["val"]),
        "inputs": plan.pairs.inputs,
        "rejected": len(encoded.rejects),
        "left_out": plan.pairs.skipped,
        "reasons": dict(Counter(reason.partition(" (")[0] for _, reason in encoded.rejects).most_common()),
        "interval": f"95 %, percentiles of {DRAWS} bootstrap draws of val images",
        "heads": {
            name: {"lr": head.lr, "weight_decay": head.weight_decay, "tried": head.tried}
            for name, head in found.items()
        },
        "measured": {name: dict(values) for name, values in measured.items()},
    }


def _encode(
    recipe: Recipe, plan: SegmentPlan, session: SessionInfo, tokens: Path, meter: TaskMeter, progress: bool
) -> Encoded:
    """Write tokens of all pairs to files; rows are in the plan's order, without pairs that cannot be decoded."""
    order = [(split, pair) for split, pairs in plan.pairs.splits.items() for pair in pairs]
    rejects = list(plan.pairs.rejects)
    found: dict[int, tuple[Row, Counter[int], float]] = {}
    with (
        tqdm(total=len(order), desc="tokens", unit=" image", disable=not progress) as bar,
        contextlib.closing(_results(recipe, plan, session, tokens, order, meter)) as results,  # while there is a Ray
    ):
        for done, result in enumerate(results, start=1):
            observability.publish(recipe.name, "segment", done, len(order), "images")
            number = int(result["row"])
            if result["reason"]:
                rejects.append((order[number][1].image, str(result["reason"])))
                check_rejects(recipe, rejects, plan.pairs.inputs)
            else:
                row = Row(str(result["part"]), int(result["place"]))
                counts = {int(value): count for value, count in json.loads(result["values"]).items()}
                found[number] = row, Counter(counts), float(result["cropped"])
            bar.update()
    flops = flops_of(sized(plan.subject.model(), plan.subject, plan.size), plan.subject.channels, plan.size)
    meter.add(images=len(found), flops=len(SUBJECTS) * flops * len(found))
    encoded = Encoded(
        {"train": [], "val": []}, {"train": [], "val": []}, {"train": Counter(), "val": Counter()}, sorted(rejects)
    )
    for number in sorted(found):
        split, pair = order[number]
        row, values, cropped = found[number]
        encoded.rows[split].append(row)
        encoded.pairs[split].append(pair)
        encoded.values[split].update(values)
        encoded.cropped_share += cropped / len(found)
    for split, rows in encoded.rows.items():
        if not rows:
            path, reason = encoded.rejects[0]
            raise StageError(f"no image of {split} could be used; the first reject: {path}: {reason}")
    return encoded


def _results(
    recipe: Recipe,
    plan: SegmentPlan,
    session: SessionInfo,
    tokens: Path,
    order: Sequence[tuple[str, Pair]],
    meter: TaskMeter,
) -> Generator[dict[str, Any], None, None]:
    """Decode and encode: yields a row for each pair, in any order."""
    settings, use_gpu = recipe.segment, uses_gpu(recipe, session)
    batches = -(-len(order) // settings.batch)
    items = [{"row": number, "image": pair.image, "mask": pair.mask} for number, (_, pair) in enumerate(order)]
    decoding = Decoding(plan.images, plan.masks, plan.wanted, plan.allowed(settings.ignore))
    encoding = Encoding(plan.subject, str(tokens.absolute()), plan.size, plan.blocks, use_gpu)
    encode = meter.around(encoding.encode, gpus=float(use_gpu))
    same: dict[str, Any] = {"batch_size": settings.batch, "batch_format": "numpy"}
    try:
        with ray_data(session):
            decoded = ray.data.from_items(items, override_num_blocks=batches).map_batches(
                meter.around(decoding.decode), num_cpus=1, **same
            )
            if use_gpu:  # actors that hold no CPU: decoding for them may otherwise wait for one for ever
                pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(int(session.gpus), batches)))
                actors: dict[str, Any] = {
                    "fn_constructor_args": (encode,),
                    "num_cpus": 0,
                    "num_gpus": 1,
                    "compute": pool,
                }
                rows = decoded.map_batches(InActor, **actors, **same)
            else:  # tasks: actors would hold CPUs of nodes that others then lack when a node is lost
                rows = decoded.map_batches(encode, num_cpus=1, **same)
            yield from rows.iter_rows()
    except ray.exceptions.RayError as error:
        raise StageError(f"the encoder failed: {root_cause(error)}") from error


def _classes(recipe: Recipe, plan: SegmentPlan, encoded: Encoded) -> Classes:
    """Classes as named, or else all values of train, then those only in val. Raises StageError for too few or too many."""
    ignored = set(recipe.segment.ignore)
    train, val = (sorted(encoded.values[split].keys() - ignored) for split in ("train", "val"))
    if plan.names is not None:
        values = [value for value in range(len(plan.names)) if value not in ignored]
    else:
        values = train + [value for value in val if value not in train]
    if len(values) < 2 or len(train) < 2:
        raise StageError(
            f"the masks of train hold {len(train)} class(es) (values {train}) besides segment.ignore={sorted(ignored)}; "
            "at least two are needed: set segment.ignore=[] if an ignored value is a class"
        )
    if len(values) > MOST_CLASSES:
        raise StageError(
            f"the masks hold {len(values)} values, but at most {MOST_CLASSES} classes are supported: are they photos, or "
            "instance IDs? The value of a pixel has to be its class; set segment.classes to reject other values"
        )
    if not val:
        raise StageError(f"no pixel of val counts: its masks hold only segment.ignore={sorted(ignored)}")
    names = plan.names or {value: str(value) for value in values}
    only_in_val = tuple(names[value] for value in val if value not in train)
    return Classes(tuple(values), tuple(names[value] for value in values), only_in_val)


def _fit_heads(
    recipe: Recipe,
    plan: SegmentPlan,
    session: SessionInfo,
    tokens: Path,
    encoded: Encoded,
    classes: Classes,
    meter: TaskMeter,
    progress: bool,
) -> dict[str, FittedHead]:
    """Fit and score a head for each encoder, each in its own task."""
    settings, use_gpu = recipe.segment, uses_gpu(recipe, session)
    how = Fitting(
        classes=len(classes.values),
        size=plan.size,
        steps=settings.steps,
        batch=settings.train_batch,
        seed=recipe.seed,
        device="cuda" if use_gpu else "cpu",
    )
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(meter.around(fit_head, gpus=float(use_gpu)))
    tried = {"lrs": settings.lrs, "weight_decays": settings.weight_decays}
    pending = {}
    for name in SUBJECTS:
        train, val = (
            StoredTokens(str(tokens.absolute()), name, encoded.rows[split], len(plan.blocks), classes.numbers)
            for split in ("train", "val")
        )
        pending[task.remote(train, val, how, tried, _shown(encoded))] = name
    found: dict[str, FittedHead] = {}
    with tqdm(total=len(pending), desc="heads", unit=" encoder", disable=not progress) as bar:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            try:
                found[pending.pop(ready)] = ray.get(ready)
            except ray.exceptions.RayError as error:
                raise StageError(f"segmentation failed: {root_cause(error)}") from error
            bar.update()
    return {name: found[name] for name in SUBJECTS}


def _shown(encoded: Encoded) -> list[int]:
    """Numbers of the val images in the picture, spread evenly."""
    count = len(encoded.rows["val"])
    return sorted({int(place) for place in np.linspace(0, count - 1, min(PICTURES, count))})


def _write_tables(
    folder: Path, recipe: Recipe, encoded: Encoded, classes: Classes, found: Mapping[str, FittedHead]
) -> None:
    """Write classes, the trained encoder's confusion matrix in pixels (rows: ground truth, columns: predicted), rejects."""
    scores = found["trained"].scores
    low, high = interval(scores.resampled(recipe.seed)[0])
    table = zip(classes.values, classes.names, scores.iou(), low, high, found["untrained"].scores.iou(), strict=True)
    truth, predicted, hits = (counts.sum(0) for counts in (scores.truth, scores.predicted, scores.hits))
    rows: list[Sequence[Any]] = []
    for number, (value, name, *ious) in enumerate(table):
        accuracy = hits[number] / truth[number] if truth[number] else float("nan")
        percent = ["" if np.isnan(share) else f"{100 * share:.2f}" for share in (*ious, accuracy)]
        rows.append((value, name, *percent, int(truth[number]), int(predicted[number])))
    header = ("value", "name", "iou", "iou_low", "iou_high", "iou_untrained", "accuracy", "pixels", "predicted_pixels")
    _write_csv(folder / CLASSES, header, rows)
    confusion = [(name, *map(int, line)) for name, line in zip(classes.names, scores.confusion, strict=True)]
    _write_csv(folder / CONFUSION, ("true", *classes.names), confusion)
    _write_csv(folder / REJECTED, ("path", "reason"), encoded.rejects)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _draw(path: Path, plan: SegmentPlan, encoded: Encoded, classes: Classes, found: Mapping[str, FittedHead]) -> None:
    chosen = [encoded.pairs["val"][number] for number in _shown(encoded)]
    pairs = [read_pair(plan.images, plan.masks, pair, plan.wanted) for pair in chosen]
    table = table_of(classes.numbers)
    segmentation_figure(
        path,
        images=[pixels for pixels, _ in pairs],
        truths=[table[values] for _, values in pairs],
        predictions={name: list(head.shown) for name, head in found.items()},
        titles=[Path(pair.image).name for pair in chosen],
        values=classes.values,
        names=classes.names,
    )
