"""One owner per folder, local or in an object store.

A local folder is owned by a file lock beside it (``.NAME.lock``, which holds the owner's process id), which the operating
system releases when the process ends, also after ``kill -9``.

Object stores have no locks. There the owner writes a mark into the folder (``.owner.json``: who it is) and renews it every
`RENEW` seconds; a mark that is `STALE` seconds old by the store's clock no longer counts. Two processes that start at the
same moment both find no mark, and must not both believe that theirs is the one that stays:

- In S3, with boto3 installed, the mark is written on condition: only if there is none, or only in place of the very mark
  that was found stale. The store decides, and one of them is refused. Renewals are conditional too.
- Elsewhere (other stores, S3 without boto3, S3 servers that refuse conditional writes) the mark is written
  unconditionally, and read back after `PAUSE` seconds: the last writer owns the folder. Two owners are then possible if
  a write takes longer than the pause.

The mark is read back in both cases, since some S3 servers ignore the condition.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import SettingError, StageError
from pipeline.periodic import Periodic
from pipeline.storage.conditional import S3Object, UnsupportedError
from pipeline.storage.folder import OWNER, Folder, log
from pipeline.storage.object_stores import StorageError

# Seconds: between two renewals of the mark; its age from which it no longer counts; before it is read back.
RENEW, STALE, PAUSE = 20.0, 90.0, 1.0
_LOOK = 5.0  # between looks at another owner's mark


@contextlib.contextmanager
def owned(folder: Folder, what: str) -> Iterator[None]:
    """Own a folder while the block runs.

    A local folder is free again when the process ends, however it ends. A folder in an object store is free 90 s after
    ``kill -9``; an owner that could not renew its mark for that long, and lost the folder, logs an error, but its work is
    not stopped.

    Args:
        folder: The folder; it need not exist yet.
        what: The work in a word or two, for the message to others.

    Raises:
        StageError: Another process owns the folder, or the store does not answer.
        SettingError: The store denies access, or has no such bucket.
    """
    with _locked(folder.local) if folder.local is not None else _leased(folder, what):
        yield


@contextlib.contextmanager
def claimed(folder: Folder, what: str, *, lease: Path, other: str = "out=") -> Iterator[str]:
    """As `owned`, but wait for an owner that seems to have ended: it was killed, or its machine is gone.

    Whether a mark in a store is still renewed takes up to a minute and a half to see. A mark that was made with the same
    `lease` is removed at once.

    Args:
        folder: The folder; it need not exist yet.
        what: The work in a word or two, for the message to others.
        lease: A local file that the caller alone uses, by a lock that ends with its process: it holds the mark.
        other: The settings that name another folder, for the message.

    Yields:
        Id of the mark; "" for a local folder, which has a lock.

    Raises:
        StageError: Another process owns the folder, or the store does not answer.
        SettingError: The store denies access, or has no such bucket.
    """
    with contextlib.suppress(OSError, ValueError):
        if folder.local is None and lease_mark(folder) == json.loads(lease.read_bytes())["id"]:
            folder.remove(OWNER)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(owned(folder, what))
        except StorageError:
            raise
        except StageError as taken:
            if folder.local is not None or not _given_up(folder):
                raise StageError(
                    f"{folder} is being written by another run; wait for it, or give another name= or {other} "
                    f"({str(taken).partition(';')[0]})"
                ) from None
            stack.enter_context(owned(folder, what))
        mark = (lease_mark(folder) or "") if folder.local is None else ""
        if mark:
            lease.parent.mkdir(parents=True, exist_ok=True)
            lease.write_text(json.dumps({"id": mark}) + "\n")
        yield mark


def lease_mark(folder: Folder) -> str | None:
    """Id in the mark of the owner of a folder in a store; None if there is no mark, or it cannot be parsed."""
    found = _mark(folder)
    return None if found is None else found.get("id")


def _given_up(folder: Folder) -> bool:
    """Wait until the owner of a folder in a store renews its mark, so that it is running, or the mark is too old to count.

    Returns:
        Whether the folder is free.
    """
    log.warning("%s: another run owned it a moment ago; waiting to see whether it still does", folder)
    seen = folder.modified(OWNER)
    ends = time.monotonic() + STALE + 1
    while time.monotonic() < ends:
        time.sleep(_LOOK)
        renewed = folder.modified(OWNER)
        if renewed != seen:
            return renewed is None  # its owner has ended and removed it
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.parent / f".{path.name}.lock"
    # A lock that ends with the process, or none: no file that stands for a lock where the file system has no locks.
    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        owner = file.read_text().strip() or "unknown"
        raise StageError(f"{path} is being written by process {owner}; wait for it or give another out=") from None
    try:
        file.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _leased(folder: Folder, what: str) -> Iterator[None]:
    lease = _Lease(folder, what)
    lease.take()
    try:
        with Periodic(lease.renew, RENEW, name="lease"):
            yield
    finally:
        lease.release()


class _Lease:
    """Ownership of a folder in an object store."""

    def __init__(self, folder: Folder, what: str) -> None:
        self.folder = folder
        self.mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "what": what}
        self.object: S3Object | None = None  # the mark, where it is written on condition
        self.version: str | None = None  # of the mark as it was last written or read there

    def take(self) -> None:
        """Write the mark. Raises StageError where another process owns the folder."""
        other = _mark(self.folder)
        if other is not None:
            age = _age(self.folder, other, str(self.mine["id"]))
            if age < STALE:
                more = (
                    f"; its owner last renewed its lock {max(age, 0):.0f} s ago; the lock expires after {STALE:.0f} s"
                )
                raise _taken(self.folder, other, more)
        self._open(other)
        if self._write():
            time.sleep(PAUSE)
        other = _mark(self.folder)
        if not self._is_mine(other):
            raise _taken(self.folder, other or {}, "")

    def renew(self) -> bool:
        """Write the mark again. False once another process owns the folder: then there is nothing left to renew."""
        try:
            found = _mark(self.folder)
            if (found is None or self._is_mine(found)) and self._write():
                return True
            found = _mark(self.folder)
        except (StageError, SettingError) as error:  # the next renewal may succeed
            log.warning("%s: ownership could not be renewed: %s", self.folder, error)
            return True
        owner = found or {}
        log.error("%s has been taken over by process %s on %s", self.folder, owner.get("pid"), owner.get("host"))
        return False

    def release(self) -> None:
        """Remove the mark if it is still this process's."""
        try:
            if self._is_mine(_mark(self.folder)):
                self.folder.remove(OWNER)
        except (StageError, SettingError) as error:  # the work is done, and the mark goes stale by itself
            log.warning("%s: its lock could not be removed and expires in %.0f s: %s", self.folder, STALE, error)

    def _is_mine(self, mark: dict[str, Any] | None) -> bool:
        return mark is not None and mark.get("id") == self.mine["id"]

    def _open(self, found: dict[str, Any] | None) -> None:
        """Prepare conditional writes where they are possible. `found` is the stale mark that may be replaced."""
        self.object = S3Object.at(self.folder, OWNER)
        if self.object is None:
            return
        try:
            content, self.version = self.object.read()
        except (StageError, SettingError) as error:  # boto3 may find other credentials than pyarrow did
            log.debug("%s: no conditional writes: %s", self.folder, error)
            self.object = None
            return
        if _parsed(content) != found:  # somebody else was here in between
            raise _taken(self.folder, _parsed(content) or {}, "")

    def _write(self) -> bool:
        """Write the mark; whether that was done, and not refused because another process was faster."""
        # Whole seconds keep its length: a reader may have asked for that just before it was replaced.
        content = json.dumps({**self.mine, "renewed": int(time.time())}).encode()
        for _ in range(2):
            if self.object is None:
                self.folder.write(OWNER, content)
                return True
            try:
                written = self.object.write(content, only_if=self.version)
            except UnsupportedError as error:
                log.debug("%s: no conditional writes: %s", self.folder, error)
                self.object = None
                continue
            if written is not None:
                self.version = written
                return True
            # Refused: by another's mark, or by one's own, when a request was repeated whose answer was lost.
            found, self.version = self.object.read()
            if found is not None and not self._is_mine(_parsed(found)):
                return False
        return self._is_mine(_mark(self.folder))


def _mark(folder: Folder) -> dict[str, Any] | None:
    """Content of the owner's mark, {} for one that cannot be understood; None where there is none."""
    try:
        return _parsed(folder.read(OWNER))
    except FileNotFoundError:
        return None


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _age(folder: Folder, mark: dict[str, Any], name: str) -> float:
    """Seconds since the mark was renewed, by the store's clock: that of a file written now."""
    probe = f".clock-{name}"
    folder.write(probe, b"now")
    try:
        now, then = folder.modified(probe), folder.modified(OWNER)
    finally:
        folder.remove(probe)
    if now is None or then is None:  # a store that does not say when an object was written
        return time.time() - float(mark.get("renewed", 0))
    return now - then


def _taken(folder: Folder, owner: dict[str, Any], more: str) -> StageError:
    what = f" ({owner['what']} on {owner.get('host')})" if owner.get("what") else ""
    pid = owner.get("pid", "unknown")
    return StageError(f"{folder} is being written by process {pid}{what}; wait for it or give another out={more}")
