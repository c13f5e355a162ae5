"""Pretraining on real Ray that is taken away: SIGTERM, a damaged checkpoint, a killed driver, other workers."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from real_commands import start, wait_for_images, workers_of
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
from pipeline.models.build import build_model
from pipeline.shards.shard_set import ShardSet
from pipeline.training.pretrain_loop import train
from wavemim.weights import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.faults]

SETTINGS = {
    "name": "long",
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "train.batch": 10,
    "train.epochs": 60,
    "train.warmup_epochs": 1,
    "train.checkpoint_every": 3,
    "train.log_every": 7,
    "tracking.system_metrics": False,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on: 4 steps an epoch


def recipe_at(folder, shards, **changes):
    places = {"out": str(folder / "out"), "shards": shards.folder.url}
    recipe = with_overrides(load("small"), {**SETTINGS, **places, **changes})
    (folder / "long.yaml").write_text(yaml.safe_dump(recipe.dump()))
    return recipe


def pretrain(folder, *more):
    return start("pretrain", folder / "long.yaml", *more)


def undisturbed(recipe, shards):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the worker: sums in another order are other sums
    trained = train(recipe, shards, device=torch.device("cpu"))
    torch.set_num_threads(threads)
    return trained


def final_of(stage, recipe, shards):
    model = build_model(recipe, ShardSet.open(shards.folder.url))
    checkpoint.load_model(checkpoint.latest(stage), model)
    return model.state_dict()


@pytest.mark.timeout(800)
def test_killed_terminated_and_interrupted_pretraining_ends_as_if_undisturbed(shards, tmp_path):
    """kill -9 of the driver with all its Ray, SIGTERM, a damaged checkpoint, Ctrl-C: the same weights, bit for bit."""
    recipe = recipe_at(tmp_path, shards, **{"train.workers": 1, "train.epochs": 120})
    stage = recipe.stage_dir("pretrain")
    process = pretrain(tmp_path)
    wait_for_images(stage, 240, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (stage / "result.json").exists()
    time.sleep(8)  # the workers of a killed driver end by themselves, and may first finish a checkpoint
    reached = checkpoint.seen(stage)[0][0]

    process = pretrain(tmp_path)
    wait_for_images(stage, reached + 240, process)
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert errors.strip().splitlines()[-1].startswith("wavemim: terminated by SIGTERM during pretrain;"), errors
    assert "Traceback" not in errors
    newest = checkpoint.seen(stage)[0][1]
    images = checkpoint.read_state(newest)["images"]
    logged = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    assert images >= max(record["step"] for record in logged)  # saved where it stopped, not an epoch's end before

    (newest / checkpoint.MODEL).write_bytes((newest / checkpoint.MODEL).read_bytes()[:-1])
    process = pretrain(tmp_path)
    wait_for_images(stage, images + 240, process)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert f"{newest} is skipped, the checkpoint before it is used" in errors
    last = errors.strip().splitlines()[-1]
    kept = "its checkpoints are kept, and the same command resumes from the last one"
    assert last == f"wavemim: interrupted during pretrain; {kept}"
    assert "Traceback" not in errors

    process = pretrain(tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "continued from images-" in output
    expected = undisturbed(recipe, shards)
    final = final_of(stage, recipe, shards)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, final[name]), name
    history = expected.position.history
    assert checkpoint.read_state(checkpoint.latest(stage))["history"] == history
    assert json.loads((stage / "result.json").read_text())["history"] == history
    assert len(checkpoint.seen(stage)) == recipe.train.keep_checkpoints
    client = MlflowClient(f"sqlite:///{recipe.out}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("wavemim").experiment_id])
    assert run.info.status == "FINISHED"  # one run, gone on with
    assert Path(run.info.artifact_uri).exists()


@pytest.mark.timeout(800)
def test_killed_and_hanging_workers_are_replaced_and_a_killed_run_goes_on_with_fewer(shards, tmp_path):
    changes = {"train.workers": 2, "train.epochs": 150, "train.keep_checkpoints": 60, "train.hang_timeout": 15}
    recipe = recipe_at(tmp_path, shards, **changes)
    stage = recipe.stage_dir("pretrain")
    process = pretrain(tmp_path)
    wait_for_images(stage, 240, process)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    psutil.wait_procs(workers, timeout=120)
    reached, newest = checkpoint.seen(stage)[0]
    (newest / checkpoint.OPTIMIZER).write_bytes(b"")  # what Ray would restore
    wait_for_images(stage, reached + 120, process)
    checkpoint.read_state(newest)  # written again by the workers that took over

    reached = checkpoint.seen(stage)[0][0]
    hanging = workers_of(process)[-1]
    hanging.suspend()
    wait_for_images(stage, reached + 240, process)  # more than could be under way
    assert not hanging.is_running()
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert f"(process {hanging.pid})" in errors and "its process does not respond" in errors
    time.sleep(5)  # its workers end by themselves, and may first finish a checkpoint

    from_one = shutil.copytree(checkpoint.latest(stage), tmp_path / checkpoint.latest(stage).name)
    process = pretrain(tmp_path, "train.workers=1", "train.keep_checkpoints=2")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"continued from {from_one.name}" in output
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = train(recipe, shards, device=torch.device("cpu"), resume=from_one)
    torch.set_num_threads(threads)
    assert expected.position.streams == 2
    final = final_of(stage, recipe, shards)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, final[name]), name
