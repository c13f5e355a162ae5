"""What the run of a stage has cost: images, time, machines, arithmetic, memory and bytes. No Ray in here.

Metrics ``cost/…`` are sums since the work began, over all attempts: what is done again after a kill is paid again, so
``cost/images_seen`` may be more than the images of the x axis. ``perf/…`` says how fast it is at a moment; GPU-hours are
a sum and have one name, ``cost/gpu_hours``. Evaluation, sweeps and the like use `Meter`, training `TrainingMeter`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.periodic import Periodic
from pipeline.runtime.formatting import duration, scaled
from pipeline.storage.jsonl import JsonLines

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
_log = logging.getLogger(__name__)

PREFIX = "cost/"
_FRACTIONS = ("wall_clock_s", "worker_hours", "gpu_hours")
_METRICS, _TASKS = "metrics.jsonl", ".costs.jsonl"  # in a stage's folder
_EVERY = 30.0  # seconds
_TAIL = 1 << 20  # bytes of a metrics file that are searched before all of it is


class CountsBytes(Protocol):
    """Whatever reads the images of a training run."""

    bytes_read: int  # so far


@dataclass(frozen=True)
class Spent:
    """A cost. Two of them add up, but for peaks, of which the higher counts."""

    images_seen: int = 0  # images that went through a network, or were decoded
    wall_clock_s: float = 0.0  # seconds at work, without those between a kill and the next attempt
    worker_hours: float = 0.0  # CPU core-hours: workers × cores that each of them holds × hours
    gpu_hours: float = 0.0
    flops: int = 0  # counted, of the networks alone: see wavemim.flops; what recomputing adds is not in it
    peak_memory_bytes: int = 0  # resident, of the worker that took most
    gpu_peak_memory_bytes: int = 0  # as torch reserved it, of the GPU with most; 0 without one
    bytes_read: int = 0  # of images: columns of shards as they are stored; files of images

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            images_seen=self.images_seen + other.images_seen,
            wall_clock_s=self.wall_clock_s + other.wall_clock_s,
            worker_hours=self.worker_hours + other.worker_hours,
            gpu_hours=self.gpu_hours + other.gpu_hours,
            flops=self.flops + other.flops,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            gpu_peak_memory_bytes=max(self.gpu_peak_memory_bytes, other.gpu_peak_memory_bytes),
            bytes_read=self.bytes_read + other.bytes_read,
        )

    def metrics(self) -> dict[str, float]:
        """By the names of metrics; the GPU's memory only where there is a GPU."""
        values = {f"{PREFIX}{name}": float(value) for name, value in asdict(self).items()}
        if not self.gpu_peak_memory_bytes:
            del values[f"{PREFIX}gpu_peak_memory_bytes"]
        return values

    def record(self) -> dict[str, float]:
        """As JSON, for results and checkpoints."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Spent:
        """From `record` or `metrics`; what they do not name is 0."""
        found: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = (values or {}).get(name, (values or {}).get(PREFIX + name, 0))
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                found[name] = float(value) if name in _FRACTIONS else int(value)
        return cls(**found)

    def __str__(self) -> str:
        """One line for people."""
        return ", ".join(text for name, text in said(self).items() if text)


def said(spent: Spent) -> dict[str, str]:
    """Each part of a cost in words, by its name; empty where it is nothing."""
    words = {
        "images_seen": (spent.images_seen, f"{spent.images_seen:,} images seen"),
        "wall_clock_s": (spent.wall_clock_s, duration(spent.wall_clock_s)),
        "worker_hours": (spent.worker_hours, f"{spent.worker_hours:.3g} worker-hours"),
        "gpu_hours": (spent.gpu_hours, f"{spent.gpu_hours:.3g} GPU-hours"),
        "flops": (spent.flops, f"{scaled(spent.flops, 1000)}FLOP"),
        "peak_memory_bytes": (spent.peak_memory_bytes, f"{scaled(spent.peak_memory_bytes, 1024)}B a worker at most"),
        "gpu_peak_memory_bytes": (
            spent.gpu_peak_memory_bytes,
            f"{scaled(spent.gpu_peak_memory_bytes, 1024)}B a GPU at most",
        ),
        "bytes_read": (spent.bytes_read, f"{scaled(spent.bytes_read, 1024)}B read"),
    }
    return {name: text if value else "" for name, (value, text) in words.items()}


def spent_in(folder: Path) -> Spent:
    """What earlier attempts at a stage have spent, by the last record in its folder's metrics; nothing without one."""
    lines = JsonLines(folder / _METRICS)
    size = lines.size()
    for start in (max(0, size - _TAIL), 0):
        last: dict[str, Any] | None = None
        for entry, _ in lines.read(start):
            values = entry.get("metrics")
            if isinstance(values, dict) and f"{PREFIX}wall_clock_s" in values:
                last = values
        if last is not None or start == 0:
            return Spent.of(last)
    raise AssertionError


def flops_of(model: nn.Module, channels: int, image_size: int) -> int:
    """FLOPs of a forward pass of one image; 0, with a warning, where they cannot be counted: that must not end a stage."""
    from wavemim.flops import forward_flops

    try:
        return forward_flops(model, channels, image_size)
    except Exception as error:  # whatever a model of timm's does that tensors without values do not allow
        _log.warning("FLOPs of %s cannot be counted (%s); cost/flops is without them", type(model).__name__, error)
        return 0


def together(parts: Iterable[Spent]) -> Spent:
    """The cost of all of them; wall-clock adds up, as of stages one after another."""
    total = Spent()
    for part in parts:
        total += part
    return total


class Meter:
    """Measures a stage, or a task of one, from the moment that it is made.

    In a driver with Ray tasks: ``with measuring_tasks(folder, tracker.log, step) as meter:``, give Ray
    ``meter.around(function)`` in place of the function, `add` images, FLOPs and bytes, and put
    ``"cost": meter.read().record()`` into the result. In a process that works by itself: ``Meter(cores=1)``, `add`, `read`.
    """

    def __init__(self, *, cores: float = 0.0, gpus: float = 0.0, before: Spent | None = None) -> None:
        """`cores` and `gpus` are held all the time by this process; 0 for a driver, whose tasks hold them.

        `before`: what earlier attempts at the same work have spent.
        """
        self.cores, self.gpus = cores, gpus
        self.sum = before or Spent()
        self.began = time.monotonic()

    def add(self, *, images: int = 0, flops: int = 0, bytes_read: int = 0) -> None:
        """Work that was done: FLOPs are those of all these images."""
        self.sum += Spent(images_seen=images, flops=flops, bytes_read=bytes_read)

    def take(self, part: Spent) -> None:
        """What a task has spent; its time is within this one's."""
        self.sum += replace(part, wall_clock_s=0.0)

    def read(self, parts: Iterable[Spent] = ()) -> Spent:
        """What has been spent up to now; also by tasks that are still at work, `parts`, and are not taken yet."""
        seconds = time.monotonic() - self.began
        held = Spent(
            wall_clock_s=seconds,
            worker_hours=self.cores * seconds / 3600,
            gpu_hours=self.gpus * seconds / 3600,
            peak_memory_bytes=peak_memory() if self.cores else 0,
            gpu_peak_memory_bytes=gpu_peak_memory() if self.gpus else 0,
        )
        return self.sum + held + replace(together(parts), wall_clock_s=0.0)


class TaskMeter(Meter):
    """Measures a stage whose work is done by tasks: each leaves what it spent as a line in the stage's folder."""

    def __init__(self, folder: Path, *, before: Spent | None = None) -> None:
        super().__init__(before=before)
        self._file = folder.absolute() / _TASKS
        self._begin = JsonLines(self._file).size()

    def around(self, task: Callable[..., T], *, cores: float = 1.0, gpus: float = 0.0) -> Callable[..., T]:
        """The function of a task, which then counts its time and memory: what it holds is `cores` and `gpus`."""
        path = self._file  # the task gets nothing else of this

        @functools.wraps(task)
        def measured(*arguments: Any, **named: Any) -> T:
            meter = Meter(cores=cores, gpus=gpus)
            try:
                return task(*arguments, **named)
            finally:
                if path.parent.is_dir():  # not on a node that does not see it
                    JsonLines(path).append(meter.read().record())

        return measured

    def read(self, parts: Iterable[Spent] = ()) -> Spent:
        """What has been spent up to now."""
        return super().read([*parts, *(Spent.of(line) for line, _ in JsonLines(self._file).read(self._begin))])


@contextlib.contextmanager
def measuring_tasks(folder: Path, log: Callable[[dict[str, float], int], None], images: int) -> Iterator[TaskMeter]:
    """A meter of a stage's tasks, on top of what earlier attempts spent; logged at step `images`.

    At the end, and every half minute by a thread, so that no more is lost when the stage is killed.
    """
    meter = TaskMeter(folder, before=spent_in(folder))

    def record() -> None:
        log(meter.read().metrics(), images)

    try:
        with Periodic(record, _EVERY, name="cost"):
            yield meter
    finally:
        record()


class TrainingMeter:
    """Measures data-parallel training: every worker has one, rank 0's knows what all of them spend.

    A step costs two additions. What the others have read and their memory are asked for in `read`, where metrics are
    brought together anyway.
    """

    def __init__(
        self, device: torch.device, *, world: int, rank: int, cores: float, before: Iterable[Spent | None]
    ) -> None:
        """`cores`: CPUs of a worker. `before`: records of what earlier attempts have spent, of which the last counts."""
        gpus = float(device.type == "cuda")
        known = [spent for spent in before if spent is not None]
        last = max(known, key=lambda spent: spent.wall_clock_s, default=Spent())
        self._meter = Meter(cores=world * cores, gpus=world * gpus, before=last)
        self._device, self._world, self._rank = device, world, rank
        self._readers: list[CountsBytes] = []
        self._image_flops = 0
        self._images = self._flops = self._read_by_others = 0
        self._peaks = (0, 0)

    def follow(self, reader: CountsBytes, image_flops: int) -> None:
        """What trains from now on: where its images come from, and FLOPs of a forward and a backward pass of one."""
        self._readers.append(reader)
        self._image_flops = image_flops

    def step(self, images: int, rows: int) -> None:
        """A step: images of all workers that count, and rows of this worker, of which some may only fill it up."""
        self._images += images
        self._flops += rows * self._world * self._image_flops

    def read(self) -> dict[str, float]:
        """Metrics up to now. Every worker has to call it."""
        self._gather()
        return self.spent().metrics()

    def spent(self) -> Spent:
        """The cost up to now; of other workers' reading and memory as they were at the last `read`."""
        work = Spent(
            images_seen=self._images,
            flops=self._flops,
            bytes_read=self._bytes_read() + self._read_by_others,
            peak_memory_bytes=self._peaks[0],
            gpu_peak_memory_bytes=self._peaks[1],
        )
        return self._meter.read() + work

    def _bytes_read(self) -> int:
        return sum(reader.bytes_read for reader in self._readers)

    def _gather(self) -> None:
        if self._world == 1:
            return
        import torch
        import torch.distributed as dist

        read, gpu = self._bytes_read(), gpu_peak_memory() if self._device.type == "cuda" else 0
        table = torch.zeros(self._world, 3, dtype=torch.float64, device=self._device)
        table[self._rank] = torch.tensor([read, peak_memory(), gpu], dtype=torch.float64)
        dist.all_reduce(table)
        self._read_by_others = int(table[:, 0].sum()) - read
        self._peaks = (int(table[:, 1].max()), int(table[:, 2].max()))


def peak_memory() -> int:
    """The most memory that this process ever held, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux: getrusage would count who started it too
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_memory() -> int:
    """The most memory that torch reserved on this process's GPU, in bytes."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
