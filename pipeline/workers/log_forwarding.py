"""Forwards the warnings of workers, wherever they run, to the command that started them, by a file. No Ray in here."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.periodic import Periodic
from pipeline.storage.jsonl import JsonLines

FILE = "warnings.jsonl"
_LOGGERS = ("pipeline", "wavemim")
_POLL = 0.5  # seconds

_log = logging.getLogger(__name__)


class _Writer(logging.Handler):
    """Appends each record to a file."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._lines, self._rank = JsonLines(path), rank
        self._busy = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(self._busy, "writing", False):  # the warning that the file cannot be written
            return
        self._busy.writing = True
        try:
            self._lines.append({"time": record.created, "rank": self._rank, "warning": record.getMessage()})
        finally:
            self._busy.writing = False


@contextlib.contextmanager
def passing_on(folder: Path, rank: int) -> Iterator[None]:
    """Write the warnings of this process, a worker, to the stage's `folder` while the block runs."""
    handler = _Writer(folder / FILE, rank)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextlib.contextmanager
def showing(folder: Path) -> Iterator[None]:
    """Repeat the warnings of the workers of the stage in `folder` while the block runs."""
    lines = JsonLines(folder / FILE)
    position = lines.size()

    def repeat() -> None:
        nonlocal position
        with contextlib.suppress(OSError):
            for entry, end in lines.read(position):
                position = end
                if "warning" in entry:
                    _log.warning("%s", entry["warning"])

    with Periodic(repeat, _POLL, name="warnings", last=repeat, join=5):
        yield
