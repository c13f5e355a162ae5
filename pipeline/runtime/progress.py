"""Progress of training: a bar on a terminal, elsewhere a line every half minute. Does not import Ray.

A thread of the driver reads it from the metrics file that rank 0 writes, wherever that runs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from pipeline.periodic import Periodic
from pipeline.runtime import observability
from pipeline.runtime.formatting import duration
from pipeline.storage.jsonl import JsonLines

MEMORY, LOSS, SKIPPED = "perf/memory_gib", "train/loss", "train/skipped_steps"
WINDOW = 300.0  # seconds over which the rate is computed
FEWEST = 5  # points that are kept in any case: logging may be rarer than the window is long
LATE = 3.0  # training counts as stalled after so many times the usual time between two lines
POLL = 0.3  # seconds


class Pace:
    """Recent rate in images per second, and from it the time left. Times are seconds of the caller's clock.

    Images of an earlier call are not part of the rate. After a restart from a checkpoint only the time since then counts.
    """

    def __init__(self, total: int, seen: int = 0) -> None:
        """`total`: images of the whole run. `seen`: those that an earlier call has done."""
        self.total, self.images = total, seen
        self.points: deque[tuple[float, int]] = deque()  # (time, images)
        self.first_rate = 0.0  # as training measured it, until there are two points

    def add(self, now: float, images: int, rate: float = 0.0) -> None:
        """Note that training has seen so many images, at `rate` images per second by its own measure."""
        if self.points and images <= self.points[-1][1]:
            self.points.clear()  # it was restarted from a checkpoint
        self.images, self.first_rate = min(images, self.total), rate
        if self.points and self.points[-1][0] == now:  # several lines were read at once
            self.points.pop()
        self.points.append((now, images))
        while len(self.points) > FEWEST and now - self.points[0][0] > WINDOW:
            self.points.popleft()

    def rate(self, now: float) -> float:
        """Images per second; 0 if unknown. Falls while a line is overdue."""
        if len(self.points) < 2:
            return self.first_rate
        (begin, first), (end, last) = self.points[0], self.points[-1]
        return (last - first) / max((now if self.silent(now) else end) - begin, 1e-9)

    def silent(self, now: float) -> float:
        """Seconds since the last line if it is overdue; else 0."""
        if len(self.points) < 2:
            return 0.0
        times = [at for at, _ in self.points]
        usual = statistics.median(b - a for a, b in itertools.pairwise(times))
        return now - times[-1] if now - times[-1] > max(LATE * usual, 1.0) else 0.0

    def left(self, now: float) -> float | None:
        """Seconds until all images are seen, at the recent rate; None if that is unknown."""
        rate = self.rate(now)
        if rate <= 0:
            return 0.0 if self.images >= self.total else None
        since = now - self.points[-1][0] if self.points and not self.silent(now) else 0.0
        return max((self.total - self.images) / rate - since, 0.0)


class Follower:
    """Reads new lines of a metrics file and shows the progress."""

    def __init__(
        self,
        path: Path,
        *,
        total: int,
        seen: int = 0,
        name: str = "pretrain",
        run: str = "",
        seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            path: The metrics file. Lines that it holds already are those of earlier calls.
            total: Images of the whole run.
            seen: Images that an earlier call has done.
            name: Of the stage.
            run: Its name, for what is published.
            seconds: Between two lines if `stream` is not a terminal.
            stream: Where to write; stderr if not given.
            clock: Seconds.
        """
        self.lines = JsonLines(path)
        self.position = self.lines.size()
        self.pace = Pace(total, seen)
        self.name, self.run, self.seconds, self.clock = name, run, seconds, clock
        self.began = time.time()
        self.stream = stream if stream is not None else sys.stderr
        self.metrics: dict[str, Any] = {}
        self.shown = self.clock()
        self.said = ""
        self.bar: Any = None
        if self.stream.isatty():
            self.bar = tqdm(
                total=total,
                initial=seen,
                desc=name,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
            )

    def look(self) -> None:
        """Read new lines; redraw the bar, or write a line if one is due."""
        now = self.clock()
        if self.lines.size() < self.position:  # another file took its place
            self.position = 0
        for record, end in self.lines.read(self.position):
            self.position = end
            metrics = record.get("metrics")
            if isinstance(metrics, dict) and (LOSS in metrics or SKIPPED in metrics):  # no loss if all were skipped
                self.metrics = metrics
                self.pace.add(now, int(record["step"]), number(metrics.get("perf/images_per_second")))
        if self.bar is not None:
            self.bar.n = self.pace.images
            self.bar.set_postfix_str(self.words(now), refresh=True)
        elif self.metrics and now - self.shown >= self.seconds:
            self.say(now)
        if observability.active() and self.metrics:
            observability.publish(self.run, self.name, self.pace.images, self.pace.total, "images", self.published(now))

    def published(self, now: float) -> dict[str, float]:
        """What is published beside the images seen, as far as it is known."""
        saved = (folder.stat().st_mtime for folder in self.lines.path.parent.glob("images-*"))
        values = {
            "wavemim_images_per_second": self.pace.rate(now),
            "wavemim_checkpoint_age_seconds": time.time() - max([self.began, *saved]),
        }
        if LOSS in self.metrics:
            values["wavemim_loss"] = number(self.metrics[LOSS])
        if (left := self.pace.left(now)) is not None:
            values["wavemim_seconds_left"] = left
        if "perf/data_wait_share" in self.metrics:
            values["wavemim_data_wait_share"] = number(self.metrics["perf/data_wait_share"])
        return values

    def say(self, now: float) -> None:
        """Write a line, unless it is the same as the last one."""
        share = self.pace.images / max(self.pace.total, 1)
        line = f"{self.name}: {self.pace.images:,} of {self.pace.total:,} images ({share:.1%}), {self.words(now)}"
        self.shown = now
        if line != self.said:
            self.said = line
            self.stream.write(line + "\n")
            self.stream.flush()

    def words(self, now: float) -> str:
        """Rate, loss, steps skipped, data wait, memory and time left, as far as they are known."""
        if not self.metrics:
            return "waiting for the first steps"
        rate, metrics = self.pace.rate(now), self.metrics
        said = [f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"]
        if LOSS in metrics:
            said.append(f"loss {_short(metrics[LOSS])}")
        if "perf/data_wait_share" in metrics:
            said.append(f"data wait {number(metrics['perf/data_wait_share']):.1%}")
        if MEMORY in metrics:
            said.append(f"{number(metrics[MEMORY]):.1f} GiB")
        if skipped := round(number(metrics.get(SKIPPED))):
            said.append(f"{skipped:,} step{'s' if skipped > 1 else ''} skipped")
        left = self.pace.left(now)
        said.append("done" if left == 0 and self.pace.images >= self.pace.total else f"{duration(left)} left")
        if silent := self.pace.silent(now):
            said.append(f"no update for {duration(silent)}")
        return ", ".join(said)

    def close(self) -> None:
        """Read and show the last changes."""
        self.look()
        if self.bar is not None:
            self.bar.close()
        elif self.metrics:
            self.say(self.clock())


@contextlib.contextmanager
def following(
    path: Path,
    *,
    total: int,
    seen: int = 0,
    name: str = "pretrain",
    run: str = "",
    seconds: float = 30.0,
    enabled: bool = True,
) -> Iterator[None]:
    """Show the progress of training while the block runs, with the arguments of `Follower`. Its errors are ignored."""
    if not enabled and not observability.active():
        yield
        return
    nowhere = None if enabled else io.StringIO()
    follower = Follower(path, total=total, seen=seen, name=name, run=run, seconds=seconds, stream=nowhere)

    def showing(show: Callable[[], None]) -> bool:
        try:
            show()
        except (OSError, ValueError):  # the terminal is gone
            return False
        return True

    last = functools.partial(showing, follower.close)
    with Periodic(functools.partial(showing, follower.look), POLL, name="progress", last=last, join=5):
        yield


def images_of_run(total_steps: int, batches_per_epoch: int, batch: int, rows: int) -> int:
    """Images that a whole run sees.

    Args:
        total_steps: Of the run.
        batches_per_epoch: Steps of an epoch.
        batch: Images of a step; the last one of an epoch may have fewer.
        rows: Images of an epoch.
    """
    epochs, batches = divmod(total_steps, batches_per_epoch)
    return epochs * rows + min(batches * batch, rows)


def memory_metric(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB, as a metric: torch's peak on a GPU, else resident memory. Does not synchronise."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
    else:
        import psutil

        used = psutil.Process().memory_info().rss
    return {MEMORY: used / 2**30}


def number(value: Any) -> float:
    """Value of a metric, which is a string if it is not finite; 0 if it is not a finite number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return 0.0
    return found if found - found == 0 else 0.0


def _short(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return "?"
