"""The training loop: the same in a Ray Train worker, in a Ray Tune trial and without Ray. Knows neither Ray nor MLflow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.batches import Batch, Reader
from pipeline.build import build_inputs, build_model, build_views, check_shards, statistics_of
from pipeline.config import Recipe, SettingError
from pipeline.orders import Orders
from pipeline.progress import memory_metric
from pipeline.shards import ShardSet
from pipeline.watch import BlowUpError, Watch
from wavemim import checkpoint
from wavemim.model import MaskedImageModel
from wavemim.optim import make_average, make_optimizer, make_schedule
from wavemim.step import TrainStep

_log = logging.getLogger(__name__)

# (metrics, images seen): called on rank 0. The other two on every rank, after the same step: with what takes a checkpoint,
# and the state or the error.
LogHook = Callable[[dict[str, float], int], None]
CheckpointHook = Callable[[checkpoint.Saver, dict[str, Any]], None]
BlowUpHook = Callable[[checkpoint.Saver, BlowUpError], None]


@dataclass
class Position:
    """Where training is: what a checkpoint has to remember, and the loss of each epoch so far."""

    step: int = 0
    images: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    streams: int = 0  # chunks of the reading order: the workers that began; 0 before the first step
    history: list[dict[str, float]] = field(default_factory=list)
    epoch_sums: list[float] = field(default_factory=list)  # of the losses of this epoch, so that a resume loses none
    window: list[float] = field(default_factory=list)  # the same since metrics were last logged
    skipped: int = 0  # steps left out

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """From a checkpoint's state."""
        known = {"streams": 0, "window": [], "skipped": 0, **state}  # earlier versions do not name them
        return cls(**{name: known[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Trained:
    """What training gives back."""

    model: MaskedImageModel
    position: Position
    stopped: bool = False  # before its end, as asked


@dataclass(frozen=True)
class Plan:
    """Lengths that follow from the settings and the size of the shard set, settled once."""

    batch: int
    batches_per_epoch: int
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int

    @classmethod
    def of(cls, recipe: Recipe, rows: int, workers: int | None = None) -> Plan:
        """A batch is never larger than the train split, and is divided evenly over the workers."""
        workers = workers or recipe.train.workers
        if rows < workers:
            raise SettingError(
                f"train.workers={workers}: the train split has {rows} images; use at most {max(rows, 1)}"
            )
        batch = max(min(recipe.train.batch, rows) // workers, 1) * workers
        batches = -(-rows // batch)
        return cls(
            batch=batch,
            batches_per_epoch=batches,
            total_steps=max(1, round(recipe.train.epochs * batches)),
            warmup_steps=round(recipe.train.warmup_epochs * batches),
            checkpoint_steps=max(1, round(recipe.train.checkpoint_every * batches)),
        )


def precision_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic; targets and losses are float32 in any case."""
    if recipe.train.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if recipe.train.precision == "bfloat16" else torch.float32


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
) -> Trained:
    """Pretrain by `recipe` on the train split of `shards`, from the checkpoint `resume` on where there is one.

    `threads` read and cut batches in this process. `orders` says when to save besides train.checkpoint_every, and when
    to stop. Raises BlowUpError, on every rank after the same step.
    """
    check_shards(recipe, shards)
    position = Position()
    if resume is not None:
        position = Position.of(checkpoint.read_state(resume))
    # The batch of the workers that began, however many there are now.
    plan = Plan.of(recipe, shards.rows["train"], position.streams or world)
    model = build_model(recipe, shards, start=resume is None).to(device)
    views = build_views(recipe, model, build_inputs(shards).to(device), augment=True)
    peak_lr = recipe.train.lr * plan.batch / 256
    optimizer = make_optimizer(model, lr=peak_lr, weight_decay=recipe.train.weight_decay, betas=recipe.train.betas)
    schedule = make_schedule(
        optimizer,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        min_lr=peak_lr * recipe.train.min_lr_share,
    )
    averaged = None if recipe.train.ema is None else make_average(model, recipe.train.ema)
    if resume is not None:
        checkpoint.load_model(resume, model)
        checkpoint.load_optimizer(resume, model, optimizer)
        if averaged is not None:
            checkpoint.load_model(resume, averaged.module, name=checkpoint.AVERAGED)
    if recipe.train.recompute:
        model.encoder.recompute_activations()
    wrapped = wrap(model) if wrap else model
    if recipe.train.compile:
        wrapped.compile(dynamic=False)
    step = TrainStep(
        model,
        views,
        optimizer,
        schedule,
        seed=recipe.seed,
        total_steps=plan.total_steps,
        clip_grad=recipe.train.clip_grad,
        precision=precision_of(recipe, device),
        accumulate=recipe.train.accumulate,
        averaged=averaged,
        wrapped=wrapped,
        world=world,
        rank=rank,
    )
    whole = views.augment is not None  # images are cropped on the device
    reader = Reader(
        shards,
        "train",
        batch=plan.batch,
        rank=rank,
        world=world,
        seed=recipe.seed,
        window=shards.image_size if whole else recipe.encoder.image_size,
        flip=recipe.train.flip and not whole,
        mix_groups=recipe.train.mix_groups,
        streams=position.streams or None,
        threads=threads,
        pin=device.type == "cuda",
    )
    position.streams = reader.streams
    meter = _Meter(model.levels, device, world, position.epoch_sums, position.window)
    watch = Watch(model.levels, device, world, every=recipe.train.log_every, max_skipped=recipe.train.max_skipped)
    watch.skipped = position.skipped
    statistics = statistics_of(shards)
    about = {
        "recipe": recipe.dump(),
        "shards": shards.fingerprint,
        "pixel_mean": shards.pixel_mean,
        "pixel_std": shards.pixel_std,
        "statistics": {"mean": statistics.mean, "std": statistics.std},
        "wavelet": shards.layout.wavelet,
    }
    saver = checkpoint.Saver(
        model, optimizer, averaged.module if averaged is not None else None, lambda: {**position.state(), **about}
    )

    while position.step < plan.total_steps:
        for batch, waited in _timed(reader.epoch(position.epoch, start=position.batch)):
            result = step(
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
            epoch_done = position.batch == plan.batches_per_epoch
            meter.add(result.losses, result.grad_norm, batch.total, waited)
            watch.add(position.step, position.epoch, batch.rows, result.losses, result.grad_norm)
            if position.step % recipe.train.log_every == 0 or last:
                try:
                    report = watch.look(optimizer.param_groups[0]["lr"], ended_after=position.step if last else None)
                except BlowUpError as error:
                    if on_blow_up is not None:
                        on_blow_up(saver, error)
                    raise
                for spike in report.spikes:
                    _log.warning("step %(step)d: the loss leapt, %(times).0f × the usual; rows %(rows)s", spike)
                weights = model.level_weights.effective(step.progress(position.step - 1)).tolist()
                metrics = meter.read(weights) | {"train/lr": optimizer.param_groups[0]["lr"]} | memory_metric(device)
                metrics |= {"train/skipped_steps": float(watch.skipped), "train/spikes": float(len(report.spikes))}
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
                position.skipped = watch.skipped
                on_checkpoint(saver, position.state())
            if stop:
                return Trained(model, position, stopped=True)
            if last:
                break
    return Trained(model, position)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that it was waited for."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began


class _Meter:
    """Sums of what steps measured, kept on the device; read only when something is logged."""

    def __init__(
        self, levels: list[int], device: torch.device, world: int, epoch_sums: list[float], window: list[float]
    ) -> None:
        self.levels = levels
        self.names = [f"train/loss_level{level}" for level in levels]
        self.world = world
        self.window = torch.zeros(len(levels) + 3, device=device)  # losses · images, gradient norm, steps, images
        self.epoch = torch.zeros(len(levels) + 1, device=device)  # losses · images, images
        if epoch_sums:
            self.epoch += torch.tensor(epoch_sums, device=device)
        if window:
            self.window += torch.tensor(window, device=device)
        self.images = self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, losses: torch.Tensor, grad_norm: torch.Tensor, images: float, waited: float) -> None:
        """One step: no value is brought to the host. One that was left out counts nothing."""
        done = grad_norm.isfinite()
        measured = torch.cat((losses * images, grad_norm[None]))
        one = done.float()[None]
        measured = torch.cat((torch.where(done, measured, 0.0), one, one * images))
        self.window += measured
        self.epoch += torch.cat((measured[:-3], measured[-1:]))
        self.images += images
        self.waited += waited

    def read(self, weights: list[float]) -> dict[str, float]:
        """Metrics since the last call, as means over images and workers. Every worker has to call it.

        `weights` are those that the levels' losses have now; the loss is their sum under these.
        """
        values = self._mean_over_workers(self.window)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        metrics: dict[str, float] = {}
        if values[-1]:  # a window of steps that were all left out has no loss
            losses = [value / values[-1] for value in values[:-3]]
            metrics |= dict(zip(self.names, losses, strict=True))
            metrics["train/loss"] = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
            metrics["train/grad_norm"] = values[-3] / values[-2]
        metrics |= {f"train/weight_level{level}": weight for level, weight in zip(self.levels, weights, strict=True)}
        metrics["perf/images_per_second"] = self.images / seconds
        metrics["perf/data_wait_share"] = self.waited / seconds
        self.window.zero_()
        self.images = self.waited = 0.0
        self.began = time.perf_counter()
        return metrics

    def read_epoch(self) -> dict[str, float]:
        """Mean loss of each level over the epoch so far."""
        values = self._mean_over_workers(self.epoch)
        self.epoch.zero_()
        return {name: value / max(values[-1], 1.0) for name, value in zip(self.names, values[:-1], strict=True)}

    def sums(self) -> tuple[list[float], list[float]]:
        """What `read` and `read_epoch` are made of, the same on every worker."""
        return self._mean_over_workers(self.window), self._mean_over_workers(self.epoch)

    def _mean_over_workers(self, sums: torch.Tensor) -> list[float]:
        total = sums.clone()
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        return total.tolist()
