"""A run whose out folder is in an object store, and whose machine is lost: the same command elsewhere goes on."""

import contextlib
import json
import os
import shutil
import time

import psutil
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster
from real_commands import start
from s3_server import new_bucket, s3_server
from stage_calls import run_stage
from tiny_shards import photos, write_set

from pipeline.checkpoints.find import seen
from pipeline.config.load import load
from pipeline.config.places import CACHE
from pipeline.models.build import build_model
from pipeline.runtime.ray_session import ray_session
from pipeline.shards.shard_set import ShardSet
from pipeline.stages import tune
from pipeline.storage.locks import STALE
from pipeline.training.pretrain_loop import train
from wavemim.weights import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.faults]

TINY = [
    *("encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"),
    *(
        "target.taps={2: 1, 3: 2, 4: 2}",
        "train.batch=10",
        "train.epochs=60",
        "train.warmup_epochs=1",
        "train.workers=1",
    ),
    *("train.checkpoint_every=3", "train.log_every=7", "tracking.system_metrics=false", "name=run"),
    "evaluate.protocols=[rank]",
    *(
        "tune.space=mask_ratio",
        "tune.trials=1",
        "tune.epochs=1",
        "tune.recipe_seeds=1",
        "tune.finalists=0",
        "tune.rungs=1",
    ),
]


def wait_for(condition, process, seconds=600):
    ends = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, "not in time"
        time.sleep(1)


def kill_all(process):
    """kill -9 of a command with its Ray: the machine is gone."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate(timeout=60)


@pytest.mark.timeout(2000)
def test_a_run_whose_machine_is_lost_goes_on_elsewhere_as_if_undisturbed(photo_folder, tmp_path, monkeypatch):
    """kill -9 of everything during pretraining, and the local copy is gone: the same losses and weights, bit for bit."""
    with s3_server() as endpoint:
        home = new_bucket(endpoint).sub("out")
        recipe = load("small", [*TINY, f"out={home.url}", f"images={photo_folder / 'bark'}"])
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(recipe.dump()))
        pretrain = home.sub("runs/run/pretrain")

        monkeypatch.setenv(CACHE, str(tmp_path / "first"))
        process = start("run", file)
        wait_for(lambda: seen(pretrain) and seen(pretrain)[0][0] >= 400, process)
        kill_all(process)
        reached = seen(pretrain)[0][0]
        assert pretrain.size("result.json") is None
        shutil.rmtree(tmp_path / "first")

        monkeypatch.setenv(CACHE, str(tmp_path / "second"))
        began = time.monotonic()
        process = start("run", file)
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors
        assert time.monotonic() - began > STALE - 30  # the lost machine might have been alive
        assert f"(continued from images-{reached:012d})" in output and "prepare: 40 images" in output
        check_everything_is_there(home, recipe, output)


@pytest.mark.timeout(1500)
def test_a_killed_worker_on_another_node_costs_what_came_after_its_last_checkpoint(tmp_path, monkeypatch):
    """Rank 0 is on another node than the driver: it has no file of the driver's, and the driver has none of it."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    cluster = Cluster()
    cluster.add_node(num_cpus=0, object_store_memory=150 * 2**20)
    cluster.add_node(num_cpus=2, object_store_memory=150 * 2**20)
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.shutdown)
        home = new_bucket(stack.enter_context(s3_server())).sub("out")
        shards = write_set(tmp_path / "shards", photos(60))
        recipe = load("small", [*TINY, f"out={home.url}", f"shards={shards.url}", f"cluster.address={cluster.address}"])
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(recipe.dump()))
        pretrain, beats = home.sub("runs/run/pretrain"), recipe.stage_dir("pretrain") / ".beats"
        process = start("pretrain", file)
        wait_for(lambda: seen(pretrain) and seen(pretrain)[0][0] >= 400, process)
        worker = json.loads((beats / "rank-00000.json").read_text())
        assert not list(beats.parent.glob("images-*"))
        psutil.Process(worker["pid"]).kill()
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        check_training(pretrain, recipe)
        assert not list((tmp_path / "cache").glob("wavemim-worker-*"))


@pytest.mark.timeout(300)
def test_a_sweep_whose_trials_are_stopped_is_whole_in_the_store(tmp_path, monkeypatch):
    """ASHA ends the process of the last trial as soon as that has reported: all that it measured is in the store."""
    monkeypatch.setenv(CACHE, str(tmp_path / "first"))
    (tmp_path / "rates.yaml").write_text("question: Which rate?\nspace: {train.lr: {grid: [1.0e-2, 1.0e-5]}}\n")
    with s3_server() as endpoint:
        home = new_bucket(endpoint).sub("out")
        shards = write_set(tmp_path / "shards", photos(60), classes=None)
        asha = ["tune.epochs=8", "tune.rungs=3", "tune.scheduler=asha", "tune.reduction=2", "tune.concurrent=1"]
        space = f"tune.space={tmp_path / 'rates.yaml'}"
        recipe = load("small", [*TINY, *asha, space, "tune.trials=2", f"shards={shards.url}", f"out={home.url}"])
        with ray_session(recipe.cluster) as session:
            result = run_stage(tune, recipe, session)
            shutil.rmtree(tmp_path / "first")
            again = run_stage(tune, recipe, session)
        assert again == {**json.loads(json.dumps(result)), "state": "finished already"}
        stage = home.sub("runs/run/tune")
        lines = [json.loads(line) for line in stage.read("trials.jsonl").splitlines()]
        rungs = [line["rung"] for line in lines if "rung" in line]
        stopped = [line["end"]["number"] for line in lines if line.get("end", {}).get("state") == "stopped"]
        assert stopped and max(stopped) == len(result["trials"])
        for trial in result["trials"]:
            folder = stage.sub(f"trials/{trial['number']:04d}")
            found = [json.loads(line) for line in folder.read("rungs.jsonl").splitlines()]
            assert [line["objective"] for line in found] == [
                rung["objective"] for rung in rungs if rung["number"] == trial["number"]
            ]
            logged = [json.loads(line)["metrics"] for line in folder.read("metrics.jsonl").splitlines()]
            assert {line["objective"] for line in found} <= {metrics.get("objective") for metrics in logged}
            assert folder.kind("checkpoints") is None
        for name in ("report.md", "trials.csv", "sweep.png", "learning_curves.png", "best.yaml"):
            assert stage.size(name), name
        assert yaml.safe_load(stage.read("best.yaml"))["train"]["lr"]


def check_everything_is_there(home, recipe, output):
    check_training(home.sub("runs/run/pretrain"), recipe)
    for stage in ("pretrain", "evaluate", "tune", "export"):
        assert str(recipe.local_out) not in home.read(f"runs/run/{stage}/result.json").decode(), stage
        assert home.kind(f"runs/run/{stage}/.owner.json") is None
        for below, names in home.tree(f"runs/run/{stage}"):
            assert not [name for name in names if name.endswith((".partial", ".lock"))], below
    assert home.size("runs/run/export/encoder/model.safetensors")
    assert home.size("runs/run/pretrain/reconstruction.png") and home.size("runs/run/tune/report.md")
    assert home.read("runs/run/report.md").decode() in output
    trials = sorted({below for below, _ in home.tree("runs/run/tune/trials")})
    assert trials and all(home.size(f"{trial}/metrics.jsonl") for trial in trials)
    assert not [trial for trial in trials if "checkpoints" in trial]
    assert not list((recipe.stage_dir("tune") / "trials").glob("*/metrics.jsonl"))
    assert os.path.exists(recipe.local_out / "mlflow.db")


def check_training(pretrain, recipe):
    """Losses, weights and everything that was logged are those of a run without interruption."""
    logged = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the worker: sums in another order are other sums
    shards = ShardSet.open(recipe.shards_at)
    undisturbed = train(
        recipe,
        shards,
        device=torch.device("cpu"),
        on_log=lambda metrics, images: logged.append((images, metrics.get("train/loss"))),
    )
    torch.set_num_threads(threads)
    result = json.loads(pretrain.read("result.json"))
    assert result["history"] == undisturbed.position.history
    lines = [json.loads(line) for line in pretrain.read("metrics.jsonl").splitlines()]
    losses = {line["step"]: line["metrics"]["train/loss"] for line in lines if "train/loss" in line["metrics"]}
    assert losses == {images: loss for images, loss in logged if loss is not None}  # also those from before
    model = build_model(recipe, shards)
    local = recipe.stage_dir("pretrain")
    checkpoint.load_model(local / result["checkpoint"], model)
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
