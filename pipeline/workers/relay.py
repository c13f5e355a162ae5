"""What workers on other nodes write, in the stage's folder on the driver's node.

Where the out folder is in an object store, the driver works in a copy of the stage's folder on its own node, and so do the
workers there. A worker on another node has a folder of its own instead, in which it logs and reports as in the other one. A
thread of it sends what is new to an actor on the driver's node, which writes it into the stage's folder, and learns from the
answer whether the driver asks it to stop. Checkpoints are not sent: they go to the store, and come from there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.places import CACHE
from pipeline.periodic import Periodic
from pipeline.retry import attempts
from pipeline.runtime.usage import Spent, spent_in
from pipeline.storage.folder import Folder
from pipeline.storage.jsonl import JsonLines
from pipeline.tracking.sender import METRICS
from pipeline.tracking.tracker import RunHandle
from pipeline.workers import heartbeat, log_forwarding, unreadable
from wavemim.atomic import new_file

log = logging.getLogger(__name__)

STOP = ".stop"  # in the stage's folder: asks the workers to save a checkpoint and stop
KEPT = ".kept"  # in a worker's own folder: it must not be removed, since it has what the store lacks
_LINES = (METRICS, log_forwarding.FILE)  # files that only grow
_EVERY = 0.5  # seconds between two messages
_PATIENCE = 20.0  # seconds for an answer
_RETRIES = (1.0, 5.0)  # seconds before further tries at the end
_PREFIX = "wavemim-worker-"  # of the folders of workers


@dataclass(frozen=True)
class Relay:
    """Where a worker of a run in a store finds the actor. Small, and can be pickled."""

    node: str  # id of the driver's node
    actor: str  # name of the actor


@dataclass(frozen=True)
class Place:
    """Where a worker works.

    Attributes:
        folder: The stage's folder, or that of a worker on another node.
        handle: For its tracker.
        spent: What earlier attempts at the stage have spent.
        elsewhere: Whether it is on another node than the driver.
    """

    folder: Path
    handle: RunHandle
    spent: Spent
    elsewhere: bool = False
    copy_journal: Callable[[], object] = lambda: None  # to the store, before a checkpoint there is complete


class Receiver:
    """The actor's class: writes what workers send into the stage's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = {name: JsonLines(folder / name) for name in _LINES}
        self._taken: dict[tuple[str, str], int] = {}  # bytes of a file of a worker

    def begin(self) -> tuple[bytes | None, Spent]:
        """What could not be read (`unreadable`), and what earlier attempts have spent."""
        note = None
        with contextlib.suppress(OSError):
            note = (self._folder / unreadable.NOTE).read_bytes()
        return note, spent_in(self._folder)

    def copy_journal(self, home: Folder) -> None:
        """Copy the metrics to the store."""
        copy_journal(self._folder, home)

    def take(self, sender: str, lines: dict[str, tuple[int, bytes]], files: dict[str, bytes | None]) -> bool:
        """Write what a worker has sent.

        Args:
            sender: Id of the worker.
            lines: By file: the byte at which they begin in the worker's own, and whole lines.
            files: Contents of whole files; None for one that was removed.

        Returns:
            Whether the workers are asked to stop.
        """
        for name, (begin, data) in lines.items():
            taken = self._taken.get((sender, name), 0)  # an answer may have been lost
            for line in data[max(0, taken - begin) :].splitlines():
                with contextlib.suppress(ValueError):
                    self._lines[name].append(json.loads(line))
            self._taken[sender, name] = begin + len(data)
        for name, content in files.items():
            with contextlib.suppress(OSError):  # a full disk: the next report comes soon
                if content is None:
                    (self._folder / name).unlink(missing_ok=True)
                else:
                    with new_file(self._folder / name) as partial:
                        partial.write_bytes(content)
        return (self._folder / STOP).exists()


def copy_journal(folder: Path, home: Folder) -> None:
    """Copy the metrics in a stage's folder to the store, ahead of what the driver does every few seconds."""
    with contextlib.suppress(FileNotFoundError):
        home.write(METRICS, (folder / METRICS).read_bytes())


class _Sending:
    """The worker's side: sends what is new in its folder."""

    def __init__(self, folder: Path, actor: Any) -> None:
        self._folder, self._actor = folder, actor
        self._id = uuid.uuid4().hex
        self._sent = dict.fromkeys(_LINES, 0)
        self._stamps: dict[str, int] = {}  # of files that were sent, by name
        self._warned = False

    def send(self) -> bool:
        """Send what is new; whether that succeeded."""
        lines: dict[str, tuple[int, bytes]] = {}
        files: dict[str, bytes | None] = {}
        stamps = self._files()
        for name, begin in self._sent.items():
            with contextlib.suppress(OSError), open(self._folder / name, "rb") as file:
                file.seek(begin)
                if data := file.read().rpartition(b"\n")[0]:
                    lines[name] = (begin, data + b"\n")
        for name in {*stamps, *self._stamps}:
            if stamps.get(name) != self._stamps.get(name):
                files[name] = None
                with contextlib.suppress(FileNotFoundError):
                    files[name] = (self._folder / name).read_bytes()
        try:
            stops = ray.get(self._actor.take.remote(self._id, lines, files), timeout=_PATIENCE)
        except ray.exceptions.RayError as error:
            if not self._warned:
                log.warning("what a worker logs does not reach the driver's node (%s); it is tried again", error)
            self._warned = True
            return False
        self._sent |= {name: begin + len(data) for name, (begin, data) in lines.items()}
        self._stamps = stamps
        with contextlib.suppress(OSError):
            (self._folder / STOP).touch() if stops else (self._folder / STOP).unlink(missing_ok=True)
        return True

    def copy_journal(self, home: Folder) -> None:
        """Send what is new, and have the metrics copied to the store."""
        self.send()
        with contextlib.suppress(ray.exceptions.RayError):  # the driver does it some seconds later
            ray.get(self._actor.copy_journal.remote(home), timeout=3 * _PATIENCE)

    def finish(self) -> None:
        """Send the rest."""
        any(self.send() for _ in attempts(_RETRIES))

    def _files(self) -> dict[str, int]:
        found = {}
        for path in (self._folder / unreadable.NOTE, *(self._folder / heartbeat.FOLDER).glob("[!.]*")):
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(self._folder))] = path.stat().st_mtime_ns
        return found


@contextlib.contextmanager
def receiving(folder: Path, *, needed: bool) -> Iterator[Relay | None]:
    """On the driver: an actor on this node that writes into the stage's `folder` while the block runs, if it is needed."""
    if not needed:
        yield None
        return
    here = ray.get_runtime_context().get_node_id()
    name = f"wavemim-{uuid.uuid4().hex}"
    actor: Any = (
        ray.remote(Receiver)
        .options(
            name=name,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(folder.absolute())
    )
    try:
        yield Relay(here, name)
    finally:
        ray.kill(actor)


@contextlib.contextmanager
def working(folder: Path, handle: RunHandle, relay: Relay | None, home: str | None) -> Iterator[Place]:
    """In a worker: where it works while the block runs.

    Args:
        folder: The stage's folder on the driver's node.
        handle: Of the driver's tracker.
        relay: Where the actor is; None if there is none, because all nodes share the folder or there is one node.
        home: URL of the stage's folder in a store, if it is in one.

    Yields:
        The place. A folder of its own is removed at the end, unless the file `KEPT` is in it.
    """
    if relay is None or relay.node == ray.get_runtime_context().get_node_id():
        here = Place(folder, handle, spent_in(folder))
        yield here if home is None else replace(here, copy_journal=partial(copy_journal, folder, Folder.at(home)))
        return
    actor: Any = ray.get_actor(relay.actor)
    begun: tuple[bytes | None, Spent] = ray.get(actor.begin.remote(), timeout=3 * _PATIENCE)
    own, (note, spent) = _new_folder(), begun
    if note is not None:
        (own / unreadable.NOTE).write_bytes(note)
    sending = _Sending(own, actor)
    try:
        with Periodic(sending.send, _EVERY, name="relay", join=_PATIENCE):
            handle = replace(handle, log_file=str(own / METRICS))
            copy = partial(sending.copy_journal, Folder.at(home or ""))
            yield Place(own, handle, spent, elsewhere=True, copy_journal=copy)
    finally:
        sending.finish()
        if not (own / KEPT).exists():
            shutil.rmtree(own, ignore_errors=True)


def _new_folder() -> Path:
    """A folder for this worker; those of workers on this node that were killed are removed."""
    root = Path(os.environ.get(CACHE) or tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(ValueError, OSError):
            if not _is_running(int(left.name.removeprefix(_PREFIX).partition("-")[0])) and not (left / KEPT).exists():
                shutil.rmtree(left)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
