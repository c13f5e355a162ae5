"""The steps that ended a run with non-finite gradients, repeated: which level, weights and images. No Ray in here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.load import validate
from pipeline.config.places import cache_of
from pipeline.errors import SettingError
from pipeline.models.build import build_model
from pipeline.shards.batches import Batch
from pipeline.shards.reader import Reader
from pipeline.shards.row_groups import read_columns
from pipeline.shards.shard_set import ShardSet
from pipeline.storage.folder import Folder
from pipeline.storage.mirror import fetch, names_in
from pipeline.training.divergence import CHECKPOINT, FOLDER, STEPS
from pipeline.training.schedule import Phase, TrainSchedule, TrainState, phases_of
from pipeline.training.setup import precision_of, reader_of, views_of
from wavemim.optim import make_optimizer
from wavemim.step import Part, TrainStep
from wavemim.weights import checkpoint

SHOWN = 10  # images that are named per step


@dataclass(frozen=True)
class Replayed:
    """What a step yields with the weights of the checkpoint."""

    step: int
    losses: dict[int, float]  # by level
    grad_norm: float
    parameter: str | None  # the first one with a non-finite gradient
    count: int  # images of the step
    images: list[str]  # those with a non-finite loss or gradient of their own: paths in the shard set


def replay(where: str, *, shards: str | None = None, say: Callable[[str], None] = print) -> list[Replayed]:
    """Repeat the steps that ended a run. Nothing is trained.

    Args:
        where: Path or URL of the folder ``blow-up``, or of that of the stage or the run.
        shards: Where the shard set is now; None: where it was.
        say: Called with a line per step, and with the conclusion.

    Returns:
        The steps.

    Raises:
        SettingError: There is nothing to replay, or the shard set is another one.
        CheckpointError: The checkpoint is damaged.
    """
    folder = _find(where)
    about = json.loads((folder / STEPS).read_bytes())
    if about.get("stage", "pretrain") != "pretrain":
        raise SettingError(f"{folder}: steps of {about['stage']}; only those of pretraining can be replayed")
    state = checkpoint.read_state(folder / CHECKPOINT)
    recipe, position = validate(state["recipe"]), TrainState.of(state)
    data = ShardSet.open(shards or about["shards"])
    if data.fingerprint != state["shards"]:
        raise SettingError(f"{data.url} is not the shard set that the run was trained on; name that one with --shards")
    plan = TrainSchedule.of(recipe, data.rows["train"], position.streams)
    phase = next(phase for phase in phases_of(recipe, data, plan.total_steps) if position.step <= phase.end)
    step = _step(phase, plan, data, folder, parts=recipe.train.accumulate * about["workers"])
    say(f"The run ended with: {about['error']}")
    found = []
    numbers = [entry["step"] for entry in about["steps"]]
    for number, epoch, batch in _batches(reader_of(phase, plan, data), plan, numbers):
        replayed = _replay(step, data, batch, number, epoch)
        found.append(replayed)
        say(_line(replayed))
    say(_verdict(found))
    return found


def _find(where: str) -> Path:
    """The folder blow-up; of one in a store, a copy."""
    for below in ("", FOLDER, f"pretrain/{FOLDER}"):
        folder = Folder.at(where).sub(below)
        if folder.kind(STEPS) == "file":
            local = folder.local or cache_of(folder.url)
            if folder.local is None:
                fetch(folder, local, names_in(folder))
            return local
    raise SettingError(
        f"{where}: nothing to replay; give the folder {FOLDER} of a run that ended with non-finite gradients, or that of the "
        "run (OUT/runs/NAME)"
    )


def _step(phase: Phase, plan: TrainSchedule, data: ShardSet, folder: Path, parts: int) -> TrainStep:
    """The training step, with the weights of the checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = phase.recipe
    model = build_model(recipe, data).to(device)
    checkpoint.load_model(folder / CHECKPOINT, model)
    return TrainStep(
        model,
        views_of(phase, model, data, device),
        make_optimizer(model, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95)),
        None,
        seed=recipe.seed,
        total_steps=plan.total_steps,
        clip_grad=None,
        precision=precision_of(recipe.train, device),
        accumulate=parts,
    )


def _batches(reader: Reader, plan: TrainSchedule, numbers: list[int]) -> Iterator[tuple[int, int, Batch]]:
    """Yields (step from 1, epoch, global batch) of each step."""
    batches, expected = None, None
    for number in numbers:
        epoch, place = divmod(number - 1, plan.batches_per_epoch)
        if batches is None or (epoch, place) != expected:
            if batches is not None:
                batches.close()
            batches = reader.epoch(epoch, start=place)
        yield number, epoch, next(batches)
        expected = (epoch, place + 1)
    if batches is not None:
        batches.close()


def _replay(step: TrainStep, data: ShardSet, batch: Batch, number: int, epoch: int) -> Replayed:
    losses, norm = _backward(step, batch, 0, len(batch.rows), number, epoch)
    gradients = [(name, p.grad) for name, p in step.model.named_parameters() if p.grad is not None]
    broken = next((name for name, gradient in gradients if not gradient.isfinite().all()), None)
    images: list[int] = []
    if not (losses.isfinite().all() and norm.isfinite()):
        images = batch.rows[_culprits(step, batch, 0, int(batch.weight.sum()), number, epoch)].tolist()
    names = _names(data, images)
    return Replayed(
        number,
        dict(zip(step.model.levels, losses.tolist(), strict=True)),
        float(norm),
        broken,
        int(batch.weight.sum()),
        [names.get(row, f"row {row}") for row in images],
    )


def _backward(
    step: TrainStep, batch: Batch, first: int, end: int, number: int, epoch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (T,) and gradient norm () of some images of a batch; for all of its images, those of training."""
    part = Part(batch.levels, batch.rows, batch.weight, batch.crop)[first:end]
    step.optimizer.zero_grad(set_to_none=True)
    losses = step.backward(
        part.stored,
        part.rows,
        part.weight,
        float(part.weight.sum()),
        epoch,
        step.progress(number - 1),
        part.crop,
    )
    gradients = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
    return losses, nn.utils.get_total_norm(gradients)


def _culprits(step: TrainStep, batch: Batch, first: int, end: int, number: int, epoch: int) -> list[int]:
    """Places of the images with a non-finite loss or gradient of their own, by bisection."""
    losses, norm = _backward(step, batch, first, end, number, epoch)
    if losses.isfinite().all() and norm.isfinite():
        return []
    if end - first == 1:
        return [first]
    middle = (first + end) // 2
    return [
        i for low, high in ((first, middle), (middle, end)) for i in _culprits(step, batch, low, high, number, epoch)
    ]


def _names(data: ShardSet, rows: list[int]) -> dict[int, str]:
    wanted, found = set(rows), dict[int, str]()
    for file, count in data.files("train"):
        for group in range(-(-count // data.rows_per_group)):
            if len(found) == len(wanted):
                return found
            table: Any = read_columns(data, file, group, ["row", "path"])
            pairs = zip(table.column("row").to_pylist(), table.column("path").to_pylist(), strict=True)
            found |= {row: path for row, path in pairs if row in wanted}
    return found


def _line(replayed: Replayed) -> str:
    losses = ", ".join(f"level {level} {loss:.4g}" for level, loss in replayed.losses.items())
    line = f"step {replayed.step}: loss {losses}; gradient norm {replayed.grad_norm:.4g}"
    if replayed.parameter is not None:
        line += f", first non-finite gradient: {replayed.parameter}"
    if replayed.images:
        more = f" and {len(replayed.images) - SHOWN} more" if len(replayed.images) > SHOWN else ""
        line += f"; images: {', '.join(replayed.images[:SHOWN])}{more}"
    return line


def _verdict(found: list[Replayed]) -> str:
    broken = [replayed for replayed in found if replayed.parameter is not None]
    if not broken:
        return "All losses and gradients are finite here: the arithmetic of this machine differs, or the device was faulty."
    if all(len(replayed.images) == replayed.count for replayed in broken):
        return f"{len(broken)} of {len(found)} steps are not finite for any image: the weights are the cause."
    images = {name for replayed in broken for name in replayed.images}
    if not images:
        return f"{len(broken)} of {len(found)} steps are not finite, although every single image is finite."
    whose = (
        "1 image whose loss or gradient is"
        if len(images) == 1
        else f"{len(images)} images whose losses or gradients are"
    )
    return f"{len(broken)} of {len(found)} steps are not finite, because of {whose} not finite."
