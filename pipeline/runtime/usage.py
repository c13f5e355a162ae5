"""What a stage has used: images, time, CPU and GPU hours, FLOPs, memory and bytes read. Does not import Ray.

Metrics ``cost/…`` are sums since the work began, over all attempts: work that is repeated after a kill counts again, so
``cost/images_seen`` may be larger than the images of the x axis. Metrics ``perf/…``, which are logged elsewhere, are rates
at a moment. Training uses `TrainingMeter`, other stages use `Meter` or `measuring_tasks`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.errors import SettingError, StageError
from pipeline.periodic import Periodic
from pipeline.runtime.formatting import duration, scaled
from pipeline.storage.jsonl import JsonLines
from pipeline.storage.mirror import Mirror, copy_id

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
_log = logging.getLogger(__name__)

PREFIX = "cost/"
_FRACTIONS = ("wall_clock_s", "worker_hours", "gpu_hours")
_PEAKS = ("peak_memory_bytes", "gpu_peak_memory_bytes")
_METRICS, _TASKS = "metrics.jsonl", ".costs.jsonl"  # in a stage's folder
_OTHERS = ".costs"  # in a stage's folder in a store: a file for each task on another machine
_EVERY = 30.0  # seconds between records
_TAIL = 1 << 20  # bytes at the end of a metrics file that are searched before all of it


class CountsBytes(Protocol):
    """A reader of images."""

    bytes_read: int  # so far


@dataclass(frozen=True)
class Spent:
    """A cost. Costs add up, except peaks, of which the higher one counts.

    Attributes:
        images_seen: Images that went through a network, or were decoded.
        wall_clock_s: Seconds at work, without those between a kill and the next attempt.
        worker_hours: CPU core-hours: workers × cores that each of them holds × hours.
        gpu_hours: GPU-hours.
        flops: Counted ones of the networks only (see wavemim.flops), without those of activation checkpointing.
        peak_memory_bytes: Resident memory of the worker that used most.
        gpu_peak_memory_bytes: Memory that torch reserved on the GPU that used most; 0 without a GPU.
        bytes_read: Of images: columns of shards as they are stored, or image files.
    """

    images_seen: int = 0
    wall_clock_s: float = 0.0
    worker_hours: float = 0.0
    gpu_hours: float = 0.0
    flops: int = 0
    peak_memory_bytes: int = 0
    gpu_peak_memory_bytes: int = 0
    bytes_read: int = 0

    def __add__(self, other: Spent) -> Spent:
        mine, others = asdict(self), asdict(other)
        return Spent(**{n: max(mine[n], others[n]) if n in _PEAKS else mine[n] + others[n] for n in mine})

    def metrics(self) -> dict[str, float]:
        """The parts as metrics ``cost/…``; those of GPUs only if one was used."""
        values = {f"{PREFIX}{name}": float(value) for name, value in asdict(self).items()}
        for name in ("gpu_hours", "gpu_peak_memory_bytes"):
            if not values[PREFIX + name]:
                del values[PREFIX + name]
        return values

    def record(self) -> dict[str, float]:
        """The parts by name, for JSON in results and checkpoints."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Spent:
        """Read what `record` or `metrics` returned; a missing part is 0."""
        found: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = (values or {}).get(name, (values or {}).get(PREFIX + name, 0))
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                found[name] = float(value) if name in _FRACTIONS else int(value)
        return cls(**found)

    def __str__(self) -> str:
        """One line for people, without the parts that are 0."""
        return ", ".join(text for name, text in said(self).items() if text)


def said(spent: Spent) -> dict[str, str]:
    """Each part of a cost as text, by its name; "" if it is 0."""
    words = {
        "images_seen": (spent.images_seen, f"{spent.images_seen:,} images seen"),
        "wall_clock_s": (spent.wall_clock_s, duration(spent.wall_clock_s)),
        "worker_hours": (spent.worker_hours, f"{spent.worker_hours:.3g} worker-hours"),
        "gpu_hours": (spent.gpu_hours, f"{spent.gpu_hours:.3g} GPU-hours"),
        "flops": (spent.flops, f"{scaled(spent.flops, 1000)}FLOP"),
        "peak_memory_bytes": (spent.peak_memory_bytes, f"{scaled(spent.peak_memory_bytes, 1024)}B per worker at most"),
        "gpu_peak_memory_bytes": (
            spent.gpu_peak_memory_bytes,
            f"{scaled(spent.gpu_peak_memory_bytes, 1024)}B per GPU at most",
        ),
        "bytes_read": (spent.bytes_read, f"{scaled(spent.bytes_read, 1024)}B read"),
    }
    return {name: text if value else "" for name, (value, text) in words.items()}


def spent_in(folder: Path) -> Spent:
    """What earlier attempts at a stage have spent: the last record in its folder's metrics, or nothing."""
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
    """FLOPs of a forward pass of one image.

    Args:
        model: The network.
        channels: Of an image.
        image_size: Height and width in pixels.

    Returns:
        The count; 0, with a warning, if it cannot be counted, which must not end a stage.
    """
    from wavemim.flops import forward_flops

    try:
        return forward_flops(model, channels, image_size)
    except Exception as error:  # a timm model may do anything that tensors without values do not allow
        _log.warning(
            "FLOPs of %s cannot be counted (%s); they are missing from cost/flops", type(model).__name__, error
        )
        return 0


def together(parts: Iterable[Spent]) -> Spent:
    """The sum of costs, also of their wall-clock time, as of stages that run one after another."""
    total = Spent()
    for part in parts:
        total += part
    return total


class Meter:
    """Measures a stage, or one of its tasks, from the moment that it is created.

    In a driver with Ray tasks: ``with measuring_tasks(folder, tracker.log, step) as meter:``, give Ray
    ``meter.around(function)`` in place of the function, `add` images, FLOPs and bytes, and put
    ``"cost": meter.read().record()`` into the result. In a process that does the work itself: ``Meter(cores=1)``, `add`,
    `read`.
    """

    def __init__(self, *, cores: float = 0.0, gpus: float = 0.0, before: Spent | None = None) -> None:
        """
        Args:
            cores: CPUs that this process holds all the time; 0 for a driver, whose tasks hold them.
            gpus: GPUs that it holds.
            before: What earlier attempts at the same work have spent.
        """
        self.cores, self.gpus = cores, gpus
        self.sum = before or Spent()
        self.began = time.monotonic()

    def add(self, *, images: int = 0, flops: int = 0, bytes_read: int = 0) -> None:
        """Add work that was done; `flops` are those of all these images."""
        self.sum += Spent(images_seen=images, flops=flops, bytes_read=bytes_read)

    def take(self, part: Spent) -> None:
        """Add what a task has spent, without its wall-clock time, which is part of this one's."""
        self.sum += replace(part, wall_clock_s=0.0)

    def read(self, parts: Iterable[Spent] = ()) -> Spent:
        """The cost so far. `parts`: the cost of tasks that are still running and were not added yet."""
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
    """Measures a stage whose work is done by tasks. Each task appends what it spent to a file in the stage's folder.

    Where that is a copy of a folder in a store, tasks on other machines write files there.
    """

    def __init__(self, folder: Path, *, before: Spent | None = None, mirror: Mirror | None = None) -> None:
        super().__init__(before=before)
        self._file = folder.absolute() / _TASKS
        self._begin = JsonLines(self._file).size()
        self._id = "" if mirror is None else mirror.id
        self._others = None if mirror is None else mirror.home.sub(_OTHERS)
        self._taken = dict.fromkeys(() if self._others is None else self._others.names(), Spent())

    def around(self, task: Callable[..., T], *, cores: float = 1.0, gpus: float = 0.0) -> Callable[..., T]:
        """Wrap the function of a task so that its time and memory are counted.

        Args:
            task: The function.
            cores: CPUs that the task holds.
            gpus: GPUs that it holds.

        Returns:
            A function with the same arguments and result.
        """
        path, others, copy = self._file, self._others, self._id  # all that is pickled with the task

        @functools.wraps(task)
        def measured(*arguments: Any, **named: Any) -> T:
            meter = Meter(cores=cores, gpus=gpus)
            try:
                return task(*arguments, **named)
            finally:
                if others is not None and copy_id(path.parent) != copy:
                    with contextlib.suppress(StageError, SettingError):
                        others.write(f"{uuid.uuid4().hex}.json", json.dumps(meter.read().record()).encode())
                elif path.parent.is_dir():  # a node may not see the folder
                    JsonLines(path).append(meter.read().record())

        return measured

    def read(self, parts: Iterable[Spent] = ()) -> Spent:
        """The cost so far."""
        if self._others is not None:
            with contextlib.suppress(StageError, SettingError):
                for name in set(self._others.names()) - set(self._taken):
                    self._taken[name] = Spent.of(json.loads(self._others.read(name)))
        lines = (Spent.of(line) for line, _ in JsonLines(self._file).read(self._begin))
        return super().read([*parts, *lines, *self._taken.values()])


@contextlib.contextmanager
def measuring_tasks(
    folder: Path, log: Callable[[dict[str, float], int], None], images: int, mirror: Mirror | None = None
) -> Iterator[TaskMeter]:
    """Measure a stage's tasks while the block runs, on top of what earlier attempts spent.

    The cost is logged at the end, and every half minute so that no more is lost when the stage is killed.

    Args:
        folder: The stage's.
        log: Takes metrics and a step.
        images: The step.
        mirror: Of the folder in a store of which the stage's is a copy.

    Yields:
        The meter.
    """
    meter = TaskMeter(folder, before=spent_in(folder), mirror=mirror)

    def record() -> None:
        log(meter.read().metrics(), images)

    try:
        with Periodic(record, _EVERY, name="cost"):
            yield meter
    finally:
        record()


class TrainingMeter:
    """Measures data-parallel training. Every worker has one; that of rank 0 knows what all of them have spent.

    A step costs two additions. The bytes and the memory of other workers are gathered by `read`, which is called when metrics
    are gathered anyway.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        world: int,
        rank: int,
        cores: float,
        before: Iterable[Spent | None],
        gpu_share: float = 1.0,
    ) -> None:
        """
        Args:
            device: That the worker trains on.
            world: Number of workers.
            rank: Of this worker.
            cores: CPUs per worker.
            before: What earlier attempts have spent, as recorded in several places; the latest counts.
            gpu_share: Of its GPU that a worker has.
        """
        gpus = gpu_share * (device.type == "cuda")
        known = [spent for spent in before if spent is not None]
        last = max(known, key=lambda spent: spent.wall_clock_s, default=Spent())
        self._meter = Meter(cores=world * cores, gpus=world * gpus, before=last)
        self._device, self._world, self._rank = device, world, rank
        self._readers: list[CountsBytes] = []
        self._image_flops = 0
        self._images = self._flops = self._read_by_others = 0
        self._peaks = (0, 0)

    def follow(self, reader: CountsBytes, image_flops: int) -> None:
        """Say what is trained from now on.

        Args:
            reader: Where its images come from.
            image_flops: FLOPs of a forward and a backward pass of one image.
        """
        self._readers.append(reader)
        self._image_flops = image_flops

    def step(self, images: int, rows: int) -> None:
        """Add a step.

        Args:
            images: Of all workers, without rows that only fill up the batch.
            rows: Of this worker, with those.
        """
        self._images += images
        self._flops += rows * self._world * self._image_flops

    def read(self) -> dict[str, float]:
        """The cost so far as metrics. A collective call: all workers must make it."""
        self._gather()
        return self.spent().metrics()

    def spent(self) -> Spent:
        """The cost so far; the bytes and memory of other workers are those of the last `read`."""
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
    """Peak resident memory of this process, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # on Linux getrusage also counts the parent before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_memory() -> int:
    """Peak memory that torch reserved on this process's GPU, in bytes; 0 without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
