"""Sweeps over every kind of distribution, on a real Ray."""

import csv
import json

import pytest
import tiny_shards
from stage_calls import run_stage

from pipeline.config.load import load, with_overrides
from pipeline.stages import tune
from pipeline.stages.tune_plan import planned_points
from pipeline.stages.tune_space import read_space

TINY = [
    *("encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"),
    *("target.taps={3: 1, 4: 2}", "train.batch=10", "train.warmup_epochs=0", "tune.epochs=1"),
    *("tune.recipe_seeds=0", "tune.finalists=0"),
    *("evaluate.probe_strengths=[0.1]", "tracking.system_metrics=false"),
]
SPACE = """
question: Does everything that can be drawn reach the trials?
space:
  target.weights: {simplex: [1, 3, 4]}
  target.kind: {choice: [wavelet, pixels]}
  target.tilt: {choice: [null, 0.5, {0: 0, 1: 1}], when: {target.kind: wavelet}}
  train.betas: {choice: [[0.9, 0.95], [0.8, 0.9]]}
  train.lr: {log_uniform: [1e-4, 1e-2]}
  decoder.depth: {int: [1, 2]}
  mask.ratio: {uniform: [0.25, 0.75], step: 0.25}
"""
pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("search", "trials"), [("random", 3), ("optuna", 2)])
def test_trials_train_at_the_points_of_the_space(ray_local, tmp_path, search, trials):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    (tmp_path / "all.yaml").write_text(SPACE)
    places = [f"out={tmp_path}", f"tune.space={tmp_path}/all.yaml"]
    recipe = load("small", [*TINY, *places, f"tune.trials={trials}", f"tune.search={search}"])
    found = run_stage(tune, recipe, ray_local)
    space = read_space(recipe)
    points = [trial["point"] for trial in found["trials"]]
    assert len(points) == trials and not any("error" in trial for trial in found["trials"])
    for point in points:
        assert point["target.weights.3"] + point["target.weights.4"] == pytest.approx(1)
        assert ("target.tilt" in point) == (point["target.kind"] == "wavelet")
        assert set(point) <= set(space.settings) == set(found["parameters"])
    if search == "random":
        planned = planned_points(recipe, space, trials)
        assert sorted(map(json.dumps, points)) == sorted(map(json.dumps, planned))
    with open(found["table"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train.lr"]) for row in rows] == [point["train.lr"] for point in points]
    assert sorted(trial["number"] for trial in found["trials"]) == list(range(1, trials + 1))
    best = load(found["best_recipe"])
    assert best.train.lr == points[0]["train.lr"] and list(best.train.betas) == points[0]["train.betas"]
    assert best.target.kind == points[0]["target.kind"]
    assert run_stage(tune, recipe, ray_local)["state"] == "finished already"
    more = run_stage(tune, with_overrides(recipe, {"tune.trials": trials + 1}), ray_local)
    assert more["state"] == f"continued, {trials} trials were done" and len(more["trials"]) == trials + 1
    assert [trial for trial in more["trials"] if trial["number"] <= trials] == found["trials"]
