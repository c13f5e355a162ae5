"""The calls of MLflow: the only module that imports it.

Every call may fail and may hang; only `within` limits the time, and `errors` classifies the errors. Runs are
addressed by id through `MlflowClient`: the fluent interface keeps an active run per thread, and creates stray runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.tracking.store_uris import artifacts_beside, sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")

# The experiment's page opens on the runs of models; without this tag MLflow asks, or opens on traces of language models.
_KIND, _TRAINING = "mlflow.experimentKind", "custom_model_development"
# MLflow sorts groups of charts by name. Costs are to come last.
_COST, _SHOWN_COST = "cost/", "usage/"
KEY = "wavemim.key"  # tag: the run's key, which the writer makes up, so that no run is created twice
REASON = "wavemim.reason"  # tag: why the run failed
_POOL = "MLFLOW_SQLALCHEMYSTORE_"  # how MLflow's settings of connections to databases begin
Value = tuple[str, float, int, int]  # of a metric: name, value, time (ms), step
# MLflow's limits.
_LONGEST_PARAM, _LONGEST_DIGEST, _PARAMS_IN_BATCH, METRICS_IN_BATCH = 6000, 36, 100, 1000


class RunGone(Exception):
    """The store has no such run, or it was deleted there (`deleted`)."""

    def __init__(self, run_id: str, *, deleted: bool) -> None:
        super().__init__(f"its run {run_id} {'was deleted' if deleted else 'does not exist'}")
        self.deleted = deleted


def within(seconds: float, call: Callable[[], T]) -> T:
    """Returns the result of `call`. Raises its errors, and TimeoutError if it takes longer than `seconds`.

    A call that hangs is abandoned in a daemon thread, which does not keep the process from exiting.
    """
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


def import_mlflow() -> None:
    """Import MLflow without its messages and long retries. Apart from the calls, whose time is limited."""
    for key, value in {
        # A request that is given up early is stored all the same, and its repetition keeps a slow server even busier.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what matters is raised, and logged once by the caller
    }.items():
        os.environ.setdefault(key, value)
    import mlflow  # noqa: F401

    # Where MLflow was imported before, its loggers have their level already.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # "Retrying (…)"


def connect(uri: str, *, create: bool) -> MlflowClient:
    """A client of the store. With `create`, a SQLite store is created if there is none; else FileNotFoundError is raised."""
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is not None and not any(name.startswith(_POOL) for name in os.environ):
        # A connection that is kept stays with a file that was removed, when a new one has taken its place.
        os.environ[f"{_POOL}POOLCLASS"] = "NullPool"
    if path is not None and not path.exists():
        if not create:
            # MLflow would create an empty store, which the driver does not see.
            raise FileNotFoundError(2, f"no {path} on this machine; on a cluster set tracking.uri to an MLflow server")
        _make_sqlite(path)
    return MlflowClient(uri)


def _make_sqlite(path: Path) -> None:
    """Create a SQLite store at once or not at all: processes that create its tables together break it.

    A link instead of a rename, so that a store that another process has created meanwhile is not replaced.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(sqlite_uri(fresh)).search_experiments(max_results=1)
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment, which is created if needed. The artifacts of a SQLite store lie beside its file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        try:
            return client.create_experiment(name, artifact_location=artifacts_beside(path), tags={_KIND: _TRAINING})
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment '{name}' was deleted; restore it or set tracking.experiment to another name")
    if _KIND not in found.tags:  # the user may have chosen another kind
        with contextlib.suppress(MlflowException):  # a user who may not change the experiment can still log runs
            client.set_experiment_tag(found.experiment_id, _KIND, _TRAINING)
    return str(found.experiment_id)


def find_or_create_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], started: int) -> str:
    """Id of the run that has the key in `tags`; if there is none, of a new one that began at `started` (ms).

    The answer to an earlier request may have been lost, and MLflow repeats a slow request by itself, so that there may be
    several: all but the one with metrics are empty, and deleted.
    """
    where = f"tags.`{KEY}` = '{tags[KEY]}'"
    found = sorted(client.search_runs([experiment], where), key=lambda run: (-len(run.data.metrics), run.info.run_id))
    if not found:
        created = client.create_run(experiment, start_time=started, tags=dict(tags), run_name=name)
        found = [created, *(r for r in client.search_runs([experiment], where) if r.info.run_id != created.info.run_id)]
    for stray in found[1:]:
        client.delete_run(stray.info.run_id)
    return str(found[0].info.run_id)


def check_run(client: MlflowClient, run_id: str) -> Run:
    """The run. Raises RunGone if the store does not have it, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RunGone(run_id, deleted=False) from None
    if run.info.lifecycle_stage != "active":
        raise RunGone(run_id, deleted=True)
    return run


def reopen_run(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Resume a run, with these tags and without the reason for which it failed before. Raises RunGone."""
    from mlflow.entities import RunTag

    known = check_run(client, run_id).data.tags
    client.update_run(run_id, status="RUNNING")
    if REASON in known:
        client.delete_tag(run_id, REASON)
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)


def end_run(client: MlflowClient, run_id: str, status: str, at: int, *, force: bool) -> None:
    """End a run at the time `at` (ms); without `force` only one that is RUNNING. Raises RunGone."""
    if check_run(client, run_id).info.status == "RUNNING" or force:
        client.set_terminated(run_id, status, end_time=at)


def log_values(client: MlflowClient, run_id: str, values: Sequence[Value]) -> None:
    """Store up to 1000 values. One that the store has, with the same name, step, time and value, changes nothing."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*value) for value in values], synchronous=True)


def not_stored(client: MlflowClient, run_id: str, values: Sequence[Value]) -> Sequence[Value]:
    """The rest of `values`, which may have been sent in part, from the first one on that the store lacks.

    MLflow stores a batch whole or not at all, and batches come in order: everything up to the last value that it shows as
    the newest of a metric is there. Sending it again would do no harm, but for each value that it has MLflow searches the
    whole run (25 ms a value in a SQLite store of 200,000).
    """
    newest = {
        (m.key, m.value, m.timestamp, m.step) for m in getattr(check_run(client, run_id).data, "_metric_objs", ())
    }
    known = [index for index, value in enumerate(values) if value in newest]
    return values[known[-1] + 1 :] if known else values


def log_file(client: MlflowClient, run_id: str, source: Path, into: str | None) -> None:
    """Store a file, or a folder with everything in it, in the artifact folder `into`."""
    if source.is_dir():
        client.log_artifacts(run_id, str(source), into)
    else:
        client.log_artifact(run_id, str(source), into)


def log_dataset(client: MlflowClient, run_id: str, about: Mapping[str, Any], context: str) -> None:
    """Log a data set as an input of the run. Logged again, it changes nothing.

    Args:
        client, run_id: The store, and the run in it.
        about: As in `Tracker.dataset`; a digest that is too long is cut.
        context: What the run uses it for.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": about["source"]}), json.dumps(about["profile"])
    columns = [{"name": name, "type": kind, "required": True} for name, kind in about["columns"].items()]
    schema, digest = json.dumps({"mlflow_colspec": columns}), about["digest"][:_LONGEST_DIGEST]
    dataset = Dataset(about["name"], digest, "local", source, schema, profile)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def system_monitors() -> list[Any]:
    """MLflow's monitors of this machine; that of the GPU only if there is one."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(kind())
            break
        except Exception:  # each raises errors of its own on a machine without one
            continue
    return monitors


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log parameters. MLflow does not let them change: those that a resumed run changed become a tag."""
    from mlflow.entities import Param

    values = {clean_key(key): _shortened(value) for key, value in params.items()}
    known = client.get_run(run_id).data.params
    changed = {key: value for key, value in values.items() if known.get(key, value) != value}
    new = [Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(new), _PARAMS_IN_BATCH):
        client.log_batch(run_id, params=new[start : start + _PARAMS_IN_BATCH], synchronous=True)
    if changed:
        client.set_tag(run_id, "wavemim.resumed_with", json.dumps(changed))


def running_children(client: MlflowClient, experiment: str, parent_run_id: str) -> Iterator[Any]:
    """Runs nested in a run that are RUNNING."""
    where = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'"
    found: list[Any] = []  # all of them before the first is yielded: ending runs shifts the pages
    token: str | None = None
    while True:
        page = client.search_runs([experiment], where, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            yield from found
            return


def find_runs(client: MlflowClient, where: str = "", at_most: int = 10_000) -> list[Run]:
    """Runs that are not deleted, of all experiments, the newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[Run] = []
    token: str | None = None
    while experiments and len(found) < at_most:
        most = min(at_most - len(found), 1000)
        page = client.search_runs(experiments, where, max_results=most, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            break
    return found


def history(client: MlflowClient, run_id: str, name: str) -> dict[int, tuple[float, int]]:
    """A metric: step -> (value, time in ms). A resumed run repeats some steps: the last value at a step counts."""
    stored = client.get_metric_history(run_id, metric_key(name)) or client.get_metric_history(run_id, name)
    values = sorted(stored, key=lambda value: value.timestamp)
    return dict(sorted({value.step: (value.value, value.timestamp) for value in values}.items()))


def save_onnx(file: Path, folder: Path, *, shape: Sequence[int], features: int, about: Mapping[str, Any]) -> None:
    """Write an ONNX file as an MLflow model: with signature, an input example, and the packages that load it.

    Loading it needs MLflow, onnx and onnxruntime, and nothing of this project.

    Args:
        file: The ONNX file.
        folder: Where to write the model; must not exist.
        shape: (C, H, W) of an image.
        features: Length of its feature vector.
        about: Metadata of the model.
    """
    import mlflow.onnx
    import numpy as np
    import onnx
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    kind = np.dtype(np.float32)
    ramp = np.linspace(0, 255, shape[-1]).round().astype(np.float32)
    mlflow.onnx.save_model(
        onnx.load(file),
        folder,
        signature=ModelSignature(
            Schema([TensorSpec(kind, (-1, *shape))]), Schema([TensorSpec(kind, (-1, features), "features")])
        ),
        input_example=np.broadcast_to(ramp, (1, *shape)).copy(),
        pip_requirements=[f"{package.__name__}=={package.__version__}" for package in (mlflow, onnx, onnxruntime)],
        metadata={key: str(value) for key, value in about.items()},
    )


def register_version(client: MlflowClient, run_id: str, name: str, model: Path, tags: Mapping[str, Any]) -> str:
    """Store a model's folder among the run's artifacts, as a new version of the registered model `name`; its number."""
    from mlflow.exceptions import MlflowException

    run = check_run(client, run_id)
    client.log_artifacts(run_id, str(model), "model")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    texts = {key: str(value) for key, value in tags.items()}
    version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run_id, tags=texts)
    return str(version.version)


def clean_key(name: str) -> str:
    """A name with the characters replaced that MLflow does not allow."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def metric_key(name: str) -> str:
    """The name of a metric in MLflow: costs are named ``usage/…`` there."""
    return clean_key(_SHOWN_COST + name.removeprefix(_COST) if name.startswith(_COST) else name)


def metrics_of(run: Run) -> dict[str, float]:
    """The newest values of a run's metrics, by the names that the stages use."""
    return {
        _COST + name.removeprefix(_SHOWN_COST) if name.startswith(_SHOWN_COST) else name: value
        for name, value in run.data.metrics.items()
    }


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_PARAM else value[: _LONGEST_PARAM - 1] + "…"
