"""One round of sending: sends the journal to MLflow and records how far it was sent.

The protocol is described in `pipeline.tracking.journal`. In short: the offset is written after MLflow has confirmed, so a
kill in between has the same lines sent again, which changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.storage.folder import Folder
from pipeline.storage.jsonl import JsonLines
from pipeline.tracking import errors
from pipeline.tracking import mlflow_client as store
from pipeline.tracking.journal import (
    METRICS,
    OUTBOX,
    RUN_ID,
    SENT,
    SendOffset,
    metric_batches,
    metric_values,
    sending_alone,
)
from pipeline.tracking.mlflow_client import RunGone, Value

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_client import MlflowClient

T = TypeVar("T")
_log = logging.getLogger(__name__)

# Seconds that a call may take. Creating a SQLite store takes 2 to 3, but its many small transactions are slow on network
# file systems; a server to which many trials log at once takes half a minute to store a batch.
START_LIMIT, CALL_LIMIT, ARTIFACT_LIMIT = 120.0, 60.0, 120.0


@dataclass
class Tally:
    """What a sender has sent."""

    values: int = 0  # of metrics
    names: set[str] = field(default_factory=set)  # of the metrics
    files: int = 0
    runs: int = 0  # begun, resumed or ended
    refused: int = 0  # values that MLflow never takes
    missing: list[str] = field(default_factory=list)  # files that are no longer there

    def __bool__(self) -> bool:
        return bool(self.values or self.files or self.runs or self.refused or self.missing)


class Sender:
    """Sends from one folder to one store, again and again.

    Attributes:
        tally: What was sent since the sender was made.
        trouble: Why MLflow did not accept the last file that failed.
        answered: When MLflow last answered, by `time.monotonic`; minus infinity before the first answer.
        slowest: Seconds that its slowest answer took.
    """

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
        """
        Args:
            folder: The stage's, with the journal.
            uri: Of the store.
            run_id: Of the run, where only another machine has the outbox that says it.
            create: Whether to create a SQLite store that does not exist.
            limit: Seconds that a call may take; None for limits that suit training.
            metrics, outbox: The files as they are open elsewhere in this process: their lines that wait for a full disk are
                sent from memory.
        """
        self.folder, self.uri = folder, uri
        self.metrics = metrics or JsonLines(folder / METRICS)
        self.outbox = outbox or JsonLines(folder / OUTBOX)
        self.tally = Tally()
        self.trouble = ""
        self.answered, self.slowest = -math.inf, 0.0
        self._known_run = run_id
        self._limit = limit
        self._create = create
        self._client: MlflowClient | None = None
        self._offset = SendOffset()
        self._unsaved: SendOffset | None = None  # what a full disk did not take
        self._saved: SendOffset | None = None  # by this sender
        self._certain = False  # that nothing beyond the offset was sent
        self._warned: set[str] = set()  # files of which was said that MLflow does not take them
        self._from_memory: set[str] = set()  # lines that were sent although the full disk lacks them

    @property
    def held(self) -> int:
        """Number of files that MLflow does not accept for now."""
        return len(self._offset.files)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run that the newest lines belong to; "" while MLflow does not know it."""
        return self._offset.run_id

    def send(self, *, wait: float = 0.0, files: bool = True) -> None:
        """Send all that is left. What was confirmed before an error is marked as sent; all errors may be tried again.

        Args:
            wait: Seconds to wait for another process that is sending.
            files: Whether to retry files that MLflow did not accept before.

        Raises:
            Busy: Another process is still sending.
            RunGone: The run was deleted in MLflow.
            Exception: MLflow's own, or OSError: it is down, slow, or refuses.
        """
        with sending_alone(self.folder, wait):
            self._offset = self._load()
            self._certain = self._certain and self._offset == self._saved
            for last in (False, True):
                try:
                    self._send_outbox()
                    self._send_rest(files)
                    return
                except RunGone as gone:
                    if gone.deleted or last:
                        raise
                    self._rewind()

    def _send_outbox(self) -> None:
        entries = list(self.outbox.read(self._offset.outbox))
        last_start = max((end for entry, end in entries if entry.get("do") == "start"), default=0)
        for entry, end in entries:
            try:
                self._apply(entry)
            except RunGone as gone:
                if not gone.deleted or end >= last_start:
                    raise  # before that, a later start creates another run with all metrics of this one
            self._offset.outbox = end
            self._save()

    def _send_rest(self, files: bool) -> None:
        for entry in [entry for entry in self.outbox.waiting() if json.dumps(entry) not in self._from_memory]:
            self._apply(entry)
            self._from_memory.add(json.dumps(entry))
        if not self._offset.run_id:
            raise ConnectionError("its run does not exist yet")
        if files:
            self._retry_files()
        self._send_metrics(None)
        lines = [line for line in self.metrics.waiting() if json.dumps(line) not in self._from_memory]
        if lines:
            self._send_values([value for line in lines for value in metric_values(line)])
            self._from_memory |= {json.dumps(line) for line in lines}

    def _rewind(self) -> None:
        """The store has lost the run: go back to where it began, so that all of it is sent to a new one."""
        offset = self._offset
        self._offset = replace(offset, run_id="", metrics=offset.begin, outbox=offset.begin_outbox, files=[])
        self._known_run = ""

    def _apply(self, entry: dict[str, Any]) -> None:
        """Do in MLflow what a line of the outbox says."""
        do = entry.get("do")
        if do == "start":
            self._start(entry)
        elif do == "end" and self._offset.run_id:
            self._send_metrics(entry["at"])
            self._retry_files()
            self._call(
                lambda client: store.end_run(client, self.run_id, entry["status"], entry["time"], force=entry["force"])
            )
            self.tally.runs += 1
        elif do == "tag" and self._offset.run_id:
            value = entry["value"].replace(RUN_ID, self.run_id) if entry.get("fill") else entry["value"]
            self._skipping_refused(lambda client: client.set_tag(self.run_id, entry["key"], value))
        elif do == "dataset" and self._offset.run_id:
            about, context = entry["about"], entry["context"]
            self._skipping_refused(lambda client: store.log_dataset(client, self.run_id, about, context))
        elif do in ("file", "text") and self._offset.run_id:
            self._file(entry)

    def _start(self, entry: dict[str, Any]) -> None:
        """Create or resume a run."""
        self._move_to_run(entry)
        tags = {**entry["tags"], store.KEY: entry["key"]}
        parent = self._parent(entry)
        if parent:
            tags["mlflow.parentRunId"] = parent
        if self._offset.run_id:
            try:
                self._call(lambda client: store.reopen_run(client, self.run_id, tags))
            except RunGone:  # deleted, and wanted again: the stage was started again
                self._offset = replace(self._offset, run_id="", metrics=self._offset.begin, files=[])
        if not self._offset.run_id:
            self._create_run(entry, tags)
        self._call(lambda client: store.log_params(client, self.run_id, entry["params"]))
        self.tally.runs += 1

    def _move_to_run(self, entry: dict[str, Any]) -> None:
        """Let the offset stand in the run that a line begins or resumes."""
        offset = self._offset
        if offset.run_id and offset.key not in ("", entry["key"]):
            with contextlib.suppress(RunGone):  # the rest of the run before
                self._send_metrics(entry["at"])
            begin = min(entry["at"], self.metrics.size())
            offset = replace(offset, run_id="", begin=begin, metrics=begin, begin_outbox=offset.outbox, files=[])
            offset.head = self.metrics.head()
        elif not offset.key:
            offset.begin = offset.metrics = min(entry["at"], self.metrics.size())
            offset.begin_outbox, offset.head = offset.outbox, self.metrics.head()
        offset.key = entry["key"]
        self._offset = offset

    def _create_run(self, entry: dict[str, Any], tags: dict[str, str]) -> None:
        def find_or_create(client: MlflowClient) -> str:
            experiment = store.experiment_id(client, entry["experiment"], self.uri)
            return store.find_or_create_run(client, experiment, entry["name"], tags, entry["time"])

        self._offset.run_id = self._call(find_or_create, START_LIMIT)
        self._save()

    def _parent(self, entry: dict[str, Any]) -> str:
        """Id of the run that this one is nested in; "" without one. Raises ConnectionError while MLflow lacks it."""
        if not entry["parent"]:
            return str(entry["parent_id"])
        folder = Path(os.path.normpath(self.folder / entry["parent"]))
        known = SendOffset.of(folder).run_id or entry["parent_id"]
        if not known and (folder / OUTBOX).is_file():
            raise ConnectionError(f"the run of {folder} does not exist yet")
        return str(known)

    def _file(self, entry: dict[str, Any]) -> None:
        """Send a file or a text; one that MLflow does not accept now is deferred, so that it blocks nothing."""
        text = entry["do"] == "text"
        source = entry["file"] if text else self.folder / entry["path"]
        if not text and not source.exists():
            self.tally.missing.append(str(source))
            _log.warning("%s cannot be sent to MLflow: the file no longer exists", source)
            return
        try:
            if text:
                self._call(lambda client: client.log_text(self.run_id, entry["text"], source))
            else:
                self._call(lambda client: store.log_file(client, self.run_id, source, entry["into"]), ARTIFACT_LIMIT)
                self.tally.files += 1
        except Exception as error:
            if errors.unreachable(error):
                raise
            self._call(lambda client: store.check_run(client, self.run_id))
            self.trouble = errors.reason(error)
            if str(source) not in self._warned:
                self._warned.add(str(source))
                _log.warning("MLflow does not accept %s for now (%s); wavemim sync will send it", source, self.trouble)
            self._offset.files.append(entry)

    def _retry_files(self) -> None:
        """Send the files that were deferred."""
        entries, self._offset.files = self._offset.files, []
        if not entries:
            return
        try:
            while entries:
                self._file(entries[0])
                entries.pop(0)
        finally:
            self._offset.files.extend(entries)
        self._save()

    def _send_metrics(self, stop: int | None) -> None:
        """Send the metrics that MLflow has not confirmed, up to byte `stop`."""
        offset = self._offset
        if offset.metrics > self.metrics.size() or (offset.metrics and offset.head != self.metrics.head()):
            offset.metrics = offset.begin = 0  # another file took its place: the stage was restarted
        for values, end in metric_batches(self.metrics, offset.metrics, stop):
            certain, self._certain = self._certain, False
            left = values if certain or not values else self._call(self._not_stored(values))
            self._send_values(left)
            self._certain = True
            self.metrics.sync()
            offset.metrics, offset.head = end, self.metrics.head()
            self._save()

    def _not_stored(self, values: Sequence[Value]) -> Callable[[MlflowClient], Sequence[Value]]:
        return lambda client: store.not_stored(client, self.run_id, values)

    def _send_values(self, values: Sequence[Value]) -> None:
        for start in range(0, len(values), store.METRICS_IN_BATCH):
            self._send_batch(values[start : start + store.METRICS_IN_BATCH])

    def _send_batch(self, batch: Sequence[Value]) -> None:
        """Send up to 1000 values; if MLflow refuses the batch, halve it until the value is found that it means."""
        try:
            self._call(lambda client: store.log_values(client, self.run_id, batch))
        except Exception as error:
            if not errors.refused(error):
                raise
            self._call(lambda client: store.check_run(client, self.run_id))
            if not errors.invalid(error):
                raise
            if len(batch) == 1:
                self._offset.refused += 1
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
            if not errors.refused(error):
                raise
            self._call(lambda client: store.check_run(client, self.run_id))

    def _call(self, call: Callable[[MlflowClient], T], limit: float | None = None) -> T:
        """The answer of MLflow. Raises its errors, and TimeoutError after `limit` seconds."""
        store.import_mlflow()
        began, answered = time.monotonic(), True
        try:
            return store.within(
                limit or self._limit or (CALL_LIMIT if self._client else START_LIMIT), lambda: call(self._connected())
            )
        except Exception as error:
            answered = errors.answered(error)
            raise
        finally:
            if answered:
                self.answered = time.monotonic()
                self.slowest = max(self.slowest, self.answered - began)

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = store.connect(self.uri, create=self._create)
        return self._client

    def _load(self) -> SendOffset:
        """The folder's offset, or the one in memory if the disk was too full for it and no other process went further."""
        offset, unsaved = SendOffset.of(self.folder), self._unsaved
        if (
            unsaved
            and offset.run_id in ("", unsaved.run_id)
            and (offset.outbox, offset.metrics) <= (unsaved.outbox, unsaved.metrics)
        ):
            return unsaved
        if not offset.run_id and self._known_run:
            offset.run_id = self._known_run
        return offset

    def _save(self) -> None:
        self._saved = replace(self._offset, files=list(self._offset.files))
        content = json.dumps(asdict(self._offset)).encode()
        try:
            Folder.at(self.folder).write(SENT, content)
            self._unsaved = None
        except OSError:  # a full disk
            self._unsaved = self._offset
