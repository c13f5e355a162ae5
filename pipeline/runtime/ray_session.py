"""The Ray that a stage runs on: an existing cluster, or a private Ray on this machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.config.settings import Cluster
from pipeline.errors import SettingError, StageError
from pipeline.runtime import interrupts, machine, observability, ray_internals, ray_job

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 10
_MAX_OBJECT_STORE = 2 * 2**30
_MIN_OBJECT_STORE = 128 * 2**20

# Read by Ray here and in every process that it starts; a value that the user has set stays.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning in every task without a GPU
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the stages have their own bars
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # which saves Ray's experiment, and returns as if it had finished
    "RAY_AIR_NEW_OUTPUT": "0",  # the stages have their own tables, and Tune's newer output cannot be silenced
}
# An autoscaled cluster has to start and set up a node before it joins.
_CLUSTER = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"}
_PRIVATE = {
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home folder; it only listens on loopback
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # so that the end of a short training is seen soon
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that asks whether a cloud takes this node away
    # Makes Ray use the loopback address, so that nothing listens on another interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True)
class SessionInfo:
    """What the Ray of a session offers.

    Attributes:
        cpus, gpus: Of all nodes together, when the session began.
        nodes: Number of nodes that are alive.
        address: Of the head, HOST:PORT.
        private: Whether it was started by and for this process.
    """

    cpus: float
    gpus: float
    nodes: int
    address: str
    private: bool


@contextlib.contextmanager
def ray_session(cluster: Cluster, *, log_level: int = logging.WARNING) -> Iterator[SessionInfo]:
    """Connect to a cluster, or start a private Ray; either is left or shut down at the end of the block.

    Ray has its workers search the driver's working folder for modules before all others. So it is started from the folder
    of this project's packages, which no module of the user's can then replace.

    A Ray that this process is connected to already is used, and stays.

    Args:
        cluster: The settings. Its address, else RAY_ADDRESS (which is set inside a Ray job), names a cluster; without
            either a private Ray is started.
        log_level: Of Ray's own messages; INFO also shows what workers print.

    Yields:
        What the Ray offers.

    Raises:
        StageError: Ray cannot be reached or started.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise SettingError(
            f"Ray's address {address}: give HOST:PORT of the cluster's head node, such as 10.0.0.1:6379, in "
            "cluster.address or RAY_ADDRESS, or leave both out; ray:// and http:// are for Ray Client and `ray job submit`"
        )
    private = address == "local"
    with _environment({**_QUIET, **(_PRIVATE if private else _CLUSTER)}):
        import ray

        if ray.is_initialized():
            yield _info(private=False)
            return
        if not private:
            _check_reachable(address)
        try:
            try:
                with (
                    interrupts.at_once(),
                    interrupts.handlers_kept(),
                    contextlib.chdir(machine.PACKAGES),
                    ray_internals.printable_command(),
                ):
                    (_start if private else _connect)(address, log_level)
            except SettingError:
                raise
            except Exception as error:  # Ray raises a bare Exception if starting takes too long
                done = "start Ray on this machine" if private else f"connect to the Ray cluster at {address}"
                raise StageError(f"could not {done}: {_first_line(error)}") from error
            if private:
                yield _info(private)
            else:
                ray_job.wait_for_checkpoint_on_stop()
                with (
                    _published(),
                    ray_internals.brief_on_nodes() if log_level > logging.INFO else contextlib.nullcontext(),
                ):
                    yield _info(private)
        finally:
            if not interrupts.interrupted():  # an orderly end takes seconds, and waits for those who use it
                ray.shutdown()


def _connect(address: str, log_level: int) -> None:
    import ray

    with ray_internals.connecting_once():  # else a wrong port or token would be found out after many minutes
        ray.init(address=address, logging_level=log_level, log_to_driver=log_level <= logging.INFO)


def _start(address: str, log_level: int) -> None:
    import ray

    machine.check_open_files()
    start = functools.partial(
        ray.init,
        address=address,
        num_cpus=_cpus(),
        object_store_memory=_object_store_bytes(),
        include_dashboard=False,
        _temp_dir=machine.ray_folder(),
        logging_level=log_level,
        log_to_driver=log_level <= logging.INFO,
    )
    with ray_internals.on_loopback(), ray_internals.quick_start():
        try:
            start()
        except Exception as error:  # a bare one
            if "timed out" not in str(error):
                raise
            _log.warning(
                "Ray did not start within its own time limit, probably because this machine is busy; trying once more"
            )
            ray.shutdown()
            start()


def _cpus() -> int:
    """CPUs that this process may use; at least two, which a worker and a task at the same time need."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(allowed, ray_internals.cpu_count()))


def _object_store_bytes() -> int:
    """Size of the object store; small, because stages pass files to each other, not objects."""
    wanted = min(_MAX_OBJECT_STORE, int(ray_internals.memory_bytes() * 0.3))
    with contextlib.suppress(OSError):  # with less shared memory than this, Ray warns and uses the disk
        wanted = min(wanted, int(shutil.disk_usage("/dev/shm").free * 0.9))
    return max(_MIN_OBJECT_STORE, wanted)


def _info(private: bool) -> SessionInfo:
    import ray

    resources: Mapping[str, Any] = ray.cluster_resources()
    return SessionInfo(
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        nodes=sum(1 for node in ray.nodes() if node["Alive"]),
        address=ray.get_runtime_context().gcs_address,
        private=private,
    )


def _published() -> contextlib.AbstractContextManager[None]:
    import ray
    from ray.util.metrics import Gauge

    file = ray_internals.log_folder() / observability.file_of(ray.get_runtime_context().get_job_id())
    return observability.publishing(file, Gauge)


def _check_reachable(address: str) -> None:
    """Raise StageError if nothing listens at an address. Ray itself would try for minutes, with messages of its own."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if address == "auto" or not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise StageError(
            f"no Ray cluster at {address} ({_first_line(error)}); start one with `ray start --head` or `ray up`, or "
            "leave out cluster.address and RAY_ADDRESS to run on this machine only"
        ) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, while the block runs."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def uses_gpu(recipe: Recipe, session: SessionInfo) -> bool:
    """Whether workers run on GPUs: as cluster.gpus says, by default if the session has any."""
    return session.gpus > 0 if recipe.cluster.gpus is None else recipe.cluster.gpus


def root_cause(error: BaseException) -> str:
    """The last line of the error that a worker raised, without Ray's wrapping and stack traces."""
    failures = getattr(error, "worker_failures", None)
    inner: Any = next(iter(failures.values())) if failures else (error.__cause__ or error)
    while getattr(inner, "cause", None) is not None:
        inner = inner.cause
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__


@contextlib.contextmanager
def ray_data(session: SessionInfo, *, in_order: bool = False) -> Iterator[None]:
    """For the making and reading of a data set: Ray Data shows no progress bars and messages of its own, as stages have bars.

    In a private Ray it also starts no processes but those that work.

    Args:
        session: The Ray session.
        in_order: Whether rows come out of data sets in the order in which they went in.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # prepare asks for less memory than it uses, to keep off GPU machines
    context.execution_options.preserve_order = in_order
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray_internals.silence_data_progress()
    with ray_internals.data_without_actors() if session.private else contextlib.nullcontext():
        yield


class InActor:
    """A function in an actor of Ray Data: after a task on a GPU, Ray ends the process, and with it models on the GPU."""

    def __init__(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._function = function

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Call it with a batch."""
        return self._function(batch)
