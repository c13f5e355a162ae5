"""Ray's private names that this project uses, all of them in this file: they may change with any version of Ray.

Written for Ray `WRITTEN_FOR`; tests/runtime/test_ray_internals.py fails with another version until each of them has been
checked against it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from pipeline.config.places import printable

WRITTEN_FOR = "2.60"


def node_is_leaving() -> bool:
    """In a Ray Train worker: whether Ray knows that a node of this run is about to be taken away.

    The public function asks all ranks; this one can be called by a single rank.
    """
    from ray.train.v2._internal.execution.context import get_train_context

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
    with _changed("NUM_REDIS_GET_RETRIES", 1):
        yield


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Within the block, a Ray that ray.init() starts listens on 127.0.0.1 only.

    That is what RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 means; Ray reads it when it is imported, which may already have
    happened.
    """
    with _changed("ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def printable_command() -> Iterator[None]:
    """Within the block, ray.init() records this process's command with names that are not UTF-8 escaped, else it fails."""
    from ray._private import utils

    before = utils.get_entrypoint_name
    utils.get_entrypoint_name = lambda: printable(before())
    try:
        yield
    finally:
        utils.get_entrypoint_name = before


@contextlib.contextmanager
def _changed(name: str, value: Any) -> Iterator[None]:
    from ray._private import ray_constants

    before = getattr(ray_constants, name)
    setattr(ray_constants, name, value)
    try:
        yield
    finally:
        setattr(ray_constants, name, before)


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
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

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
