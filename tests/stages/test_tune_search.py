"""Sweeps over every kind of distribution, on a real Ray."""

import csv
import json

import mlflow
import pytest
import tiny_shards
from loss_equality.cases import TWO_LEVELS
from stage_calls import run_stage

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.stages import tune
from pipeline.stages.tune_plan import planned_points
from pipeline.stages.tune_space import read_space
from pipeline.sweeps.ledger import Ledger
from pipeline.sweeps.trials import trial_name
from pipeline.tracking.tracker import store_uri

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


@pytest.mark.parametrize(("search", "trials"), [("random", 2), ("optuna", 2)])
def test_trials_train_at_the_points_of_the_space(ray_local, tmp_path, search, trials):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    (tmp_path / "all.yaml").write_text(SPACE)
    places = [f"out={tmp_path}", f"tune.space={tmp_path}/all.yaml"]
    recipe = load(TWO_LEVELS, [*TINY, *places, f"tune.trials={trials}", f"tune.search={search}"])
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
    for result in (found, more):  # a trial that an earlier call has finished is counted once
        assert result["cost"]["images_seen"] == sum(trial["cost/images_seen"] for trial in result["trials"])


def test_a_population_is_forked_at_rungs_and_its_winner_runs_again_with_its_last_values(ray_local, tmp_path):
    """Would catch: a fork that is not trained, a run that ends at each rung, parameters of MLflow that are not the last
    values, checkpoints of rungs that stay."""
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24), classes=None)
    (tmp_path / "grid.yaml").write_text("question: Q?\nspace: {train.lr: {grid: [0.03, 1.0e-3]}}")
    places = [f"out={tmp_path}", f"tune.space={tmp_path}/grid.yaml"]
    counts = ["tune.trials=2", "tune.epochs=3", "tune.rungs=3", "tune.recipe_seeds=1", "tune.finalists=1"]
    pbt = ["tune.scheduler=pbt", "tune.concurrent=2", "tune.fresh_seeds=1"]
    recipe = load("small", [*TINY, *places, *counts, *pbt])
    found = run_stage(tune, recipe, ray_local)
    ledger = Ledger(recipe.stage_dir("tune") / "trials.jsonl")
    trials = ledger.trials()
    assert [trial.role for trial in trials] == ["recipe", *["search"] * 2, "finalist"]
    assert {trial.state for trial in trials} == {"finished"}
    assert sorted(ledger.generations) == [1, 2] and all(len(one.forks) == 1 for one in ledger.generations.values())
    client = mlflow.MlflowClient(store_uri(recipe))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = (run for run in runs if run.data.tags["wavemim.stage"] == "tune")
    assert len(runs) == 5 and {name.partition(".")[0] for name in parent.data.params} == {"tune"}
    assert (parent.data.params["tune.trials"], parent.data.params["tune.scheduler"]) == ("2", "pbt")
    assert {"recipe.yaml", "space.yaml"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    for trial in trials:
        assert [images for images, _ in trial.curve] == [0, 16, 32, 48] and trial.metrics["images"] == 48
        assert trial.cost["cost/images_seen"] >= 48
        run = client.get_run(trial.metrics["mlflow_run"])
        assert run.info.status == "FINISHED" and float(run.data.params["train.lr"]) == trial.point["train.lr"]
        assert run.info.run_name == trial_name(trial.number, trial.point)
        history = client.get_metric_history(run.info.run_id, "objective_curve")
        assert [(one.step, one.value) for one in history] == list(trial.curve)
        history = client.get_metric_history(run.info.run_id, "objective")
        assert [(one.step, one.value) for one in history] == [*trial.curve[:-1], (48, trial.objective)]
        said = run.data.tags["mlflow.note.content"]
        counts = [trial.metrics[name] for name in ("objective_images", "curve_images")]
        assert [int(run.data.tags[f"wavemim.{name}"]) for name in ("objective_images", "curve_images")] == counts
        assert f"on {counts[0]} train images" in said and f"on {counts[1]} images: compare" in said
        assert ("continued from a checkpoint" in said) == bool(trial.forks)
        forked = "; ".join(f"#{fork.donor:02d} after {fork.images} images" for fork in trial.forks)
        assert run.data.tags.get("wavemim.forked", "") == forked
        if trial.role == "search":
            values = client.get_metric_history(run.info.run_id, "searched/train.lr")
            assert [one.step for one in values] == [0, 16, 32] and values[-1].value == trial.point["train.lr"]
        folder = recipe.stage_dir("tune") / "trials" / f"{trial.number:04d}"
        assert not list(folder.glob("*checkpoints/*"))
    best = max((trial for trial in trials if trial.role == "search"), key=lambda trial: trial.objective)
    assert best.point == trials[-1].point or best.point == trials[0].point
    assert any("the last values of such a trial" in line for line in found["answer"])
    assert run_stage(tune, recipe, ray_local)["state"] == "finished already"
    with pytest.raises(SettingError, match=r"tune\.trials: 2 → 3"):
        run_stage(tune, with_overrides(recipe, {"tune.trials": 3}), ray_local)


def test_asha_stops_trials_of_the_search_and_the_others_run_to_their_end(ray_local, tmp_path):
    """Would catch: a stopped trial that trains on, is ranked, has no cost, keeps its checkpoint, or ends as FINISHED."""
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24), classes=None)  # then the objective is RankMe
    (tmp_path / "grid.yaml").write_text("question: Q?\nspace: {train.lr: {grid: [0.03, 1.0e-3, 1.0e-4, 1.0e-5]}}")
    places = [f"out={tmp_path}", f"tune.space={tmp_path}/grid.yaml"]
    counts = ["tune.trials=4", "tune.epochs=8", "tune.recipe_seeds=1", "tune.finalists=1", "tune.fresh_seeds=1"]
    recipe = load("small", [*TINY, *places, *counts, "tune.scheduler=asha", "tune.concurrent=1"])
    found = run_stage(tune, recipe, ray_local)
    assert 0 < found["probe_share"] < 1 and "% of the time of a trial" in tune.summary(recipe, found)
    trials = Ledger(recipe.stage_dir("tune") / "trials.jsonl").trials()
    assert [trial.role for trial in trials] == ["recipe", *["search"] * 4, "finalist"]
    assert {trial.state for trial in trials if trial.role != "search"} == {"finished"}
    assert {trial.state for trial in trials if trial.role == "search"} == {"finished", "stopped"}
    client = mlflow.MlflowClient(store_uri(recipe))
    for trial in trials:
        seen = [images for images, _ in trial.curve]
        assert seen == [0, 32, 64, 96, 128][: len(seen)] and trial.metrics["images"] == seen[-1]
        assert trial.metrics["objective_images"] == trial.metrics["curve_images"] > 0
        assert (trial.state == "finished") == (seen[-1] == 128) and trial.objective == trial.curve[-1][1]
        assert trial.cost["cost/images_seen"] >= seen[-1] and trial.cost["cost/wall_clock_s"] > 0
        assert trial.state == "stopped" or 0 < trial.metrics["perf/probe_share"] < 1
        folder = recipe.stage_dir("tune") / "trials" / f"{trial.number:04d}"
        assert not list(folder.glob("checkpoints/images-*"))
        run = client.get_run(trial.metrics["mlflow_run"])
        assert run.info.status == ("FINISHED" if trial.state == "finished" else "KILLED")
        history = client.get_metric_history(run.info.run_id, "objective_curve")
        assert [(one.step, one.value) for one in history] == list(trial.curve)
        assert run.data.metrics["objective"] == trial.objective  # a stopped trial has one too
