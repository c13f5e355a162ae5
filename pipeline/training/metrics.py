"""What is measured while training runs, gathered in one object: losses, waits, speed, cost, stragglers, divergence.

A step only adds to sums that stay on the device. They are read, and compared between workers, where metrics are logged.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from pipeline.config.recipe import Recipe
from pipeline.runtime.progress import memory_metric
from pipeline.runtime.usage import Spent, TrainingMeter
from pipeline.shards.batches import Batch
from pipeline.training.divergence import DivergenceWatch
from pipeline.training.schedule import TrainSchedule, TrainState
from pipeline.training.task import Task
from pipeline.workers.harness import Harness
from pipeline.workers.heartbeat import OTHERS
from pipeline.workers.stragglers import StragglerDetector
from wavemim.step import StepResult

_log = logging.getLogger(__name__)


class LossMeter:
    """Sums of what steps measured, kept on the device; read only when something is logged. A skipped step adds nothing."""

    def __init__(
        self, parts: int, device: torch.device, world: int, epoch_sums: Sequence[float], window: Sequence[float]
    ) -> None:
        """`parts` of the loss; the sums that `sums` gave when training was interrupted, empty at its start."""
        self.world = world
        self.window = torch.zeros(parts + 3, device=device)  # losses · images, gradient norm, steps, images
        self.epoch = torch.zeros(parts + 1, device=device)  # losses · images, images
        if epoch_sums:
            self.epoch += torch.tensor(epoch_sums, device=device)
        if window:
            self.window += torch.tensor(window, device=device)
        self.images = self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, result: StepResult, images: float, waited: float) -> None:
        """Add a step over `images` of all workers, for whose batch this worker waited so many seconds."""
        done = result.grad_norm.isfinite()
        measured = torch.cat((result.losses * images, result.grad_norm[None]))
        one = done.float()[None]
        measured = torch.cat((torch.where(done, measured, 0.0), one, one * images))
        self.window += measured
        self.epoch += torch.cat((measured[:-3], measured[-1:]))
        self.images += images
        self.waited += waited

    def read(self) -> tuple[list[float], dict[str, float]]:
        """Means over images and workers since the last call. To be called by every worker.

        Returns:
            The parts of the loss, none if all steps were skipped; and metrics: gradient norm, speed, data wait.
        """
        values = self._mean_over_workers(self.window)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        losses = [value / values[-1] for value in values[:-3]] if values[-1] else []
        metrics = {"train/grad_norm": values[-3] / values[-2]} if values[-1] else {}
        metrics["perf/images_per_second"] = self.images / seconds
        metrics["perf/data_wait_share"] = self.waited / seconds
        self.window.zero_()
        self.images = self.waited = 0.0
        self.began = time.perf_counter()
        return losses, metrics

    def read_epoch(self) -> list[float]:
        """Means of the parts of the loss over the epoch so far; the next epoch begins. To be called by every worker."""
        values = self._mean_over_workers(self.epoch)
        self.epoch.zero_()
        return [value / max(values[-1], 1.0) for value in values[:-1]]

    def sums(self) -> tuple[list[float], list[float]]:
        """The sums behind `read` and `read_epoch`, the same on every worker. To be called by every worker."""
        return self._mean_over_workers(self.window), self._mean_over_workers(self.epoch)

    def _mean_over_workers(self, sums: torch.Tensor) -> list[float]:
        total = sums.clone()
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        return total.tolist()


class Telemetry:
    """All that is measured while training runs. Every worker has one and calls its methods after the same steps."""

    def __init__(
        self,
        recipe: Recipe,
        harness: Harness,
        state: TrainState,
        schedule: TrainSchedule,
        *,
        parts: Sequence[str],
        section: str,
        spent: Iterable[Spent | None],
    ) -> None:
        """Measure from `state` on.

        Args:
            recipe: The settings.
            harness: The worker.
            state: Where training is; it is kept, read and written while training proceeds.
            schedule: Lengths of the run.
            parts: Names of the parts of the loss, for messages.
            section: Section of the settings that training follows, for messages.
            spent: Records of what earlier attempts have cost.
        """
        device, rank, world = harness.device, harness.rank, harness.world
        self._device, self._state, self._schedule = device, state, schedule
        self.losses = LossMeter(len(parts), device, world, state.epoch_sums, state.window)
        cores, share = recipe.cluster.cpus_per_worker, harness.gpu_share
        self.cost = TrainingMeter(device, world=world, rank=rank, cores=cores, gpu_share=share, before=spent)
        self.divergence = DivergenceWatch(
            parts, device, world, every=schedule.log_steps, max_skipped=recipe.train.max_skipped, section=section
        )
        self.divergence.skipped, self.divergence.before = state.skipped, state.skipped_in_a_row
        self.stragglers = StragglerDetector(device, rank, world, ready=lambda: harness.heartbeat(OTHERS))
        self._waited = 0.0

    def follow(self, task: Task) -> None:
        """`task` is what is trained from now on; no reference to it is kept."""
        self.stragglers.follow(task.wrapped)
        self.cost.follow(task.reader, task.image_flops)
        self.divergence.forget()

    def begin_step(self, waited: float) -> None:
        """A step begins, after `waited` seconds for its batch."""
        self._waited = waited
        self.stragglers.begin(waited)

    def end_step(self, batch: Batch, result: StepResult) -> None:
        """A step is done and counted in the state. Nothing is brought to the host."""
        self.losses.add(result, batch.total, self._waited)
        self.cost.step(round(batch.total), len(batch.rows))
        self.divergence.add(self._state.step, self._state.epoch, batch.rows, result.losses, result.grad_norm)

    def read(self, task: Task) -> dict[str, float]:
        """Metrics since the last call. Raises DivergedError."""
        state, schedule, lr = self._state, self._schedule, task.learning_rate()
        finished = state.step == schedule.total_steps
        report = self.divergence.report(lr, total_steps=state.step if finished else None)
        for spike in report.spikes:
            _log.warning("step %(step)d: loss spike, %(times).0f × the usual deviation; rows %(rows)s", spike)
        losses, metrics = self.losses.read()
        metrics = task.metrics(losses) | metrics | {"train/lr": lr} | memory_metric(self._device)
        metrics |= {
            "train/skipped_steps": float(self.divergence.skipped),
            "train/spikes": float(len(report.spikes)),
        }
        metrics |= self.stragglers.read() | self.cost.read()
        task.note_cost(self.cost.spent())
        return metrics | {"train/epoch": state.epoch + state.batch / schedule.batches_per_epoch}

    def store(self, task: Task) -> None:
        """Write into the state what a resumed run needs in order to log what an uninterrupted one does."""
        state = self._state
        state.window, state.epoch_sums = self.losses.sums()
        state.skipped, state.skipped_in_a_row = self.divergence.skipped_so_far()
        task.note_cost(self.cost.spent())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count as training, in what concerns speed."""
        began = time.perf_counter()
        yield
        self.losses.began += time.perf_counter() - began
