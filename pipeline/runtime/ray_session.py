"""The Ray that a stage runs on: a cluster that is there already, or a private Ray on this machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.config.settings import Cluster
from pipeline.errors import SettingError, StageError

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 10
_MAX_OBJECT_STORE = 2 * 2**30
_MIN_OBJECT_STORE = 128 * 2**20

# Read by Ray here and in every process it starts; what the user has set is left as it is.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning in every task without a GPU
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the stages have bars of their own
    "RAY_AIR_NEW_OUTPUT": "0",  # and tables: Tune's newer output cannot be silenced
}
# A node of an autoscaled cluster is started, set up and only then joins.
_CLUSTER = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"}
_PRIVATE = {
    "RAY_AUTH_MODE": "disabled",  # or Ray writes a token into the home folder; only loopback is listened on
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon the end of a short training is seen
    # Makes Ray take the loopback address for its own: nothing listens on any other interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True)
class SessionInfo:
    """What the Ray of a session offers."""

    cpus: float
    gpus: float
    nodes: int
    address: str
    private: bool  # started by and for this process


@contextlib.contextmanager
def ray_session(cluster: Cluster, *, log_level: int = logging.WARNING) -> Iterator[SessionInfo]:
    """A Ray to work on, shut down at the end unless it was there before.

    `cluster.address`, then RAY_ADDRESS (set inside a Ray job), name a cluster; without either a private Ray is started.
    Raises StageError where Ray cannot be reached or started. `log_level` INFO also shows what workers print.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
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
                with _own_sigterm():
                    (_start if private else _connect)(address, log_level)
            except Exception as error:  # that it took too long is a bare Exception of Ray's
                done = "start Ray on this machine" if private else f"connect to the Ray cluster at {address}"
                raise StageError(f"could not {done}: {_first_line(error)}") from error
            yield _info(private)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that exits with status 15; this process has its own."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _connect(address: str, log_level: int) -> None:
    import ray
    from ray._private import ray_constants

    # Each retry takes 40 seconds, and 20 are usual: too long to find out about a wrong port or token.
    retries, ray_constants.NUM_REDIS_GET_RETRIES = ray_constants.NUM_REDIS_GET_RETRIES, 1
    try:
        ray.init(address=address, logging_level=log_level, log_to_driver=log_level <= logging.INFO)
    finally:
        ray_constants.NUM_REDIS_GET_RETRIES = retries
        _keep_sigterm()


def _start(address: str, log_level: int) -> None:
    import ray
    from ray._private import ray_constants

    # The variable is read when Ray is imported, which may have been before.
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    start = functools.partial(
        ray.init,
        address=address,
        num_cpus=_cpus(),
        object_store_memory=_object_store_bytes(),
        include_dashboard=False,
        logging_level=log_level,
        log_to_driver=log_level <= logging.INFO,
    )
    try:
        try:
            start()
        except Exception as error:  # a bare one
            if "timed out" not in str(error):
                raise
            _log.warning("this machine is busy: Ray did not start within the time that it gives itself; once more")
            ray.shutdown()
            start()
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        _keep_sigterm()


def _keep_sigterm() -> None:
    """Ray's core takes SIGTERM for a crash, and would end the process with a stack trace: give it back to Python."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _cpus() -> int:
    """CPUs this process may use, and never less than the two that a worker and a task beside it wait for."""
    from ray._private.utils import get_num_cpus

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(allowed, int(get_num_cpus())))


def _object_store_bytes() -> int:
    """A modest store: stages hand files to each other, not objects."""
    from ray._common.utils import get_system_memory

    wanted = min(_MAX_OBJECT_STORE, int(get_system_memory() * 0.3))
    with contextlib.suppress(OSError):  # with less shared memory than asked for, Ray warns and works on disk
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


def _check_reachable(address: str) -> None:
    """Ray itself tries for many minutes, in lines of its own; a port that nobody listens on is known at once."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if address == "auto" or not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise StageError(
            f"no Ray cluster at {address} ({_first_line(error)}); start one with `ray start --head` or `ray up`, or "
            "leave out cluster.address and RAY_ADDRESS to run on this machine alone"
        ) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables set where they are not, for as long as the session lasts."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def uses_gpu(recipe: Recipe, session: SessionInfo) -> bool:
    """Whether training runs on GPUs: as set, else where there are any."""
    return session.gpus > 0 if recipe.cluster.gpus is None else recipe.cluster.gpus


def check_room(recipe: Recipe, session: SessionInfo, workers: int, section: str = "train") -> None:
    """Raise SettingError where this machine can never hold so many workers; a cluster may still grow.

    `section`: of the settings, the one that names the workers.
    """
    needed = workers * recipe.cluster.cpus_per_worker
    if session.private and needed > session.cpus:
        raise SettingError(
            f"{workers} worker(s) with cluster.cpus_per_worker={recipe.cluster.cpus_per_worker:g} need {needed:g} CPUs, "
            f"this machine has {session.cpus:g}; use fewer with {section}.workers={max(1, int(session.cpus))}, "
            "or a smaller share"
        )
    if session.private and uses_gpu(recipe, session) and workers > session.gpus:
        raise SettingError(
            f"{workers} worker(s) need a GPU each (cluster.gpus={recipe.cluster.gpus}), this machine has {session.gpus:g}; "
            f"use fewer with {section}.workers=, or none with cluster.gpus=false"
        )


def root_cause(error: BaseException) -> str:
    """The last line of what a worker raised."""
    failures = getattr(error, "worker_failures", None)
    inner: Any = next(iter(failures.values())) if failures else (error.__cause__ or error)
    while getattr(inner, "cause", None) is not None:
        inner = inner.cause
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__


def quiet_ray_data(*, in_order: bool = False) -> None:
    """Make Ray Data show no progress bars and start messages of its own in this process: the stages have bars.

    Args:
        in_order: Whether rows come out of data sets in the order in which they went in.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = in_order
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # This logger warns that Ray Data's own bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
