"""The loop of fine-tuning: in a Ray Train worker and without Ray. Knows neither Ray nor MLflow."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.recipe import Recipe
from pipeline.models.encoder_source import build_classifier
from pipeline.runtime.progress import memory_metric
from pipeline.runtime.usage import TrainingMeter
from pipeline.shards.batches import Batch, sequential
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from pipeline.training.coordination import Orders
from pipeline.training.schedule import FinetuneSchedule, FinetuneState, precision_of
from wavemim.augment import RandAugment, random_resized_crop
from wavemim.finetune import FinetuneResult, FinetuneStep, Mixing, count_predictions, make_finetune_optimizer
from wavemim.flops import BACKWARD, forward_flops
from wavemim.inputs import Inputs
from wavemim.optim import make_average, make_schedule
from wavemim.weights import checkpoint

if TYPE_CHECKING:
    from pipeline.models.encoder_source import Subject  # which loads Ray

TOP1 = "eval/finetune_top1"
MAX_SKIPPED = 20  # steps in a row without a finite gradient, before training ends
_MIX_GROUPS = 8  # row groups mixed with each other in a worker's buffer

# (metrics, images seen): called on rank 0. The other on every rank, after the same step.
LogHook = Callable[[dict[str, float], int], None]
CheckpointHook = Callable[[checkpoint.Saver], None]


class NotFiniteError(Exception):
    """No step of late had a finite gradient: training has ended, on every rank after the same step."""


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning gives back."""

    model: nn.Module  # the average of the weights where there is one
    progress: FinetuneState
    counts: torch.Tensor | None  # val images by true and predicted class, int64 (K, K); None where it was stopped
    stopped: bool = False  # before its end, as asked


def finetune(
    recipe: Recipe,
    subject: Subject,
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
    orders: Orders | None = None,
    costs: TrainingMeter | None = None,
) -> Finetuned:
    """Fine-tune `subject` by `recipe` on the train split of `shards`, from the checkpoint `resume` on where there is one.

    Raises NotFiniteError.
    """
    done = FinetuneState.of(checkpoint.read_state(resume)) if resume is not None else FinetuneState()
    run = _Run(recipe, subject, shards, device, rank, world, wrap, resume, done)
    about = {"recipe": recipe.dump(), "shards": shards.fingerprint, "encoder": subject.fingerprint}
    averaged = run.averaged.module if run.averaged is not None else None
    saver = checkpoint.Saver(run.model, run.step.optimizer, averaged, lambda: {**vars(done), **about})
    log = on_log if on_log is not None and rank == 0 else lambda metrics, images: None
    meter, plan = _Meter(device, world), run.plan
    if costs is not None:
        costs.follow(run.reader, run.image_flops())
    counts: torch.Tensor | None = None
    while done.step < plan.total_steps:
        for batch, pixels, waited in _timed(run.batches(done.epoch, done.batch, threads)):
            result = run.do(batch, pixels, epoch=done.epoch, number=done.step)
            done.step, done.batch, done.images = done.step + 1, done.batch + 1, done.images + round(batch.total)
            meter.add(result, batch.total, waited)
            if costs is not None:
                costs.step(round(batch.total), len(batch.rows))
            last, epoch_done = done.step == plan.total_steps, done.batch == plan.batches_per_epoch
            if done.step % run.settings.log_every == 0 or last:
                metrics = meter.read(done) | {"train/lr": run.rate()} | memory_metric(device)
                metrics |= costs.read() if costs is not None else {}
                log({**metrics, "train/epoch": done.epoch + done.batch / plan.batches_per_epoch}, done.images)
            if epoch_done:
                done.epoch, done.batch = done.epoch + 1, 0
            if last or (epoch_done and done.epoch % run.settings.eval_every == 0):
                with meter.paused():
                    counts = run.measure()
                top1 = top1_of(counts)
                done.history.append({"epoch": done.step / plan.batches_per_epoch, "images": done.images, TOP1: top1})
                log({TOP1: top1}, done.images)
            stop = orders is not None and not last and orders.after_step()[1]
            if on_checkpoint is not None and (epoch_done or last or stop):
                on_checkpoint(saver)
            if stop:
                return Finetuned(run.trained, done, None, stopped=True)
            if last:
                break
    return Finetuned(run.trained, done, counts if counts is not None else run.measure())


class _Run:
    """What one worker trains with, from settings and, with `resume`, a checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        subject: Subject,
        shards: ShardSet,
        device: torch.device,
        rank: int,
        world: int,
        wrap: Callable[[nn.Module], nn.Module] | None,
        resume: Path | None,
        done: FinetuneState,
    ) -> None:
        self.settings, self.shards, self.device, self.rank, self.world = recipe.finetune, shards, device, rank, world
        self.size, self.seed = subject.image_size, recipe.seed
        # The batch of the workers that began, however many there are now.
        self.plan = FinetuneSchedule.of(self.settings, shards.rows["train"], done.streams or world)
        self.host, self.inputs = subject.inputs(shards), subject.inputs(shards).to(device)
        torch.manual_seed(recipe.seed)
        self.model = build_classifier(self.settings, subject, shards)[0].to(device)
        self.averaged = None if self.settings.ema is None else make_average(self.model, self.settings.ema)
        self.step = self._step(wrap, resume)
        self.reader = Reader(
            shards,
            "train",
            batch=self.plan.batch,
            rank=rank,
            world=world,
            seed=recipe.seed,
            window=shards.image_size,
            flip=False,
            mix_groups=_MIX_GROUPS,
            pixels=shards.layout.windows,
            streams=done.streams or None,
        )
        done.streams = self.reader.streams
        self.augment: RandAugment | None = None
        if self.settings.rand_augment:
            self.augment = RandAugment(
                self.settings.rand_augment,
                size=self.size,
                seed=self.seed,
                pixel_mean=subject.pixel_mean,
                scale=self.settings.crop_scale,
                flip=self.settings.flip,
            )

    def _step(self, wrap: Callable[[nn.Module], nn.Module] | None, resume: Path | None) -> FinetuneStep:
        settings, model, plan = self.settings, self.model, self.plan
        peak = settings.lr * plan.batch / 256
        optimizer = make_finetune_optimizer(
            model, lr=peak, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay, betas=settings.betas
        )
        if resume is not None:
            checkpoint.load_model(resume, model)
            checkpoint.load_optimizer(resume, model, optimizer)
            if self.averaged is not None:
                checkpoint.load_model(resume, self.averaged.module, name=checkpoint.AVERAGED)
        lowest = peak * settings.min_lr_share
        schedule = make_schedule(optimizer, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps, min_lr=lowest)
        classes = len(self.shards.classes or ())
        return FinetuneStep(
            model,
            Mixing(classes, settings.mixup, settings.cutmix, settings.label_smoothing, settings.erasing),
            optimizer,
            schedule,
            seed=self.seed,
            precision=precision_of(settings, self.device),
            clip_grad=settings.clip_grad,
            accumulate=settings.accumulate,
            averaged=self.averaged,
            wrapped=wrap(model) if wrap else model,
            world=self.world,
            rank=self.rank,
        )

    @property
    def trained(self) -> nn.Module:
        """What is judged and saved: the average of the weights where there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def rate(self) -> float:
        """The learning rate of the head."""
        return max(float(group["lr"]) for group in self.step.optimizer.param_groups)

    def image_flops(self) -> int:
        """Of a forward and a backward pass of one image; a frozen encoder has no backward pass."""
        forward = forward_flops(self.model, self.shards.channels, self.size)
        return forward if self.settings.freeze else (1 + BACKWARD) * forward

    def batches(self, epoch: int, start: int, threads: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Batches with their images in pixel values (B, C, H, W), cropped and augmented where that is the CPU's work."""

        def images(batch: Batch) -> torch.Tensor:
            pixels = _pixels(batch, self.host)
            if self.augment is not None:
                whole = pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)
                pixels = self.augment(whole, batch.rows, epoch=epoch)
            return pixels.pin_memory() if self.device.type == "cuda" else pixels

        self.reader.threads = threads
        return _in_threads(self.reader.epoch(epoch, start), images, threads)

    def do(self, batch: Batch, pixels: torch.Tensor, *, epoch: int, number: int) -> FinetuneResult:
        """One step."""
        self.model.train(not self.settings.freeze)  # a frozen encoder is not disturbed either
        images = pixels.to(self.device, non_blocking=True).float()
        if self.augment is None:
            images = random_resized_crop(
                images,
                batch.rows.to(self.device),
                size=self.size,
                seed=self.seed,
                epoch=epoch,
                scale=self.settings.crop_scale,
                flip=self.settings.flip,
            )
        return self.step(self.inputs.normalise(images), batch.labels, batch.weight, batch.total, step=number)

    def measure(self) -> torch.Tensor:
        """Val images of all workers by true and predicted class, int64 (K, K) on the CPU: every row once."""
        if self.world > 1:
            for buffer in self.trained.buffers():  # statistics of batch norm are each worker's own, rank 0's are saved
                dist.broadcast(buffer, 0)
        mine = sequential(
            self.shards,
            "val",
            self.settings.eval_batch,
            window=self.shards.image_size,
            pixels=self.shards.layout.windows,
            part=(self.rank, self.world),
        )
        counts = count_predictions(
            self.trained,
            self.inputs,
            ((_pixels(batch, self.host).to(self.device).float(), batch.labels) for batch in mine),
            size=self.size,
            classes=self.step.mixing.classes,
            precision=self.step.precision,
        )
        if self.world > 1:
            dist.all_reduce(counts)
        return counts.cpu()


def _pixels(batch: Batch, inputs: Inputs) -> torch.Tensor:
    """Whole images in pixel values: 8-bit ones where the reader gives them."""
    return batch.pixels if batch.pixels is not None else inputs.raw(batch.levels)[0]


def _in_threads(
    batches: Iterator[Batch], work: Callable[[Batch], torch.Tensor], threads: int
) -> Generator[tuple[Batch, torch.Tensor], None, None]:
    """Each batch with what `work` makes of it, in order; done ahead in as many threads."""
    pending: collections.deque[tuple[Batch, Future[torch.Tensor]]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="augment") as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(work, batch)))
                if len(pending) > threads:
                    first, images = pending.popleft()
                    yield first, images.result()
            while pending:
                first, images = pending.popleft()
                yield first, images.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            batches.close()  # type: ignore[attr-defined]  # a generator, which ends its threads


def _timed(batches: Iterator[tuple[Batch, torch.Tensor]]) -> Iterator[tuple[Batch, torch.Tensor, float]]:
    """Each batch with the seconds that it was waited for."""
    while True:
        began = time.perf_counter()
        found = next(batches, None)
        if found is None:
            return
        yield *found, time.perf_counter() - began


def top1_of(counts: torch.Tensor) -> float:
    """Share of the images (K, K) on the diagonal, in percent."""
    return 100 * float(counts.diagonal().sum()) / max(int(counts.sum()), 1)


class _Meter:
    """Sums of what steps measured, kept on the device; read only when something is logged."""

    def __init__(self, device: torch.device, world: int) -> None:
        self.world = world
        self.sums = torch.zeros(4, device=device)  # loss · images, gradient norm, steps that were done, their images
        self.steps = 0
        self.images = self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, result: FinetuneResult, images: float, waited: float) -> None:
        """One step. One that was left out counts nothing."""
        done = result.grad_norm.isfinite()
        one = torch.ones_like(result.grad_norm)
        measured = torch.stack((result.loss * images, result.grad_norm, one, one * images))
        self.sums += torch.where(done, measured, 0.0)
        self.steps += 1
        self.images += images
        self.waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the block does is no training."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self, done: FinetuneState) -> dict[str, float]:
        """Metrics since the last call, as means over workers; notes in `done` what was left out. For every worker to call.

        Raises NotFiniteError.
        """
        total = self.sums.clone()
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        loss, norm, steps, images = total.tolist()
        skipped = self.steps - round(steps)
        done.skipped += skipped
        done.skipped_in_a_row = done.skipped_in_a_row + skipped if not steps else 0
        if done.skipped_in_a_row >= MAX_SKIPPED:
            raise NotFiniteError(
                f"none of the last {done.skipped_in_a_row} steps had a finite gradient; lower finetune.lr"
            )
        seconds = max(time.perf_counter() - self.began, 1e-9)
        metrics = {"train/loss": loss / images, "train/grad_norm": norm / steps} if steps else {}
        metrics |= {"train/skipped_steps": float(done.skipped)}
        metrics |= {"perf/images_per_second": self.images / seconds, "perf/data_wait_share": self.waited / seconds}
        self.sums.zero_()
        self.steps = 0
        self.images = self.waited = 0.0
        self.began = time.perf_counter()
        return metrics
