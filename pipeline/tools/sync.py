"""`wavemim sync`: send what MLflow missed while the stages ran."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pipeline.config.places import is_url
from pipeline.errors import SettingError, StageError
from pipeline.runtime import ray_job
from pipeline.storage.folder import Folder
from pipeline.storage.jsonl import JsonLines
from pipeline.storage.mirror import fetch, names_in
from pipeline.storage.object_stores import Address
from pipeline.tools.arguments import Output, tracking_uri
from pipeline.tracking import errors, store_uris
from pipeline.tracking.journal import OUTBOX, SENT, Busy, SendOffset
from pipeline.tracking.mlflow_client import RunGone
from pipeline.tracking.runs import recorded_address, stored_uri
from pipeline.tracking.sender import Sender

# Seconds: to wait for a stage that is sending itself; for one request, since no training waits for it.
_WAIT, _LIMIT = 30.0, 120.0
_LARGE = ("shards", "fetched", "checkpoints", "rung_checkpoints", "blow-up")


@click.command("sync")
@click.argument("run", type=Output(url=True))  # notes in it what it has sent
@click.argument("settings", nargs=-1, metavar="[tracking.uri=URI]")
def command(run: str, settings: tuple[str, ...]) -> None:
    """Send the metrics, files and run states that MLflow has not received; nothing is sent twice.

    RUN is a run's folder (OUT/runs/NAME), the folder of a stage in it, or OUT for all runs, local or in a store. Exit code
    1 if MLflow does not answer.
    """
    uri = tracking_uri(settings, "sync")
    ray_job.check_tracking("tracking.uri", uri or "")
    sync(run, uri=uri, say=click.echo)


def sync(where: str | Path, *, uri: str | None = None, say: Callable[[str], object] = print) -> None:
    """Send what has not been sent yet.

    Args:
        where: An out folder, a run's folder (OUT/runs/NAME) or a stage's folder: a path or URL.
        uri: MLflow's address; None: the one that the stages used.
        say: Called with a line for each stage.

    Raises:
        SettingError: No stage has logged anything there.
        StageError: MLflow does not answer, or refuses.
    """
    if is_url(str(where)):
        with _copy(Folder.at(where)) as local:
            if uri is not None:
                _forget_others(local, store_uris.absolute_uri(uri))
            _sync(local, where, uri, say)
    else:
        _sync(Path(where).expanduser().absolute(), where, uri, say)


def _sync(root: Path, where: str | Path, uri: str | None, say: Callable[[str], object]) -> None:
    if not root.is_dir():
        raise SettingError(f"{where} is not a folder; give OUT, OUT/runs/NAME or the folder of a stage in it")
    below = root / "runs" if (root / "runs").is_dir() else root
    folders = _folders(below)
    if not folders:
        raise SettingError(f"{where} holds no logs of a stage; give OUT, OUT/runs/NAME or the folder of a stage in it")
    for folder in folders:
        name = folder.name if folder == below else str(folder.relative_to(below))
        say(f"{name}: {_send(folder, uri)}")


@contextlib.contextmanager
def _copy(home: Folder) -> Iterator[Path]:
    """A local copy of a folder in a store, without checkpoints; what sending changes in it is copied back."""
    with tempfile.TemporaryDirectory(prefix="wavemim-") as room:
        local = Path(room) / Address.of(home.url).path.rpartition("/")[2]
        local.mkdir()
        names = fetch(home, local, [name for name in names_in(home) if _is_journal(name)])
        before = {name: (local / name).read_bytes() for name in names if name.endswith((OUTBOX, SENT))}
        try:
            yield local
        except StageError as error:
            raise StageError(str(error).replace(str(local), str(home))) from None
        finally:
            for place in _folders(local):
                for name in (str((place / file).relative_to(local)) for file in (OUTBOX, SENT)):
                    with contextlib.suppress(FileNotFoundError):
                        content = (local / name).read_bytes()
                        if content != before.get(name):
                            home.write(name, content)


def _forget_others(local: Path, uri: str) -> None:
    """Have everything sent that was sent to another server before: that may be a file on a machine that is gone."""
    for folder in _folders(local):
        if recorded_address(JsonLines(folder / OUTBOX)) != store_uris.without_password(uri):
            (folder / SENT).unlink(missing_ok=True)


def _is_journal(name: str) -> bool:
    """Whether a file may belong to what is sent: not a checkpoint, nor a shard."""
    return not any(part.startswith("images-") or part in _LARGE for part in name.split("/"))


def _folders(below: Path) -> list[Path]:
    """Folders with an outbox, parents before the folders in them."""
    found = []
    for place, names, files in os.walk(below):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if OUTBOX in files:
            found.append(Path(place))
    return found


def _send(folder: Path, uri: str | None) -> str:
    """Send what is left of one folder; returns what that was, as text."""
    outbox = JsonLines(folder / OUTBOX)
    chosen = uri is not None
    if uri is not None:
        uri = store_uris.absolute_uri(uri)
        if recorded_address(outbox) != store_uris.without_password(uri):
            outbox.append({"do": "store", "uri": store_uris.without_password(uri)})
    else:
        uri = stored_uri(folder, outbox)
    _end_with_parent(folder, outbox)
    sender = Sender(folder, uri, create=chosen or not SendOffset.of(folder).run_id, limit=_LIMIT)
    try:
        sender.send(wait=_WAIT)
    except (RunGone, Busy) as error:
        raise StageError(f"{folder}: {error}; the logs are kept, and sent once that is fixed") from None
    except Exception as error:
        verb = "refuses" if errors.refused(error) else "does not answer"
        raise StageError(
            f"MLflow at {store_uris.without_password(uri)} {verb} ({errors.reason(error)}); unsent logs stay in {folder}"
        ) from error
    if sender.held:
        raise StageError(f"{folder}: MLflow does not accept {_count(sender.held, 'file')} ({sender.trouble})")
    return _said(sender)


def _said(sender: Sender) -> str:
    tally = sender.tally
    parts = []
    if tally.values:
        parts.append(f"{_count(tally.values, 'value')} of {_count(len(tally.names), 'metric')}")
    if tally.files:
        parts.append(_count(tally.files, "file"))
    if not parts and tally.runs:
        parts.append("settings and state")
    if tally.refused:
        parts.append(f"{_count(tally.refused, 'value')} refused")
    if tally.missing:
        parts.append(f"{_count(len(tally.missing), 'file')} no longer exist")
    return f"{', '.join(parts) or 'nothing to send'}; run {sender.run_id}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _end_with_parent(folder: Path, outbox: JsonLines) -> None:
    """A trial that was stopped logged no end: it ends with its sweep."""
    entries = _runs(outbox)
    if not entries or entries[-1]["do"] == "end" or not entries[-1]["parent"]:
        return
    parent = _runs(JsonLines(Path(os.path.normpath(folder / entries[-1]["parent"])) / OUTBOX))
    if parent and parent[-1]["do"] == "end":
        size = JsonLines(folder / "metrics.jsonl").size()
        now = parent[-1].get("time", int(time.time() * 1000))
        outbox.append({"do": "end", "at": size, "status": "KILLED", "time": now, "force": False})


def _runs(outbox: JsonLines) -> list[dict[str, Any]]:
    return [entry for entry, _ in outbox.read() if entry.get("do") in ("start", "end")]
