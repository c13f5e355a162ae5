"""Workers that hang: each says now and then how far it is, and the driver ends one that gets no further.

A worker's training thread only counts what it begins (a batch, a step, a checkpoint); a thread beside it writes that
into a small file of the stage's folder. So the driver sees both a process that is stopped or gone (its file stays as it
is) and a training thread that is stuck in a living one (the file changes, the count does not). Ray itself sees the first
alone. No clock is compared with another, and time is counted in looks: a machine that was suspended, or a clock that is
set, makes no worker hang.
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

_log = logging.getLogger(__name__)

FOLDER = ".beats"  # in the stage's folder
STARTING = 6  # times the limit that a worker may take until it has done its first steps: it builds and compiles
LEAST_START = 300.0  # seconds, however short the limit is
FIRST_STEPS = 2
STEP = "its own part of a step"
BATCH = "a batch of the shard set"
OTHERS = "the other workers"
CHECKPOINT = "a checkpoint"
MODEL = "a model for the next image size"

Pulse = Callable[[str], None]  # "what the training thread begins now": costs no more than a count


@dataclass(frozen=True)
class Beat:
    """How far a worker is, as it says itself."""

    rank: int
    host: str
    pid: int
    node: str  # of Ray
    group: str = ""  # of workers that were started together
    born: str = ""  # when the process was started, in the machine's own count: tells it from a later one of its number
    count: int = 0  # things begun: the same on ranks that are equally far
    steps: int = 0
    doing: str = "the start"
    where: str = ""  # of the training thread, where it stands still
    stuck: float = 0.0  # seconds since the count changed

    def words(self) -> str:
        """Who it is and what it waits for."""
        at = f" ({self.where})" if self.where else ""
        return f"rank {self.rank} on {self.host} (process {self.pid}), waiting for {self.doing}{at}"


def pause_of(limit: float) -> float:
    """Seconds between two beats, and between two looks at them."""
    return min(max(limit / 10, 0.1), 5.0)


class Heart:
    """A worker's side. Called by the training thread with what it begins; its own thread writes that down.

    Where the file cannot be written (a full disk) it is only touched: then the driver knows that the process is alive.
    """

    def __init__(self, folder: Path, rank: int, limit: float, *, node: str = "", group: str = "") -> None:
        """`folder` is the stage's. The calling thread is the one that is watched."""
        self.path = folder / FOLDER / f"rank-{rank:05d}.json"
        self.beat = Beat(rank, socket.gethostname(), os.getpid(), node, group, born(os.getpid()))
        self.count, self.steps, self.doing = 0, 0, self.beat.doing
        self._pause = pause_of(limit)
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __call__(self, doing: str) -> None:
        """The training thread begins something."""
        self.doing = doing
        self.count += 1
        self.steps += doing == STEP

    def __enter__(self) -> Heart:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _run(self) -> None:
        seen = time.monotonic()
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            gone, seen = min(now - seen, 2 * self._pause), now  # no more: it may have been stopped itself
            same = self.count == self.beat.count
            self.beat = replace(
                self.beat,
                count=self.count,
                steps=self.steps,
                doing=self.doing,
                stuck=self.beat.stuck + gone if same else 0.0,
                where=_place(self._watched) if same else "",
            )
            self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)
            new = self.path.with_name(f".{self.path.name}")
            new.write_text(json.dumps(asdict(self.beat)))
            os.replace(new, self.path)  # not forced onto the disk: nobody needs it after a crash
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _place(thread: int) -> str:
    """Where a thread is, by the innermost line of this project: file, line, function."""
    frame = sys._current_frames().get(thread)
    root = str(Path(__file__).resolve().parents[2])
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(root) and "site-packages" not in code.co_filename[len(root) :]:
            return f"{code.co_filename[len(root) + 1 :]}:{frame.f_lineno}, {code.co_name}"
        frame = frame.f_back
    return ""


@dataclass
class _Known:
    """What the driver remembers of a worker."""

    beat: Beat
    mark: int  # when the file was written, ns; only ever compared for being another
    silent: float = 0.0  # seconds that its file did not change


class Watcher:
    """The driver's side: finds a worker that hangs, names it, and has it ended, once a group of workers."""

    def __init__(
        self, folder: Path, limit: float, end: Callable[[Beat], bool], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`limit`: seconds without progress that are too many. `end` ends the process of a worker, wherever it runs, and
        says whether it was still there."""
        self.folder, self.limit, self.end = folder / FOLDER, limit, end
        self.pause = pause_of(limit)
        self._clock, self._looked = clock, clock()
        self._known: dict[int, _Known] = {}
        self._over: set[str] = set()  # groups of which a worker was ended

    def look(self) -> Beat | None:
        """Read what the workers say, and end the one that hangs; gives it. What cannot be read is no sign of anything."""
        now = self._clock()
        gone, self._looked = min(now - self._looked, 2 * self.pause), now
        there = self._read()
        self._known = {rank: known for rank, known in self._known.items() if rank in there}
        for rank, (beat, mark) in there.items():
            known = self._known.get(rank)
            if known is None or (beat.pid, mark) != (known.beat.pid, known.mark):
                self._known[rank] = _Known(beat, mark)
            else:
                known.silent += gone
        late = [known for known in self._known.values() if max(known.silent, known.beat.stuck) >= self._allowed(known)]
        if not late:
            return None
        culprit, what = self._culprit()
        beat = culprit.beat
        self._known = {}
        was_there = self.end(beat)  # where that fails, it is tried again after another limit
        self._over.add(beat.group)
        if not was_there:
            return None  # it is gone already, and the others are waiting for their end
        _log.warning(
            "%s: %s for %.0f s; it was ended, and training goes on from the last checkpoint (train.hang_timeout=%g)",
            beat.words(), what, max(culprit.silent, beat.stuck), self.limit,
        )  # fmt: skip
        return beat

    def _allowed(self, known: _Known) -> float:
        """Seconds; less than the limit by what it takes to notice."""
        started = known.beat.steps > FIRST_STEPS
        return (self.limit if started else max(STARTING * self.limit, LEAST_START)) - 2 * self.pause

    def _culprit(self) -> tuple[_Known, str]:
        """Of workers that wait for each other that which is waited for, a process that is silent, else the one that is
        least far; and what is wrong with it."""
        quiet = [known for known in self._known.values() if known.silent >= 0.5 * self._allowed(known)]
        known = min(quiet or self._known.values(), key=lambda known: (known.beat.count, known.beat.rank))
        others = [other.beat.count for other in self._known.values() if other is not known]
        what = "its process does not answer" if quiet else "it gets no further"
        if not quiet and others and min(others) == known.beat.count:
            what = "all workers stand at the same place"
        return known, what

    def _read(self) -> dict[int, tuple[Beat, int]]:
        """rank -> (what it says, when it was written) of the group of rank 0, which has been started last."""
        found: dict[int, tuple[Beat, int]] = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob("[!.]*"):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    beat = Beat(**json.loads(path.read_bytes()))
                    found[beat.rank] = beat, path.stat().st_mtime_ns
        group = found[0][0].group if 0 in found else None
        return {
            rank: (beat, mark)
            for rank, (beat, mark) in found.items()
            if beat.group not in self._over and group in (None, beat.group)
        }


def born(pid: int) -> str:
    """When a process was started, in ticks since the machine's start; empty where that is not known (not on Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def watching(folder: Path, limit: float | None, end: Callable[[Beat], bool]) -> Iterator[None]:
    """Look after the workers of the stage in `folder` while the block runs; not at all where `limit` is None."""
    with contextlib.suppress(OSError):
        for left in (folder / FOLDER).glob("*"):  # by workers that were killed
            left.unlink()
    if limit is None:
        yield
        return
    watcher, ended = Watcher(folder, limit, end), threading.Event()

    def run() -> None:
        while not ended.wait(watcher.pause):
            try:
                watcher.look()
            except Exception as error:  # training is not to end because nobody looks after it
                _log.warning("a worker that hangs could not be ended: %s", error)

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
