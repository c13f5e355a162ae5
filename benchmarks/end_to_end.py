"""Training from shards against training on batches that are in memory already: a table, and a JSON file.

    python benchmarks/end_to_end.py --json FILE [--recipe NAME] [--images FOLDER | --shards SET] [--workers N] [--ray]

What runs is the project's own loop (`pipeline.training.pretrain_loop.train`) in the layout of training: one process a worker, DDP between
several, as many reader threads as training would use. The two differ in one thing: the batches are read from the shard
set, or the first few of them are used over and over. They take turns, and numbers are medians of the repeats:

    end_to_end_vs_synthetic   images/s from shards over images/s from memory
    data_wait_share           share of the time that the worker which waits longest waits for a batch from shards

Without --shards a set is made of the photos of a folder, or of made-up pictures, one after another up to --rows. Every
epoch ends with threads that stop and others that start: a set with few batches an epoch shows that cost larger than it
is. With --ray the workers are those of the pretrain stage, with MLflow and all; otherwise neither Ray nor MLflow is
needed. On a GPU the recipe is compiled; `--set train.compile=false` for the other case.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from measure import BenchmarkError, in_child, interleaved, machine_facts, usable_cores, write_json

SYNTHETIC, SHARDS = "synthetic", "shards"
KEPT = 4  # batches in memory
PICTURES = 2000  # different ones in a set that is made here, at most; of made-up ones 256
GOALS = {"end_to_end_vs_synthetic": (">=", 0.97), "data_wait_share": ("<=", 0.03)}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
ANSWER_SECONDS = 1800  # longer than any run: compilation on a GPU takes minutes


@dataclass(frozen=True)
class Job:
    """One call, as its workers need it."""

    recipe: str
    overrides: tuple[str, ...]
    shards: str
    workers: int = 1
    device: str = "cpu"
    cpus: float = 1.0  # cores of a worker, where it has no GPU
    log_every: int = 10  # steps between the looks at the device that training takes anyway
    warm: int = 10  # steps left out, a multiple of log_every: compilation, memory, the first row groups

    def recipe_for(self, steps: int, **more: Any) -> Any:
        """The recipe, so long that it takes `steps`."""
        from pipeline.config.load import load, with_overrides
        from pipeline.shards.shard_set import ShardSet
        from pipeline.training.schedule import TrainSchedule

        recipe = with_overrides(load(self.recipe, self.overrides), {"train.workers": self.workers})
        epoch = TrainSchedule.of(recipe, ShardSet.open(self.shards).rows["train"]).batches_per_epoch
        changes = {"train.epochs": steps / epoch, "train.warmup_epochs": 0, "train.log_every": self.log_every}
        return with_overrides(recipe, {**changes, **more})


@dataclass
class Measured:
    """A worker's batches: when each was asked for and had, its images on all workers, and CPU time when it was asked for."""

    stamps: list[tuple[float, float, float, float]] = field(default_factory=list)
    ended: float = 0.0
    ended_cpu: float = 0.0

    def result(self, warm: int) -> dict[str, float]:
        """Without the first steps."""
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
    """A class in place of the loop's reader, which times it, and for SYNTHETIC reads only what it keeps in memory."""
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
    """Train for so many steps as one of the workers; what it measured after the first ones."""
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
            threads=min(max(len(usable_cores()) // job.workers, 1), 8),  # as the pretrain stage shares them out
        )
    return measured.result(job.warm)


def _serve(connection: Any, job: Job, rank: int, meeting: str) -> None:
    """A worker's process: train as often as it is told to."""
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
    except Exception as error:  # handed to who asked
        connection.send(("failed", f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def crew(job: Job, folder: Path) -> Iterator[Callable[[str, int], list[dict[str, float]]]]:
    """The workers, which train together when called with (kind, steps); a single one is this process."""
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
                raise BenchmarkError(f"a worker gave no answer in {ANSWER_SECONDS} s")
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
def ray_crew(job: Job, folder: Path) -> Iterator[Callable[[str, int], list[dict[str, float]]]]:
    """The workers of the pretrain stage, each call a run of its own; only rank 0 measures."""
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
    """What training logged itself, without its first lines."""
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


def run(job: Job, *, repeats: int, seconds: float, ray: bool, folder: Path) -> dict[str, Any]:
    """Measure both in turn."""
    found: dict[str, list[list[dict[str, float]]]] = {SYNTHETIC: [], SHARDS: []}
    with (ray_crew if ray else crew)(job, folder) as call:
        try_out = call(SYNTHETIC, job.warm + job.log_every)[0]
        rate = try_out["images_per_second"]
        batch = try_out["seconds"] * rate / job.log_every
        steps = job.warm + max(1, round(seconds * rate / batch / job.log_every)) * job.log_every
        say(f"{steps} steps of {batch:.0f} images each time, the first {job.warm} of them not counted")

        def measure(kind: str) -> float:
            found[kind].append(call(kind, steps))
            return found[kind][-1][0]["images_per_second"]

        contenders = {kind: functools.partial(measure, kind) for kind in found}
        rates = interleaved(contenders, repeats, say)
    if rates.skipped:
        raise BenchmarkError("; ".join(f"{kind}: {reason}" for kind, reason in rates.skipped.items()))
    waits = {kind: [max(worker["wait"] for worker in workers) for workers in made] for kind, made in found.items()}
    pairs = [shards / memory for memory, shards in zip(rates.repeats[SYNTHETIC], rates.repeats[SHARDS], strict=True)]
    numbers = {
        "end_to_end_vs_synthetic": rates.ratio(SHARDS, [SYNTHETIC]),
        "data_wait_share": statistics.median(waits[SHARDS]),
    }
    return {
        "numbers": numbers,
        "goals": {name: verdict(*goal, numbers[name]) for name, goal in GOALS.items()},
        "images_per_second": {kind: rates.median(kind) for kind in found},
        "repeats": rates.repeats,
        "ratios_of_pairs": pairs,
        "data_wait_shares": waits,
        "cpu_seconds_per_image": {kind: cpu_of(made) for kind, made in found.items()},
        "steps": steps,
        "batch": round(batch),
    }


def cpu_of(made: Sequence[Sequence[dict[str, float]]]) -> float | None:
    """Of all workers, libraries' threads included: what a rate says less well where others use the same cores."""
    if not all("cpu_seconds_per_image" in worker for workers in made for worker in workers):
        return None
    return statistics.median(sum(worker["cpu_seconds_per_image"] for worker in workers) for workers in made)


def verdict(sign: str, bound: float, value: float) -> str:
    """A goal, and whether it is reached."""
    reached = value >= bound if sign == ">=" else value <= bound
    return f"{sign} {bound:g}: {'reached' if reached else 'missed'}"


def make_shards(recipe: str, overrides: Sequence[str], out: str, rows: int, images: str | None) -> None:
    """A shard set with the recipe's layout, all train, of a folder's photos or of made-up pictures. For a child process."""
    import numpy as np
    from shards_reading import decode_photos, finish_set

    from pipeline.config.load import load
    from pipeline.shards.layout import Layout

    data = load(recipe, overrides).data
    layout = Layout(data.image_size, data.channels, load(recipe, overrides).steps_by_level(), data.wavelet)
    folder, photos, workers = Path(out), str(Path(out).with_suffix(".npy")), len(usable_cores())
    folder.mkdir(parents=True)
    if images is None:
        np.save(photos, made_up(min(256, rows), data.channels, data.image_size))
    else:
        paths = sorted(str(path) for path in Path(images).rglob("*") if path.suffix.lower() in SUFFIXES)
        chosen = [paths[i * len(paths) // min(PICTURES, len(paths))] for i in range(min(PICTURES, len(paths)))]
        decode_photos(chosen, photos, workers, data.image_size)
    size = min(data.rows_per_shard, -(-rows // workers))
    parts = [range(first, min(first + size, rows)) for first in range(0, rows, size)]
    tasks = [(out, number, part, layout, data.rows_per_group, photos) for number, part in enumerate(parts)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.map(write_file, tasks, chunksize=1)
    finish_set(folder, layout, data.rows_per_group, [entry for entry, _ in made], made[0][1])


def write_file(task: tuple[str, int, range, Any, int, str]) -> tuple[dict[str, Any], Any]:
    """One file of the set: its entry in the manifest, and the statistics of its rows."""
    import numpy as np

    from pipeline.shards.writer import ShardWriter

    out, number, rows, layout, rows_per_group, photos = task
    images = np.load(photos, mmap_mode="r")
    writer = ShardWriter(Path(out), layout, rows_per_group)
    for row in rows:
        writer.append(row, f"{row}", -1, images[row % len(images)])
    closed = writer.close()
    assert closed is not None, rows
    name = f"train-{number:05d}.parquet"
    closed[0].rename(Path(out) / name)
    return {"name": name, **closed[1]}, writer.moments.statistics()


def made_up(count: int, channels: int, side: int) -> Any:
    """Pictures (n, C, H, W), uint8, about as smooth as photos: noise at three scales."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    total = torch.full((count, channels, side, side), 127.5)
    for cells, strength in ((4, 60.0), (max(side // 8, 4), 25.0), (side, 6.0)):
        noise = strength * torch.randn(count, channels, cells, cells, generator=generator)
        total += torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic")
    return total.clamp(0, 255).numpy().astype(np.uint8)


def say(text: str) -> None:
    """What is going on, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """What people read."""
    lines = [f"{'batches':28} {'images/s':>10} {'data wait':>10} {'CPU ms/image':>13}"]
    for kind, rate in result["images_per_second"].items():
        wait = statistics.median(result["data_wait_shares"][kind])
        cpu = result["cpu_seconds_per_image"][kind]
        name = "from shards" if kind == SHARDS else "in memory"
        lines.append(f"{name:28} {rate:10.1f} {wait:10.2%} {'-' if cpu is None else f'{1e3 * cpu:.2f}':>13}")
    lines += [f"{name:28} {value:10.4f} {result['goals'][name]}" for name, value in result["numbers"].items()]
    return "\n".join(lines)


def job_of(given: argparse.Namespace, folder: Path) -> Job:
    """The call's settings, and a shard set where none was given."""
    import torch

    gpus = torch.cuda.device_count()
    gpu = gpus > 0 if given.device is None else given.device == "cuda"
    recipe = given.recipe or ("wamim_vit_base" if gpu else "small_wavelet")
    workers = given.workers or (1 if gpu else min(2, len(usable_cores())))
    defaults = [f"train.batch={256 * workers}", "train.compile=true"] if gpu else []
    overrides = (*defaults, *given.set)
    shards = given.shards
    if shards is None:
        rows = given.rows or (20_480 if gpu else 12_800)
        shards = str(folder / "shards")
        say(f"{rows} rows are written")
        where = str(Path(given.images).absolute()) if given.images else None
        in_child(
            "end_to_end:make_shards", recipe=recipe, overrides=list(overrides), out=shards, rows=rows, images=where
        )
    return Job(recipe, overrides, shards, workers, "cuda" if gpu else "cpu", log_every=given.log_every, warm=given.warm)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--recipe", help="name or YAML file; wamim_vit_base on a GPU, otherwise small_wavelet")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings changed in it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="FOLDER", help="photos that a shard set is made of")
    source.add_argument("--shards", metavar="SET", help="a shard set that fits the recipe, a folder or URL")
    parser.add_argument("--rows", type=int, help="rows of a set that is made; 20480 on a GPU, otherwise 12800")
    parser.add_argument("--workers", type=int, help="1 on a GPU, otherwise 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--ray", action="store_true", help="through Ray Train, as the pretrain stage does it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="about the time of a repeat")
    parser.add_argument("--log-every", type=int, default=10, help="steps between logged metrics")
    parser.add_argument(
        "--warm", type=int, default=10, help="steps left out of every repeat, a multiple of --log-every"
    )
    given = parser.parse_args(arguments)
    if given.warm % given.log_every or given.warm < given.log_every:
        parser.error(f"--warm {given.warm}: not a multiple of --log-every {given.log_every}")
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as temporary:
        job = job_of(given, Path(temporary))
        result = run(job, repeats=given.repeats, seconds=given.seconds, ray=given.ray, folder=Path(temporary))
    if job.device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    described = {**asdict(job), "images": given.images, "ray": given.ray, "seconds": given.seconds}
    write_json(given.json, {"machine": facts, "settings": described, **result})
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
