"""Brings what a stage's folder holds to MLflow, and marks how far it came.

The folder is the truth: ``metrics.jsonl`` has the values, ``.mlflow-outbox.jsonl`` everything else in its order (a run
begins, a tag, a file, a run ends); both only grow. ``.mlflow-sent.json`` says up to which byte of each MLflow has
confirmed, and for which run. It is written after the confirmation: a kill in between has the same sent again, which
changes nothing, since MLflow stores a value of the same name, step, time and number once, and the rest is replaced by
itself. One process sends at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from pipeline.storage.folder import Folder
from pipeline.storage.jsonl import JsonLines
from pipeline.tracking import mlflow_client as store
from pipeline.tracking.mlflow_client import RunGone, Value

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_client import MlflowClient

T = TypeVar("T")
_log = logging.getLogger(__name__)

METRICS, OUTBOX, SENT, LOCK = "metrics.jsonl", ".mlflow-outbox.jsonl", ".mlflow-sent.json", ".mlflow.lock"
# Seconds. A fresh SQLite store takes 2 to 3, but its many small transactions are slow on network file systems.
START_LIMIT, CALL_LIMIT, ARTIFACT_LIMIT = 120.0, 20.0, 120.0


@dataclass
class Position:
    """How far a folder's files have been sent."""

    run_id: str = ""
    key: str = ""  # of the run; a folder may hold several runs after another
    begin: int = 0  # bytes of the metrics before the run
    begin_outbox: int = 0
    metrics: int = 0  # bytes that MLflow has
    outbox: int = 0
    head: str = ""  # tells whether the metrics are still the same file
    files: list[dict[str, Any]] = field(default_factory=list)  # that MLflow did not take for now
    refused: int = 0  # values that it never takes

    @classmethod
    def of(cls, folder: Path) -> Position:
        """The folder's mark; the beginning where there is none, or a damaged one: then all is sent again."""
        try:
            return cls(**json.loads((folder / SENT).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()


@dataclass
class Tally:
    """What was sent."""

    values: int = 0
    names: set[str] = field(default_factory=set)
    files: int = 0
    runs: int = 0  # begun or ended
    refused: int = 0
    missing: list[str] = field(default_factory=list)  # files that are no longer there

    def __bool__(self) -> bool:
        return bool(self.values or self.files or self.runs or self.refused or self.missing)


class Busy(Exception):
    """Another process is sending from this folder."""


class Sender:
    """Sends from one folder to one store. Its errors are MLflow's, OSError, RunGone and Busy; all may be tried again."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        *,
        run_id: str = "",
        create: bool = False,
        limit: float | None = None,
        metrics: JsonLines | None = None,
        outbox: JsonLines | None = None,
    ) -> None:
        self.folder, self.uri = folder, uri
        self.metrics = metrics or JsonLines(folder / METRICS)
        self.outbox = outbox or JsonLines(folder / OUTBOX)
        self.tally = Tally()
        self._known_run = run_id  # where the outbox lies on another machine
        self._limit = limit  # seconds a call may take
        self._create = create  # makes the store where there is none
        self._client: MlflowClient | None = None
        self._at = Position()
        self._unsaved: Position | None = None
        self._marked: Position | None = None  # by this sender
        self._certain = False  # that nothing after the mark was sent
        self._told: set[str] = set()  # files of which was said that MLflow does not take them
        self.trouble = ""  # why it did not take the last of them
        self._direct: set[str] = set()  # lines sent from memory, because the disk is full

    @property
    def held(self) -> int:
        """Files that MLflow does not take for now."""
        return len(self._at.files)

    @property
    def run_id(self) -> str:
        """Of the run that the folder's newest lines belong to; empty while MLflow does not know it."""
        return self._at.run_id

    def send(self, *, wait: float = 0.0, files: bool = True) -> None:
        """Send all that is left. Raises what goes wrong; what was confirmed until then is marked.

        `wait`: seconds to wait for another process. `files`: also those that MLflow did not take before.
        """
        with _alone(self.folder, wait):
            self._at = self._load()
            self._certain = self._certain and self._at == self._marked
            for last in (False, True):
                try:
                    self._send_outbox()
                    self._send_rest(files)
                    return
                except RunGone as gone:
                    if gone.deleted or last:
                        raise
                    self._begin_anew()

    def _send_outbox(self) -> None:
        entries = list(self.outbox.read(self._at.outbox))
        last_start = max((end for entry, end in entries if entry.get("do") == "start"), default=0)
        for entry, end in entries:
            try:
                self._apply(entry)
            except RunGone as gone:
                if not gone.deleted or end >= last_start:
                    raise  # else a later start begins another run, with all metrics of this one
            self._at.outbox = end
            self._save()

    def _send_rest(self, files: bool) -> None:
        for entry in [entry for entry in self.outbox.waiting() if json.dumps(entry) not in self._direct]:
            self._apply(entry)
            self._direct.add(json.dumps(entry))
        if not self._at.run_id:
            raise ConnectionError("its run is not there yet")
        if files:
            self._retry_files()
        self._send_metrics(None)
        lines = [line for line in self.metrics.waiting() if json.dumps(line) not in self._direct]
        if lines:
            self._send_values([value for line in lines for value in _values(line)])
            self._direct |= {json.dumps(line) for line in lines}

    def _begin_anew(self) -> None:
        """The store lost the run: all of it is sent to a new one."""
        at = self._at
        self._at = replace(at, run_id="", metrics=at.begin, outbox=at.begin_outbox, files=[])
        self._known_run = ""

    def _apply(self, entry: dict[str, Any]) -> None:
        """Do what a line of the outbox says."""
        do = entry.get("do")
        if do == "start":
            self._start(entry)
        elif do == "end" and self._at.run_id:
            self._send_metrics(entry["at"])
            self._retry_files()
            self._call(
                lambda client: store.end_run(client, self.run_id, entry["status"], entry["time"], force=entry["force"])
            )
            self.tally.runs += 1
        elif do == "tag" and self._at.run_id:
            self._skipping_refused(lambda client: client.set_tag(self.run_id, entry["key"], entry["value"]))
        elif do in ("file", "text") and self._at.run_id:
            self._file(entry)

    def _start(self, entry: dict[str, Any]) -> None:
        at = self._at
        if at.run_id and at.key not in ("", entry["key"]):
            with contextlib.suppress(RunGone):  # the former run: what comes now is another one's
                self._send_metrics(entry["at"])
            begin = min(entry["at"], self.metrics.size())
            self._at = at = replace(at, run_id="", begin=begin, metrics=begin, begin_outbox=at.outbox, files=[])
            at.head = self.metrics.head()
        elif not at.key:
            at.begin = at.metrics = min(entry["at"], self.metrics.size())
            at.begin_outbox, at.head = at.outbox, self.metrics.head()
        at.key = entry["key"]
        tags = {**entry["tags"], store.KEY: entry["key"]}
        parent = self._parent(entry)
        if parent:
            tags["mlflow.parentRunId"] = parent
        run_id = at.run_id
        if run_id:
            try:
                self._call(lambda client: store.reopen_run(client, run_id, tags))
            except RunGone:  # deleted: whoever starts the stage again wants to see it
                self._at = at = replace(at, run_id="", metrics=at.begin, files=[])
        if not self._at.run_id:
            self._create_run(entry, tags)
        self._call(lambda client: store.log_params(client, self.run_id, entry["params"]))
        self.tally.runs += 1

    def _create_run(self, entry: dict[str, Any], tags: dict[str, str]) -> None:
        def find_or_create(client: MlflowClient) -> str:
            experiment = store.experiment_id(client, entry["experiment"], self.uri)
            return store.find_or_create_run(client, experiment, entry["name"], tags, entry["time"])

        self._at.run_id = self._call(find_or_create, START_LIMIT)
        self._save()

    def _parent(self, entry: dict[str, Any]) -> str:
        """Id of the run that this one is nested in. Raises ConnectionError while that is not there."""
        if not entry["parent"]:
            return str(entry["parent_id"])
        folder = Path(os.path.normpath(self.folder / entry["parent"]))
        known = Position.of(folder).run_id or entry["parent_id"]
        if not known and (folder / OUTBOX).is_file():
            raise ConnectionError(f"the run of {folder} is not there yet")
        return str(known)

    def _file(self, entry: dict[str, Any]) -> None:
        """Send a file or a text; one that cannot be stored now does not hold up what comes after it."""
        text = entry["do"] == "text"
        source = entry["file"] if text else self.folder / entry["path"]
        if not text and not source.exists():
            self.tally.missing.append(str(source))
            _log.warning("%s is not sent to MLflow: it is no longer there", source)
            return
        try:
            if text:
                self._call(lambda client: client.log_text(self.run_id, entry["text"], source))
            else:
                self._call(lambda client: store.log_file(client, self.run_id, source, entry["into"]), ARTIFACT_LIMIT)
                self.tally.files += 1
        except Exception as error:
            if store.unreachable(error):
                raise
            self._call(lambda client: store.check_run(client, self.run_id))
            self.trouble = store.reason(error)
            if str(source) not in self._told:
                self._told.add(str(source))
                _log.warning("MLflow does not take %s for now (%s); wavemim sync sends it", source, self.trouble)
            self._at.files.append(entry)

    def _retry_files(self) -> None:
        entries, self._at.files = self._at.files, []
        if not entries:
            return
        try:
            while entries:
                self._file(entries[0])
                entries.pop(0)
        finally:
            self._at.files.extend(entries)
        self._save()

    def _send_metrics(self, stop: int | None) -> None:
        """Send the lines that MLflow has not confirmed, up to byte `stop`."""
        at = self._at
        if at.metrics > self.metrics.size() or (at.metrics and at.head != self.metrics.head()):
            at.metrics = at.begin = 0  # another file took its place: the stage was started over
        for values, end in _groups(self.metrics, at.metrics, stop):
            certain, self._certain = self._certain, False
            left = values if certain or not values else self._call(self._not_stored(values))
            self._send_values(left)
            self._certain = True
            self.metrics.sync()
            at.metrics, at.head = end, self.metrics.head()
            self._save()

    def _not_stored(self, values: Sequence[Value]) -> Callable[[MlflowClient], Sequence[Value]]:
        return lambda client: store.not_stored(client, self.run_id, values)

    def _send_values(self, values: Sequence[Value]) -> None:
        for start in range(0, len(values), store.METRICS_IN_BATCH):
            self._send_batch(values[start : start + store.METRICS_IN_BATCH])

    def _send_batch(self, batch: Sequence[Value]) -> None:
        """Send up to 1000 values; where MLflow refuses the batch, find the value that it means."""
        try:
            self._call(lambda client: store.log_values(client, self.run_id, batch))
        except Exception as error:
            if not store.refused(error):
                raise
            self._call(lambda client: store.check_run(client, self.run_id))
            if not store.invalid(error):
                raise
            if len(batch) == 1:
                self._at.refused += 1
                self.tally.refused += 1
                return
            self._send_batch(batch[: len(batch) // 2])
            self._send_batch(batch[len(batch) // 2 :])
            return
        self.tally.values += len(batch)
        self.tally.names |= {name for name, *_ in batch}

    def _skipping_refused(self, call: Callable[[MlflowClient], object]) -> None:
        try:
            self._call(call)
        except Exception as error:
            if not store.refused(error):
                raise
            self._call(lambda client: store.check_run(client, self.run_id))

    def _call(self, call: Callable[[MlflowClient], T], limit: float | None = None) -> T:
        """What MLflow answers. It may fail, and it may hang: it gets `limit` seconds."""
        store.import_mlflow()
        return store.within(
            limit or self._limit or (CALL_LIMIT if self._client else START_LIMIT), lambda: call(self._connected())
        )

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = store.connect(self.uri, create=self._create)
        return self._client

    def _load(self) -> Position:
        at, unsaved = Position.of(self.folder), self._unsaved
        if (
            unsaved
            and at.run_id in ("", unsaved.run_id)
            and (at.outbox, at.metrics) <= (unsaved.outbox, unsaved.metrics)
        ):
            return unsaved
        if not at.run_id and self._known_run:
            at.run_id = self._known_run
        return at

    def _save(self) -> None:
        self._marked = replace(self._at, files=list(self._at.files))
        content = json.dumps(asdict(self._at)).encode()
        try:
            Folder.at(self.folder).write(SENT, content)
            self._unsaved = None
        except OSError:  # a full disk
            self._unsaved = self._at


def _values(line: dict[str, Any]) -> list[Value]:
    """What a line of the metrics holds for MLflow: finite numbers. Others are text in the file."""
    numbers = {name: value for name, value in line.get("metrics", {}).items() if isinstance(value, int | float)}
    stamp, step = round(1000 * line.get("time", 0)), int(line.get("step", 0))
    return [(store.clean_key(name), float(value), stamp, step) for name, value in numbers.items()]


def _groups(record: JsonLines, start: int, stop: int | None) -> Iterator[tuple[list[Value], int]]:
    """Whole lines of together at most a batch (or one longer line), with the byte where they end."""
    group: list[Value] = []
    end = start
    for line, line_end in record.read(start):
        if stop is not None and line_end > stop:
            break
        values = _values(line)
        if group and len(group) + len(values) > store.METRICS_IN_BATCH:
            yield group, end
            group = []
        group += values
        end = line_end
    if end > start:
        yield group, end


@contextlib.contextmanager
def _alone(folder: Path, wait: float) -> Iterator[None]:
    """Be the only process that sends from the folder. Raises Busy after `wait` seconds."""
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
