"""A run's folder in an object store (its home), of which one process at a time keeps a local copy.

Where ``out=`` is a URL, each stage owns its folder OUT/runs/NAME/STAGE in the store and works in a copy of it on the local
disk, a cache, as it works in a local out folder:

- At the start it owns the folder in the store (`locks`), and fetches its files, unless the local copy is the one that was
  last written there: then the local files are newer, or the same. Which copy that was is in ``.writer.json``.
- While it runs, changed files are copied to the store every few seconds, and at once when the stage says so. A failure
  ends nothing: there is a warning, and another try after a longer pause.
- At the end, what is still missing is copied, with several tries. If that fails, the stage fails, and says what is only here.

Two kinds of files are left out. Those of use to the processes of this machine only are recognised by their names: hidden
and without an ending (``.NAME``), locks, and files that are being written. Those that others copy to the store, or nobody,
are named by whoever opens the mirror. A file that names other files is copied after them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.errors import SettingError, StageError
from pipeline.periodic import Periodic
from pipeline.retry import attempts
from pipeline.storage.folder import OWNER, Folder
from pipeline.storage.locks import claimed, lease_mark
from wavemim.atomic import PARTIAL, new_file

log = logging.getLogger(__name__)

WRITER = ".writer.json"  # in both: id of the copy that was last written to the store
LAST = (
    ".mlflow-sent.json",
    "result.json",
)  # read before, and written after all others, of which they say that they are there
_LARGE = 64 << 20  # bytes from which a file is mapped instead of read: those do not change once they are written
# Seconds: between two copies, also after a failure; bytes per second that copies may take on average.
EVERY, LONGEST, RATE = 10.0, 300.0, 16 << 20
RETRIES = (2.0, 10.0, 30.0)  # seconds before further tries at the end

Stamp = tuple[int, int]  # size and modification time in ns: whether a local file has changed


class Mirror:
    """A local copy of a folder in a store, in which this process writes. Threads may share it."""

    def __init__(self, home: Folder, local: Path, *, owner: str = "", left_out: Collection[str] = ()) -> None:
        """
        Args:
            home: The folder in the store.
            local: The local copy, which this process owns.
            owner: Id of the mark with which this process owns `home`; "" if nobody else writes there.
            left_out: Patterns, as in a shell, of paths in the folder that are not copied; ``*`` matches ``/`` too.
        """
        self.home, self.local, self.owner, self._left_out = home, local, owner, tuple(left_out)
        self.id = ""  # of the local copy, in its WRITER
        self._known: dict[str, Stamp] = {}  # files that the store has, as they were when they were copied
        self._turn = threading.Lock()
        self._next, self._woken, self._failures = 0.0, False, 0

    def pull(self) -> None:
        """Make the local copy equal to the folder in the store, unless it was the last to be written there.

        Raises:
            StorageError: The store does not answer, or failed.
            SettingError: It denies access.
            OSError: The local disk cannot be written.
        """
        mine, known = self._read_writer()
        if mine and mine == _parsed(self._theirs()).get("id"):
            self.id, self._known = mine, known
            # Whatever has removed them (a cleaner of caches): only what is removed under these eyes is removed in the store.
            lost = [name for name in known if name not in LAST and not (self.local / name).exists()]
            self._known |= {name: _stamp(self.local / name) for name in fetch(self.home, self.local, lost)}
            return
        self.local.mkdir(parents=True, exist_ok=True)
        Folder.at(self.local).clear()
        names = fetch(self.home, self.local, [name for name in names_in(self.home) if not self._leaves_out(name)])
        self._known = {name: _stamp(self.local / name) for name in names}
        self._claim()

    def clear(self) -> None:
        """Remove everything from the store, also checkpoints, after the local folder was emptied."""
        with self._turn:
            self.home.clear()
            self._known = {}
            self._claim()

    def push(self) -> int:
        """Copy what has changed to the store, and remove there what was removed here.

        Returns:
            Bytes that were copied.

        Raises:
            StorageError: The store does not answer, or failed.
            SettingError: It denies access.
            StageError: Another process has taken the folder over.
        """
        with self._turn:
            last = {name: found for name in LAST if (found := _content(self.local, name)) is not None}
            files = dict(self._files())
            changed = [name for name in files if files[name] != self._known.get(name) and name not in LAST]
            changed += [name for name in last if name in files and last[name][0] != self._known.get(name)]
            gone = [name for name in self._known if name not in files]
            if not changed and not gone:
                return 0
            self._check_owner()
            copied = 0
            try:
                self._remove([name for name in gone if name in LAST])
                # A checkpoint's state.json says that the others are whole.
                for name in sorted(changed, key=lambda name: (name in LAST, name.endswith("/state.json"))):
                    found = last.get(name) or _content(self.local, name)
                    if found is not None:  # else it was removed meanwhile
                        self.home.write(name, found[1])
                        self._known[name] = found[0]
                        copied += found[0][0]
                self._remove([name for name in gone if name in self._known])
            finally:
                self._save()
            return copied

    def wake(self) -> None:
        """Report that something was written that must not be lost; returns immediately."""
        self._woken = True

    def attempt(self) -> None:
        """Push if that is due. A failure is only a warning."""
        now = time.monotonic()
        if now < self._next and (self._failures or not self._woken):
            return
        self._woken = False
        try:
            copied = self.push()
        except Exception as error:  # of the store or the disk: the stage continues whatever it is
            self._failures += 1
            self._next = time.monotonic() + min(EVERY * 2 ** (self._failures - 1), LONGEST)
            if self._failures in (1, 4):
                log.warning("%s; the stage continues, and what is missing there is in %s", error, self.local)
            return
        if self._failures:
            log.warning("%s: the store takes files again, and has all of them", self.home)
        self._failures = 0
        self._next = time.monotonic() + max(EVERY, copied / RATE)

    def finish(self) -> None:
        """Copy what is missing, with several tries. Raises StageError where that fails."""
        for attempt in attempts(RETRIES):
            try:
                self.push()
                return
            except (StageError, SettingError, OSError) as error:
                if attempt == len(RETRIES):
                    raise StageError(
                        f"not all files of {self.home} were written there ({error}); they are in {self.local}, and the "
                        "same command copies them"
                    ) from None

    def _leaves_out(self, name: str) -> bool:
        first = name.partition("/")[0]
        return (
            first in (OWNER, WRITER)
            or (first.startswith(".") and not Path(first).suffix)
            or any(part.endswith((PARTIAL, ".tmp", ".lock")) for part in name.split("/"))
            or any(fnmatchcase(name, pattern) for pattern in self._left_out)
        )

    def _files(self) -> Iterator[tuple[str, Stamp]]:
        """The local files that belong into the store, with their stamps."""
        for place, folders, names in os.walk(self.local):
            below = os.path.relpath(place, self.local)
            prefix = "" if below == "." else f"{below}/"
            folders[:] = [name for name in folders if not self._leaves_out(f"{prefix}{name}/")]
            for name in names:
                if not self._leaves_out(f"{prefix}{name}"):
                    with contextlib.suppress(FileNotFoundError):
                        yield f"{prefix}{name}", _stamp(Path(place, name))

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.home.remove(name)
            del self._known[name]

    def _check_owner(self) -> None:
        """Raise StageError if another process owns the folder now, because this one could not renew its mark for long."""
        found = lease_mark(self.home) if self.owner else None
        if found is not None and found != self.owner:
            raise StageError(f"{self.home} has been taken over by another run")

    def _claim(self) -> None:
        """Make this copy the one that is written to the store from now on."""
        self.id = uuid.uuid4().hex
        self._save()
        self.home.write(WRITER, json.dumps({"id": self.id}).encode())

    def _save(self) -> None:
        with contextlib.suppress(OSError), new_file(self.local / WRITER) as partial:
            partial.write_text(json.dumps({"id": self.id, "files": self._known}))

    def _theirs(self) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return self.home.read(WRITER)
        return b""

    def _read_writer(self) -> tuple[str, dict[str, Stamp]]:
        try:
            found = _parsed((self.local / WRITER).read_bytes())
            return str(found["id"]), {name: (int(size), int(at)) for name, (size, at) in found["files"].items()}
        except (OSError, KeyError, TypeError, ValueError):
            return "", {}


@contextlib.contextmanager
def mirrored(home: Folder, local: Path, what: str = "a stage", *, left_out: Collection[str] = ()) -> Iterator[Mirror]:
    """Own a folder in a store and keep a local copy of it while the block runs.

    Args:
        home: The folder in the store.
        local: The local copy, which the caller owns.
        what: The work in a word or two, for the message to others.
        left_out: As of `Mirror`.

    Yields:
        The mirror.

    Raises:
        StageError: Another process owns the folder; the store does not answer; or, at the end, files could not be copied.
        SettingError: The store denies access, or has no such bucket.
    """
    with claimed(home, what, lease=local.parent / f".{local.name}.lease.json") as owner:
        mirror = Mirror(home, local, owner=owner, left_out=left_out)
        mirror.pull()
        with pushing(mirror):
            yield mirror
        mirror.finish()


@contextlib.contextmanager
def pushing(mirror: Mirror) -> Iterator[None]:
    """Copy what changes while the block runs, and once more if it raises; at its end `Mirror.finish` is to be called."""
    with Periodic(mirror.attempt, 1.0, name="mirror", join=0.1):
        try:
            yield
        except BaseException:  # also where the stage is interrupted: one try, and the error is the stage's own
            try:
                mirror.push()
            except (StageError, SettingError, OSError) as error:
                log.warning("%s; what is missing there is in %s, and the same command copies it", error, mirror.local)
            raise


def names_in(home: Folder) -> list[str]:
    """Paths of all files below a folder in a store, relative to it, also of hidden ones. Raises StorageError, SettingError."""
    return [f"{folder}/{name}" if folder else name for folder, names in home.tree(hidden=True) for name in names]


def fetch(home: Folder, local: Path, names: Iterable[str]) -> list[str]:
    """Copy files of a folder in a store to a local one; returns the names of those that were there.

    Raises:
        StorageError: The store does not answer, or failed.
        SettingError: It denies access.
        OSError: The local disk cannot be written.
    """
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError), new_file(local / name) as partial:  # removed meanwhile
            home.get(name, partial)
            found.append(name)
    return found


def copy_id(local: Path) -> str:
    """Id of the local copy of a folder in a store, by which a process sees whether it is on the same machine; "" for none."""
    with contextlib.suppress(OSError):
        return str(_parsed((local / WRITER).read_bytes()).get("id", ""))
    return ""


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _content(local: Path, name: str) -> tuple[Stamp, Any] | None:
    """A file's content, and its stamp from before it was read; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        stamp = _stamp(local / name)
        if stamp[0] < _LARGE or name.endswith(".jsonl"):
            return stamp, (local / name).read_bytes()
        with open(local / name, "rb") as file:
            return stamp, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return None


def _parsed(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        return found if isinstance(found, dict) else {}
    return {}
