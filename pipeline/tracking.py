"""Runs, metrics and artifacts in MLflow: the only module that imports it.

Tracking never costs a run. Every metric first goes to a local JSON-lines file; every call to MLflow is limited in time
and may fail, which gives one warning. Runs are addressed by explicit ids through `MlflowClient`: the fluent interface
keeps its active run per thread, and opens stray runs elsewhere.
"""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import queue
import re
import shlex
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from pipeline.config import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

T = TypeVar("T")
_log = logging.getLogger(__name__)

# Seconds. A fresh SQLite store takes 2 to 3, but its many small transactions are slow on network file systems.
RUN_MARK = ".mlflow-run"  # in a stage's folder: which run an unfinished call began
_START_LIMIT, _CALL_LIMIT, _ARTIFACT_LIMIT, _MONITOR_LIMIT = 120.0, 20.0, 120.0, 5.0
# After a failure MLflow is left alone for this long, doubled with every further one: a dead server costs next to nothing.
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
_PENDING = 20_000  # metric values kept in memory for a store that does not answer; the oldest go first
_LONGEST_PARAM = 6000  # MLflow's limit
_PARAMS_IN_BATCH, _METRICS_IN_BATCH = 100, 1000  # MLflow's limits


def store_uri(recipe: Recipe) -> str:
    """Where MLflow keeps the runs: the setting, MLFLOW_TRACKING_URI or SQLite in the out folder. Always absolute."""
    uri = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return _absolute(uri) if uri else f"sqlite:///{Path(recipe.out).expanduser().absolute() / 'mlflow.db'}"


def ui_command(recipe: Recipe) -> str:
    """What the user types, or opens, to see the runs."""
    uri = store_uri(recipe)
    if "://" in uri and not uri.startswith(("http:", "https:", "databricks")):
        # One worker: MLflow starts four by default, of 250 MB each.
        command = f"mlflow ui --backend-store-uri {shlex.quote(_without_password(uri))}"
        return f"{command} --host 127.0.0.1 --port 5000 --workers 1"
    return f"open {_without_password(uri)}"


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to log to a run; plain strings, so that it can be pickled."""

    uri: str
    run_id: str  # empty: MLflow did not answer at the start, the run is only in `log_file`
    log_file: str


class Tracker:
    """One run: metrics, tags and artifacts go to MLflow, metrics also to a file."""

    def __init__(self, handle: RunHandle, *, owner: bool, create: bool = False) -> None:
        self.handle = handle
        self._owner = owner  # ends the run
        self._create = create  # makes the store where there is none
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._pending: deque[tuple[str, float, int, int]] = deque(maxlen=_PENDING)
        self._started = time.monotonic()
        self._silent_until = 0.0
        self._pause = _FIRST_PAUSE
        self._warned = False
        self._file_warned = False
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
        log_dir: Path,
        resume_id: str | None = None,
    ) -> Tracker:
        """A new run, in a store that is made if need be; or the run that an earlier call began in `log_dir`.

        `resume_id` names another run to go on with. A run that the store no longer has is begun anew.
        """
        # A trial's working folder is not the driver's, so a relative URI is not resolved a second time.
        uri = parent.uri if parent is not None else store_uri(recipe)
        log_file = Path(log_dir).absolute() / "metrics.jsonl"
        tracker = cls(RunHandle(uri, "", str(log_file)), owner=True, create=parent is None)
        if parent is not None and not parent.run_id:
            return tracker  # the parent has waited and warned
        all_tags = {**_tags(recipe, stage, parent), **(tags or {})}
        run_name = name or f"{stage}-{recipe.name}"
        opened: list[str] = []
        marker = Path(log_dir) / RUN_MARK
        if resume_id is None and marker.is_file():
            resume_id = marker.read_text(encoding="utf-8").strip() or None

        def open_run(client: MlflowClient) -> None:
            opened.append(_open_run(client, _experiment(client, recipe, uri), run_name, all_tags, resume_id))

        tracker._guarded(open_run, _START_LIMIT)
        if opened:
            tracker.handle = replace(tracker.handle, run_id=opened[0])
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(opened[0] + "\n", encoding="utf-8")
            settings = _redacted(recipe)
            flat = flatten(params if params is not None else settings)
            tracker._guarded(lambda client: _log_params(client, opened[0], flat))
            tracker.artifact_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "recipe.yaml")
            if recipe.tracking.system_metrics:
                tracker._start_monitor()
        return tracker

    @classmethod
    def attach(cls, handle: RunHandle) -> Tracker:
        """A further writer to a run, in a worker; the run itself is begun and ended by who started it."""
        return cls(handle, owner=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at a step (images seen). Values that are not finite stay out of MLflow, and are text in the file."""
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        self._write_line(int(step), now, values)
        if not self.handle.run_id:
            return
        stamp = int(now * 1000)
        self._pending.extend((_key(k), v, stamp, int(step)) for k, v in values.items() if math.isfinite(v))
        self._guarded(self._send)
        if self._monitor is not None and "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL" not in os.environ:
            # Dense enough for a run of 30 s, and not a million rows for one of a week.
            self._monitor.sampling_interval = min(60.0, max(5.0, (time.monotonic() - self._started) / 100))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file, or a folder with all that is in it."""
        run_id, source = self.handle.run_id, Path(path)

        def send(client: MlflowClient) -> None:
            if source.is_dir():
                client.log_artifacts(run_id, str(source), folder)
            else:
                client.log_artifact(run_id, str(source), folder)

        if run_id:
            self._guarded(send, _ARTIFACT_LIMIT)

    def artifact_text(self, text: str, file: str) -> None:
        """Log a text as the artifact `file`."""
        if self.handle.run_id:
            self._guarded(lambda client: client.log_text(self.handle.run_id, text, file), _ARTIFACT_LIMIT)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        if self.handle.run_id:
            self._guarded(lambda client: client.set_tag(self.handle.run_id, _key(key), str(value)))

    def end(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; what an attached tracker still holds is sent, no more."""
        if self._ended:
            return
        self._ended = True
        self._stop_monitor()
        if not self.handle.run_id:
            return

        def finish(client: MlflowClient) -> None:
            self._send(client)
            if self._owner:
                client.set_terminated(self.handle.run_id, status)

        if self._owner or self._pending:
            self._guarded(finish, force=True)
        if self._owner and status == "FINISHED":
            (Path(self.handle.log_file).parent / RUN_MARK).unlink(missing_ok=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (isinstance(error, SystemExit) and not error.code):
            self.end("FINISHED")
        else:
            self.end("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _write_line(self, step: int, now: float, values: Mapping[str, float]) -> None:
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(now, 3), "metrics": metrics})
        path = Path(self.handle.log_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line: several processes may append to the file, and nothing is lost when one is killed.
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._file_warned:
                self._file_warned = True
                _log.warning("metrics cannot be written to %s (%s); the run goes on", path, error.strerror or error)

    def _send(self, client: MlflowClient) -> None:
        """Send what is pending. A value sent twice is stored once, so a call that was given up does no harm."""
        from mlflow.entities import Metric

        while self._pending:
            batch = list(self._pending)[:_METRICS_IN_BATCH]
            client.log_batch(self.handle.run_id, metrics=[Metric(*values) for values in batch], synchronous=True)
            for sent in batch:
                if self._pending and self._pending[0] is sent:
                    self._pending.popleft()

    def _guarded(
        self, call: Callable[[MlflowClient], object], limit: float = _CALL_LIMIT, *, force: bool = False
    ) -> bool:
        """Whether `call` succeeded. It may fail, and it may hang: it gets `limit` seconds."""
        if not force and time.monotonic() < self._silent_until:
            return False
        try:
            _import_mlflow()
            _within(limit, lambda: call(self._connected()))
        except Exception as error:
            self._failed(error)
            return False
        self._pause = _FIRST_PAUSE
        return True

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = _connect(self.handle.uri, create=self._create)
        return self._client

    def _failed(self, error: Exception) -> None:
        self._silent_until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        refused = _refused(error)
        if refused:
            self._pending.clear()  # it would be refused again, and hold up what comes after it
        if not self._warned:
            self._warned = True
            verb = "refuses" if refused else "does not answer"
            _log.warning(
                "MLflow at %s %s (%s): metrics are kept in %s; training goes on",
                _without_password(self.handle.uri), verb, _reason(error), self.handle.log_file,
            )  # fmt: skip

    def _start_monitor(self) -> None:
        def start(client: MlflowClient) -> None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self.handle.run_id, sampling_interval=5, resume_logging=True, tracking_uri=self.handle.uri
            )
            self._monitor.start()

        self._guarded(start)

    def _stop_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            try:
                _within(_MONITOR_LIMIT, monitor.finish)
            except Exception as error:
                _log.debug("system metrics did not end: %s", error)


def end_trials(uri: str, parent_run_id: str, statuses: Mapping[str, str]) -> None:
    """End the child runs still RUNNING, with the status given for their run id or name, else KILLED."""
    if not parent_run_id:
        return

    def end_all() -> None:
        client = _connect(uri, create=False)
        experiment = client.get_run(parent_run_id).info.experiment_id
        for run in _running_children(client, experiment, parent_run_id):
            status = statuses.get(run.info.run_id) or statuses.get(run.info.run_name or "") or "KILLED"
            client.set_terminated(run.info.run_id, status)

    try:
        _import_mlflow()
        _within(_START_LIMIT, end_all)
    except Exception as error:
        _log.warning("MLflow at %s: runs of trials were not ended (%s)", _without_password(uri), _reason(error))


def flatten(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with values in text, as YAML would have them."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or a TimeoutError. A daemon thread: a call that hangs does not hold up the exit either."""
    outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="mlflow", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result


def _import_mlflow() -> None:
    """Import MLflow with short time-outs and without its messages; a slow import counts to no call's limit."""
    for key, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what matters comes as an exception, and is told once
    }.items():
        os.environ.setdefault(key, value)
    import mlflow  # noqa: F401

    # Where MLflow was imported before, its loggers have their level already.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # "Retrying (…)"


def _connect(uri: str, *, create: bool) -> MlflowClient:
    """A client of the store; with `create`, a SQLite store is made where there is none."""
    from mlflow import MlflowClient

    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        if not create:
            # MLflow would make an empty store, unseen by the driver.
            raise FileNotFoundError(2, f"no {path} on this machine; on a cluster set tracking.uri to an MLflow server")
        _make_sqlite(path)
    return MlflowClient(uri)


def _make_sqlite(path: Path) -> None:
    """Make a SQLite store at once or not at all: writers that meet while the tables are made break each other."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(f"sqlite:///{fresh}").search_experiments(max_results=1)
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass  # another run was faster
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _experiment(client: MlflowClient, recipe: Recipe, uri: str) -> str:
    """Id of the recipe's experiment, made if need be; artifacts of a local store lie beside its file."""
    from mlflow.exceptions import MlflowException

    name = recipe.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        path = _sqlite_path(uri)
        try:
            return client.create_experiment(name, artifact_location=str(path.parent / "mlartifacts") if path else None)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment '{name}' was deleted; restore it or set tracking.experiment to another name")
    return str(found.experiment_id)


def _open_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], resume_id: str | None) -> str:
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    if resume_id:
        try:
            run = client.get_run(resume_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                client.update_run(resume_id, status="RUNNING")
                client.log_batch(resume_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
                return resume_id
    return str(client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id)


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log parameters; MLflow does not let them change, so what a resumed run has otherwise becomes a tag."""
    from mlflow.entities import Param

    values = {_key(key): _shortened(value) for key, value in params.items()}
    known = client.get_run(run_id).data.params
    changed = {key: value for key, value in values.items() if known.get(key, value) != value}
    new = [Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(new), _PARAMS_IN_BATCH):
        client.log_batch(run_id, params=new[start : start + _PARAMS_IN_BATCH], synchronous=True)
    if changed:
        client.set_tag(run_id, "wavemim.resumed_with", json.dumps(changed))


def _running_children(client: MlflowClient, experiment: str, parent_run_id: str) -> Iterator[Any]:
    where = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'"
    found: list[Any] = []  # all of them first: ending runs moves the pages
    token: str | None = None
    while True:
        page = client.search_runs([experiment], where, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            yield from found
            return


def _tags(recipe: Recipe, stage: str, parent: RunHandle | None) -> dict[str, str]:
    tags = {
        "wavemim.stage": stage,
        "wavemim.recipe": recipe.name,
        "wavemim.out": str(Path(recipe.out).expanduser().absolute()),
        "mlflow.source.name": f"wavemim {stage}",
        **_version_tags(),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        tags["mlflow.user"] = str(os.getuid())
    if parent is not None:
        tags["mlflow.parentRunId"] = parent.run_id
    return tags


def _version_tags() -> dict[str, str]:
    """The commit of the project's own checkout, else the installed version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():  # not any repository that happens to lie around the installed package
        try:
            commit = _git(root, "rev-parse", "HEAD")
            dirty = "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
            return {"mlflow.source.git.commit": commit + dirty}
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return {"wavemim.version": metadata.version("wavemim")}
    except metadata.PackageNotFoundError:
        return {}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _absolute(uri: str) -> str:
    """A store URI that means the same in every working folder."""
    if uri in ("databricks", "databricks-uc", "uc"):
        return uri
    for prefix in ("sqlite:///", "file://", "file:"):
        rest = uri.removeprefix(prefix)
        if rest != uri:
            place, mark, query = rest.partition("?")
            in_memory = prefix == "sqlite:///" and place in ("", ":memory:")
            return uri if in_memory else f"{prefix}{os.path.abspath(os.path.expanduser(place))}{mark}{query}"
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store."""
    place = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(place) if uri.startswith("sqlite:///") and place not in ("", ":memory:") else None


def _without_password(uri: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def _redacted(recipe: Recipe) -> dict[str, Any]:
    """All settings; a password in the store's URI is not for everyone who sees the runs."""
    settings = recipe.dump()
    if recipe.tracking.uri:
        settings["tracking"]["uri"] = _without_password(recipe.tracking.uri)
    return settings


def _key(name: str) -> str:
    """A name with what MLflow does not allow in one replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_PARAM else value[: _LONGEST_PARAM - 1] + "…"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _refused(error: Exception) -> bool:
    """Whether the store is there, and does not take what it was given."""
    if any(isinstance(link, OSError) for link in _chain(error)):  # includes time-outs and lost connections
        return False
    code = getattr(error, "error_code", "")
    return isinstance(error, ValueError) or code not in ("", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


def _reason(error: Exception) -> str:
    """The innermost system error in a few words, else the first line of the error itself."""
    words = [link.strerror for link in _chain(error) if isinstance(link, OSError) and link.strerror]
    text = str(words[-1] if words else error).strip()
    if "timed out" in text:  # else half a page of connection pools
        return "timed out"
    line = text.splitlines()[0] if text else type(error).__name__
    return _without_password(line if len(line) <= 200 else line[:199] + "…")
