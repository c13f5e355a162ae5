"""Append-only files of JSON lines, which survive a kill at any moment and take lines of several processes.

A line that cannot be written, because the disk is full, waits in memory and is written before the next one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from pipeline.retry import attempts

_log = logging.getLogger(__name__)

_WAITING = 20_000  # lines kept in memory while the disk is full; beyond that the oldest are dropped
_PAUSES = 20 * (0.005,)  # seconds between attempts at the lock, which writers hold for microseconds


class JsonLines:
    """A file of JSON objects, one per line. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[str] = deque(maxlen=_WAITING)
        self._turn = threading.Lock()
        self._warned = False

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line. If that fails, warn once and keep the line for the next call."""
        with self._turn:
            self._waiting.append(json.dumps(entry))
            try:
                self._write_waiting()
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    reason = error.strerror or error
                    _log.warning("metrics cannot be written to %s (%s); the run continues", self.path, reason)

    def waiting(self) -> list[dict[str, Any]]:
        """The lines that could not be written so far."""
        with self._turn:
            return [json.loads(line) for line in self._waiting]

    def size(self) -> int:
        """Bytes in the file; 0 if there is none."""
        with contextlib.suppress(OSError):
            return self.path.stat().st_size
        return 0

    def head(self) -> str:
        """Digest of the first line, which tells the file from a later one of the same name; "" if there is no line."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            line = file.readline()
            return hashlib.sha256(line).hexdigest()[:16] if line.endswith(b"\n") else ""
        return ""

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Read the lines that are complete.

        Args:
            start: Byte at which a line begins.

        Yields:
            A line's content, {} if it is damaged; and the byte at which it ends.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                start += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {}
                yield entry if isinstance(entry, dict) else {}, start

    def sync(self) -> None:
        """Force what was written onto the disk, so that after a power cut no offset reaches beyond the end of the file."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _write_waiting(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, flags, 0o644)
        try:
            alone = _locked(descriptor)
            if alone:
                _cut_torn_line(descriptor)
            while self._waiting:
                data = (self._waiting[0] + "\n").encode()
                written = os.write(descriptor, data)  # in one call, so that lines of several processes do not mix
                if written != len(data):
                    if alone:
                        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.popleft()
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock the file until it is closed. False where others keep it locked, or the file system has no locks."""
    try:
        return any(lock_descriptor(descriptor, blocking=False) for _ in attempts(_PAUSES))
    except OSError:
        return False


def _cut_torn_line(descriptor: int) -> None:
    """Remove a last line without an end, which a killed writer left: the next line would be joined to it."""
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return
    while end > 0:
        start = max(0, end - 4096)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            os.ftruncate(descriptor, start + found + 1)
            return
        end = start
    os.ftruncate(descriptor, 0)
