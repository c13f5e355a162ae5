"""The training loop of pretraining and fine-tuning: in a Ray Train worker, in a trial of a sweep and in tests.

It knows neither Ray nor MLflow. What differs between the two is a `Task`: where batches come from, how a batch becomes a
step, and what is done at the end of an epoch. Measurements are gathered in `Telemetry`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import TypeVar

from pipeline.runtime.usage import Spent
from pipeline.shards.batches import Batch
from pipeline.training.divergence import DivergedError, save_diverged
from pipeline.training.metrics import Telemetry
from pipeline.training.schedule import TrainSchedule, TrainState
from pipeline.training.task import Task
from pipeline.workers.harness import Harness
from pipeline.workers.heartbeat import BATCH, STEP
from wavemim.weights import checkpoint

State = TypeVar("State", bound=TrainState)


def starting_point(state: State, harness: Harness) -> tuple[State, list[Spent | None]]:
    """Where a run begins.

    Args:
        state: That of a new run.
        harness: The worker, with the checkpoint to resume from.

    Returns:
        The state, or that of the checkpoint; and the records of what earlier attempts have cost.
    """
    if harness.resume is None:
        return state, [harness.spent]
    content = checkpoint.read_state(harness.resume)
    return state.of(content), [harness.spent, Spent.of(content.get("cost"))]


def run(
    task: Task, end: int, state: TrainState, schedule: TrainSchedule, telemetry: Telemetry, harness: Harness
) -> bool:
    """Train up to step `end`. To be called by every worker.

    Args:
        task: What is trained.
        end: Step after the last one; the end of training or of one of its phases.
        state: Progress of training; it is updated.
        schedule: Lengths of the run.
        telemetry: What is measured.
        harness: The worker.

    Returns:
        Whether training was asked to stop earlier; in that case a checkpoint has been saved.

    Raises:
        DivergedError: Too many steps in a row were skipped; on every worker after the same step.
    """
    telemetry.follow(task)
    try:
        with contextlib.closing(_batches(task, end, state, harness)) as batches:
            for batch, waited in batches:
                telemetry.begin_step(waited)
                result = task.step(batch, epoch=state.epoch, step=state.step)
                state.count(batch)
                telemetry.end_step(batch, result)
                finished = state.step == schedule.total_steps
                epoch_done = state.batch == schedule.batches_per_epoch
                if state.step % schedule.log_steps == 0 or state.step == end:
                    harness.log(telemetry.read(task), state.images)
                if epoch_done or finished:
                    with telemetry.paused():
                        measured = task.end_epoch(telemetry.losses.read_epoch(), finished=finished)
                    harness.log(measured, state.images)
                if epoch_done:
                    state.epoch, state.batch = state.epoch + 1, 0
                save, stop = (True, False) if finished else harness.decide()
                if save or stop or state.step % schedule.checkpoint_steps == 0:
                    telemetry.store(task)
                    harness.save(task.saver, state.state())
                if stop:
                    return True
    except DivergedError as error:
        if harness.folder is not None:
            place, rank, world = task.shards.folder.url, harness.rank, harness.world
            save_diverged(harness.folder, task.saver, error, shards=place, stage=task.stage, rank=rank, world=world)
        raise
    return False


def _batches(task: Task, end: int, state: TrainState, harness: Harness) -> Generator[tuple[Batch, float]]:
    """Batches up to step `end`, epoch after epoch, each with the seconds that this worker waited for it.

    The caller advances `state` by one step for each.
    """
    while state.step < end:
        with contextlib.closing(task.batches(state.epoch, state.batch)) as batches:
            while state.step < end:
                harness.heartbeat(BATCH)
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                harness.heartbeat(STEP)
                yield batch, time.perf_counter() - began
