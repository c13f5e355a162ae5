"""Sweeps whose driver or trials are killed: the same command goes on, nothing finished is lost, nothing is run twice."""

import json
import os
import signal
import time

import mlflow
import psutil
import pytest
import tiny_shards
import yaml
from ray.cluster_utils import Cluster
from real_commands import start

from pipeline.config.load import load
from pipeline.shards.shard_set import ShardSet
from pipeline.sweeps.ledger import Ledger
from pipeline.sweeps.trials import point_key
from pipeline.tracking.tracker import store_uri

pytestmark = [pytest.mark.ray, pytest.mark.faults]

TINY = [
    *("encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"),
    *("target.taps={3: 1, 4: 2}", "train.batch=10", "train.warmup_epochs=0", "train.checkpoint_every=5"),
    *("tune.space=mask_ratio", "tune.search=optuna", "tune.trials=4", "tune.epochs=60", "tune.concurrent=2"),
    *("tune.recipe_seeds=2", "tune.finalists=1", "tune.fresh_seeds=1"),
    *("evaluate.probe_strengths=[0.1]", "tracking.system_metrics=false"),
]


def sweep_in(tmp_path, *more):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    recipe = load("small", [*TINY, f"out={tmp_path}", f"shards={tmp_path}/shards", "name=sweep", *more])
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(recipe.dump()))
    return recipe, file


def wait_for(condition, process, what, seconds=300):
    ends = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, f"no {what} in time"
        time.sleep(0.05)


def trials_of(process):
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "ImplicitFunc" in child.name()]


@pytest.mark.timeout(900)
def test_a_killed_worker_costs_a_retry_and_a_killed_driver_nothing_that_was_finished(tmp_path):
    recipe, file = sweep_in(tmp_path)
    path = recipe.stage_dir("tune") / "trials.jsonl"
    process = start("tune", file)
    wait_for(lambda: len(list((path.parent / "trials").glob("*/checkpoints/images-*"))) > 0, process, "checkpoint")
    trials_of(process)[0].kill()
    wait_for(lambda: len(Ledger(path).ended) >= 3, process, "third trial")
    process.kill()  # the driver alone: its Ray and the trials follow, or they would hold the output open
    process.communicate(timeout=120)
    before = Ledger(path)
    assert all(ended.state == "finished" for ended in before.ended.values())
    assert before.begun.keys() > before.ended.keys()

    process = start("tune", file)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert f"continued, {len(before.ended)} trials were done" in output
    after = Ledger(path)
    assert {number: after.ended[number] for number in before.ended} == before.ended
    assert {number: after.begun[number] for number in before.begun} == before.begun
    trials = after.trials()
    assert [trial.state for trial in trials] == ["finished"] * 7
    assert len({(point_key(trial.point), trial.seed) for trial in trials}) == 7
    images = 60 * ShardSet.open(recipe.shards_at).rows["train"]
    assert {trial.metrics["images"] for trial in trials} == {images}
    assert json.loads((path.parent / "result.json").read_text())["verdict"]

    client = mlflow.MlflowClient(store_uri(recipe))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=100)
    parents = [run for run in runs if run.data.tags.get("wavemim.stage") == "tune"]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1 and len(children) == 7
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}


@pytest.mark.timeout(600)
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    recipe, file = sweep_in(tmp_path)
    path = recipe.stage_dir("tune") / "trials.jsonl"
    process = start("tune", file)
    wait_for(lambda: len(Ledger(path).ended) >= 1, process, "trial")
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=200)
    assert process.returncode == 130
    before = Ledger(path)
    assert 1 <= len(before.ended) < 7
    process = start("tune", file)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"continued, {len(before.ended)} trials were done" in output and len(Ledger(path).ended) == 7


@pytest.mark.timeout(600)
def test_a_killed_node_costs_a_retry_of_its_trials(tmp_path):
    """A cluster of two nodes, of which one is killed while both train a trial: the other one runs the sweep to its end."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        recipe, file = sweep_in(tmp_path, f"cluster.address={nodes.address}", "tune.trials=2", "tune.finalists=0")
        path = recipe.stage_dir("tune") / "trials.jsonl"
        process = start("tune", file)
        begun = (path.parent / "trials").glob
        wait_for(lambda: len(list(begun("*/checkpoints/images-*"))) >= 2, process, "checkpoint of each node")
        assert not Ledger(path).ended
        nodes.remove_node(lost, allow_graceful=False)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    finally:
        nodes.shutdown()
    trials = Ledger(path).trials()
    assert [trial.state for trial in trials] == ["finished"] * 4
    images = 60 * ShardSet.open(recipe.shards_at).rows["train"]
    assert {trial.metrics["images"] for trial in trials} == {images}
