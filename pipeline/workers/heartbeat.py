"""Detection of workers that hang: each reports its progress in a file, and the driver ends one that makes no progress.

The training thread of a worker only counts what it begins (a batch, a step, a checkpoint). A second thread writes the
count into a small file in the stage's folder. So the driver notices both a process that was stopped or is gone (its file
no longer changes) and a training thread that is stuck in a process that is alive (the file changes, the count does not).
Ray by itself notices only the former. Clocks of different machines are never compared, and time is measured from one
look at the files to the next: neither a machine that was suspended nor a clock that was set makes a worker hang.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.periodic import Periodic
from wavemim.atomic import new_file

_log = logging.getLogger(__name__)

FOLDER = ".beats"  # in the stage's folder
STARTING = 6  # times the limit that a worker may take until its first steps are done: it builds and compiles the model
LEAST_START = 300.0  # seconds for the same, however short the limit is
FIRST_STEPS = 2
# What the training thread waits for, as shown to the user.
STEP = "its own computation"
BATCH = "a batch of the shard set"
OTHERS = "the other workers"
CHECKPOINT = "a checkpoint"
MODEL = "a new model"
EVALUATION = "a batch of the evaluation"

ReportActivity = Callable[[str], None]  # called with what the training thread begins; costs no more than counting


@dataclass(frozen=True)
class WorkerStatus:
    """The progress of a worker, as it reports it."""

    rank: int
    host: str
    pid: int
    node: str  # id of the Ray node
    group: str = ""  # id of the workers that were started together
    start_time: str = ""  # of the process, in ticks of its machine: tells it from a later process with the same pid
    count: int = 0  # activities begun: the same on ranks that have come equally far
    steps: int = 0
    activity: str = "the start"
    where: str = ""  # line at which the training thread is stuck
    stalled: float = 0.0  # seconds since the count changed

    def describe(self) -> str:
        """Which worker this is and what it waits for."""
        at = f" ({self.where})" if self.where else ""
        return f"rank {self.rank} on {self.host} (process {self.pid}), waiting for {self.activity}{at}"


def interval_of(limit: float) -> float:
    """Seconds between two reports of a worker, and between two checks by the driver."""
    return min(max(limit / 10, 0.1), 5.0)


class Heartbeat:
    """The worker's side: called by the training thread with what it begins; its own thread writes that to the file.

    If the file cannot be written (disk full), it is only touched: the driver then knows that the process is alive.
    """

    def __init__(self, folder: Path, rank: int, limit: float, *, node: str = "", group: str = "") -> None:
        """The calling thread is the one whose progress is reported.

        Args:
            folder: The stage's folder.
            rank: Rank of this worker.
            limit: Seconds without progress after which the driver ends a worker.
            node: Id of the Ray node.
            group: Id of the workers that were started together.
        """
        self.path = folder / FOLDER / f"rank-{rank:05d}.json"
        self.status = WorkerStatus(rank, socket.gethostname(), os.getpid(), node, group, start_time_of(os.getpid()))
        self.count, self.steps, self.activity = 0, 0, self.status.activity
        self._interval = interval_of(limit)
        self._training_thread = threading.get_ident()
        self._last = time.monotonic()
        self._reports = Periodic(self._report, self._interval, name="heartbeat", join=5)

    def __call__(self, activity: str) -> None:
        """The training thread begins an activity."""
        self.activity = activity
        self.count += 1
        self.steps += activity == STEP
        if activity == STEP and self.steps == 1:  # reported at once: an interrupt saves only if there has been a step
            self.status = replace(self.status, count=self.count, steps=self.steps, activity=activity)
            self._write()

    def __enter__(self) -> Heartbeat:
        self._write()
        self._last = time.monotonic()
        self._reports.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reports.stop()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _report(self) -> None:
        now = time.monotonic()
        passed, self._last = min(now - self._last, 2 * self._interval), now  # capped: the process may have been stopped
        same = self.count == self.status.count
        self.status = replace(
            self.status,
            count=self.count,
            steps=self.steps,
            activity=self.activity,
            stalled=self.status.stalled + passed if same else 0.0,
            where=_line_of(self._training_thread) if same else "",
        )
        self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)
            with new_file(self.path) as partial:  # without fsync: nobody needs it after a crash
                partial.write_text(json.dumps(asdict(self.status)))
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _line_of(thread: int) -> str:
    """Where a thread is: file, line and function of the innermost frame of this project."""
    frame = sys._current_frames().get(thread)
    root = str(Path(__file__).resolve().parents[2])
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(root) and "site-packages" not in code.co_filename[len(root) :]:
            return f"{code.co_filename[len(root) + 1 :]}:{frame.f_lineno}, {code.co_name}"
        frame = frame.f_back
    return ""


@dataclass
class _Observed:
    """What the driver remembers of a worker."""

    status: WorkerStatus
    written: int  # modification time of the file in ns; only ever tested for being different
    silent: float = 0.0  # seconds since the file changed


class HangMonitor:
    """The driver's side: finds a worker that hangs, names it, and has it ended, at most one per group of workers."""

    def __init__(
        self,
        folder: Path,
        limit: float,
        end: Callable[[WorkerStatus], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch the workers of the stage in `folder`.

        Args:
            folder: The stage's folder.
            limit: Seconds without progress after which a worker counts as hanging.
            end: Ends the process of a worker, on whatever node it runs. Returns whether it was still there.
            clock: Seconds, monotonic.
        """
        self.folder, self.limit, self.end = folder / FOLDER, limit, end
        self.interval = interval_of(limit)
        self._clock, self._last = clock, clock()
        self._observed: dict[int, _Observed] = {}
        self._over: set[str] = set()  # groups of which a worker was ended

    def look(self) -> WorkerStatus | None:
        """Read the workers' reports and end the one that hangs. A report that cannot be read means nothing.

        Returns:
            The worker that was ended; None if there was none.
        """
        now = self._clock()
        passed, self._last = min(now - self._last, 2 * self.interval), now
        reports = self._read()
        self._observed = {rank: observed for rank, observed in self._observed.items() if rank in reports}
        for rank, (status, written) in reports.items():
            observed = self._observed.get(rank)
            if observed is None or (status.pid, written) != (observed.status.pid, observed.written):
                self._observed[rank] = _Observed(status, written)
            else:
                observed.silent += passed
        allowed = self._allowed()
        if not any(max(one.silent, one.status.stalled) >= allowed for one in self._observed.values()):
            return None
        culprit, reason = self._culprit(allowed)
        status = culprit.status
        self._observed = {}
        was_there = self.end(status)  # if this fails, it is tried again after another `limit` seconds
        self._over.add(status.group)
        if not was_there:
            return None  # it is already gone, and the others are about to be ended
        _log.warning(
            "%s: %s for %.0f s; it was ended, and training resumes from the last checkpoint (train.hang_timeout=%g)",
            status.describe(), reason, max(culprit.silent, status.stalled), self.limit,
        )  # fmt: skip
        return status

    def _allowed(self) -> float:
        """Seconds without progress that are allowed; less than the limit by the time that it takes to notice.

        All workers of a group take their steps together, so one of them shows for all that training has started.
        """
        started = any(one.status.steps > FIRST_STEPS for one in self._observed.values())
        return (self.limit if started else max(STARTING * self.limit, LEAST_START)) - 2 * self.interval

    def _culprit(self, allowed: float) -> tuple[_Observed, str]:
        """The worker that the others wait for, and what is wrong with it.

        That is a worker whose process does not report, or else the one that has made the least progress.
        """
        silent = [one for one in self._observed.values() if one.silent >= 0.5 * allowed]
        culprit = min(silent or self._observed.values(), key=lambda one: (one.status.count, one.status.rank))
        others = [one.status.count for one in self._observed.values() if one is not culprit]
        reason = "its process does not respond" if silent else "it makes no progress"
        if not silent and others and min(others) == culprit.status.count:
            reason = "all workers are stuck at the same place"
        return culprit, reason

    def _read(self) -> dict[int, tuple[WorkerStatus, int]]:
        """rank -> (report, when it was written) of the group of rank 0, which was started last."""
        found: dict[int, tuple[WorkerStatus, int]] = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob("[!.]*"):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    status = WorkerStatus(**json.loads(path.read_bytes()))
                    found[status.rank] = status, path.stat().st_mtime_ns
        group = found[0][0].group if 0 in found else None
        return {
            rank: (status, written)
            for rank, (status, written) in found.items()
            if status.group not in self._over and group in (None, status.group)
        }


def started(folder: Path) -> bool:
    """Whether a worker of the stage in `folder` has reported a step of training."""
    for path in (folder / FOLDER).glob("[!.]*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(path.read_bytes())["steps"] > 0:
                return True
    return False


def start_time_of(pid: int) -> str:
    """When a process was started, in ticks since its machine booted; empty where that is not known (not on Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def ending_hung_workers(folder: Path, limit: float | None, end: Callable[[WorkerStatus], bool]) -> Iterator[None]:
    """Watch the workers of the stage in `folder` while the block runs, as `HangMonitor` does; not if `limit` is None."""
    with contextlib.suppress(OSError):
        for left in (folder / FOLDER).glob("*"):  # by workers that were killed
            left.unlink()
    if limit is None:
        yield
        return
    monitor = HangMonitor(folder, limit, end)

    def look() -> None:
        try:
            monitor.look()
        except Exception as error:  # training must not end because nobody watches it
            _log.warning("a hung worker could not be ended: %s", error)

    with Periodic(look, monitor.interval, name="hang monitor", join=10):
        yield
