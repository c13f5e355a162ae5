"""Whether a cluster has room for workers: by its nodes, by what an autoscaler may start, and in time."""

import json
import logging

import pytest

from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.runtime import ray_internals, room
from pipeline.runtime.ray_session import SessionInfo

CPU_NODE, GPU_NODE = {"CPU": 16.0}, {"CPU": 8.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("bundle", "nodes", "expected"),
    [
        ({"CPU": 2.0}, [CPU_NODE, GPU_NODE], 12),
        ({"CPU": 1.0, "GPU": 1.0}, [CPU_NODE, GPU_NODE, GPU_NODE], 8),
        ({"CPU": 4.0, "GPU": 1.0}, [CPU_NODE, GPU_NODE], 2),
        ({"CPU": 12.0}, [GPU_NODE, GPU_NODE], 0),  # 16 in all, but not on one node
        ({"CPU": 0.5}, [{"CPU": 1.25}], 2),
    ],
)
def test_workers_have_to_fit_on_nodes_as_a_whole(bundle, nodes, expected):
    assert room.room_for(bundle, nodes) == expected


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose nodes, one list a look, and autoscaler the test decides."""

    def made(*looks, grows=False):
        left = list(looks)
        monkeypatch.setattr(room, "_nodes", lambda: left.pop(0) if len(left) > 1 else left[0])
        monkeypatch.setattr(room, "PATIENCE", 0.2)
        monkeypatch.setattr(room, "_POLL", 0.01)
        monkeypatch.setattr(ray_internals, "may_grow", lambda: grows)
        return SessionInfo(cpus=16, gpus=4, nodes=1, address="127.0.0.1:6379", private=False)

    return made


def test_a_stage_that_can_never_be_placed_says_what_it_needs_and_what_there_is(cluster):
    session = cluster([CPU_NODE, GPU_NODE])
    with pytest.raises(SettingError) as error:
        room.check_room(load("small", ["cluster.gpus=true", "cluster.cpus_per_worker=2"]), session, 8)
    text = str(error.value)
    assert "8 worker(s) need 2 CPUs and 1 GPU each on a node, and the cluster has room for 4 of them" in text
    assert "(nodes: 16 CPUs; 8 CPUs and 4 GPUs)" in text and "train.workers=4" in text and "no autoscaler" in text


def test_nodes_that_join_in_time_are_waited_for(cluster):
    session = cluster([CPU_NODE], [CPU_NODE], [CPU_NODE, GPU_NODE])
    room.check_room(load("small", ["cluster.gpus=true"]), session, 4)


def test_an_autoscaler_is_told_about_and_not_waited_for(cluster, caplog):
    session = cluster([CPU_NODE], grows=True)
    with caplog.at_level(logging.WARNING):
        room.check_room(load("small", ["cluster.gpus=true"]), session, 4)
    assert "room for 0 of them" in caplog.text and "autoscaler" in caplog.text


NODE = "node_da7a542f97bab49db3aa59c117b9d0291032efa90764293d4d1675ed"


@pytest.mark.parametrize(
    ("config", "status", "grows"),
    [
        (None, {"active_nodes": {NODE: 1}, "idle_nodes": None}, False),  # as `ray start --head` writes it
        (None, {"active_nodes": {"head": 1}, "idle_nodes": None}, True),
        (None, {"active_nodes": {NODE: 1}, "idle_nodes": {"gpu_worker": 1}}, True),
        (None, {"active_nodes": {}}, True),
        (None, None, True),
        (object(), {"active_nodes": {NODE: 1}}, True),  # the newer autoscaler reports its configuration
    ],
)
def test_an_autoscaler_is_known_by_what_ray_stores(monkeypatch, config, status, grows):
    from ray._private.state import state
    from ray.experimental import internal_kv

    stored = None if status is None else json.dumps({"autoscaler_report": status}).encode()
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key: stored)
    assert ray_internals.may_grow() is grows
