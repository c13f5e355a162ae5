"""Fine-tuning on real Ray whose workers hang and which is terminated: it resumes, in the middle of an epoch too."""

import json
import os
import signal
import time

import pytest
import yaml
from real_commands import start, wait_for_images, workers_of
from tiny_finetune import coloured_set, recipe_for

from pipeline.config.load import with_overrides
from wavemim.weights import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.mark.timeout(800)
def test_a_hanging_worker_is_ended_and_a_terminated_run_resumes_where_it_was(tmp_path):
    shards = coloured_set(tmp_path / "set")
    changes = {"name": "long", "finetune.workers": 2, "finetune.epochs": 300, "finetune.eval_every": 50}
    changes |= {"train.hang_timeout": 15, "train.checkpoint_minutes": 0.01, "train.keep_checkpoints": 3}
    recipe = with_overrides(recipe_for(shards, tmp_path), changes)
    stage, file = recipe.stage_dir("finetune"), tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(recipe.dump()))
    process = start("finetune", file)
    wait_for_images(stage, 640, process)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].suspend()
    time.sleep(1)
    reached = checkpoint.seen(stage)[0][0]
    wait_for_images(stage, reached + 640, process)
    assert not workers[1].is_running()

    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert f"(process {workers[1].pid})" in errors and "its process does not respond" in errors
    newest = checkpoint.seen(stage)[0][1]
    state = checkpoint.read_state(newest)
    assert state["images"] < 300 * 64 and state["streams"] == 2

    process = start("finetune", file)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"continued from {newest.name}" in output
    result = json.loads((stage / "result.json").read_text())
    assert result["images_seen"] == 300 * 64 and result["val_images"] == 32
    assert [line["epoch"] for line in result["history"]] == [50, 100, 150, 200, 250, 300]
    assert len(checkpoint.seen(stage)) == 3
