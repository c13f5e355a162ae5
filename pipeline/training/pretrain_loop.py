"""The training loop: the same in a Ray Train worker, in a Ray Tune trial and without Ray. Knows neither Ray nor MLflow."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.recipe import Recipe
from pipeline.models.build import check_shards
from pipeline.runtime.progress import memory_metric
from pipeline.runtime.usage import Spent, TrainingMeter
from pipeline.shards.batches import Batch
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from pipeline.training.coordination import Orders
from pipeline.training.divergence import BlowUpError, Watch
from pipeline.training.metrics import LossMeter
from pipeline.training.schedule import PartMeter, TrainSchedule, TrainState, phases_of
from pipeline.training.setup import set_up
from pipeline.workers.heartbeat import BATCH, CHECKPOINT, MODEL, OTHERS, STEP, Pulse
from pipeline.workers.stragglers import OwnTime
from wavemim.model import MaskedImageModel
from wavemim.weights import checkpoint

_log = logging.getLogger(__name__)

# (metrics, images seen): called on rank 0. The other two on every rank, after the same step: with what takes a checkpoint,
# and the state or the error.
LogHook = Callable[[dict[str, float], int], None]
CheckpointHook = Callable[[checkpoint.Saver, dict[str, Any]], None]
BlowUpHook = Callable[[checkpoint.Saver, BlowUpError], None]


@dataclass(frozen=True)
class Trained:
    """What training gives back."""

    model: MaskedImageModel
    position: TrainState
    stopped: bool = False  # before its end, as asked


def train(
    recipe: Recipe,
    shards: ShardSet,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    threads: int = 2,
    resume: Path | None = None,
    on_log: LogHook | None = None,
    on_checkpoint: CheckpointHook | None = None,
    on_blow_up: BlowUpHook | None = None,
    orders: Orders | None = None,
    beat: Pulse = lambda doing: None,
    spent: Spent | None = None,
) -> Trained:
    """Pretrain by `recipe` on the train split of `shards`, from the checkpoint `resume` on where there is one.

    `wrap` makes a model exchange its gradients (train.parallel=ddp). `threads` read and cut batches in this process.
    `orders` says when to save besides train.checkpoint_every, and when to stop. `beat` is told what is begun. `spent` is
    the last record of what earlier attempts have cost. Raises BlowUpError, on every rank after the same step.
    """
    check_shards(recipe, shards)
    position, known = TrainState(), [spent]
    if resume is not None:
        state = checkpoint.read_state(resume)
        position, known = TrainState.of(state), [spent, Spent.of(state.get("cost"))]
    cores = recipe.cluster.cpus_per_worker
    cost = TrainingMeter(device, world=world, rank=rank, cores=cores, before=known)
    # The batch of the workers that began, however many there are now; of an elastic run as if all had.
    begin = recipe.train.workers if recipe.cluster.min_workers else world
    plan = TrainSchedule.of(recipe, shards.rows["train"], position.streams or begin)
    levels = sorted(recipe.target.taps)
    meter = LossMeter(levels, device, world, position.epoch_sums, position.window)
    watch = Watch(levels, device, world, every=recipe.train.log_every, max_skipped=recipe.train.max_skipped)
    watch.skipped = position.skipped
    own = OwnTime(device, rank, world, ready=lambda: beat(OTHERS))
    before: Path | checkpoint.Snapshot | None = resume

    for phase in phases_of(recipe, shards, plan.total_steps):
        if position.step >= phase.end < plan.total_steps:
            continue  # done before this attempt
        beat(MODEL)
        training = set_up(
            recipe, phase, plan, position, shards,
            before=before, device=device, rank=rank, world=world, wrap=wrap, threads=threads,
            about=lambda: {"cost": cost.spent().record()},
        )  # fmt: skip
        before = None  # a whole model and its moments
        own.follow(training.wrapped)
        cost.follow(training.reader, training.flops)
        watch.forget()
        position.streams = training.reader.streams
        part = PartMeter(phase.size, cost.spent(), position.parts[phase.number :])
        for batch, waited in _batches(training.reader, position, phase.end, beat):
            own.begin(waited)
            result = training.step(
                batch.levels,
                batch.rows,
                batch.weight,
                batch.total,
                epoch=position.epoch,
                step=position.step,
                crop=batch.crop,
            )
            position.step += 1
            position.batch += 1
            position.images += round(batch.total)
            last = position.step == plan.total_steps
            phase_done = position.step == phase.end
            epoch_done = position.batch == plan.batches_per_epoch
            meter.add(result.losses, result.grad_norm, batch.total, waited)
            cost.step(round(batch.total), len(batch.rows))
            watch.add(position.step, position.epoch, batch.rows, result.losses, result.grad_norm)
            if position.step % recipe.train.log_every == 0 or phase_done:
                lr = training.optimizer.param_groups[0]["lr"]
                try:
                    report = watch.look(lr, ended_after=position.step if last else None)
                except BlowUpError as error:
                    if on_blow_up is not None:
                        on_blow_up(training.saver, error)
                    raise
                for spike in report.spikes:
                    _log.warning("step %(step)d: the loss leapt, %(times).0f × the usual; rows %(rows)s", spike)
                weights = training.model.level_weights.effective(training.step.progress(position.step - 1)).tolist()
                metrics = meter.read(weights) | {"train/lr": lr} | memory_metric(device)
                metrics |= {"train/skipped_steps": float(watch.skipped), "train/spikes": float(len(report.spikes))}
                metrics |= own.read() | cost.read()
                position.parts[phase.number :] = [part.read(cost.spent())]
                metrics["train/image_size"] = float(phase.size)
                metrics["train/epoch"] = position.epoch + position.batch / plan.batches_per_epoch
                if on_log is not None and rank == 0:
                    on_log(metrics, position.images)
            if epoch_done or last:
                position.history.append({"epoch": position.epoch + 1, **meter.read_epoch()})
            if epoch_done:
                position.epoch, position.batch = position.epoch + 1, 0
            due, stop = orders.after_step() if orders is not None and not last else (False, False)
            if on_checkpoint is not None and (position.step % plan.checkpoint_steps == 0 or last or due or stop):
                position.window, position.epoch_sums = meter.sums()
                position.skipped = watch.skipped_so_far()
                position.parts[phase.number :] = [part.read(cost.spent())]
                beat(CHECKPOINT)
                on_checkpoint(training.saver, position.state())
            if stop:
                return Trained(training.model, position, stopped=True)
        if phase.end < plan.total_steps:
            before = training.saver.snapshot()
            del training  # there may be no room for two
    return Trained(training.model, position)


def _batches(reader: Reader, position: TrainState, end: int, beat: Pulse) -> Iterator[tuple[Batch, float]]:
    """Batches up to step `end`, epoch after epoch, each with the seconds that it was waited for.

    The loop moves `position` on, by one step for each.
    """
    while position.step < end:
        with contextlib.closing(reader.epoch(position.epoch, start=position.batch)) as batches:
            while position.step < end:
                beat(BATCH)
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                beat(STEP)
                yield batch, time.perf_counter() - began
