"""Evaluation of frozen features: the trained encoder beside the same encoder untrained and beside raw pixels.

Ray tasks read a part of the shard set each and run an encoder over it once, for all protocols; further tasks judge what
they gave, a protocol (and a block) each. So encoders, parts and protocols run at once where the cluster has room.
Features travel through Ray's object store, which spills to disk where memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch.nn import functional
from tqdm import tqdm

from pipeline.config.load import validate
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.features import tapped_of, with_tokens
from pipeline.evaluation.tables import evaluation_tables, write_tables
from pipeline.models.encoder_source import Subject, subject_of
from pipeline.runtime.ray_session import SessionInfo, check_room, root_cause, uses_gpu
from pipeline.runtime.stage_folder import stage_folder
from pipeline.runtime.usage import TaskMeter, flops_of, measuring_tasks
from pipeline.shards.batches import positions_of_part, split_bytes
from pipeline.shards.shard_set import ShardSet
from pipeline.tracking.tracker import Tracker
from wavemim.evaluation.features import Tapped, Taps, joined
from wavemim.evaluation.metrics import confusion
from wavemim.evaluation.protocols import (
    Judgement,
    best_block,
    judge_attentive,
    judge_block,
    judge_few_labels,
    judge_knn,
    judge_linear,
    judge_rank,
)

SUBJECTS = {"trained": "trained encoder", "untrained": "same encoder, untrained", "pixels": "raw pixels (32×32)"}
PIXELS_SIDE = 32  # raw pixels are averaged to this side: a probe on more of them is slower and no better
PART_ROWS, PART_ROWS_GPU = 1024, 8192  # images of a reading task: minutes of work, so that building a model is not felt
OF_TOKENS = ("blocks", "attentive")  # protocols that need maps of blocks, which raw pixels have none of

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # float16 (n, T, E); labels (n,); places in the split (n,)
Judged = tuple[dict[str, float], np.ndarray | None]  # values; confusion matrix


def evaluate(
    recipe: Recipe, session: SessionInfo, *, progress: bool = True, subject: Subject | None = None
) -> dict[str, Any]:
    """Judge the encoder that the recipe names; gives the summary that is also the stage's finishing mark."""
    shards = ShardSet.open(recipe.shards_at)
    subject = subject or subject_of(recipe, shards)
    check_room(recipe, session, 1)
    same = {**identity(recipe, "evaluate"), "checkpoint": subject.fingerprint, "shards": shards.fingerprint}
    with stage_folder(recipe.stage_dir("evaluate"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.weights.checkpoint": subject.source}
        with Tracker.start(recipe, "evaluate", log_dir=folder.path, tags=tags) as tracker:
            images = subject.images_seen or 0
            with measuring_tasks(folder.path, tracker.log, images) as meter:
                plan = _Plan(recipe, subject, shards, uses_gpu(recipe, session), meter)
                measured, matrices = plan.run(progress)
            for which, values in measured.items():
                ending = "" if which == "trained" else f"_{which}"
                tracker.log({f"{name}{ending}": value for name, value in values.items()}, images)
            titles = _titles(subject)
            files = write_tables(folder.path, matrices, shards.classes or [], titles)
            for path in files:
                tracker.artifact(path)
            result = {
                "checkpoint": subject.source,
                "images_seen": subject.images_seen,
                "labelled": plan.labelled,
                "classes": len(shards.classes or ()),
                "train_images": min(shards.rows["train"], recipe.evaluate.max_images),
                "val_images": shards.rows.get("val", 0),
                "titles": titles,
                "files": [path.name for path in files],
                "measured": measured,
                "cost": meter.read().record(),
            }
            folder.finish(result)
        return {**result, "state": folder.state}


def check_protocols(recipe: Recipe, subject: Subject) -> int:
    """How many blocks are judged; 0 where none is asked for. Raises SettingError where the encoder gives no maps."""
    asked = [name for name in OF_TOKENS if name in recipe.evaluate.protocols]
    if not asked:
        return 0
    taps = Taps(subject.model(trained=False).eval(), blocks=True, tokens=False)
    _, blocks, _ = taps(torch.zeros(1, subject.channels, subject.image_size, subject.image_size))
    if not blocks:
        raise SettingError(
            f"evaluate.protocols={list(recipe.evaluate.protocols)}: timm gives no maps of the blocks of "
            f"{subject.source}; leave out {' and '.join(asked)}"
        )
    return len(blocks)


def _titles(subject: Subject) -> dict[str, str]:
    titles = dict(SUBJECTS)
    if subject.kind != "checkpoint":
        titles["trained"] = subject.source
    if subject.starts_pretrained:
        titles["untrained"] = "same encoder, as training began"
    return titles


class _Plan:
    """The tasks of a call: who reads what, and what is then judged."""

    def __init__(self, recipe: Recipe, subject: Subject, shards: ShardSet, use_gpu: bool, meter: TaskMeter) -> None:
        self.recipe, self.subject, self.shards, self.use_gpu, self.meter = recipe, subject, shards, use_gpu, meter
        self.labelled = shards.classes is not None and bool(shards.rows.get("val"))
        asked: list[str] = [
            name for name in dict.fromkeys(recipe.evaluate.protocols) if self.labelled or name == "rank"
        ]
        self.protocols = asked or ["rank"]  # of an unlabelled set nothing else can be said
        self.blocks = check_protocols(recipe, subject) if self.labelled else 0
        self.splits = ("train", "val") if self.labelled else ("train",)

    def run(self, progress: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, np.ndarray]]]:
        """{encoder: values} and {protocol: {encoder: confusion matrix}}. Raises StageError."""
        model = self.subject.model(trained=False)
        flops = flops_of(model, self.subject.channels, self.subject.image_size)
        reading: list[ray.ObjectRef] = []
        judging: dict[ray.ObjectRef, tuple[str, str]] = {}
        for which in SUBJECTS:
            pooled, tokens = self._read(which)
            reading += [ref for refs in pooled.values() for ref in refs]
            self._count(0 if which == "pixels" else flops)
            judging |= {ref: (which, protocol) for protocol, ref in self._judge(which, pooled, tokens)}
        measured: dict[str, dict[str, float]] = {which: {} for which in SUBJECTS}
        matrices: dict[str, dict[str, np.ndarray]] = {}
        pending = [*reading, *judging]
        with tqdm(total=len(pending), desc="evaluate", unit=" task", disable=not progress) as bar:
            while pending:
                (ready,), pending = ray.wait(pending, fetch_local=False)
                bar.update()
                if ready not in judging:
                    continue  # what went wrong in reading is raised by what judges it
                which, protocol = judging[ready]
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
        """What an encoder has to do, with FLOPs an image."""
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
        """Parts that a split is read in: some row groups each."""
        rows = min(self.shards.rows[split], self._rows(split) or self.shards.rows[split])
        groups = max(1, rows // self.shards.rows_per_group)  # rounded down: no part without one
        return max(1, min(groups, -(-rows // (PART_ROWS_GPU if self.use_gpu else PART_ROWS))))

    def _read(self, which: str) -> tuple[dict[str, list[ray.ObjectRef]], dict[str, list[ray.ObjectRef]]]:
        """{split: parts} of an encoder's features and of its tokens, as tasks that are on their way."""
        task = self._remote(_read_part, num_gpus=int(self.use_gpu), num_returns=2)
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
                    use_gpu=self.use_gpu,
                )
                for number in range(parts)
            ]
            pooled[split], tokens[split] = [ref for ref, _ in refs], [ref for _, ref in refs]
        return pooled, tokens

    def _judge(
        self, which: str, pooled: dict[str, list[ray.ObjectRef]], tokens: dict[str, list[ray.ObjectRef]]
    ) -> Iterator[tuple[str, ray.ObjectRef]]:
        """(protocol, its task) for all that is asked of an encoder."""
        parts = [ref for split in self.splits for ref in pooled[split]]
        places = {
            split: [
                positions_of_part(self.shards, split, (number, len(pooled[split])), self._rows(split))
                for number in range(len(pooled[split]))
            ]
            for split in self.splits
        }
        settings, classes = self.recipe.dump(), len(self.shards.classes or ())
        task = self._remote(_judge_features)
        for protocol in self.protocols:
            if protocol in OF_TOKENS and which == "pixels":
                continue
            if protocol == "attentive":
                on_device = self._remote(_judge_tokens, num_gpus=int(self.use_gpu))
                # Parts are given to be waited for, or the task would hold the GPU that they are made on.
                yield (
                    protocol,
                    on_device.remote(settings, classes, self.use_gpu, tokens["train"], tokens["val"], *parts),
                )
            elif protocol == "blocks":
                for number in range(1, self.blocks + 1):
                    yield protocol, task.remote(protocol, number, settings, classes, places, *parts)
            else:
                yield protocol, task.remote(protocol, 0, settings, classes, places, *parts)


def _read_part(
    which: str,
    subject: Subject,
    settings: dict[str, Any],
    shards_at: str,
    split: str,
    part: tuple[int, int],
    max_rows: int | None,
    *,
    blocks: bool,
    token_rows: int,
    use_gpu: bool,
) -> tuple[Tapped, Tokens | None]:
    """Features of a part of a split, and its patch tokens with labels and places, where they are asked for."""
    torch.set_num_threads(1)
    shards, device = ShardSet.open(shards_at, check_files=False), torch.device("cuda" if use_gpu else "cpu")
    found = tapped_of(
        Taps(_encoder(which, subject, device), blocks=blocks, tokens=token_rows > 0),
        subject.inputs(shards).to(device),
        shards,
        split,
        window=subject.image_size,
        batch=validate(settings).evaluate.batch,
        max_rows=max_rows,
        part=part,
        token_rows=token_rows,
    )
    if found.tokens is None:
        return found, None
    kept, places = with_tokens(shards, split, part, max_rows, token_rows)
    return replace(found, tokens=None), (found.tokens, found.labels[kept], places)


_last: dict[tuple[str, str, str], Any] = {}  # the encoder of this worker's last task: it may read several parts


def _encoder(which: str, subject: Subject, device: torch.device) -> Any:
    if which == "pixels":
        side = min(PIXELS_SIDE, subject.image_size)
        return lambda images: functional.interpolate(images, size=(side, side), mode="area")
    key = (which, f"{subject.source} {subject.fingerprint} {subject.image_size} {subject.channels}", str(device))
    if key not in _last:
        _last.clear()
        model = subject.model() if which == "trained" else subject.beginning()
        _last[key] = model.to(device).eval()
    return _last[key]


def _judge_features(
    protocol: str,
    block: int,
    settings: dict[str, Any],
    classes: int,
    places: dict[str, list[np.ndarray]],
    *parts: Tapped,
) -> Judged:
    """One protocol on all parts of train, then of val."""
    recipe, cut = validate(settings), len(places["train"])
    train = joined(parts[:cut], places["train"])
    if protocol == "rank":
        return judge_rank(train.final).values, None
    test = joined(parts[cut:], places["val"])
    own = recipe.evaluate
    fitted: dict[str, Any] = {
        "strengths": own.probe_strengths,
        "seed": recipe.seed,
        "max_iterations": own.probe_iterations,
    }
    judged: Judgement
    if protocol == "linear":
        judged = judge_linear(train.set, test.set, **fitted)
    elif protocol == "blocks":
        judged = judge_block(train.block(block), test.block(block), number=block, **fitted)
    elif protocol == "knn":
        judged = judge_knn(train.set, test.set, k=own.knn_k)
    else:
        assert protocol == "few_labels", protocol
        judged = judge_few_labels(train.set, test.set, shares=own.few_shares, draws=own.few_draws, **fitted)
    if judged.predicted is None or protocol == "blocks":
        return judged.values, None
    return judged.values, confusion(test.labels, judged.predicted, classes)


def _judge_tokens(
    settings: dict[str, Any],
    classes: int,
    use_gpu: bool,
    train: list[ray.ObjectRef],
    val: list[ray.ObjectRef],
    *_: Tapped,
) -> Judged:
    """The attentive probe on kept tokens: those of train together in memory, those of val part by part."""
    torch.set_num_threads(1)
    recipe, labels = validate(settings), []
    own = recipe.evaluate
    tokens, fitted = _gathered(train, own.attentive_images)

    def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ref in val:
            part, theirs, _ = ray.get(ref)
            labels.append(theirs)
            yield part, theirs

    judged = judge_attentive(
        tokens,
        fitted,
        test(),
        lrs=own.attentive_lrs,
        epochs=own.attentive_epochs,
        batch=own.attentive_batch,
        seed=recipe.seed,
        device=torch.device("cuda" if use_gpu else "cpu"),
    )
    assert judged.predicted is not None
    return judged.values, confusion(np.concatenate(labels), judged.predicted, classes)


def _gathered(refs: list[ray.ObjectRef], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of at most `most` images out of all parts, each image at its place; one part at a time is held."""
    tokens, labels = np.zeros((0, 0, 0), np.float16), np.zeros(most, np.int64)
    count = 0
    for ref in refs:
        part = ray.get(ref)
        if part is None:
            continue
        values, theirs, places = part
        if not len(tokens):
            tokens = np.empty((most, *values.shape[1:]), np.float16)
        tokens[places], labels[places] = values, theirs
        count += len(places)
    return tokens[:count], labels[:count]


def evaluate_lines(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What evaluate measured and where it is."""
    files = ", ".join(["result.json", *result["files"]])
    return f"{evaluation_tables(result)}\n\nevaluate: → {recipe.stage_dir('evaluate')}: {files} ({result['state']})"
