"""Ray's private names that this project uses, all of them in this file: they may change with any version of Ray.

Written for Ray `WRITTEN_FOR`; tests/runtime/test_ray_internals.py fails with another version until each of them has been
checked against it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.places import printable

_log = logging.getLogger(__name__)

WRITTEN_FOR = "2.60"
_REGISTERS, _POLL = 10.0, 0.02  # seconds in which a new node registers, and between two looks
_DATA_ASKS = 0.5  # seconds after which Ray Data asks again what the cluster offers
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the environment of a job's command


def node_is_leaving() -> bool:
    """In a Ray Train worker: whether Ray knows that a node of this run is about to be taken away.

    The public function asks all ranks; this one can be called by a single rank. No node leaves a worker in local mode.
    """
    from ray.train.v2._internal.execution.context import get_train_context
    from ray.train.v2._internal.execution.train_fn_utils import get_train_fn_utils

    if not get_train_fn_utils().is_distributed():
        return False
    return get_train_context().preemption_context.preemption_info is not None


def torch_trainer(*, private: bool, **options: Any) -> Any:
    """A Ray Train trainer for PyTorch without helper actors that it would start for nothing, which takes a second each.

    Args:
        private: Whether the Ray ends with this process; placement groups then need nobody that removes them.
        **options: Of `ray.train.torch.TorchTrainer`, without datasets.
    """
    from ray.train.torch import TorchTrainer

    unused = {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if private else [])}

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            every: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # of V2, which Ray hides
            return [each for each in every if type(each).__name__ not in unused]

    return Trainer(**options)


@contextlib.contextmanager
def connecting_once() -> Iterator[None]:
    """Within the block, ray.init() tries once to reach a cluster instead of 20 times, which takes 40 seconds each."""
    from ray._private import ray_constants

    with _changed(ray_constants, "NUM_REDIS_GET_RETRIES", 1):
        yield


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Within the block, a Ray that ray.init() starts listens on 127.0.0.1 only.

    That is what RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 means; Ray reads it when it is imported, which may already have
    happened.
    """
    from ray._private import ray_constants

    with _changed(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """Within the block, a Ray that ray.init() starts has only what it needs, and is used as soon as its node has registered.

    Without a dashboard its API server only sends usage statistics, and takes a second to start. Its monitor starts nodes, of
    which there are none to start, writes the status that `may_grow` reads, and takes a second to end. Ray asks for its new node
    once and then a second later.
    """
    from ray._private import services
    from ray._private.node import Node
    from ray._private.state import GlobalState

    ask = services.get_node

    def without_server(node: Any, **_: Any) -> None:
        node._webui_url = ""

    def get_node(gcs_address: str, node_id: str) -> Any:
        state, ends = GlobalState(), time.monotonic() + _REGISTERS
        state._initialize_global_state(services._get_gcs_client_options(gcs_address))
        while time.monotonic() < ends and all(node["NodeID"] != node_id for node in state.node_table()):
            time.sleep(_POLL)
        return ask(gcs_address, node_id)

    with (
        _changed(Node, "start_api_server", without_server),
        _changed(Node, "start_monitor", lambda _: None),
        _changed(services, "get_node", get_node),
    ):
        yield


@contextlib.contextmanager
def prompt_data_scheduling() -> Iterator[None]:
    """Within the block, Ray Data starts the next task as soon as one has ended.

    By itself it waits for all running tasks to end, for at most 0.1 seconds, before it looks which have, so that a core is idle
    for up to that long, or twice that, after each task. It also asks only once a second what the cluster offers, and runs one
    task at a time until the first answer.
    """
    import ray
    from ray.data._internal.execution import resource_manager, streaming_executor_state

    class WaitsForOne:
        def __getattr__(self, name: str) -> Any:
            return getattr(ray, name)

        @staticmethod
        def wait(refs: list[Any], *, num_returns: int, timeout: float, **options: Any) -> Any:
            first = ray.wait(refs, num_returns=1, timeout=timeout, **options)
            return ray.wait(refs, num_returns=num_returns, timeout=0, **options) if first[0] else first

    with (
        _changed(streaming_executor_state, "ray", WaitsForOne()),
        _changed(resource_manager.ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", _DATA_ASKS),
    ):
        yield


@contextlib.contextmanager
def data_without_actors() -> Iterator[None]:
    """Within the block, Ray Data starts no actors of its own, for a Ray of this process; each takes a second of a core.

    One divides the cluster among its users and asks for more nodes, and Ray Data runs one task at a time until it answers; here
    all nodes are for this process, and there will be no others. The other one keeps statistics for a dashboard.
    """
    import ray
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator

    class Nobody:
        def __getattr__(self, _: str) -> Any:
            return self

        def remote(self, *_: Any) -> None:
            pass

    def offered(_: Any) -> dict[str, Any]:
        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    with (
        _changed(stats, "get_or_create_stats_actor", Nobody),
        _changed(stats._StatsManager, "gen_dataset_id_from_stats_actor", staticmethod(lambda: uuid.uuid4().hex)),
        _changed(DefaultAutoscalingCoordinator, "get_reserved_resources", offered),
        _changed(DefaultAutoscalingCoordinator, "request_resources", lambda *_, **__: None),
        _changed(DefaultAutoscalingCoordinator, "cancel_request", lambda _: None),
    ):
        yield


@contextlib.contextmanager
def printable_command() -> Iterator[None]:
    """Within the block, ray.init() records this process's command with names that are not UTF-8 escaped, else it fails."""
    from ray._private import utils

    before = utils.get_entrypoint_name
    with _changed(utils, "get_entrypoint_name", lambda: printable(before())):
        yield


@contextlib.contextmanager
def no_credentials_in_trials() -> Iterator[None]:
    """Within the block, Ray Tune does not copy AWS_* variables to its trials: Ray logs them, in files all users can read.

    Trials then have the credentials of their node, as the workers of all other stages.
    """
    from ray.tune.execution import class_cache

    kept = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
    with _changed(class_cache, "ENV_VARS_TO_PROPAGATE", kept):
        yield


@contextlib.contextmanager
def brief_on_nodes() -> Iterator[None]:
    """Within the block, a lost node is one warning, instead of the end of its log on standard output, many times.

    A task that Ray then runs again is nothing to report. All else that Ray reports is shown as before.
    """
    from ray._private import worker

    before = worker.print_to_stdstream

    def show(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") == "raylet":
            data = {**data, "lines": [line for line in data["lines"] if not _said_of_nodes(line)]}
        if data["lines"]:
            before(data, ignore_prefix)

    with _changed(worker, "print_to_stdstream", show):
        yield


def _said_of_nodes(text: str) -> bool:
    """Whether a message of Ray is about a lost node; warns of the node."""
    if lost := re.match(r"The node with node id: (\w+) and address: (\S+) .*has been marked dead", text, re.DOTALL):
        node, address = lost.groups()
        _log.warning("node %s (%s…) was lost; its tasks and workers start again on other nodes", address, node[:8])
    return bool(lost) or text.startswith("Raylet is terminated") or "so the task will be retried" in text


@contextlib.contextmanager
def _changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def cpu_count() -> int:
    """CPUs that this process may use by its container's limits, as Ray counts them."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


def memory_bytes() -> int:
    """Memory that this process may use by its container's limits, as Ray counts it."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())


def may_grow() -> bool:
    """Whether the cluster has an autoscaler that could start more nodes; True where that is not known.

    `ray start` alone runs an autoscaler too, which only reports the nodes that are there, each as a type of its own.
    """
    from ray._private import ray_constants, worker
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

    node: Any = worker._global_node
    if node is not None and node.head and ray_constants.PROCESS_TYPE_MONITOR not in node.all_processes:
        return False  # a Ray of this process, by `quick_start`
    if state.get_cluster_config() is not None:
        return True
    status = _internal_kv_get(b"__autoscaling_status")
    if not status:
        return True
    report = json.loads(status).get("autoscaler_report") or {}
    types = [*(report.get("active_nodes") or {}), *(report.get("idle_nodes") or {})]
    return not types or not all(re.fullmatch("node_[0-9a-f]{56}", name) for name in types)


def silence_data_progress() -> None:
    """Ray Data warns that its own progress bars are off."""
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def in_uploaded_folder(path: str) -> bool:
    """Whether an absolute path lies in a folder that Ray has unpacked from a job's upload."""
    return "/runtime_resources/working_dir_files/" in f"{os.path.realpath(path)}/"


def set_stop_wait(submission_id: str, seconds: int) -> None:
    """Have the actor that supervises a job wait so long before it kills the stopped job.

    It reads RAY_JOB_STOP_WAIT_TIME_S from its own environment when the job is stopped; a value that is set there stays.

    Args:
        submission_id: The job's ID.
        seconds: The time.
    """
    import ray
    from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE

    try:
        supervisor: Any = ray.get_actor(
            JOB_ACTOR_NAME_TEMPLATE.format(job_id=submission_id), namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE
        )
        # The name of a local function cannot be imported, so the function itself is sent.
        call = supervisor.__ray_call__.remote(lambda _: os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(seconds)))
        ray.get(call, timeout=10)
    except Exception as error:  # whatever a cluster of another kind lacks: the job then has Ray's 3 seconds
        _log.warning("ray job stop will not wait for a checkpoint: %s", str(error).partition("\n")[0])


def log_folder() -> Path:
    """Where Ray keeps the logs of this machine, for the cluster that this process is connected to."""
    from ray._private import worker

    node: Any = worker.global_worker.node
    return Path(node.get_logs_dir_path())


def read_log(client: Any, node: str, name: str) -> str | None:
    """A file of a node's log folder.

    Args:
        client: Ray's `JobSubmissionClient`.
        node: The node's IP address.
        name: The file.

    Returns:
        Its text; None if there is no such file.
    """
    query = urllib.parse.urlencode({"node_ip": node, "filename": name, "lines": -1, "timeout": 10})
    answer = client._do_request("GET", f"/api/v0/logs/file?{query}")
    return str(answer.text) if answer.status_code == 200 else None
