"""Evaluation of frozen features: the trained encoder compared with the same encoder untrained and with raw pixels.

Ray tasks read a part of the shard set each and run an encoder over it once, for all protocols; further tasks evaluate
these features, one task per protocol (and block). So encoders, parts and protocols run in parallel where the cluster has
room. Features travel through Ray's object store, which spills to disk where memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import nn
from tqdm import tqdm

from pipeline.checkpoints.find import located
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.subjects import TITLES, titles_of
from pipeline.evaluation.tables import evaluation_tables, write_tables
from pipeline.models.encoder_source import EncoderSource, find_encoder
from pipeline.runtime import observability
from pipeline.runtime.ray_session import SessionInfo, root_cause, uses_gpu
from pipeline.runtime.room import check_room
from pipeline.runtime.stage_folder import stage_folder
from pipeline.runtime.usage import TaskMeter, flops_of, measuring_tasks
from pipeline.shards.batches import positions_of_part, split_bytes
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.evaluate_task import evaluate_features, evaluate_tokens, read_part
from pipeline.tracking.tracker import Tracker
from wavemim.evaluation.features import Taps, pools_of
from wavemim.evaluation.protocols import best_block

PART_ROWS, PART_ROWS_GPU = (
    1024,
    8192,
)  # images per reading task: minutes of work, so that building a model is negligible
OF_TOKENS = ("blocks", "attentive")  # protocols on the feature maps of blocks, which raw pixels do not have
OF_POOLS = ("linear", "knn")  # protocols that are repeated for every pooling

CHECKS = ()


@dataclass(frozen=True)
class Checked:
    """What is evaluated, and on what."""

    shards: ShardSet
    subject: EncoderSource
    labelled: bool  # whether there are labelled val images
    protocols: tuple[str, ...]  # without those that need labels where there are none
    blocks: int  # of the encoder, for protocols on feature maps; 0 where there is no such protocol
    pools: tuple[str, ...]  # poolings that are evaluated, the first one by all protocols; none: the encoder's own


def check(recipe: Recipe) -> Checked:
    """Open the shard set and find the encoder.

    Raises:
        SettingError: The encoder does not fit the shard set or the protocols.
        StageError: There is no checkpoint or no shard set, or timm's weights cannot be downloaded.
    """
    if recipe.checkpoint is None:  # a missing checkpoint is reported first
        path, url = located(recipe)
        recipe = recipe.model_copy(update={"checkpoint": url or str(path)})
    shards = ShardSet.open(recipe.shards_at)
    subject = find_encoder(recipe, shards)
    labelled = shards.classes is not None and bool(shards.rows.get("val"))
    asked = tuple(name for name in dict.fromkeys(recipe.evaluate.protocols) if labelled or name == "rank")
    model = subject.model(trained=False).eval()
    blocks = _count_blocks(recipe, subject, model) if labelled else 0
    return Checked(shards, subject, labelled, asked or ("rank",), blocks, _pools(recipe, subject, model))


def run(recipe: Recipe, session: SessionInfo, checked: Checked, *, progress: bool = True) -> dict[str, Any]:
    """Evaluate the encoder that the recipe names.

    Args:
        recipe: The settings.
        session: The Ray session.
        checked: What `check` returned.
        progress: Whether a progress bar is shown.

    Returns:
        What was measured, which is also the stage's finishing mark.

    Raises:
        SettingError: The folder holds an evaluation with other settings.
        StageError: A task failed.
    """
    shards, subject = checked.shards, checked.subject
    check_room(recipe, session, 1)
    same = {**identity(recipe, "evaluate"), "checkpoint": subject.fingerprint, "shards": shards.fingerprint}
    place, home = recipe.stage_dir("evaluate"), recipe.stage_home("evaluate")
    with stage_folder(place, same, restart=recipe.restart, home=home, work=()) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.weights.checkpoint": subject.place}
        with Tracker.start(
            recipe, "evaluate", log_dir=folder.path, tags=tags, dataset=shards.about, wait=False
        ) as tracker:
            images = subject.images_seen or 0
            with measuring_tasks(folder.path, tracker.log, images, folder.mirror) as meter:
                measured, matrices = _Tasks(recipe, checked, uses_gpu(recipe, session), meter).run(progress)
            for which, values in measured.items():
                ending = "" if which == "trained" else f"_{which}"
                tracker.log({f"{name}{ending}": value for name, value in values.items()}, images)
            titles = titles_of(subject, pixels=True)
            files = write_tables(folder.path, matrices, shards.classes or [], titles)
            for path in files:
                tracker.artifact(path)
            result = {
                "checkpoint": subject.place,
                "images_seen": subject.images_seen,
                "labelled": checked.labelled,
                "classes": len(shards.classes or ()),
                "train_images": min(shards.rows["train"], recipe.evaluate.max_images),
                "val_images": shards.rows.get("val", 0),
                "classes_without_val": _without_val(shards.classes or [], matrices),
                "titles": titles,
                "pools": list(checked.pools),
                "files": [path.name for path in files],
                "measured": measured,
                "cost": meter.read().record(),
            }
            folder.finish(result)
        return {**result, "state": folder.state}


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What evaluate measured, and its files."""
    files = ", ".join(["result.json", *result["files"]])
    folder = recipe.place_of(recipe.stage_dir("evaluate"))
    return f"{evaluation_tables(result)}\n\nevaluate: → {folder}: {files} ({result['state']})"


def _without_val(names: list[str], matrices: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Names of the classes of which val has no image, by a confusion matrix, whose rows are the true classes."""
    of_encoders = next(iter(matrices.values()), None)
    if of_encoders is None:
        return []
    images = of_encoders["trained"].sum(1)
    return [name for name, count in zip(names, images, strict=True) if not count]


def _pools(recipe: Recipe, subject: EncoderSource, model: nn.Module) -> tuple[str, ...]:
    """The poolings to evaluate, out of those that the encoder has. Raises SettingError where none is left."""
    asked = recipe.evaluate.pool
    able = pools_of(model, torch.zeros(1, subject.channels, subject.image_size, subject.image_size))
    found = tuple(name for name in dict.fromkeys(asked) if name in able)
    if not found and "mean" not in asked:
        raise SettingError(f"evaluate.pool={list(asked)}: {subject.place} has no class token; set evaluate.pool=[mean]")
    return found


def _count_blocks(recipe: Recipe, subject: EncoderSource, model: nn.Module) -> int:
    """Blocks that are evaluated; 0 without such a protocol. Raises SettingError where the encoder has no feature maps."""
    asked = [name for name in OF_TOKENS if name in recipe.evaluate.protocols]
    if not asked:
        return 0
    taps = Taps(model, blocks=True, tokens=False)
    _, blocks, _ = taps(torch.zeros(1, subject.channels, subject.image_size, subject.image_size))
    if not blocks:
        raise SettingError(
            f"evaluate.protocols={list(recipe.evaluate.protocols)}: timm offers no feature maps of the blocks of "
            f"{subject.place}; remove {' and '.join(asked)}"
        )
    return len(blocks)


class _Tasks:
    """The Ray tasks of a call: who reads which part, and what is then evaluated."""

    def __init__(self, recipe: Recipe, checked: Checked, use_gpu: bool, meter: TaskMeter) -> None:
        self.recipe, self.use_gpu, self.meter = recipe, use_gpu, meter
        self.subject, self.shards = checked.subject, checked.shards
        self.protocols, self.blocks, self.pools = checked.protocols, checked.blocks, checked.pools
        self.splits = ("train", "val") if checked.labelled else ("train",)

    def run(self, progress: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, np.ndarray]]]:
        """Returns {encoder: metrics} and {protocol: {encoder: confusion matrix}}. Raises StageError."""
        model = self.subject.model(trained=False)
        flops = flops_of(model, self.subject.channels, self.subject.image_size)
        reading: list[ray.ObjectRef] = []
        evaluating: dict[ray.ObjectRef, tuple[str, str]] = {}
        for which in TITLES:
            pooled, tokens = self._read(which)
            reading += [ref for refs in pooled.values() for ref in refs]
            self._count(0 if which == "pixels" else flops)
            evaluating |= {ref: (which, protocol) for protocol, ref in self._evaluate(which, pooled, tokens)}
        measured: dict[str, dict[str, float]] = {which: {} for which in TITLES}
        matrices: dict[str, dict[str, np.ndarray]] = {}
        pending = [*reading, *evaluating]
        with tqdm(total=len(pending), desc="evaluate", unit=" task", disable=not progress) as bar:
            total = len(pending)
            while pending:
                (ready,), pending = ray.wait(pending, fetch_local=False)
                bar.update()
                observability.publish(self.recipe.name, "evaluate", total - len(pending), total, "tasks")
                if ready not in evaluating:
                    continue  # errors of reading are raised by the tasks that take its features
                which, protocol = evaluating[ready]
                try:
                    values, matrix = ray.get(ready)
                except ray.exceptions.RayError as error:
                    raise StageError(f"evaluation failed ({protocol}): {root_cause(error)}") from error
                measured[which] |= {name: value for name, value in values.items() if np.isfinite(value)}
                if matrix is not None:
                    matrices.setdefault(protocol, {})[which] = matrix
        ordered = {protocol: matrices[protocol] for protocol in self.protocols if protocol in matrices}
        return {which: values | best_block(values) for which, values in measured.items()}, ordered

    def _count(self, flops: int) -> None:
        """Add the work of one encoder, at `flops` per image, to the meter."""
        for split in self.splits:
            rows = min(self.shards.rows[split], self._rows(split) or self.shards.rows[split])
            read = split_bytes(self.shards, split, self._rows(split))
            self.meter.add(images=rows, flops=flops * rows, bytes_read=read)

    def _remote(self, function: Callable[..., Any], **options: Any) -> Any:
        measured = self.meter.around(function, gpus=options.get("num_gpus", 0))
        return ray.remote(num_cpus=1, **options)(measured)

    def _rows(self, split: str) -> int | None:
        return self.recipe.evaluate.max_images if split == "train" else None

    def _parts(self, split: str) -> int:
        """Number of parts in which a split is read: some row groups each."""
        rows = min(self.shards.rows[split], self._rows(split) or self.shards.rows[split])
        groups = max(1, rows // self.shards.rows_per_group)  # rounded down: no part is empty
        return max(1, min(groups, -(-rows // (PART_ROWS_GPU if self.use_gpu else PART_ROWS))))

    def _read(self, which: str) -> tuple[dict[str, list[ray.ObjectRef]], dict[str, list[ray.ObjectRef]]]:
        """Start to read: returns {split: parts} of an encoder's features and of its tokens."""
        task = self._remote(read_part, num_gpus=int(self.use_gpu), num_returns=2)
        wanted = which != "pixels" and "attentive" in self.protocols
        pooled: dict[str, list[ray.ObjectRef]] = {}
        tokens: dict[str, list[ray.ObjectRef]] = {}
        for split in self.splits:
            limit = self.recipe.evaluate.attentive_images if split == "train" else self.shards.rows[split]
            parts = self._parts(split)
            refs = [
                task.remote(
                    which,
                    self.subject,
                    self.recipe.dump(),
                    self.shards.folder.url,
                    split,
                    (number, parts),
                    self._rows(split),
                    blocks=which != "pixels" and "blocks" in self.protocols,
                    token_rows=limit if wanted else 0,
                    pools=() if which == "pixels" else self.pools,
                    use_gpu=self.use_gpu,
                )
                for number in range(parts)
            ]
            pooled[split], tokens[split] = [ref for ref, _ in refs], [ref for _, ref in refs]
        return pooled, tokens

    def _evaluate(
        self, which: str, pooled: dict[str, list[ray.ObjectRef]], tokens: dict[str, list[ray.ObjectRef]]
    ) -> Iterator[tuple[str, ray.ObjectRef]]:
        """Start to evaluate an encoder: yields (protocol, its task)."""
        parts = [ref for split in self.splits for ref in pooled[split]]
        places = {
            split: [
                positions_of_part(self.shards, split, (number, len(pooled[split])), self._rows(split))
                for number in range(len(pooled[split]))
            ]
            for split in self.splits
        }
        settings, classes = self.recipe.dump(), len(self.shards.classes or ())
        task = self._remote(evaluate_features)
        for protocol in self.protocols:
            if protocol in OF_TOKENS and which == "pixels":
                continue
            if protocol == "attentive":
                on_device = self._remote(evaluate_tokens, num_gpus=int(self.use_gpu))
                # Parts are arguments so that they are waited for, or the task would hold the GPU that they need.
                yield (
                    protocol,
                    on_device.remote(settings, classes, self.use_gpu, tokens["train"], tokens["val"], *parts),
                )
            elif protocol == "blocks":
                for number in range(1, self.blocks + 1):
                    yield protocol, task.remote(protocol, number, settings, classes, places, *parts)
            else:
                yield protocol, task.remote(protocol, 0, settings, classes, places, *parts)
            if protocol in OF_POOLS and which != "pixels":
                for pool in self.pools[1:]:
                    yield protocol, task.remote(protocol, 0, settings, classes, places, *parts, pool=pool)
