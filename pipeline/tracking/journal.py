"""The journal: what a stage logged, in files of its folder, and how far it was sent to MLflow.

Tracking never ends a run: training does not wait for MLflow, and continues if MLflow is down, slow, full or
refuses something. Logging only appends a line to a local file; a thread sends what is there. What could not be sent
is sent later: by this process, by the next one that resumes the stage, or by ``wavemim sync``.

The files
    Three in the stage's folder. The first two only grow, and are the ground truth; MLflow has a copy.

    ``metrics.jsonl``
        The metrics: ``{"step": images seen, "time": seconds since 1970, "metrics": {name: value}}``. A value that is not
        finite is a string ("nan", "inf") and is not sent, since MLflow stores numbers only.
    ``.mlflow-outbox.jsonl``
        Everything else, in the order in which it happened. What a line does is its ``do``:

        - ``start``: a run begins or is resumed: its key, name, experiment, tags, parameters, parent, and ``at``, the
          length of ``metrics.jsonl`` at that moment;
        - ``text`` and ``file``: an artifact. A file is named, not copied: it is read when it is sent;
        - ``tag``: a tag of the run; in its value ``{run_id}`` stands for MLflow's id of the run where `fill` is true;
        - ``dataset``: a data set that the run reads, with its context;
        - ``end``: the run ends, with status, time, and ``at`` as above;
        - ``store``: from here on another MLflow server was chosen with ``wavemim sync tracking.uri=``.
    ``.mlflow-sent.json``
        How far the other two have been sent (`SendOffset`): a byte offset in each, and the run that they went to.

What "sent" means
    MLflow has confirmed the line. Only then is the offset written, as a new file that is renamed. The metrics are forced
    onto the disk before it, so that after a power cut the offset does not reach beyond their end.

What is created once
    A run has a key, which the writer generates before the run exists in MLflow, and which MLflow stores as the tag
    ``wavemim.key``. A run is created only if none has that key, so that a request whose answer was lost creates no second
    one. A process that opens the folder again reads the last key from the outbox and resumes that run, unless it is FINISHED.

What happens when
    the process is killed
        A line that was cut off is removed by the next writer, and readers skip it. What was sent but not yet marked as
        sent is sent again, which changes nothing: MLflow stores a metric of the same name, step, time and value once, and
        tags, parameters and artifacts are overwritten by themselves. The run stays RUNNING in MLflow until the stage is
        resumed and ends. Trials of a sweep that has ended are ended as KILLED by ``wavemim sync``.
    MLflow is down
        One warning. Sending is tried again after 30 s, then after twice as long each time, up to 10 min. At its end the
        stage waits for at most 20 s.
    MLflow is slow, because many trials log at once
        The longer a round took, the longer is the pause to the next one. At its end a stage waits until MLflow has not
        answered for a minute, and tries again what failed, for at most 5 min.
    a call hangs
        It runs in a thread of its own, which is abandoned when its time is up, and counts as MLflow being down.
    MLflow refuses a metric
        The batch is halved until the value is found, which is counted as refused and skipped; all others are sent. Only
        an invalid value is skipped: a missing permission, for example, may be granted later.
    MLflow does not accept a file
        One warning per file. Its line is deferred in ``.mlflow-sent.json``, so that it does not block metrics, and tried
        again when the run ends, when the stage is resumed, and by ``wavemim sync``.
    the run was deleted in MLflow
        Nothing more is sent, with one warning: the deletion was intended. Starting the stage again creates a new run with
        all metrics.
    the store has lost the run
        All of it is sent again to a new run.
    the disk is full
        Lines wait in memory, are sent from there, and are written when there is room again. An offset that cannot be
        written is kept in memory too.
    ``metrics.jsonl`` was replaced
        The stage was restarted. The offset holds a digest of the first line; if that differs, it is sent from its start.
    several processes write
        Each line is one write under a lock on the file. One process sends at a time (``.mlflow.lock``); it sends the
        lines of the others too.

`tracker` writes the journal, `background` is the thread that sends, `sender` does one round of sending, `mlflow_client`
holds every call of MLflow, `errors` says what its errors mean, and `runs` finds runs again by id, name or folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.storage.jsonl import JsonLines
from pipeline.tracking.mlflow_client import METRICS_IN_BATCH, Value, metric_key

METRICS, OUTBOX, SENT, LOCK = "metrics.jsonl", ".mlflow-outbox.jsonl", ".mlflow-sent.json", ".mlflow.lock"
RUN_ID = "{run_id}"  # in a tag that is filled in: MLflow's id of the run


class Busy(Exception):
    """Another process is sending from this folder."""


@dataclass
class SendOffset:
    """How far a folder's journal has been sent: the content of ``.mlflow-sent.json``."""

    run_id: str = ""  # MLflow's, of the run that the newest lines belong to; "" while MLflow does not know it
    key: str = ""  # of that run; a folder may hold several runs, one after another
    begin: int = 0  # byte of the metrics at which the run begins
    begin_outbox: int = 0  # byte of the outbox at which the run begins
    metrics: int = 0  # byte of the metrics up to which MLflow has confirmed
    outbox: int = 0  # byte of the outbox up to which MLflow has confirmed
    head: str = ""  # digest of the metrics' first line: whether they are still the same file
    files: list[dict[str, Any]] = field(default_factory=list)  # lines of files that MLflow did not take so far
    refused: int = 0  # values that it never takes

    @classmethod
    def of(cls, folder: Path) -> SendOffset:
        """The offset of a folder; the start where there is none, or a damaged one: then everything is sent again."""
        try:
            return cls(**json.loads((folder / SENT).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()


def unfinished_key(outbox: JsonLines) -> str:
    """Key of the run that an earlier process began in this folder and did not finish; "" if there is none."""
    key = ""
    for entry, _ in outbox.read():
        if entry.get("do") == "start":
            key = entry["key"]
        elif entry.get("do") == "end" and entry["status"] == "FINISHED":
            key = ""
    return key


def metric_values(line: dict[str, Any]) -> list[Value]:
    """The finite numbers of a line of the metrics, as MLflow stores them."""
    numbers = {name: value for name, value in line.get("metrics", {}).items() if isinstance(value, int | float)}
    stamp, step = round(1000 * line.get("time", 0)), int(line.get("step", 0))
    return [(metric_key(name), float(value), stamp, step) for name, value in numbers.items()]


def metric_batches(metrics: JsonLines, start: int, stop: int | None) -> Iterator[tuple[list[Value], int]]:
    """Group lines of the metrics so that MLflow takes a group at once.

    Args:
        metrics: The file.
        start: Byte at which the first line begins.
        stop: Byte at which the last line ends; None for all that are there.

    Yields:
        Values of whole lines, at most 1000 unless a single line has more; and the byte at which the last line ends.
    """
    batch: list[Value] = []
    end = start
    for line, line_end in metrics.read(start):
        if stop is not None and line_end > stop:
            break
        values = metric_values(line)
        if batch and len(batch) + len(values) > METRICS_IN_BATCH:
            yield batch, end
            batch = []
        batch += values
        end = line_end
    if end > start:
        yield batch, end


@contextlib.contextmanager
def sending_alone(folder: Path, wait: float) -> Iterator[None]:
    """Be the only process that sends from a folder. Raises Busy after `wait` seconds."""
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait)
            stack.callback(lock.release)
        except Timeout:
            raise Busy(f"another process is sending from {folder}") from None
        except OSError:  # a full or read-only disk, or one without locks: sending twice does no harm
            pass
        yield
