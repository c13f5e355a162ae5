"""Training workers as the driver sees them: a group of them on Ray Train, hangs, interrupts, and how a run ends."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoints.remote import CheckpointStore
from pipeline.config.recipe import Recipe
from pipeline.errors import StageError
from pipeline.periodic import Periodic
from pipeline.runtime import interrupts, machine, ray_job
from pipeline.runtime.ray_internals import torch_trainer
from pipeline.runtime.ray_session import SessionInfo, root_cause, uses_gpu
from pipeline.shards.shard_set import ShardSet
from pipeline.tracking.tracker import Tracker
from pipeline.workers.harness import CONFIG, Loop
from pipeline.workers.heartbeat import WorkerStatus, ending_hung_workers, start_time_of, started
from pipeline.workers.log_forwarding import showing
from pipeline.workers.relay import STOP, receiving
from pipeline.workers.unreadable import forget
from wavemim.atomic import PARTIAL

log = logging.getLogger(__name__)

_SEND_EVERY = 5.0  # seconds between two looks at what the workers have logged
_PATIENCE = 60.0  # seconds for a task that ends a process


def train_on_workers(
    loop: Loop,
    recipe: Recipe,
    session: SessionInfo,
    folder: Path,
    *,
    shards: ShardSet,
    tracker: Tracker,
    store: CheckpointStore | None,
    workers: int,
    reader_threads: int | None,
    what: str,
    **more: Any,
) -> Any:
    """Run a stage's loop on data-parallel workers to its end, resumed from its last checkpoint.

    KeyboardInterrupt makes the workers save a checkpoint and stop. Workers that hang are ended, those that fail are
    restarted from the last checkpoint, with cluster.min_workers perhaps fewer.

    Args:
        loop: Function of a module, which the workers import.
        recipe: The settings.
        session: The running Ray.
        folder: The stage's folder, which all nodes share unless the out folder is in an object store.
        shards: The shard set.
        tracker: Of the run that rank 0 logs to: it writes to the journal, which this process sends to MLflow.
        store: Second place for the checkpoints.
        workers: Their number.
        reader_threads: Threads that read in a worker; None: its share of the cores.
        what: The work, for messages.
        **more: Handed to the loop, with the above, as its last argument.

    Returns:
        The value of the loop on rank 0.

    Raises:
        StageError: Workers failed too often, or training failed for a reason that a restart does not fix.
        KeyboardInterrupt: Training was stopped.
    """
    forget(folder)
    with (
        Periodic(tracker.wake, _SEND_EVERY, name="metrics of workers"),
        receiving(folder, needed=recipe.home is not None and not session.private) as relay,
        ending_hung_workers(folder, recipe.train.hang_timeout, end_process),
        showing(folder),
    ):
        handle = replace(tracker.handle, uri="")  # without an address it sends nothing
        config = {**more, "loop": loop, "recipe": recipe.dump(), "folder": str(folder.absolute()), "handle": handle}
        config |= {"shards": shards.folder.url, "store": store, "reader_threads": reader_threads}
        config |= {"relay": relay, "home": recipe.stage_home(folder.name)}
        alone = workers == 1 and session.private
        train = _train_alone if alone else functools.partial(_train_in_group, folder=folder, workers=workers)
        ended = _fit(functools.partial(train, ray.put(config), recipe, session), recipe, folder, what)
    if ended.get("stopped"):
        raise KeyboardInterrupt
    if store is not None and recipe.home is not None:
        _take_home(recipe, store, folder, str(ended.get("uncopied", "")))
    return ended.get("value")


def _take_home(recipe: Recipe, store: CheckpointStore, folder: Path, uncopied: str) -> None:
    """At the end, where the out folder is in a store: the last checkpoint must be there, and be in the driver's copy too."""
    if uncopied:
        raise StageError(f"{uncopied}; the same command copies it")
    store.restore(folder, best=recipe.train.keep_best is not None)  # where rank 0 was on another node


def _fit(train: Callable[[], Any], recipe: Recipe, folder: Path, what: str) -> dict[str, Any]:
    """Train, and let the workers stop where that is interrupted; returns and raises as `_ended`."""
    (folder / STOP).unlink(missing_ok=True)
    fitting = interrupts.beside_main(train)
    try:
        return _ended(fitting, recipe.place_of(folder), what, warn=recipe.home is None)
    except KeyboardInterrupt:
        _stop(fitting, recipe, folder, what)
        raise
    finally:
        (folder / STOP).unlink(missing_ok=True)


def _stop(fitting: Future[Any], recipe: Recipe, folder: Path, what: str) -> None:
    """Make the workers save a checkpoint and stop, and wait for that, unless they have nothing to save."""
    if interrupts.interrupted() and recipe.train.hang_timeout is not None and not started(folder):
        return  # they would first come up, which takes long
    (folder / STOP).touch()
    # The checkpoint has to reach a store, perhaps from another node; in a job nobody waits at a terminal.
    patient = recipe.home is not None or ray_job.submission_id() is not None
    with interrupts.saving(lambda: patient or any(folder.glob(f".images-*{PARTIAL}"))):
        _ended(fitting, recipe.place_of(folder), what, warn=True)


def _ended(fitting: Future[Any], kept: str, what: str, *, warn: bool) -> dict[str, Any]:
    """What `train_worker` returned on rank 0, once training ends. Raises StageError if it has failed."""
    try:
        ended: dict[str, Any] = fitting.result() or {}
    except _failures() as error:
        raise StageError(f"{what} failed: {root_cause(error)}; finished work is kept in {kept}") from error
    if warn and ended.get("uncopied"):
        log.warning("%s; the same command copies it", ended["uncopied"])
    if ended.get("failed"):
        raise StageError(f"{what} ended: {ended['failed']}; finished work is kept in {kept}")
    return ended


def _failures() -> tuple[type[Exception], ...]:
    """What failed training raises. Ray Train takes time to import, and cannot have failed where it is not loaded."""
    ray_train = sys.modules.get("ray.train")
    return (ray.exceptions.RayError, *([ray_train.TrainingFailedError] if ray_train else []))


def _train_alone(config: ray.ObjectRef, recipe: Recipe, session: SessionInfo) -> Any:
    """Train on a single worker of a private Ray: a task, without the process that controls a group, which starts in 5 s.

    It is restarted as often as a group would be. Not by Ray, which would count a process that ran out of memory as no failure.
    """
    alone = ray.remote(
        num_cpus=recipe.cluster.cpus_per_worker,
        num_gpus=1 if uses_gpu(recipe, session) else 0,
        max_retries=0,
        max_calls=1,  # each attempt has a process of its own
    )(machine.call)
    alone = alone.options(name="train_alone")
    for failures in itertools.count():
        try:
            return ray.get(alone.remote("pipeline.workers.worker:train_alone", {CONFIG: config}))
        except ray.exceptions.RayError:
            if failures == recipe.cluster.max_failures:  # -1: never
                raise


def _train_in_group(
    config: ray.ObjectRef, recipe: Recipe, session: SessionInfo, folder: Path, workers: int
) -> dict[str, Any] | None:
    """Train on data-parallel workers, with Ray Train."""
    ended: dict[str, Any] | None = _trainer(config, recipe, session, folder, workers).fit().return_value
    return ended


def _trainer(config: ray.ObjectRef, recipe: Recipe, session: SessionInfo, folder: Path, workers: int) -> Any:
    import ray.train

    from pipeline.workers.worker import train_worker

    use_gpu = uses_gpu(recipe, session)
    least = least_workers(recipe, workers)
    return torch_trainer(
        private=session.private,
        train_loop_per_worker=train_worker,
        # By reference: the process that controls the workers would else import torch and all models to read it.
        train_loop_config={CONFIG: config},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(least, workers) if least != workers else workers,  # type: ignore[arg-type]  # of V2
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=".ray",  # Ray's own records; checkpoints are not its business
            storage_path=str(folder.absolute()),
            failure_config=ray.train.FailureConfig(
                max_failures=recipe.cluster.max_failures,
                controller_failure_limit=1,  # type: ignore[call-arg]  # of Train V2, whose types Ray hides
            ),
        ),
    )


def least_workers(recipe: Recipe, workers: int) -> int:
    """The fewest workers that a stage with so many may continue with (cluster.min_workers)."""
    return min(recipe.cluster.min_workers or workers, workers)


def end_process(worker: WorkerStatus) -> bool:
    """Kill a worker's process on its node, whatever its state; Ray notices that and restarts the workers.

    Ray's own way of ending an actor asks its process, which does not respond if it is stopped.

    Returns:
        Whether the process was still there.
    """
    if worker.node == ray.get_runtime_context().get_node_id():
        return _kill(worker.pid, worker.start_time)
    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    kill = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there)
    return bool(ray.get(kill.remote(worker.pid, worker.start_time), timeout=_PATIENCE))


def _kill(pid: int, start_time: str) -> bool:
    if start_time_of(pid) != start_time:  # a later process with this pid, or none
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
