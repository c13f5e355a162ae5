"""One measurement of benchmarks/end_to_end.py: the project's training loop on batches from shards or from memory.

The workers are this process, processes of the benchmark's own, or those of the pretrain stage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from measure import BenchmarkError, usable_cores

SYNTHETIC, SHARDS = "synthetic", "shards"
KEPT = 4  # batches kept in memory
ANSWER_SECONDS = 1800  # longer than any run: compilation on a GPU takes minutes

# Trains with (kind, steps); returns what each worker measured.
Call = Callable[[str, int], list[dict[str, float]]]


@dataclass(frozen=True)
class Job:
    """The settings of a call that its workers need."""

    recipe: str
    overrides: tuple[str, ...]
    shards: str
    workers: int = 1
    device: str = "cpu"
    cpus: float = 1.0  # cores per worker without a GPU
    log_every: int = 10  # steps between logged metrics, each of which waits for the device
    warm: int = 10  # warm-up steps (compilation, memory, the first row groups), a multiple of log_every

    def recipe_for(self, steps: int, **more: Any) -> Any:
        """The recipe with as many epochs as give `steps` steps."""
        from pipeline.config.load import load, with_overrides
        from pipeline.shards.shard_set import ShardSet
        from pipeline.training.schedule import TrainSchedule

        recipe = with_overrides(load(self.recipe, self.overrides), {"train.workers": self.workers})
        epoch = TrainSchedule.of(recipe, ShardSet.open(self.shards).rows["train"]).batches_per_epoch
        changes = {"train.epochs": steps / epoch, "train.warmup_epochs": 0, "train.log_every": self.log_every}
        return with_overrides(recipe, {**changes, **more})


@dataclass
class Measured:
    """A worker's measurements of each batch.

    A stamp is (time of request, time of delivery, images of the batch over all workers, CPU time at the request).
    """

    stamps: list[tuple[float, float, float, float]] = field(default_factory=list)
    ended: float = 0.0
    ended_cpu: float = 0.0

    def result(self, warm: int) -> dict[str, float]:
        """Rates and shares, without the first `warm` steps."""
        kept = self.stamps[warm:]
        seconds = self.ended - kept[0][0]
        images = sum(stamp[2] for stamp in kept)
        return {
            "images_per_second": images / seconds,
            "wait": sum(had - asked for asked, had, _, _ in kept) / seconds,
            "cpu_seconds_per_image": (self.ended_cpu - kept[0][3]) / images,
            "seconds": seconds,
            "steps": len(kept),
        }


def reader_of(kind: str, measured: Measured) -> Any:
    """A subclass of the loop's reader that measures it; for SYNTHETIC it reuses a few batches kept in memory."""
    from pipeline.shards.reader import Reader

    class TimedReader(Reader):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            if kind == SYNTHETIC:
                with contextlib.closing(super().epoch(0)) as first:
                    self._kept = list(itertools.islice(first, min(KEPT, max(self.batches_per_epoch - 1, 1))))

        def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:  # type: ignore[override]
            batches = super().epoch(epoch, start) if kind == SHARDS else self._again(start)
            try:
                while True:
                    asked, cpu = time.perf_counter(), time.process_time()
                    batch = next(batches, None)
                    if batch is None:
                        return
                    measured.stamps.append((asked, time.perf_counter(), batch.total, cpu))
                    yield batch
            finally:
                measured.ended, measured.ended_cpu = time.perf_counter(), time.process_time()
                batches.close()

        def _again(self, start: int) -> Iterator[Any]:
            for number in range(start, self.batches_per_epoch):
                yield self._kept[number % len(self._kept)]

    return TimedReader


def train_once(job: Job, kind: str, steps: int, rank: int = 0) -> dict[str, float]:
    """Train for `steps` steps as one of the workers; returns what it measured after the warm-up."""
    import torch

    from pipeline.shards.shard_set import ShardSet
    from pipeline.training import pretrain_loop as loop
    from pipeline.training import setup as training

    device = torch.device(job.device if job.device == "cpu" else f"cuda:{rank}")
    measured = Measured()

    def wrap(model: Any) -> Any:
        return torch.nn.parallel.DistributedDataParallel(model, None if device.type == "cpu" else [rank])

    with mock.patch.object(training, "Reader", reader_of(kind, measured)):
        loop.train(
            job.recipe_for(steps),
            ShardSet.open(job.shards),
            device=device,
            rank=rank,
            world=job.workers,
            wrap=wrap if job.workers > 1 else None,
            threads=min(max(len(usable_cores()) // job.workers, 1), 8),  # as in the pretrain stage
        )
    return measured.result(job.warm)


def _serve(connection: Any, job: Job, rank: int, meeting: str) -> None:
    """The main function of a worker process: trains on every request until it receives None."""
    import torch
    import torch.distributed as dist

    if job.device == "cpu":
        torch.set_num_threads(max(1, int(job.cpus)))
    else:
        torch.cuda.set_device(rank)
    backend = "gloo" if job.device == "cpu" else "nccl"
    try:
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=job.workers)
        while (order := connection.recv()) is not None:
            connection.send(("done", train_once(job, *order, rank=rank)))
    except Exception as error:  # raised in the parent process
        connection.send(("failed", f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def workers_of(job: Job, folder: Path) -> Iterator[Call]:
    """Workers outside Ray, which train together with DDP; a single worker is this process."""
    if job.workers == 1:
        import torch

        threads = torch.get_num_threads()
        if job.device == "cpu":
            torch.set_num_threads(max(1, int(job.cpus)))
        try:
            yield lambda kind, steps: [train_once(job, kind, steps)]
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(job.workers)]
    meeting = str(folder / "meeting")
    processes = [
        context.Process(target=_serve, args=(theirs, job, rank, meeting), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]

    def call(kind: str, steps: int) -> list[dict[str, float]]:
        for ours, _ in pipes:
            ours.send((kind, steps))
        found = []
        for ours, _ in pipes:
            if not ours.poll(ANSWER_SECONDS):
                raise BenchmarkError(f"a worker did not answer within {ANSWER_SECONDS} s")
            word, answer = ours.recv()
            if word == "failed":
                raise BenchmarkError(answer)
            found.append(answer)
        return found

    for process in processes:
        process.start()
    try:
        yield call
    finally:
        for (ours, _), process in zip(pipes, processes, strict=True):
            with contextlib.suppress(OSError):
                ours.send(None)
            process.join(10)
            process.kill()


@contextlib.contextmanager
def ray_workers(job: Job, folder: Path) -> Iterator[Call]:
    """The workers of the pretrain stage; each call is a new run, and only rank 0 measures."""
    from pipeline.runtime.ray_session import ray_session
    from pipeline.stages import pretrain

    def loop_of(kind: str) -> Callable[..., Any]:
        def loop(*arguments: Any) -> Any:
            from pipeline.stages import pretrain as theirs
            from pipeline.training import setup as training

            with mock.patch.object(training, "Reader", reader_of(kind, Measured())):
                return theirs._loop(*arguments)

        return loop

    numbers = itertools.count()

    def call(kind: str, steps: int) -> list[dict[str, float]]:
        name = f"{kind}-{next(numbers)}"
        recipe = job.recipe_for(steps, name=name, out=str(folder / "out"), shards=job.shards)
        with mock.patch.object(pretrain, "_loop", loop_of(kind)):
            pretrain.run(recipe, session, pretrain.check(recipe), progress=False)
        return [from_metrics(recipe.stage_dir("pretrain") / "metrics.jsonl", job.warm // job.log_every)]

    recipe = job.recipe_for(1)
    with ray_session(recipe.cluster) as session:
        yield call


def from_metrics(path: Path, skipped: int) -> dict[str, float]:
    """Rates from the metrics that training logged, without the first `skipped` lines."""
    records = [
        record for line in path.read_text().splitlines() if "train/loss" in (record := json.loads(line))["metrics"]
    ]
    images = seconds = waited = 0.0
    for before, record in itertools.pairwise([{"step": 0}, *records]):
        if skipped > 0:
            skipped -= 1
            continue
        count = record["step"] - before["step"]
        lasted = count / record["metrics"]["perf/images_per_second"]
        images, seconds = images + count, seconds + lasted
        waited += record["metrics"]["perf/data_wait_share"] * lasted
    return {"images_per_second": images / seconds, "wait": waited / seconds, "seconds": seconds}
