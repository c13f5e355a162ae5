"""Training workers as the driver sees them: room for them, a group of them on Ray Train, and how that ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from pipeline.config.recipe import Recipe
from pipeline.errors import StageError
from pipeline.runtime.ray_session import SessionInfo, root_cause, uses_gpu
from pipeline.workers.log_forwarding import showing
from pipeline.workers.process import STOP

log = logging.getLogger(__name__)


def run_workers(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    config: Mapping[str, Any],
    recipe: Recipe,
    session: SessionInfo,
    folder: Path,
    *,
    workers: int,
    least: int | None = None,
    what: str,
) -> dict[str, Any]:
    """Run `worker` in so many processes, `least` at least (elastic), to the end; gives what rank 0 gave back.

    It is called with `config` and the stage's "folder". SIGTERM makes the workers save a checkpoint and end, as
    KeyboardInterrupt. Raises StageError where workers failed for good, or say so by "failed"; "uncopied" is a warning.
    """
    use_gpu = uses_gpu(recipe, session)
    trainer = ray.train.torch.TorchTrainer(
        worker,  # type: ignore[arg-type]  # Train V2 hands on what it gives
        train_loop_config={**config, "folder": str(folder.absolute())},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(least, workers) if least and least != workers else workers,  # type: ignore[arg-type]  # of V2
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=".ray",  # Ray's own marks; checkpoints are not its business
            storage_path=str(folder.absolute()),
            failure_config=ray.train.FailureConfig(
                max_failures=recipe.cluster.max_failures,
                controller_failure_limit=1,  # type: ignore[call-arg]  # of Train V2, whose types Ray hides
            ),
        ),
    )
    with sigterm_stops(folder), showing(folder):
        try:
            ended: dict[str, Any] = trainer.fit().return_value or {}  # type: ignore[attr-defined]  # of Train V2
        except SystemExit:
            # Ray Train takes Ctrl-C for itself, and would end the process with 1 and without a word
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            raise StageError(f"{what} failed: {root_cause(error)}; what was reached is kept in {folder}") from error
        # said before SIGTERM, if that is why they ended, has its way
        if ended.get("uncopied"):
            log.warning("%s; the same command copies it", ended["uncopied"])
        if ended.get("failed"):
            raise StageError(f"{what} ended: {ended['failed']}; what was reached is kept in {folder}")
    if ended.get("stopped"):
        raise KeyboardInterrupt
    return ended


@contextlib.contextmanager
def sigterm_stops(folder: Path) -> Iterator[None]:
    """SIGTERM asks the workers to stop and is handled as ever once they have; a second one is handled at once."""
    (folder / STOP).unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        if callable(before):
            before(signal.SIGTERM, None)
        raise KeyboardInterrupt

    def asked(*_: Any) -> None:
        if (folder / STOP).exists():
            end()
        (folder / STOP).touch()
        log.warning("SIGTERM: training saves a checkpoint and ends; once more ends it at once")

    signal.signal(signal.SIGTERM, asked)
    try:
        yield
        if (folder / STOP).exists():
            end()
    finally:
        signal.signal(signal.SIGTERM, before)
        (folder / STOP).unlink(missing_ok=True)
