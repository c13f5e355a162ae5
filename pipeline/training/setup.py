"""Builds what pretraining needs for as long as images have one size: model, optimiser, step, reader. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from pipeline.config.downstream import Finetune
from pipeline.config.recipe import Recipe
from pipeline.config.settings import Train
from pipeline.models.build import build_inputs, build_model, build_views, statistics_of
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from pipeline.training.schedule import Phase, TrainSchedule, TrainState
from pipeline.workers.harness import Harness
from wavemim.flops import cost_of
from wavemim.model import MaskedImageModel
from wavemim.optim import Average, make_average, make_optimizer, make_schedule
from wavemim.positions import stretch_positions
from wavemim.sharding import shard
from wavemim.step import TrainStep
from wavemim.targets import STD_FLOOR
from wavemim.views import Views
from wavemim.weights import checkpoint


@dataclass(frozen=True)
class Training:
    """One model in training."""

    model: MaskedImageModel
    wrapped: nn.Module  # the same behind DDP
    optimizer: torch.optim.Optimizer
    step: TrainStep
    reader: Reader
    saver: checkpoint.Saver
    flops: int  # of a forward and a backward pass of one image, with each of its masks


def set_up(
    recipe: Recipe,
    phase: Phase,
    schedule: TrainSchedule,
    state: TrainState,
    shards: ShardSet,
    harness: Harness,
    *,
    before: Path | checkpoint.Snapshot | None,
    about: Callable[[], Mapping[str, Any]] = dict,
) -> Training:
    """Build everything for a phase of pretraining.

    Args:
        recipe: The settings of the whole run, which checkpoints remember.
        phase: The phase.
        schedule: Lengths of the run.
        state: Where training is, which checkpoints remember as it is when they are taken.
        shards: The shard set.
        harness: The worker.
        before: A checkpoint, or what the previous phase ended with; None at the start of training.
        about: What else a checkpoint remembers; called when it is taken.
    """
    device, rank, world, wrap = harness.device, harness.rank, harness.world, harness.wrap
    settings = phase.recipe.train
    sharded = settings.parallel == "fsdp" and world > 1
    model = _model(recipe, phase, shards, start=before is None)
    flops = cost_of(model, recipe.mask.count).training_flops
    averaged = None if settings.ema is None else make_average(model, settings.ema)
    for placed, file in _files(model, averaged):
        if sharded:  # before there is an optimiser, so that its moments are sharded too
            shard(placed, device, precision_of(settings, device))
        else:
            placed.to(device)
        if before is not None:
            checkpoint.load_model(before, placed, name=file)
    peak_lr = settings.lr * schedule.batch / 256
    optimizer = make_optimizer(
        model, lr=peak_lr, weight_decay=settings.weight_decay, betas=settings.betas, kind=settings.optimizer
    )
    if before is not None:
        checkpoint.load_optimizer(before, model, optimizer)
    if settings.recompute:
        model.encoder.recompute_activations()
    wrapped = wrap(model) if wrap and not sharded else model
    if settings.compile:
        wrapped.compile(dynamic=False)
    step = _step(phase, schedule, shards, harness, model, optimizer, averaged, wrapped)
    reader = reader_of(phase, schedule, shards, rank=rank, world=world, threads=harness.threads, device=device)
    always = _about(recipe, shards)
    saver = checkpoint.Saver(
        model,
        optimizer,
        averaged.module if averaged is not None else None,
        lambda: {**state.state(), **always, **about()},
    )
    return Training(model, wrapped, optimizer, step, reader, saver, flops)


def _step(
    phase: Phase,
    schedule: TrainSchedule,
    shards: ShardSet,
    harness: Harness,
    model: MaskedImageModel,
    optimizer: torch.optim.Optimizer,
    averaged: Average | None,
    wrapped: nn.Module,
) -> TrainStep:
    settings = phase.recipe.train
    return TrainStep(
        model,
        views_of(phase, model, shards, harness.device),
        optimizer,
        schedule_of(settings, schedule, optimizer),
        seed=phase.recipe.seed,
        total_steps=schedule.total_steps,
        clip_grad=settings.clip_grad,
        precision=precision_of(settings, harness.device),
        accumulate=settings.accumulate,
        averaged=averaged,
        wrapped=wrapped,
        world=harness.world,
        rank=harness.rank,
    )


def schedule_of(
    settings: Train | Finetune, lengths: TrainSchedule, optimizer: torch.optim.Optimizer
) -> CosineLRScheduler:
    """The learning-rate schedule of pretraining or fine-tuning.

    Args:
        settings: Of the stage.
        lengths: Its batch and its numbers of steps.
        optimizer: The optimizer, whose rate is the peak.
    """
    return make_schedule(
        optimizer,
        total_steps=lengths.total_steps,
        warmup_steps=lengths.warmup_steps,
        min_lr=settings.lr * lengths.batch / 256 * settings.min_lr_share,
        warmup_prefix=settings.warmup_prefix,
    )


def precision_of(settings: Train | Finetune, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic; targets and losses are float32 in any case."""
    if settings.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def views_of(phase: Phase, model: MaskedImageModel, shards: ShardSet, device: torch.device) -> Views:
    """What the network sees of a batch that comes from `reader_of`."""
    deepest = max(phase.recipe.target.taps) if phase.recipe.target.predicts_bands else None
    return build_views(phase.recipe, model, build_inputs(shards, depth=deepest).to(device), augment=True)


def reader_of(
    phase: Phase,
    schedule: TrainSchedule,
    shards: ShardSet,
    *,
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Reader:
    """The reader of the train split for a phase: of windows, or of whole images that are cropped on the device.

    Levels that are too fine for the phase are not read. Images come in the same order in every phase.
    """
    recipe = phase.recipe
    whole = recipe.train.augment == "rrc"
    return Reader(
        shards,
        "train",
        batch=schedule.batch,
        rank=rank,
        world=world,
        seed=recipe.seed,
        window=shards.image_size if whole else phase.size << phase.halvings,
        flip=recipe.train.flip and not whole,
        mix_groups=recipe.train.mix_groups,
        finest=1 + phase.halvings,
        streams=schedule.streams,
        threads=threads,
        pin=device.type == "cuda",
    )


def _model(recipe: Recipe, phase: Phase, shards: ShardSet, *, start: bool) -> MaskedImageModel:
    model = build_model(phase.recipe, shards, start=start)
    if phase.size != recipe.encoder.image_size:
        stretch_positions(model, model.encoder.image_size, recipe.encoder.image_size)
    asked = recipe.train.channels_last
    model.encoder.use_channels_last(None if asked == "auto" else asked)
    return model


def _files(model: MaskedImageModel, averaged: Average | None) -> Iterator[tuple[nn.Module, str]]:
    """What a checkpoint holds of a model, and under which name."""
    yield model, checkpoint.MODEL
    if averaged is not None:
        yield averaged.module, checkpoint.AVERAGED


def _about(recipe: Recipe, shards: ShardSet) -> dict[str, Any]:
    """What a checkpoint says of its training."""
    statistics = statistics_of(shards)
    return {
        "recipe": recipe.dump(),
        "shards": shards.fingerprint,
        "pixel_mean": shards.pixel_mean,
        "pixel_std": [max(value, STD_FLOOR) for value in shards.pixel_std],
        "statistics": {"mean": statistics.mean, "std": statistics.std},
        "wavelet": shards.layout.wavelet,
    }
