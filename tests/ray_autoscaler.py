"""A cluster on paper: which machines Ray's own autoscaler starts for what the stages ask for. Nothing runs."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (
    ClusterResourceConstraint,
    GangResourceRequest,
    NodeState,
    NodeStatus,
)
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.data._internal.cluster_autoscaler.rate_based_cluster_autoscaler import RateBasedClusterAutoscaler
from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil
from ray.data._internal.execution.interfaces import ExecutionResources

Bundle = dict[str, float]


@dataclass
class PaperCluster:
    """The nodes of a cluster, at first its head alone; `demand` adds those that the autoscaler would start.

    Args:
        config: Of the autoscaler: cluster.yaml, or what Ray derives from a RayCluster.
    """

    config: dict[str, Any]
    nodes: list[AutoscalerInstance] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.autoscaling = AutoscalingConfig(self.config, skip_content_hash=True)
        self._add(self.autoscaling.get_head_node_type(), NodeKind.HEAD)

    @property
    def workers(self) -> Counter[str]:
        """Number of workers by type."""
        return Counter(node.im_instance.instance_type for node in self.nodes[1:])

    def demand(
        self,
        tasks: Sequence[Bundle] = (),
        *,
        gangs: Sequence[Sequence[Bundle]] = (),
        at_least: Sequence[Bundle] = (),
        used: float = 0.0,
    ) -> bool:
        """Start what the autoscaler decides; returns whether it could serve everything.

        Args:
            tasks: Of waiting tasks and actors.
            gangs: Of waiting placement groups.
            at_least: What the cluster is to have in all, as `ray.autoscaler.sdk.request_resources` asks.
            used: Share of each present node that is in use.
        """
        for node in self.nodes:
            for name, total in node.ray_node.total_resources.items():
                node.ray_node.available_resources[name] = total * (1 - used)
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=self.autoscaling.get_node_type_configs(),
                max_num_nodes=self.autoscaling.get_max_num_nodes(),
                resource_requests=_by_count(tasks),
                gang_resource_requests=[GangResourceRequest(requests=_requests(gang)) for gang in gangs],
                cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=_by_count(at_least))]
                if at_least
                else [],
                current_instances=self.nodes,
            )
        )
        for launch in reply.to_launch:
            for _ in range(launch.count):
                self._add(launch.instance_type, NodeKind.WORKER)
        return not (
            reply.infeasible_resource_requests
            or reply.infeasible_gang_resource_requests
            or reply.infeasible_cluster_resource_constraints
        )

    def as_ray_nodes(self) -> list[dict[str, Any]]:
        """The nodes as `ray.nodes()` lists them."""
        head = {"node:__internal_head__": 1.0}
        return [
            {"NodeID": node.cloud_instance_id, "Alive": True, "Labels": {}, "Resources": resources}
            for number, node in enumerate(self.nodes)
            for resources in [dict(node.ray_node.total_resources) | (head if number == 0 else {})]
        ]

    def _add(self, kind: str, node_kind: Any) -> None:
        resources = self.autoscaling.get_node_resources(kind)
        name = uuid.uuid4().hex
        node = NodeState(ray_node_type_name=kind, instance_id=name, node_id=name.encode(), status=NodeStatus.RUNNING)
        for key, value in resources.items():
            node.total_resources[key] = node.available_resources[key] = value
        instance = Instance(
            instance_id=name, instance_type=kind, status=Instance.RAY_RUNNING, node_kind=node_kind, node_id=name
        )
        self.nodes.append(AutoscalerInstance(cloud_instance_id=name, ray_node=node, im_instance=instance))


def _requests(bundles: Sequence[Bundle]) -> list[Any]:
    return [ResourceRequestUtil.make({name: value for name, value in b.items() if value}) for b in bundles]


def _by_count(bundles: Sequence[Bundle]) -> Any:
    return ResourceRequestUtil.group_by_count(_requests(bundles))


class _Operator:
    """What Ray Data's autoscaler looks at in an operator that always has more to do."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._each = ExecutionResources(
            cpu=arguments.get("num_cpus", 0), gpu=arguments.get("num_gpus", 0), memory=arguments.get("memory", 0)
        )
        self.output_dependencies: list[Any] = []
        self.metrics = self
        self.average_num_inputs_per_task = self.average_num_outputs_per_task = 1.0
        self.num_output_blocks_per_task_s = 0.1

    def per_task_resource_allocation(self) -> ExecutionResources:
        return self._each

    min_scheduling_resources = per_task_resource_allocation

    def get_max_concurrency_limit(self) -> None:
        return None

    def has_completed(self) -> bool:
        return False


class _Busy:
    """Measures a cluster that is fully in use."""

    def observe(self) -> None:
        pass

    def get(self) -> ClusterUtil:
        return ClusterUtil(cpu=1.0, gpu=0.0, memory=0.0, object_store_memory=0.0)


class _Coordinator:
    """Ray's coordinator of requests, called instead of sent to."""

    def __init__(self, cluster: PaperCluster) -> None:
        self.asked: list[Bundle] = []
        self.actor = _AutoscalingCoordinatorActor(
            send_resources_request=lambda bundles, label_selectors=None: self.asked.__setitem__(slice(None), bundles),
            get_cluster_nodes=cluster.as_ray_nodes,
        )

    def request_resources(self, **arguments: Any) -> None:
        self.actor.request_resources("data", **arguments)

    def get_reserved_resources(self) -> Any:
        return self.actor.get_reserved_resources("data", recompute=True)


def grow_for_ray_data(cluster: PaperCluster, arguments: dict[str, Any], *, waiting: int, rounds: int = 12) -> None:
    """Let a cluster grow for a `Dataset.map` with more tasks than it will ever have room for, as long as it wants to.

    Args:
        cluster: The cluster.
        arguments: Of the `map`: num_cpus, num_gpus, memory.
        waiting: Tasks that are submitted and have no room, such as those of a node that was lost.
        rounds: Times that Ray Data asks.
    """
    coordinator = _Coordinator(cluster)
    task = {
        "CPU": arguments.get("num_cpus", 0),
        "GPU": arguments.get("num_gpus", 0),
        "memory": arguments.get("memory", 0),
    }
    data = RateBasedClusterAutoscaler(
        [_Operator(arguments)],
        "data",
        utility_calculator=_Busy(),
        autoscaling_coordinator=coordinator,
        min_gap_between_autoscaling_requests_s=0,
    )
    for _ in range(rounds):
        data.try_trigger_scaling()
        cluster.demand([task] * waiting, at_least=coordinator.asked, used=1.0)
