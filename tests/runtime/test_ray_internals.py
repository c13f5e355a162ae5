"""Ray's private names: each is there and does what it is used for, in the version that they were checked against."""

from types import SimpleNamespace

import pytest
import ray

from pipeline.runtime import ray_internals
from pipeline.runtime.ray_internals import WRITTEN_FOR


def test_ray_is_the_version_that_its_private_names_were_checked_against():
    found = ray.__version__
    assert found.startswith(f"{WRITTEN_FOR}."), (
        f"pipeline/runtime/ray_internals.py was written for Ray {WRITTEN_FOR}, this is {found}: check each private name in "
        "it against this version, run the tests that are marked ray, and then change WRITTEN_FOR"
    )


def test_constants_are_there_changed_within_the_block_and_read_where_it_matters():
    from ray._private import ray_constants, services

    retries, clusters = ray_constants.NUM_REDIS_GET_RETRIES, ray_constants.ENABLE_RAY_CLUSTER
    assert type(retries) is int and type(clusters) is bool
    with ray_internals.connecting_once():
        assert ray_constants.NUM_REDIS_GET_RETRIES == 1
    with ray_internals.on_loopback():
        assert not ray.is_initialized()
        assert services.get_node_ip_address() == "127.0.0.1"
    assert (retries, clusters) == (ray_constants.NUM_REDIS_GET_RETRIES, ray_constants.ENABLE_RAY_CLUSTER)


def test_machine_sizes_are_whole_and_above_zero():
    for value in (ray_internals.cpu_count(), ray_internals.memory_bytes()):
        assert type(value) is int and value > 0
    assert ray_internals.memory_bytes() > 2**28  # bytes, not a larger unit


def test_a_leaving_node_is_seen_by_a_worker(monkeypatch):
    """By Ray's own classes: what its main thread marks is what the training thread sees."""
    import dataclasses

    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    assert "preemption_context" in {field.name for field in dataclasses.fields(context.TrainContext)}
    preemption = PreemptionContext()
    from ray.train.v2._internal.execution import train_fn_utils

    monkeypatch.setattr(train_fn_utils, "_train_fn_utils", train_fn_utils.DistributedTrainFnUtils())
    monkeypatch.setattr(context, "_train_context", None)
    context.set_train_context(SimpleNamespace(preemption_context=preemption))
    assert not ray_internals.node_is_leaving()
    preemption.preemption_info = SimpleNamespace(preempted_ranks=[1])
    assert ray_internals.node_is_leaving()


def test_the_silenced_logger_is_the_one_that_ray_data_warns_with(monkeypatch):
    import logging

    from ray.data._internal import progress
    from ray.data._internal.progress import base_progress

    logger = logging.getLogger("ray.data._internal.progress")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    ray_internals.silence_data_progress()
    for module in (progress, base_progress):
        assert not logging.getLogger(module.__name__).isEnabledFor(logging.WARNING)


def test_names_that_are_not_utf8_are_escaped_in_the_command_that_ray_records(monkeypatch):
    import psutil
    from ray._private import utils

    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["wavemim", "embed", "caf\udce9.jpg"])
    before = utils.get_entrypoint_name
    with ray_internals.printable_command():
        assert utils.get_entrypoint_name() == "wavemim embed caf\\xe9.jpg"
    assert utils.get_entrypoint_name is before


def test_a_trainer_starts_no_helpers_for_nothing_but_all_others(tmp_path):
    """By Ray's own classes, whose names are the ones that are left out. Would catch: another name, or one callback less."""
    import ray.train.torch
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    options = {"train_loop_per_worker": print, "run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    every = [type(each) for each in ray.train.torch.TorchTrainer(**options)._create_default_callbacks()]
    private, shared = (
        [type(each) for each in ray_internals.torch_trainer(private=private, **options)._create_default_callbacks()]
        for private in (True, False)
    )
    cleaner = placement_group_callback.PlacementGroupCleanerCallback
    assert set(every) - set(shared) == {datasets.DatasetsCallback}
    assert set(shared) - set(private) == {cleaner}


def test_a_lost_node_is_one_warning_and_all_else_is_shown(monkeypatch, capsys, caplog):
    """By Ray's own listener. Would catch: another name of what it prints with, a dump that is shown, other news that are lost."""
    import threading

    from ray._private import worker

    node = "c09e44203c42" + "0" * 44
    dead = "has been marked dead because the detector has missed too many heartbeats from it. This can happen when a \t(1) …"
    news = [
        "Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:\n    [state-dump] x",
        f"The node with node id: {node} and address: 10.0.0.7 and node name: 10.0.0.7 {dead}\n(2) …",
        "Task fit failed. There are 3 retries remaining, so the task will be retried. Error: Task failed because the node …",
        "1 Workers (tasks / actors) killed due to memory pressure (OOM)",
    ]
    polled = iter([*({"job_id": None, "error_message": text} for text in news)])

    def poll():
        message = next(polled, None)
        if message is None:
            stopped.set()
        return None, message

    stopped = threading.Event()
    ears = SimpleNamespace(
        gcs_error_subscriber=SimpleNamespace(subscribe=lambda: None, poll=poll), current_job_id=ray.JobID.nil()
    )
    monkeypatch.setattr(worker, "_internal_kv_initialized", lambda: False)
    with ray_internals.brief_on_nodes():
        worker.listen_error_messages(ears, stopped)
    assert caplog.messages == ["node 10.0.0.7 (c09e4420…) was lost; its tasks and workers start again on other nodes"]
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and "killed due to memory pressure (OOM)" in shown


def test_a_quick_start_changes_what_a_new_node_calls_and_asks_until_it_has_registered(monkeypatch):
    """Would catch: Ray starting its server, or asking for its node, by other names; a node that is asked for too early."""
    import inspect

    from ray._private import node, services, state

    head = inspect.getsource(node.Node.start_head_processes)
    assert "self.start_api_server(" in head and "self.start_monitor()" in head
    assert "ray._private.services.get_node(" in inspect.getsource(node.Node.__init__)
    tables = iter([[], [{"NodeID": "other"}], [{"NodeID": "other"}, {"NodeID": "mine"}]])
    monkeypatch.setattr(state.GlobalState, "_initialize_global_state", lambda *_: None)
    monkeypatch.setattr(state.GlobalState, "node_table", lambda _: next(tables))
    asked = []
    monkeypatch.setattr(services, "get_node", lambda *place: asked.append(place) or {"labels": {}})
    before, monitor = node.Node.start_api_server, node.Node.start_monitor
    with ray_internals.quick_start():
        node.Node.start_monitor(SimpleNamespace())  # it would need a node
        assert services.get_node("127.0.0.1:1", "mine") == {"labels": {}}
        made = SimpleNamespace()
        node.Node.start_api_server(made, include_dashboard=False, raise_on_failure=False)
    assert made._webui_url == "" and asked == [("127.0.0.1:1", "mine")] and next(tables, None) is None
    assert (node.Node.start_api_server, node.Node.start_monitor) == (before, monitor)


def test_ray_data_waits_for_the_first_task_and_asks_for_resources_where_this_project_changes_it(monkeypatch):
    """Would catch: a wait by another name or with other arguments, an interval that is read elsewhere, all else of `ray`."""
    import inspect

    from ray.data._internal.execution import resource_manager, streaming_executor_state

    assert "ray.wait(" in inspect.getsource(streaming_executor_state.process_completed_tasks)
    limits = inspect.getsource(resource_manager.ResourceManager.get_global_limits)
    assert "self.GLOBAL_LIMITS_UPDATE_INTERVAL_S" in limits
    asked, ready = [], []
    monkeypatch.setattr(ray, "wait", lambda refs, **options: asked.append((refs, options)) or (ready, refs))
    before = resource_manager.ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S
    with ray_internals.prompt_data_scheduling():
        seen = streaming_executor_state.ray
        assert seen.wait(["a", "b"], num_returns=2, fetch_local=False, timeout=0.1) == ([], ["a", "b"])
        ready.append("b")
        assert seen.wait(["a", "b"], num_returns=2, fetch_local=False, timeout=0.1)[0] == ["b"]
        assert seen.get is ray.get and seen.exceptions is ray.exceptions
        assert before > resource_manager.ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S
    # It waits for one, and then takes all that are ready.
    waits = [(options.pop("num_returns"), options.pop("timeout")) for _, options in asked]
    assert waits == [(1, 0.1), (1, 0.1), (2, 0)]
    assert all(given == (["a", "b"], {"fetch_local": False}) for given in asked)
    assert streaming_executor_state.ray is ray
    assert before == resource_manager.ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S


def test_ray_data_without_actors_knows_what_the_nodes_offer_and_starts_none(monkeypatch):
    """Would catch: an actor that is made or asked elsewhere; resources of nodes that are gone. Also tried in test_ray_session."""
    import inspect

    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

    made, client = "get_or_create_autoscaling_coordinator", coordinator.DefaultAutoscalingCoordinator
    assert inspect.getsource(coordinator).count(f"{made}()") == 2  # its definition, and in the client
    calls = [name for name, each in vars(client).items() if "self._autoscaling_coordinator." in _source(each)]
    assert sorted(calls) == ["cancel_request", "get_reserved_resources", "request_resources"]
    assert inspect.getsource(stats).count("_StatsActor.options(") == 1
    monkeypatch.setattr(coordinator, made, lambda: pytest.fail("it would start an actor"))
    alive = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0, "memory": 2.0**30}}
    monkeypatch.setattr(ray, "nodes", lambda: [alive, {**alive, "NodeID": "b", "Alive": False}])
    before = stats.get_or_create_stats_actor, client.get_reserved_resources
    with ray_internals.data_without_actors():
        asked = client("a data set")
        asked.request_resources([], expire_after_s=60, request_remaining=["CPU"])
        assert asked.get_reserved_resources() == {"a": {"CPU": 2.0, "memory": 2.0**30}}
        asked.cancel_request()
        stats._StatsManager.update_execution_metrics("a data set", [], [], {})
        numbers = {stats._StatsManager.gen_dataset_id_from_stats_actor() for _ in range(3)}
        assert len(numbers) == 3 and all(isinstance(number, str) for number in numbers)
    assert before == (stats.get_or_create_stats_actor, client.get_reserved_resources)


def _source(each):
    import inspect

    return inspect.getsource(each) if inspect.isfunction(each) else ""


def test_a_ray_of_this_process_does_not_grow(monkeypatch):
    """It has no monitor, so nothing says which nodes there are. Would catch: stages that wait for nodes for ever."""
    import inspect

    from ray._private import node, worker

    assert "ray_constants.PROCESS_TYPE_MONITOR" in inspect.getsource(node.Node.start_monitor)
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(head=True, all_processes={"raylet": []}))
    assert not ray_internals.may_grow()
