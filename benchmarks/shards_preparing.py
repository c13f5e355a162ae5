"""Measurements of benchmarks/shards.py: the whole prepare stage on Ray, and planning many inputs."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from measure import BenchmarkError, Missing

RECIPE = "wamim_vit_base"
SPLITS = ("train", "val")


def link_copies(paths: Sequence[str], folder: Path, copies: int) -> list[str]:
    """Give every photo `copies` names, by hard links where the file system supports them."""
    folder.mkdir(parents=True)
    found = []
    for copy in range(copies):
        for number, path in enumerate(paths):
            target = folder / f"{copy:02d}-{number:06d}{Path(path).suffix}"
            try:
                os.link(os.path.realpath(path), target)
            except OSError:
                shutil.copyfile(path, target)
            found.append(str(target))
    return found


class PrepareRuns:
    """Runs of the prepare stage on a Ray that is started before anything is measured."""

    def __init__(self, images: Path, work: Path) -> None:
        self.images, self.work = images, work
        self.seconds: list[float] = []  # measured by the stage itself
        self.wall: list[float] = []  # of the whole call, with planning, the start of the tracker and the summary
        self._stack = contextlib.ExitStack()
        self._ready = False

    def __enter__(self) -> PrepareRuns:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        try:
            from pipeline.config.load import load
            from pipeline.runtime.ray_session import ray_session
            from pipeline.stages import prepare
        except ImportError as error:
            raise Missing(str(error)) from None
        # Ray's workers run at niceness 15: beside other processes they would get less of a core than the other contenders.
        os.environ.setdefault("RAY_worker_niceness", "0")
        self._session = self._stack.enter_context(ray_session(load(RECIPE).cluster))
        self._load, self._prepare, self._ready = load, prepare, True

    def run(self) -> float:
        """Prepare the folder again, into a new folder; returns images/s over the wall time of the call."""
        if not self._ready:
            self._start()
        out = self.work / f"prepared-{len(self.wall)}"
        recipe = self._load(RECIPE, [f"images={self.images}", f"out={out}", "data.max_rejected=1"])
        began = time.perf_counter()
        try:
            summary = self._prepare.run(recipe, self._session, self._prepare.check(recipe), progress=False)
        except Exception as error:  # the other measurements go on, whatever it is
            raise BenchmarkError(f"prepare: {' '.join(str(error).split())[:300]}") from error
        self.wall.append(time.perf_counter() - began)
        self.seconds.append(summary["seconds"])
        shutil.rmtree(out, ignore_errors=True)
        return float(sum(summary["rows"].values()) / self.wall[-1])


class Stopwatch:
    """CPU seconds of this thread inside wrapped functions, by part; a function that another one calls counts to that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._running = False

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time counted to `part`."""

        def timed(*args: Any, **options: Any) -> Any:
            if self._running:
                return function(*args, **options)
            self._running, began = True, time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.thread_time() - began
                self._running = False

        return timed

    def items(self, part: str, function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator function `function`, with the time until each item counted to `part`."""

        def timed(*args: Any) -> Iterator[Any]:
            following = self.wrapped(part, iter(function(*args)).__next__)
            with contextlib.suppress(StopIteration):
                while True:
                    yield following()

        return timed


@contextlib.contextmanager
def _timed_parts(watch: Stopwatch) -> Iterator[None]:
    """Count the parts of a task of the prepare stage while the block runs."""
    import pyarrow.parquet as pq
    import xxhash

    from pipeline.images.observed import Observed
    from pipeline.shards import writer
    from pipeline.shards.layout import PyramidEncoder
    from pipeline.shards.statistics import Moments
    from pipeline.stages import prepare_task

    parts: list[tuple[str, Any, tuple[str, ...]]] = [
        ("decode and resize", prepare_task, ("decode_image",)),
        ("range of values", Observed, ("add",)),
        ("transform and round", PyramidEncoder, ("encode",)),
        ("statistics", Moments, ("add_stored",)),
        ("digest of pixels", xxhash, ("xxh3_128_digest",)),
        ("Parquet", pq.ParquetWriter, ("write_table", "close")),
        ("SHA-256 of the file", writer, ("file_entry",)),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(prepare_task, "fetch", watch.items("read files", prepare_task.fetch)))
        for part, owner, names in parts:
            for name in names:
                timed = watch.wrapped(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
        yield


def task_parts(images: str, work: str, repeats: int = 3) -> dict[str, float]:
    """CPU time of each part of a task of the prepare stage, in ms an image on one core.

    Args:
        images: Folder of photos, of which one shard is made.
        work: For temporary files.
        repeats: Number of measurements, of which the median of each part is taken. Parts then may not add up to the total
            exactly; "the rest" is what is left of it.

    Returns:
        Milliseconds of each part, in the order of the work, and "task", their sum.
    """
    from pipeline.config.load import load
    from pipeline.images.arrays import Pixels
    from pipeline.shards import writer
    from pipeline.shards.layout import Layout
    from pipeline.stages import prepare, prepare_task, prepare_units
    from pipeline.storage.folder import Folder

    recipe = load(RECIPE, [f"images={images}", "data.max_rejected=1"])
    data, found = recipe.data, prepare.check(recipe).plan
    assert found is not None, images
    unit = next(unit for unit in prepare_task.make_units(found, data.rows_per_shard) if unit.split == "train")
    layout = Layout(data.image_size, data.channels, recipe.steps_by_level(), data.wavelet)
    measured: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(dir=work) as out:
        pixels = Pixels(data.image_size, data.channels, data.max_pixels, data.min_side)
        task = prepare_task.Task(Folder.at(out), found.origin, layout, pixels, data.rows_per_group, data.compression)
        prepare_units.write_plan(task.folder, found, [unit])

        def run() -> dict[str, float]:
            watch, began = Stopwatch(), time.thread_time()
            task.folder.remove(f"{prepare_task.UNITS}/{unit.name}.tries")
            with _timed_parts(watch):
                made = prepare_task.make_shard({"unit": json.dumps(vars(unit))}, task)
            if made["error"]:
                raise BenchmarkError(made["error"])
            return {**watch.seconds, "task": time.thread_time() - began}

        run()  # imports, and files into the page cache
        for _ in range(repeats):
            for part, seconds in run().items():
                measured[part].append(seconds)
            with mock.patch.object(writer, "codecs", return_value={"compression": "none"}):
                measured["uncompressed"].append(run()["Parquet"])
    ms = {part: statistics.median(seconds) / unit.inputs * 1000 for part, seconds in measured.items()}
    plain, total = ms.pop("uncompressed"), ms.pop("task")
    ms["Parquet: encoding, checksums, file"], ms["Parquet: compression"] = plain, ms.pop("Parquet") - plain
    return {**ms, "the rest, mostly Python": total - sum(ms.values()), "task": total}


def plan(count: int, kind: str, work: str) -> dict[str, float]:
    """Plan `count` inputs from a list or a folder; returns the seconds of each step and the peak memory in GB."""
    try:
        from pipeline.images.sources import plan_source
        from pipeline.stages.prepare_task import make_units
    except ImportError as error:
        raise Missing(str(error)) from None
    from pipeline.config.load import load

    with tempfile.TemporaryDirectory(dir=work) as folder:
        images = _many_files(Path(folder), count) if kind == "folder" else _long_list(Path(folder), count)
        before = _peak_gb()
        began = time.perf_counter()
        found = plan_source(images, val_share=0.1, seed=0)
        planned = time.perf_counter()
        rows = {split: len(found.splits[split]) for split in SPLITS}
        if sum(rows.values()) != count:
            raise Missing(f"a plan with all {count} inputs; it has {rows}")
        units = make_units(found, load(RECIPE).data.rows_per_shard)
        cut = time.perf_counter()
        manifest_bytes = _manifest_bytes(units)
        ended = time.perf_counter()
    return {
        "inputs": count,
        "seconds": ended - began,
        "list_seconds": planned - began,
        "units_seconds": cut - planned,
        "manifest_seconds": ended - cut,
        "units": len(units),
        "manifest_bytes": manifest_bytes,
        "peak_gb": _peak_gb(),
        "peak_gb_before": before,  # of Python and the imported libraries
    }


def _long_list(folder: Path, count: int) -> str:
    path = folder / "list.csv"
    with open(path, "w") as file:
        file.write("path,label,split\n")
        for i in range(count):
            split = "val" if i % 21 == 0 else "train"  # every class in both
            file.write(f"photos/class-{i % 100:04d}/image-{i:08d}.jpg,class-{i % 100:04d},{split}\n")
    return str(path)


def _many_files(folder: Path, count: int) -> str:
    """A hundred classes of empty files, CLASS/IMAGE.jpg: planning reads only their names."""
    root = folder / "photos"
    for number in range(100):
        (root / f"class-{number:04d}").mkdir(parents=True)
    for i in range(count):
        (root / f"class-{i % 100:04d}" / f"image-{i:08d}.jpg").touch()
    return str(root)


def _manifest_bytes(units: Sequence[Any]) -> int:
    from pipeline.config.load import load
    from pipeline.shards.layout import Layout
    from pipeline.shards.shard_set import make_manifest

    recipe = load(RECIPE)
    layout = Layout(recipe.data.image_size, recipe.data.channels, recipe.steps_by_level(), recipe.data.wavelet)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for unit in units:
        rows = unit.inputs if isinstance(unit.inputs, int) else len(unit.inputs)
        entry = {"name": f"{unit.name}.parquet", "rows": rows, "bytes": 30_000 * rows, "sha256": "0" * 64}
        splits[unit.split].append(entry)
    kept = sum(entry["rows"] for files in splits.values() for entry in files)
    manifest = make_manifest(
        layout,
        rows_per_group=recipe.data.rows_per_group,
        classes=[f"class-{number:04d}" for number in range(100)],
        splits=splits,
        statistics={},
        counts={"inputs": kept, "kept": kept, "rejected": 0, "ignored": 0},
    )
    return len(json.dumps(manifest))


def _peak_gb() -> float:
    """Peak memory in 10^9 bytes; on Linux, the peak of getrusage includes that of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log(seconds) over log(inputs) by least squares; 1 means proportional."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
