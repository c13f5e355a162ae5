"""The whole way on real JPEGs, real Ray, a real MLflow store: each stage's files, numbers and second call."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stage_calls import run_stage
from tiny_images import images_of

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.models.build import build_model, model_of_checkpoint
from pipeline.runtime.room import check_room
from pipeline.shards.shard_set import ShardSet
from pipeline.stages import evaluate, export, prepare, pretrain, tune
from pipeline.stages.tune_trial import PROBE, RANK
from pipeline.tools.embed import embed, subject_named
from pipeline.tools.embed_sources import plan_images
from wavemim.weights import checkpoint

TINY = {
    "data.image_size": 32,
    "data.levels": 3,
    "encoder.image_size": 32,
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2},
    "train.epochs": 4,
    "train.batch": 20,
    "train.warmup_epochs": 1,
    "train.log_every": 2,
    "evaluate.probe_strengths": [0.1],
    "tune.space": "level_weights_and_mask_ratio",
    "tune.trials": 2,
    "tune.recipe_seeds": 1,
    "tune.finalists": 1,
    "tune.fresh_seeds": 1,
    "tune.epochs": 1,
    "tracking.system_metrics": False,
}
pytestmark = pytest.mark.ray


def recipe_for(folder, images, **changes):
    return with_overrides(load("small"), {**TINY, "images": str(images), "out": str(folder), **changes})


def client_of(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("wavemim")
    return client, {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def whole(ray_local, photo_folder, tmp_path_factory):
    """All stages once, on labelled photos, pretraining with two workers."""
    out = tmp_path_factory.mktemp("whole")
    recipe = recipe_for(out, photo_folder)
    results = {"prepare": run_stage(prepare, recipe, ray_local)}
    results["pretrain"] = run_stage(pretrain, recipe, ray_local)
    results["evaluate"] = run_stage(evaluate, recipe, ray_local)
    results["tune"] = run_stage(tune, recipe, ray_local)
    results["export"] = run_stage(export, recipe)
    return out, recipe, results


def test_pretrain_leaves_whole_checkpoints_and_a_picture(whole):
    _, recipe, results = whole
    folder = recipe.stage_dir("pretrain")
    last = checkpoint.latest(folder)
    state = checkpoint.read_state(last)
    assert last.name == results["pretrain"]["checkpoint"]
    assert state["epoch"] == 4
    assert state["images"] == 4 * ShardSet.open(recipe.shards_at).rows["train"] == results["pretrain"]["images_seen"]
    assert len(list(folder.glob("images-*"))) == recipe.train.keep_checkpoints
    first, final = results["pretrain"]["history"][0], results["pretrain"]["history"][-1]
    assert final["train/loss_level3"] < first["train/loss_level3"]
    assert Image.open(folder / "reconstruction.png").size[0] > 300


def test_everything_is_in_mlflow(whole):
    out, recipe, results = whole
    client, runs = client_of(out)
    stages = {f"{stage}-small" for stage in ("prepare", "pretrain", "evaluate", "tune", "export")}
    assert stages <= set(runs)
    assert all(run.info.status == "FINISHED" for run in runs.values())
    run = runs["pretrain-small"]
    shards = ShardSet.open(recipe.shards_at)
    assert run.data.tags["wavemim.shards"] == shards.fingerprint
    assert run.data.params["target.taps.3"] == "2"
    assert run.data.params["mask.ratio"] == "0.75"
    points = client.get_metric_history(run.info.run_id, "train/loss_level3")
    assert points[-1].step == results["pretrain"]["images_seen"]
    assert {"train/loss", "train/lr", "train/grad_norm", "perf/images_per_second"} <= set(run.data.metrics)
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"reconstruction.png", "recipe.yaml"} <= names
    parent = runs["tune-small"]
    trials = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(trial.data.tags["wavemim.role"] for trial in trials) == ["finalist", "recipe", "search", "search"]
    assert all(trial.info.run_name.startswith("#0") and "mask=" in trial.info.run_name for trial in trials)
    assert len({trial.data.params["mask.ratio"] for trial in trials}) == 3
    assert {frozenset(trial.data.params) for trial in trials} == {
        frozenset(results["tune"]["parameters"])
    }  # what varies
    assert all(trial.data.tags["wavemim.objective"] == PROBE for trial in trials)
    for trial in trials:
        first = client.get_metric_history(trial.info.run_id, "objective")[0]
        assert first.step == 0 and "objective" in trial.data.metrics
    assert "sweep.png" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    measured = runs["evaluate-small"].data.metrics
    assert {"eval/linear_top1", "eval/linear_top1_untrained", "eval/knn_top1", "eval/rankme"} <= set(measured)


def test_evaluation_is_of_three_subjects_on_val(whole):
    _, recipe, results = whole
    measured = results["evaluate"]["measured"]
    assert set(measured) == {"trained", "untrained", "pixels"}
    assert results["evaluate"]["val_images"] == ShardSet.open(recipe.shards_at).rows["val"]
    for which, values in measured.items():
        assert values["eval/linear_top1_low"] <= values["eval/linear_top1"] <= values["eval/linear_top1_high"]
        of_token = {name for name in values if "_token_" in name}
        assert of_token >= {"eval/linear_token_top1", "eval/knn_token_top1"} if which != "pixels" else not of_token
    assert results["evaluate"]["pools"] == ["mean", "token"]


def test_the_sweep_is_ranked_by_what_weights_cannot_move(whole):
    _, _, results = whole
    found = results["tune"]
    assert found["objective"] == PROBE
    values = [trial[PROBE] for trial in found["trials"]]
    assert values == sorted(values, reverse=True)
    assert set(found["parameters"]) == {"target.weights.2", "target.weights.3", "mask.ratio"}  # only tapped levels
    with open(found["table"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row[PROBE]) for row in rows] == values
    assert [trial["role"] for trial in sorted(found["trials"], key=lambda trial: trial["number"])] == [
        *("recipe", "search", "search", "finalist")
    ]
    assert len({trial["seed"] for trial in found["trials"]}) == 2  # a finalist has a seed of its own
    assert load(found["best_recipe"]).mask.ratio in {trial["point"]["mask.ratio"] for trial in found["trials"]}


def test_the_export_is_the_trained_encoder(whole):
    import timm

    _, recipe, results = whole
    shards = ShardSet.open(recipe.shards_at)
    model = build_model(recipe, shards)
    checkpoint.load_model(checkpoint.latest(recipe.stage_dir("pretrain")), model)
    loaded = timm.create_model(f"local-dir:{results['export']['encoder']}", pretrained=True).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (loaded(x) - model.encoder.model.eval()(x)).abs().max() < 1e-5
    assert loaded.pretrained_cfg["mean"] == pytest.approx([m / 255 for m in shards.pixel_mean])


def pictures_in(folder):
    """50 lossless pictures as a tree of classes, in a tar and by themselves, and two files that are none: (sources, pixels,
    {(source, path): (number, label)})."""
    images = images_of(50, 3, 32, seed=3)
    content = []
    for image in images:
        Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).save(buffer := io.BytesIO(), "png")
        content.append(buffer.getvalue())
    expected = {}
    for number in range(40):
        path = f"{('train', 'test')[number % 2]}/class{number % 3}/{number:02d}.png"
        (folder / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / path).write_bytes(content[number])
        expected["tree", path] = number, f"class{number % 3}"
    (folder / "tree" / "train" / "class0" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "tree" / "notes.txt").write_text("hello")
    with tarfile.open(folder / "more.tar", "w") as tar:
        for number in range(40, 48):
            member = tarfile.TarInfo(f"{99 - number}.png")
            member.size = len(content[number])
            tar.addfile(member, io.BytesIO(content[number]))
            expected["more.tar", f"more.tar!{99 - number}.png"] = number, None
    for number in (49, 48):
        (folder / f"{number}.png").write_bytes(content[number])
        expected["", f"{number}.png"] = number, None
    return ["tree", "more.tar", "49.png", "48.png"], torch.from_numpy(images), expected


def test_embeddings_of_folders_tars_and_files_are_the_encoders(whole, ray_local, tmp_path, monkeypatch):
    _, recipe, _ = whole
    run = recipe.run_dir.absolute()
    monkeypatch.chdir(tmp_path)
    sources, pixels, expected = pictures_in(tmp_path)
    subject = subject_named(str(run))
    done = embed(subject, plan_images(sources), "f.parquet", ray_local, batch=7, progress=False)
    assert done["images"] == 50 and done["rejected"] == 1
    rejected = {(row["source"], row["path"]) for row in pq.read_table("f.rejected.parquet").to_pylist()}
    assert rejected == {("tree", "train/class0/broken.jpg")}  # text files are left out
    table = pq.read_table("f.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    about = json.loads(table.schema.metadata[b"wavemim"])
    assert about["fingerprint"] == subject.fingerprint and about["image_size"] == 32
    rows = table.to_pylist()
    found = [(row["source"], row["path"]) for row in rows]
    assert found[:40] == sorted(key for key in expected if key[0] == "tree") and found[40:] == list(expected)[40:]
    model, inputs, _ = model_of_checkpoint(Path(subject.source))
    with torch.inference_mode():
        features = model.eval().encoder.model(inputs.normalise(pixels)).numpy()
    for row in rows:
        number, label = expected[row["source"], row["path"]]
        assert row["label"] == label
        assert np.abs(np.array(row["embedding"]) - features[number]).max() < 1e-5


def test_the_same_call_again_does_nothing_and_says_so(whole, ray_local):
    _, recipe, _ = whole

    def written():
        files = [path for path in recipe.run_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    for stage in (prepare, pretrain, evaluate, tune, export):
        assert run_stage(stage, recipe, ray_local)["state"] == "finished already"
    assert written() == before


def test_other_settings_in_the_same_place_are_refused(whole, ray_local):
    _, recipe, _ = whole
    with pytest.raises(SettingError, match=r"train\.epochs: 4\.0 → 5\.0.*restart=true"):
        run_stage(pretrain, with_overrides(recipe, {"train.epochs": 5}), ray_local)


def test_workers_that_never_fit_are_refused_at_once(whole, ray_local):
    from dataclasses import replace

    _, recipe, _ = whole
    many = with_overrides(recipe, {"train.workers": 20})
    with pytest.raises(SettingError, match=r"20 worker\(s\) with cluster\.cpus_per_worker=1 need 20 CPUs"):
        check_room(many, replace(ray_local, private=True, gpus=0), 20)


def test_without_labels_what_needs_them_is_skipped(ray_local, photo_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photo_folder.rglob("*.jpg"))[:20]):
        (flat / f"{number}.jpg").write_bytes(path.read_bytes())
    (flat / "notes.txt").write_text("not a picture")
    (flat / "broken.jpg").write_bytes((flat / "0.jpg").read_bytes()[:200])
    recipe = recipe_for(tmp_path / "out", flat, **{"train.workers": 1, "train.epochs": 2, "tune.finalists": 0})
    summary = run_stage(prepare, recipe, ray_local)
    assert summary["counts"]["kept"] == 20
    assert summary["counts"]["rejected"] == 1  # the text file is left out, not rejected
    run_stage(pretrain, recipe, ray_local)
    measured = run_stage(evaluate, recipe, ray_local)
    assert not measured["labelled"]
    assert set(measured["measured"]["trained"]) == {"eval/rankme", "eval/alpha_req"}
    assert run_stage(tune, recipe, ray_local)["objective"] == RANK
