"""What a stage logs: its runs, metrics, files and tags.

`Tracker` writes each of them to the stage's journal, at once and without waiting for MLflow, and has a thread send it. The
journal, and what happens when MLflow is down or the process is killed, is described in `pipeline.tracking.journal`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from pipeline.config.recipe import Recipe
from pipeline.periodic import Periodic
from pipeline.storage.jsonl import JsonLines
from pipeline.tracking import errors, store_uris
from pipeline.tracking import mlflow_client as store
from pipeline.tracking.background import SendingThread
from pipeline.tracking.journal import METRICS, OUTBOX, RUN_ID, Busy, SendOffset, unfinished_key
from pipeline.tracking.sender import CALL_LIMIT, Sender
from pipeline.tracking.tags import tags_of

_log = logging.getLogger(__name__)

# Seconds that a stage waits for MLflow at its start, where a store may have to be created, and at its end: one that did not
# accept the last batch shorter, one that answers, but slowly, up to _MOST_AT_END.
_START_LIMIT, _END_LIMIT, _KILLED_LIMIT, _MOST_AT_END = 120.0, 20.0, 3.0, 300.0
_AWAY_LIMIT = 8.0  # that connections may fail of a server that has just answered


def store_uri(recipe: Recipe) -> str:
    """Where MLflow keeps the runs: tracking.uri, else MLFLOW_TRACKING_URI, else SQLite in the out folder; absolute."""
    uri = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return (
        store_uris.absolute_uri(uri)
        if uri
        else store_uris.sqlite_uri(recipe.local_out.expanduser().absolute() / "mlflow.db")
    )


def ui_command(recipe: Recipe) -> str:
    """The command, or the address after "open", with which the user sees the runs."""
    uri = store_uri(recipe)
    if "://" in uri and not uri.startswith(("http:", "https:", "databricks")):
        # One worker: MLflow starts four by default, of 250 MB each.
        command = f"mlflow ui --backend-store-uri {shlex.quote(store_uris.without_password(uri))}"
        return f"{command} --host 127.0.0.1 --port 5000 --workers 1"
    return f"open {store_uris.without_password(uri)}"


@dataclass(frozen=True)
class RunHandle:
    """What another process needs to log to a run. Plain strings, so that it can be pickled.

    Attributes:
        uri: Of the store; "" where another process sends what is logged.
        run_id: MLflow's id; "" while MLflow does not know the run.
        log_file: The journal's metrics.jsonl; the rest of the journal is in the same folder.
    """

    uri: str
    run_id: str
    log_file: str

    def __repr__(self) -> str:  # Ray logs what it hands to workers
        return f"RunHandle({store_uris.without_password(self.uri)!r}, {self.run_id!r}, {self.log_file!r})"


class Tracker:
    """One run: all that is logged goes to the journal in its folder, and from there to MLflow.

    As a context manager it ends the run: as FINISHED, as KILLED after Ctrl-C, else as FAILED.
    """

    def __init__(self, handle: RunHandle, *, owner: bool, create: bool = False) -> None:
        """Use `start` or `attach`. `owner`: ends the run. `create`: creates a SQLite store that does not exist."""
        self._handle = handle
        self._owner = owner
        self._folder = Path(handle.log_file).parent
        self._metrics, self._outbox = JsonLines(Path(handle.log_file)), JsonLines(self._folder / OUTBOX)
        self._sender = Sender(
            self._folder, handle.uri, run_id=handle.run_id, create=create, metrics=self._metrics, outbox=self._outbox
        )
        self._thread = SendingThread(self._send, self._alive_until)
        self._refused = self._away = self._accepted = False  # what MLflow did in the last round
        self._probe: _SystemProbe | None = None
        self._stamp = 0  # time of the last line, ms
        self._warned = False
        self._warning = threading.Lock()  # so that only one of two threads warns
        self._ended = False

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        stage: str,
        *,
        parent: RunHandle | None = None,
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: Mapping[str, Any] | None = None,
        log_dir: Path,
        wait: bool = True,
    ) -> Tracker:
        """Begin a run, or resume the one that an earlier call began in `log_dir` and did not finish.

        A run that the store has lost, or that was deleted there, is created anew. A missing SQLite store is created.

        Args:
            recipe: The settings, which become parameters and the artifact recipe.yaml.
            stage: Name of the stage.
            parent: The run that this one is nested in, for a trial of a sweep.
            name: Of the run; STAGE-RECIPE if not given.
            params: Parameters in place of the settings.
            tags: Further tags.
            dataset: What the stage reads: see `dataset`.
            log_dir: The stage's folder, for the journal.
            wait: Whether to wait for MLflow, for 120 s at most. A new SQLite store takes seconds, as workers do to start.
        """
        # A trial's working folder is not the driver's, so a relative URI is not resolved a second time.
        uri = parent.uri if parent is not None else store_uri(recipe)
        folder = Path(log_dir).absolute()
        tracker = cls(RunHandle(uri, "", str(folder / METRICS)), owner=True, create=parent is None)
        unknown = parent is not None and not (parent.run_id or SendOffset.of(Path(parent.log_file).parent).run_id)
        tracker._warned = unknown  # then the parent has waited and warned already; set before anything is sent
        settings = _redacted(recipe)
        flat = flatten(params if params is not None else settings)
        start = {
            "do": "start",
            "at": tracker._metrics.size(),
            "time": int(time.time() * 1000),
            "key": unfinished_key(tracker._outbox) or uuid.uuid4().hex,
            "uri": store_uris.without_password(uri),
            "experiment": recipe.tracking.experiment,
            "name": name or f"{stage}-{recipe.name}",
            "tags": {**tags_of(recipe, stage), **(tags or {})},
            "params": flat,
            "parent": os.path.relpath(Path(parent.log_file).parent, folder) if parent else "",
            "parent_id": parent.run_id if parent else "",
        }
        tracker._outbox.append(start)
        tracker.text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "recipe.yaml")
        if dataset is not None:
            tracker.dataset(dataset, stage)
        if unknown:
            tracker._thread.pause()
        elif wait:
            tracker.flush(_START_LIMIT)
        if recipe.tracking.system_metrics:
            tracker._probe = _SystemProbe(tracker)
        return tracker

    @classmethod
    def attach(cls, handle: RunHandle) -> Tracker:
        """Another writer to a run, in a worker. Who started the run also ends it."""
        return cls(handle, owner=False)

    @property
    def handle(self) -> RunHandle:
        """For other writers; its run id is empty while MLflow does not know the run."""
        return replace(self._handle, run_id=self._sender.run_id or self._handle.run_id)

    def run_id(self) -> str:
        """MLflow's id of the run; "" if MLflow does not know it. Waits for MLflow if `start` has not."""
        if not self.handle.run_id:
            self.flush(_START_LIMIT)
        return self.handle.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics; returns immediately.

        Args:
            metrics: By name. A value that is not finite is written to the journal as a string, and not sent.
            step: Images seen so far, the x axis of all metrics.
        """
        stamp = int(time.time() * 1000)
        # MLflow stores a value of the same name, step, time and number once, so each line gets a time of its own. A clock
        # that was set back by a second or more is believed.
        if stamp <= self._stamp < stamp + 1000:
            stamp = self._stamp + 1
        self._stamp = stamp
        values = {name: float(value) for name, value in metrics.items()}
        written = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._metrics.append({"step": int(step), "time": stamp / 1000, "metrics": written})
        self._thread.wake()

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file, or a folder with everything in it.

        Args:
            path: Read when it is sent, so it must stay in place.
            folder: Of the artifacts; None for their root.
        """
        source = Path(path).absolute()
        inside = source.is_relative_to(self._folder)  # relative, so that the stage's folder can be moved
        self._note("file", path=str(source.relative_to(self._folder) if inside else source), into=folder)

    def text(self, text: str, file: str) -> None:
        """Log a text as an artifact with this name."""
        self._note("text", text=text, file=file)

    def dataset(self, about: Mapping[str, Any], context: str) -> None:
        """Log a data set that the run reads or writes.

        Args:
            about: `name`, `digest`, `source` (path or URL), `profile` and `columns` (mappings), as `ShardSet.about`.
            context: What the run uses it for, a word.
        """
        self._note("dataset", about=dict(about), context=context)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._note("tag", key=store.clean_key(key), value=str(value))

    def description(self, markdown: str, figures: Sequence[str] = ()) -> None:
        """Set the text at the top of the run's page.

        Args:
            markdown: The text.
            figures: Artifacts that are shown below it, by their names.
        """
        # Relative to the page's address, so that they are found through any proxy.
        shown = "".join(f"\n\n![{name}](get-artifact?path={name}&run_uuid={RUN_ID})" for name in figures)
        text = markdown.rstrip("\n").replace(RUN_ID, "{ run_id }") + shown
        self._note("tag", key="mlflow.note.content", value=text, fill=True)

    def end(self, status: str | None = "FINISHED") -> None:
        """End the run; an attached tracker only sends what is missing. A second call does nothing.

        Waits for MLflow until it has not answered for a minute, for 5 min in all; if it was down before, for 20 s; if the run
        is KILLED, for 3 s. What is not sent by then is sent later.

        Args:
            status: FINISHED, FAILED or KILLED; None: the run stays RUNNING, and a later `start` goes on with it.
        """
        if self._ended:
            return
        self._ended = True
        if self._probe is not None:
            self._probe.stop()
        if self._owner and status is not None:
            self._note("end", at=self._metrics.size(), status=status, time=int(time.time() * 1000), force=True)
        if status == "KILLED":
            sent = self.flush(_KILLED_LIMIT)
        else:
            sent = self.flush(CALL_LIMIT if self._accepted else _END_LIMIT, _MOST_AT_END)
        self._thread.close()
        if not sent and not self._warned:
            self._warn("does not accept everything in time", goes_on="")

    def wake(self) -> None:
        """Send what others have written to the journal; returns immediately."""
        self._thread.wake()

    def flush(self, seconds: float, most: float | None = None) -> bool:
        """Send at once. Returns whether all that was logged was sent; the arguments are those of `SendingThread.flush`."""
        return self._thread.flush(seconds, most)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (isinstance(error, SystemExit) and not error.code):
            self.end("FINISHED")
        else:
            self.end("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _note(self, do: str, **entry: Any) -> None:
        """Append a line to the outbox, and have it sent."""
        self._outbox.append({"do": do, **entry})
        self._thread.wake()

    def _send(self, urgent: bool) -> bool | None:
        """Send what there is. Returns whether that succeeded; None if another process is sending."""
        if not self._handle.uri:
            return True
        try:
            self._sender.send(wait=_END_LIMIT if urgent else 0.0, files=urgent)
        except Busy:
            return None
        except Exception as error:
            self._refused = errors.refused(error) or errors.broken_file(error)
            self._away, self._accepted = errors.no_connection(error), False
            if not errors.busy(error):  # what it does not take until the end, is said then
                self._warn(f"{'refuses' if self._refused else 'does not answer'} ({errors.reason(error)})")
            return False
        self._refused, self._away, self._accepted = False, False, True
        return True

    def _alive_until(self) -> float:
        """Until when MLflow counts as alive; a refusal does not pass with time, and a lost connection rarely."""
        if self._refused:
            return -math.inf
        return self._sender.answered + (_AWAY_LIMIT if self._away else max(CALL_LIMIT, 2 * self._sender.slowest))

    def _warn(self, what: str, goes_on: str = "; the stage continues") -> None:
        with self._warning:
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "MLflow at %s %s: metrics are kept in %s%s, and wavemim sync %s sends what is missing",
                store_uris.without_password(self._handle.uri), what, self._handle.log_file, goes_on,
                shlex.quote(str(self._folder)),
            )  # fmt: skip


class _SystemProbe:
    """Logs the use of this machine under MLflow's names for it; the step is seconds since the probe was made."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._begun = tracker, time.monotonic()
        self._monitors: list[Any] = []
        self._thread = Periodic(self._sample, self._interval, name="system metrics", at_once=True, join=5).start()

    def stop(self) -> None:
        """Log no more."""
        self._thread.stop()

    def _sample(self) -> bool:
        """Log what was collected by the call before, and collect for the next one. False ends the thread."""
        try:
            if self._monitors:
                values = {f"system/{k}": v for m in self._monitors for k, v in m.aggregate_metrics().items()}
                self._tracker.log(values, int(time.monotonic() - self._begun))
            else:
                store.import_mlflow()
                self._monitors = store.system_monitors()
            for monitor in self._monitors:
                monitor.clear_metrics()
                monitor.collect_metrics()
        except Exception:  # a machine without some counter
            return False
        return True

    def _interval(self) -> float:
        """Seconds to the next sample: 5 at first, then longer, so that a week does not make a million rows."""
        asked = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL")
        return float(asked) if asked else min(60.0, max(5.0, (time.monotonic() - self._begun) / 100))


def end_trials(uri: str, parent_run_id: str, statuses: Mapping[str, str]) -> None:
    """End the trials of a sweep that are still RUNNING in MLflow. A failure is only a warning.

    Args:
        uri: Of the store.
        parent_run_id: MLflow's id of the sweep's run; "" if MLflow does not know it, then nothing is done.
        statuses: FINISHED, FAILED or KILLED, by the trial's run id or name; KILLED for others.
    """
    if not parent_run_id:
        return

    def end_all() -> None:
        client = store.connect(uri, create=False)
        experiment = client.get_run(parent_run_id).info.experiment_id
        for run in store.running_children(client, experiment, parent_run_id):
            status = statuses.get(run.info.run_id) or statuses.get(run.info.run_name or "") or "KILLED"
            client.set_terminated(run.info.run_id, status)

    try:
        store.import_mlflow()
        store.within(_START_LIMIT, end_all)
    except Exception as error:
        reason = errors.reason(error)
        _log.warning("MLflow at %s: runs of trials were not ended (%s)", store_uris.without_password(uri), reason)


def flatten(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys (``train.epochs``), with strings as they are and other values as JSON."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _redacted(recipe: Recipe) -> dict[str, Any]:
    """All settings, without a password in the store's URI: everyone who sees the runs sees them."""
    settings = recipe.dump()
    if recipe.tracking.uri:
        settings["tracking"]["uri"] = store_uris.without_password(recipe.tracking.uri)
    return settings
