"""Whether a Ray has room for the workers of a stage: a stage that can never be placed says so instead of waiting for hours."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.runtime import ray_internals
from pipeline.runtime.ray_session import SessionInfo, uses_gpu

_log = logging.getLogger(__name__)

PATIENCE = 15.0  # seconds for nodes that are about to join
_POLL = 1.0


def check_room(recipe: Recipe, session: SessionInfo, workers: int, section: str = "train") -> None:
    """Check that a Ray has the CPUs and GPUs for so many workers.

    A cluster that an autoscaler can enlarge may still get them: then a line says what it has to start. Other clusters are
    given some seconds, since their nodes may be about to join.

    Args:
        recipe: The settings, with each worker's CPUs and whether they use GPUs.
        session: The Ray.
        workers: Number of workers at a time.
        section: Of the setting that gives the number of workers, for the message.

    Raises:
        SettingError: It can never hold so many workers.
    """
    if not session.private:
        _check_cluster(_bundle(recipe, session), workers, section)
        return
    needed = workers * recipe.cluster.cpus_per_worker
    if needed > session.cpus:
        raise SettingError(
            f"{workers} worker(s) with cluster.cpus_per_worker={recipe.cluster.cpus_per_worker:g} need {needed:g} CPUs, "
            f"this machine has {session.cpus:g}; use fewer with {section}.workers={max(1, int(session.cpus))}, "
            "or a smaller cluster.cpus_per_worker"
        )
    if uses_gpu(recipe, session) and workers > session.gpus:
        raise SettingError(
            f"{workers} worker(s) need a GPU each (cluster.gpus={recipe.cluster.gpus}), this machine has {session.gpus:g}; "
            f"use fewer with {section}.workers=, or none with cluster.gpus=false"
        )


def _bundle(recipe: Recipe, session: SessionInfo) -> dict[str, float]:
    """What one worker needs of a node."""
    gpu = {"GPU": 1.0} if uses_gpu(recipe, session) else {}
    return {"CPU": float(recipe.cluster.cpus_per_worker), **gpu}


def _check_cluster(bundle: Mapping[str, float], workers: int, section: str) -> None:
    """Raise SettingError where the nodes of a cluster are too few or too small and no autoscaler can start others."""
    ends = time.monotonic() + PATIENCE
    while (room := room_for(bundle, nodes := _nodes())) < workers:
        each, there = _shown(bundle), "; ".join(_shown({"CPU": 0, **node}) for node in nodes[:4])
        more = f" and {len(nodes) - 4} more nodes" if len(nodes) > 4 else ""
        said = f"{workers} worker(s) need {each} each on a node, and the cluster has room for {room} of them (nodes: {there}{more})"
        if ray_internals.may_grow():
            _log.warning("%s; waiting for the nodes that its autoscaler starts", said)
            return
        if time.monotonic() > ends:
            raise SettingError(
                f"{said}, and no autoscaler; add nodes, or use fewer workers with {section}.workers={max(room, 1)}, "
                "a smaller cluster.cpus_per_worker, or cluster.gpus=false"
            )
        time.sleep(_POLL)


def room_for(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers fit on nodes without other work.

    Args:
        bundle: What a worker needs, by resource.
        nodes: The resources of each node.
    """
    return sum(min(int(node.get(name, 0) // count) for name, count in bundle.items() if count) for node in nodes)


def _shown(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in words."""
    found = {name: resources[name] for name in ("CPU", "GPU") if name in resources}
    return " and ".join(f"{count:g} {name}{'s' if count != 1 else ''}" for name, count in found.items())


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
