"""How far training is: a bar on a terminal, elsewhere a line now and then. No Ray in here.

Both are fed by the metrics file that rank 0 writes, wherever it runs, and are followed by a thread of the driver.
"""

from __future__ import annotations

import contextlib
import functools
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
from pipeline.runtime.formatting import duration
from pipeline.storage.jsonl import JsonLines

MEMORY = "perf/memory_gib"
WINDOW = 300.0  # seconds that the rate is taken over
FEWEST = 5  # looks at training that are kept in any case: logging may be rarer than the window is long
LATE = 3.0  # times the usual distance of two lines after which training counts as standing still
POLL = 0.3  # seconds


class Pace:
    """Images a second of late, and from it the time that is left. Times are of the caller's clock, in seconds.

    Images that were done before (by an earlier call) are no part of the rate, and neither is work that a restart from
    a checkpoint does again: only the time since then counts.
    """

    def __init__(self, total: int, seen: int = 0) -> None:
        """`total`: images of the whole run. `seen`: those that were done when this call began."""
        self.total, self.images = total, seen
        self.points: deque[tuple[float, int]] = deque()  # (time, images)
        self.first_rate = 0.0  # what training said itself, until there are two points

    def add(self, now: float, images: int, rate: float = 0.0) -> None:
        """Training says that it has seen so many images, at `rate` a second by its own measure."""
        if self.points and images <= self.points[-1][1]:
            self.points.clear()  # it was restarted from a checkpoint
        self.images, self.first_rate = min(images, self.total), rate
        if self.points and self.points[-1][0] == now:  # several lines were read at once
            self.points.pop()
        self.points.append((now, images))
        while len(self.points) > FEWEST and now - self.points[0][0] > WINDOW:
            self.points.popleft()

    def rate(self, now: float) -> float:
        """Images a second; 0 where nothing is known. Falls while nothing comes though something should have."""
        if len(self.points) < 2:
            return self.first_rate
        (begin, first), (end, last) = self.points[0], self.points[-1]
        return (last - first) / max((now if self.silent(now) else end) - begin, 1e-9)

    def silent(self, now: float) -> float:
        """Seconds without news, where they are more than usual; else 0."""
        if len(self.points) < 2:
            return 0.0
        times = [at for at, _ in self.points]
        usual = statistics.median(b - a for a, b in itertools.pairwise(times))
        return now - times[-1] if now - times[-1] > max(LATE * usual, 1.0) else 0.0

    def left(self, now: float) -> float | None:
        """Seconds until all images are seen, at the pace of late; None where no pace is known."""
        rate = self.rate(now)
        if rate <= 0:
            return 0.0 if self.images >= self.total else None
        since = now - self.points[-1][0] if self.points and not self.silent(now) else 0.0
        return max((self.total - self.images) / rate - since, 0.0)


class Follower:
    """Reads what is new in a metrics file and shows it."""

    def __init__(
        self,
        path: Path,
        *,
        total: int,
        seen: int = 0,
        name: str = "pretrain",
        seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total`, `seen`: images of the whole run, and of it done before. `seconds`: between lines, where no terminal is.

        Lines that `path` holds already are those of earlier calls. `stream` is stderr where none is given.
        """
        self.lines = JsonLines(path)
        self.position = self.lines.size()
        self.pace = Pace(total, seen)
        self.name, self.seconds, self.clock = name, seconds, clock
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
        """Read what training added; redraw the bar, or write a line where it is time for one."""
        now = self.clock()
        if self.lines.size() < self.position:  # another file in its place
            self.position = 0
        for record, end in self.lines.read(self.position):
            self.position = end
            metrics = record.get("metrics")
            if isinstance(metrics, dict) and "train/loss" in metrics:
                self.metrics = metrics
                self.pace.add(now, int(record["step"]), number(metrics.get("perf/images_per_second")))
        if self.bar is not None:
            self.bar.n = self.pace.images
            self.bar.set_postfix_str(self.words(now), refresh=True)
        elif self.metrics and now - self.shown >= self.seconds:
            self.say(now)

    def say(self, now: float) -> None:
        """Write a line, unless it says what the last one did."""
        share = self.pace.images / max(self.pace.total, 1)
        line = f"{self.name}: {self.pace.images:,} of {self.pace.total:,} images ({share:.1%}), {self.words(now)}"
        self.shown = now
        if line != self.said:
            self.said = line
            self.stream.write(line + "\n")
            self.stream.flush()

    def words(self, now: float) -> str:
        """Rate, loss, data wait, memory and time left, as far as they are known."""
        if not self.metrics:
            return "waiting for the first steps"
        rate, metrics = self.pace.rate(now), self.metrics
        said = [
            f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s",
            f"loss {_short(metrics['train/loss'])}",
        ]
        if "perf/data_wait_share" in metrics:
            said.append(f"data wait {number(metrics['perf/data_wait_share']):.1%}")
        if MEMORY in metrics:
            said.append(f"{number(metrics[MEMORY]):.1f} GiB")
        left = self.pace.left(now)
        said.append("done" if left == 0 and self.pace.images >= self.pace.total else f"{duration(left)} left")
        if silent := self.pace.silent(now):
            said.append(f"no news for {duration(silent)}")
        return ", ".join(said)

    def close(self) -> None:
        """The last look, and the last line."""
        self.look()
        if self.bar is not None:
            self.bar.close()
        elif self.metrics:
            self.say(self.clock())


@contextlib.contextmanager
def following(
    path: Path, *, total: int, seen: int = 0, name: str = "pretrain", seconds: float = 30.0, enabled: bool = True
) -> Iterator[None]:
    """Show how far training is while the block runs, as `Follower` does. What goes wrong with it is nobody's trouble."""
    if not enabled:
        yield
        return
    follower = Follower(path, total=total, seen=seen, name=name, seconds=seconds)

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
    """Images that a whole run sees: the last batch of an epoch may be smaller."""
    epochs, batches = divmod(total_steps, batches_per_epoch)
    return epochs * rows + min(batches * batch, rows)


def memory_metric(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: the device's peak as torch counts it, on a CPU what is resident. Waits for nothing."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
    else:
        import psutil

        used = psutil.Process().memory_info().rss
    return {MEMORY: used / 2**30}


def number(value: Any) -> float:
    """Of a metric, which is text where it is not finite; 0 for what is none."""
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
