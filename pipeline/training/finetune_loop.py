"""Fine-tuning by the common loop: images cropped and augmented, accuracy on val. Knows neither Ray nor MLflow."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.recipe import Recipe
from pipeline.models.encoder_source import build_classifier, finetune_size
from pipeline.runtime.usage import Spent
from pipeline.shards.batches import Batch, positions_of_part, sequential
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from pipeline.training import loop
from pipeline.training.metrics import Telemetry
from pipeline.training.schedule import FinetuneState, TrainSchedule
from pipeline.training.setup import precision_of, schedule_of
from pipeline.workers.harness import Harness
from pipeline.workers.heartbeat import EVALUATION, MODEL, OTHERS
from wavemim.augment import RandAugment, random_resized_crop
from wavemim.finetune import FinetuneStep, Mixing, count_predictions, make_finetune_optimizer
from wavemim.flops import BACKWARD, forward_flops
from wavemim.inputs import Inputs
from wavemim.optim import make_average
from wavemim.step import StepResult
from wavemim.weights import checkpoint

if TYPE_CHECKING:
    from pipeline.models.encoder_source import EncoderSource  # which loads Ray

TOP1 = "eval/finetune_top1"


@dataclass(frozen=True)
class Finetuned:
    """The outcome of fine-tuning."""

    model: nn.Module  # the average of the weights where there is one
    position: FinetuneState
    counts: torch.Tensor | None  # val images by true and predicted class, int64 (K, K); None where it was stopped
    stopped: bool = False  # before its end, as asked


def finetune(recipe: Recipe, subject: EncoderSource, shards: ShardSet, **options: Any) -> Finetuned:
    """Fine-tune an encoder on the train split of a shard set, or resume. To be called by every worker.

    Args:
        recipe: The settings.
        subject: The encoder.
        shards: The shard set, with labels.
        **options: The fields of `Harness`, of which only `device` has to be given.

    Returns:
        The model, where training is, predictions on val, and whether it was stopped before its end.

    Raises:
        DivergedError: Too many steps in a row were skipped; on every worker after the same step.
    """
    harness = Harness(**options)
    state, spent = loop.starting_point(FinetuneState(mix_groups=recipe.train.mix_groups), harness)
    # The batch of the workers that began, however many there are now; of an elastic run as if all had.
    begin = recipe.finetune.workers if recipe.cluster.min_workers else harness.world
    schedule = TrainSchedule.of_finetuning(recipe, shards.rows["train"], state.streams or begin)
    telemetry = Telemetry(recipe, harness, state, schedule, parts=[""], section="finetune", spent=spent)
    harness.heartbeat(MODEL)
    task = FinetuneTask(recipe, subject, shards, schedule, state, harness, telemetry.cost.spent)
    if loop.run(task, schedule.total_steps, state, schedule, telemetry, harness):
        return Finetuned(task.trained, state, None, stopped=True)
    return Finetuned(task.trained, state, task.counts if task.counts is not None else task.evaluate())


class FinetuneTask:
    """A classifier in training, as one worker has it (a `pipeline.training.task.Task`)."""

    stage = "finetune"

    def __init__(
        self,
        recipe: Recipe,
        subject: EncoderSource,
        shards: ShardSet,
        schedule: TrainSchedule,
        state: FinetuneState,
        harness: Harness,
        spent: Callable[[], Spent],
    ) -> None:
        """Build it from the settings and, when resuming, the harness's checkpoint; `spent` is called for checkpoints."""
        self.settings, self.shards, self.schedule, self.state = recipe.finetune, shards, schedule, state
        self.harness, self.device, self.rank, self.world = harness, harness.device, harness.rank, harness.world
        self.size, self.seed = finetune_size(self.settings, subject), recipe.seed
        self.counts: torch.Tensor | None = None  # of the last evaluation
        self._host_inputs = subject.inputs(shards)
        self._inputs = subject.inputs(shards).to(self.device)
        torch.manual_seed(recipe.seed)
        self.model = build_classifier(self.settings, subject, shards)[0].to(self.device)
        self.averaged = None if self.settings.ema is None else make_average(self.model, self.settings.ema)
        self._step = self._make_step()
        self.wrapped = self._step.wrapped
        self.reader = Reader(
            shards,
            "train",
            batch=schedule.batch,
            rank=self.rank,
            world=self.world,
            seed=recipe.seed,
            window=shards.image_size,
            flip=False,
            mix_groups=state.mix_groups,
            pixels=shards.layout.windows,
            streams=schedule.streams,
            threads=harness.threads,
        )
        state.streams = self.reader.streams
        self._augment = self._make_augment(subject)
        forward = forward_flops(self.model, shards.channels, self.size)
        self.image_flops = forward if self.settings.freeze else (1 + BACKWARD) * forward  # backwards only in the head
        about = {"recipe": recipe.dump(), "shards": shards.fingerprint, "encoder": subject.fingerprint}
        self.saver = checkpoint.Saver(
            self.model,
            self._step.optimizer,
            self.averaged.module if self.averaged is not None else None,
            lambda: {**state.state(), **about, "cost": spent().record()},
        )

    def _make_step(self) -> FinetuneStep:
        settings, model, schedule, resume = self.settings, self.model, self.schedule, self.harness.resume
        peak = settings.lr * schedule.batch / 256
        optimizer = make_finetune_optimizer(
            model, lr=peak, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay, betas=settings.betas
        )
        if resume is not None:
            checkpoint.load_model(resume, model)
            checkpoint.load_optimizer(resume, model, optimizer)
            if self.averaged is not None:
                checkpoint.load_model(resume, self.averaged.module, name=checkpoint.AVERAGED)
        classes = len(self.shards.classes or ())
        return FinetuneStep(
            model,
            Mixing(classes, settings.mixup, settings.cutmix, settings.label_smoothing, settings.erasing),
            optimizer,
            schedule_of(settings, schedule, optimizer),
            seed=self.seed,
            precision=precision_of(settings, self.device),
            clip_grad=settings.clip_grad,
            accumulate=settings.accumulate,
            averaged=self.averaged,
            wrapped=self.harness.wrap(model) if self.harness.wrap else model,
            world=self.world,
            rank=self.rank,
        )

    def _make_augment(self, subject: EncoderSource) -> RandAugment | None:
        settings = self.settings
        if not settings.rand_augment:
            return None
        return RandAugment(
            settings.rand_augment,
            size=self.size,
            seed=self.seed,
            pixel_mean=subject.pixel_mean,
            scale=settings.crop_scale,
            flip=settings.flip,
        )

    @property
    def trained(self) -> nn.Module:
        """The model that is evaluated and exported: the average of the weights where there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def batches(self, epoch: int, start: int) -> Generator[Batch]:
        """Batches of an epoch from batch `start` on, their images in pixel values (B, C, H, W).

        Images are cropped and augmented here where that is work for the CPU, and in `step` otherwise.
        """

        def prepared(batch: Batch) -> Batch:
            pixels = _pixels(batch, self._host_inputs)
            if self._augment is not None:
                whole = pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)
                pixels = self._augment(whole, batch.rows, epoch=epoch)
            return replace(batch, levels={}, pixels=pixels.pin_memory() if self.device.type == "cuda" else pixels)

        return _in_threads(self.reader.epoch(epoch, start), prepared, self.harness.threads)

    def step(self, batch: Batch, *, epoch: int, step: int) -> StepResult:
        """Do step number `step`, from 0 on."""
        assert batch.pixels is not None
        self.model.train(not self.settings.freeze)  # a frozen encoder has no drop path and fixed statistics
        images = batch.pixels.to(self.device, non_blocking=True).float()
        if self._augment is None:
            images = random_resized_crop(
                images,
                batch.rows.to(self.device),
                size=self.size,
                seed=self.seed,
                epoch=epoch,
                scale=self.settings.crop_scale,
                flip=self.settings.flip,
            )
        return self._step(self._inputs.normalise(images), batch.labels, batch.weight, batch.total, step=step)

    def learning_rate(self) -> float:
        """The learning rate of the head in the last step."""
        return max(float(group["lr"]) for group in self._step.optimizer.param_groups)

    def metrics(self, losses: list[float]) -> dict[str, float]:
        """The mean loss."""
        return {"train/loss": losses[0]} if losses else {}

    def note_cost(self, spent: Spent) -> None:
        """Only a checkpoint remembers it."""

    def end_epoch(self, losses: list[float], *, finished: bool) -> dict[str, float]:
        """Measure the accuracy on val, every finetune.eval_every epochs and at the end."""
        state = self.state
        if not finished and (state.epoch + 1) % self.settings.eval_every:
            return {}
        self.counts = self.evaluate()
        measured = {TOP1: top1_of(self.counts)}
        epochs = state.step / self.schedule.batches_per_epoch
        state.history.append({"epoch": epochs, "images": state.images, **measured})
        return measured

    def evaluate(self) -> torch.Tensor:
        """Val images of all workers by true and predicted class, int64 (K, K) on the CPU: every row once."""
        if self.world > 1:
            for (
                buffer
            ) in self.trained.buffers():  # each worker has its own statistics of batch norm; rank 0's are saved
                dist.broadcast(buffer, 0)
        mine = sequential(
            self.shards,
            "val",
            self.settings.eval_batch,
            window=self.shards.image_size,
            pixels=self.shards.layout.windows,
            part=(self.rank, self.world),
            patiently=True,
        )
        # The first worker has the most batches; all report as many, which tells who of them is behind.
        most = -(-len(positions_of_part(self.shards, "val", (0, self.world))) // self.settings.eval_batch)
        reported = 0

        def images() -> Generator[tuple[torch.Tensor, torch.Tensor]]:
            nonlocal reported
            for batch in mine:
                self.harness.heartbeat(EVALUATION)
                reported += 1
                yield _pixels(batch, self._host_inputs).to(self.device).float(), batch.labels

        counts = count_predictions(
            self.trained,
            self._inputs,
            images(),
            size=self.size,
            classes=self._step.mixing.classes,
            precision=self._step.precision,
        )
        for _ in range(reported, most):
            self.harness.heartbeat(EVALUATION)
        if self.world > 1:
            self.harness.heartbeat(OTHERS)
            dist.all_reduce(counts)
        return counts.cpu()


def _pixels(batch: Batch, inputs: Inputs) -> torch.Tensor:
    """Whole images in pixel values: 8-bit ones where the reader makes them."""
    return batch.pixels if batch.pixels is not None else inputs.raw(batch.levels)[0]


def _in_threads(batches: Generator[Batch], work: Callable[[Batch], Batch], threads: int) -> Generator[Batch]:
    """What `work` makes of each batch, in order; done ahead in as many threads."""
    pending: collections.deque[Future[Batch]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="augment") as pool:
        try:
            for batch in batches:
                pending.append(pool.submit(work, batch))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            batches.close()


def top1_of(counts: torch.Tensor) -> float:
    """Share of the images (K, K) on the diagonal, in percent."""
    return 100 * float(counts.diagonal().sum()) / max(int(counts.sum()), 1)
