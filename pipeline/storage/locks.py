"""One owner per folder, local or in an object store."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import SettingError, StageError
from pipeline.storage.folder import OWNER, Folder, log

# Seconds: the owner of a remote folder renews its mark, is taken for dead, and looks whether another was faster.
RENEW, STALE, PAUSE = 20.0, 90.0, 1.0


@contextlib.contextmanager
def owned(folder: Folder, what: str) -> Iterator[None]:
    """Own `folder` alone for the work `what` (a word or two for the message to others). Raises StageError if it is taken.

    Local: a lock that ends with the process, the same one as of `pipeline.runtime.stage_folder.stage_folder`. Remote: a mark in the
    folder, renewed every 20 s and void when it is 90 s old by the store's clock; so after `kill -9` the folder is free
    after 90 s. Stores have no lock: two that start within the same instant are told apart by reading the mark back, and
    an owner that could not renew for 90 s and lost the folder says so in the log alone, its work is not stopped.
    """
    with _locked(folder.local) if folder.local is not None else _leased(folder, what):
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise StageError(f"{path} is being written by process {owner}; wait for it or give another out=") from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def _leased(folder: Folder, what: str) -> Iterator[None]:
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "what": what}
    other = _mark(folder)
    if other is not None:
        age = _age(folder, other, str(mine["id"]))
        if age < STALE:
            raise _taken(
                folder, other, f"; its owner was there {max(age, 0):.0f} s ago, and is given up after {STALE:.0f}"
            )
    _renew(folder, mine)
    time.sleep(PAUSE)
    other = _mark(folder)
    if other is None or other.get("id") != mine["id"]:
        raise _taken(folder, other or {}, "")
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(folder, mine, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            if (_mark(folder) or {}).get("id") == mine["id"]:
                folder.remove(OWNER)
        except (StageError, SettingError) as error:  # what was done is done; the mark becomes void by itself
            log.warning("%s: its mark of ownership stays for %.0f s: %s", folder, STALE, error)


def _keep(folder: Folder, mine: dict[str, Any], ended: threading.Event) -> None:
    """Renew the mark until `ended`, or until it is another's."""
    while not ended.wait(RENEW):
        try:
            found = _mark(folder)
            if found is not None and found.get("id") != mine["id"]:
                log.error("%s has been taken over by process %s on %s", folder, found.get("pid"), found.get("host"))
                return
            _renew(folder, mine)
        except (StageError, SettingError) as error:  # the next time may go well
            log.warning("%s: ownership could not be renewed: %s", folder, error)


def _renew(folder: Folder, mine: dict[str, Any]) -> None:
    # Whole seconds: as long as the one before, which a reader may just have asked for its length.
    folder.write(OWNER, json.dumps({**mine, "renewed": int(time.time())}).encode())


def _mark(folder: Folder) -> dict[str, Any] | None:
    try:
        content = json.loads(folder.read(OWNER))
    except FileNotFoundError:
        return None
    except ValueError:  # another's, whoever that is
        return {}
    return content if isinstance(content, dict) else {}


def _age(folder: Folder, mark: dict[str, Any], name: str) -> float:
    """Seconds since the mark was renewed, by the store's clock: that of a file written now."""
    probe = f".clock-{name}"
    folder.write(probe, b"now")
    try:
        now, then = folder.modified(probe), folder.modified(OWNER)
    finally:
        folder.remove(probe)
    if now is None or then is None:  # a store without times of its own
        return time.time() - float(mark.get("renewed", 0))
    return now - then


def _taken(folder: Folder, owner: dict[str, Any], more: str) -> StageError:
    what = f" ({owner['what']} on {owner.get('host')})" if owner.get("what") else ""
    pid = owner.get("pid", "unknown")
    return StageError(f"{folder} is being written by process {pid}{what}; wait for it or give another out={more}")
