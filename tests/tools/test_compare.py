"""`wavemim compare` on real SQLite stores that the real Tracker wrote: what it says is what was logged."""

import json
import socket
import sys

import matplotlib.image
import numpy as np
import pytest

from pipeline.cli import main
from pipeline.config import load as config
from pipeline.errors import SettingError, StageError
from pipeline.runtime.usage import Spent
from pipeline.tools import compare as module
from pipeline.tools.compare import compare
from pipeline.tracking.runs import find
from pipeline.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def _no_uri_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def recipe_in(folder, name, **settings):
    base = {"name": name, "out": str(folder), "tracking": {"system_metrics": False}}
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return config.with_overrides(config.Recipe.model_validate(base), changes)


def spent(images, seconds):
    return Spent(images, seconds, 2 * seconds / 3600, 0.0, 10**9 * images, 3 * 2**30, 0, 1024 * images)


def stage(recipe, name, lines, **tags):
    """A stage's run as it logs itself; its id."""
    folder = recipe.stage_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    with Tracker.start(recipe, name, log_dir=folder, tags={"wavemim.shards": "f" * 64, **tags}) as tracker:
        for images, metrics in lines:
            tracker.log(metrics, images)
    assert tracker.handle.run_id
    return tracker.handle.run_id


def pretraining(loss, seconds):
    return [
        (images, {"train/loss": loss / images, "train/lr": 0.1, **spent(images, seconds * images).metrics()})
        for images in (100, 200, 300, 200, 400)  # killed, and gone on with from 100 images
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An out folder with runs `first` (pretrain, evaluate) and `second` (pretrain alone): {stage: id} by name."""
    out = tmp_path_factory.mktemp("an out folder")
    first = recipe_in(out, "first", mask__ratio=0.75, evaluate__batch=7)
    second = recipe_in(out, "second", mask__ratio=0.5, target__weights={3: 0.5}, tune__trials=3)
    judged = {
        "eval/linear_top1": 35.0,
        "eval/linear_top1_low": 30.12,
        "eval/linear_top1_high": 40.23,
        "eval/linear_top1_untrained": 0.512,
        "eval/linear_top1_low_untrained": 0.506,
        "eval/linear_top1_high_untrained": 0.519,
        "eval/rankme": 12.3456,
        "perf/images_per_second": 1.0,
    }
    ids = {
        "first": {
            "pretrain": stage(first, "pretrain", pretraining(300.0, 0.5)),
            "evaluate": stage(first, "evaluate", [(400, {**judged, **spent(50, 7.0).metrics()})]),
        },
        "second": {"pretrain": stage(second, "pretrain", pretraining(200.0, 0.25))},
    }
    return out, ids


def uri(out):
    return f"sqlite:///{out}/mlflow.db"


def rows(text):
    """{first cell: other cells} of all tables."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_side_by_side(runs, tmp_path):
    out, ids = runs
    text = compare(["first", "second"], uri=uri(out), plot=tmp_path / "c.png", numbers=tmp_path / "c.json")
    found = rows(text)
    differing = text.partition("## Settings")[2].partition("## Metrics")[0]
    assert set(rows(differing)) == {"setting", "mask.ratio", "target.weights", "target.weights.3"}
    assert found["mask.ratio"] == ["0.75", "0.5"]
    assert found["target.weights.3"] == ["–", "0.5"]
    assert found["eval/linear_top1"] == ["35.0 (30.1 to 40.2)", "–"]
    assert found["eval/linear_top1_untrained"] == ["0.512 (0.506 to 0.519)", "–"]
    assert found["eval/rankme"] == ["12.35", "–"]
    assert found["train/loss"] == ["0.75", "0.5"]
    assert not {"train/lr", "perf/images_per_second", "eval/linear_top1_low", "cost/flops"} & set(found)
    training, evaluation = (
        rows(part) for part in text.partition("## Cost of pretrain")[2].split("## Cost of evaluate")
    )
    assert training["images seen"] == ["400", "400"]
    assert training["wall-clock"] == ["3 min 20 s", "1 min 40 s"]
    assert training["compute"] == ["400 GFLOP", "400 GFLOP"]
    assert training["CPU core-hours"] == ["0.111", "0.0556"]
    assert training["bytes read"] == ["400 KiB", "400 KiB"]
    assert evaluation["images seen"] == ["50", "–"]
    content = json.loads((tmp_path / "c.json").read_text())
    assert {name: {s: about["run_id"] for s, about in of.items()} for name, of in content["runs"].items()} == ids
    assert content["metrics"]["first"]["eval/linear_top1"] == {"value": 35.0, "low": 30.12, "high": 40.23}
    assert Spent.of(content["cost"]["pretrain"]["second"]) == spent(400, 100.0)
    assert content["notes"] == []
    picture = matplotlib.image.imread(tmp_path / "c.png")
    assert picture.shape[1] == 1100
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20


def test_curves_are_what_was_logged_last_at_a_step(runs):
    out, _ = runs
    _, curves = module._read(["first", "second"], uri(out), (), drawn=True)
    assert list(curves) == ["eval/linear_top1", "train/loss"]
    points = curves["train/loss"]["first"]
    assert [(p.images, p.value) for p in points] == [(n, 300.0 / n) for n in (100, 200, 300, 400)]
    assert [p.seconds for p in points] == [50.0, 100.0, 150.0, 200.0]
    (judged,) = curves["eval/linear_top1"]["first"]
    assert (judged.images, judged.seconds, judged.value, judged.interval) == (400, 200.0, 35.0, (30.12, 40.23))
    assert curves["eval/linear_top1"]["second"] == []


def test_runs_by_folder_id_and_name(runs, tmp_path, monkeypatch):
    out, ids = runs

    def found(*names, uri=None):
        return [{s: run.info.run_id for s, run in one.stages.items()} for one in find(names, uri)]

    assert found(str(out / "runs" / "first"), str(out / "runs" / "second" / "pretrain")) == [
        ids["first"],
        ids["second"],
    ]
    assert found(str(out / "runs" / "first"), "second") == [ids["first"], ids["second"]]  # the store is the folder's
    assert found(ids["first"]["evaluate"], "pretrain-second", uri=uri(out)) == [
        {"evaluate": ids["first"]["evaluate"]},
        ids["second"],
    ]
    (out.parent / "wavemim-out").symlink_to(out)
    monkeypatch.chdir(out.parent)
    assert found("second") == [ids["second"]]
    labels = [run.label for run in find(["first", "wavemim-out/runs/first"], uri(out))]
    assert all(label.startswith("first (") for label in labels)


def test_params_are_flat_and_of_the_same_names_in_all_runs(runs):
    """So that MLflow's own comparison of runs has something to compare."""
    out, _ = runs
    stored = [run for one in find(["first", "second"], uri(out)) for run in one.stages.values()]
    names = [{n for n in run.data.params if not n.startswith("target.weights")} for run in stored]
    assert names[0] == names[1] == names[2]
    assert {"mask.ratio", "train.lr", "evaluate.knn_k", "data.steps"} <= names[0]
    assert {run.data.tags["wavemim.run"] for run in stored} == {"first", "second"}


def said_by_command(monkeypatch, capsys, *arguments):
    """(exit code, lines) of the command."""
    monkeypatch.setattr(sys, "argv", ["wavemim", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err.splitlines()


def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys):
    out, _ = runs
    monkeypatch.chdir(tmp_path)
    here = f"tracking.uri={uri(out)}"
    for arguments, words in {
        ("third", here): "third: MLflow at sqlite:///",
        ("0" * 32, here): "does not exist in MLflow at",
        ("it's", here): "no run of this name or id; its runs are",
        (
            "first",
            here,
            "--metric",
            "eval/knn",
        ): "--metric eval/knn: none of the runs has it; they have eval/linear_top1",
        ("first", here, "--plot", "none/c.png"): "none/c.png: the folder",
        ("first", "tracking.experiment=x"): "compare takes no setting except tracking.uri=URI",
        ("first",): "the address of MLflow is unknown; give tracking.uri=URI",
        (out,): "holds runs; give one or more of them",
        (tmp_path,): "contains no logs of a stage",
        ("no/such", here): "no/such is not a folder",
        (here,): "compare needs one or more runs",
    }.items():
        code, lines = said_by_command(monkeypatch, capsys, *arguments)
        assert (code, len(lines)) == (2, 1), (arguments, lines)
        assert words in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_it_fails_in_one_line(monkeypatch, capsys, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code, lines = said_by_command(monkeypatch, capsys, "first", f"tracking.uri=http://me:secret@127.0.0.1:{port}")
    assert (code, len(lines)) == (1, 1), lines
    assert f"MLflow at http://me:***@127.0.0.1:{port} does not answer: Connection refused" in lines[0]
    code, lines = said_by_command(monkeypatch, capsys, "first", f"tracking.uri=sqlite:///{tmp_path}/none.db")
    assert (code, len(lines)) == (1, 1), lines
    assert not (tmp_path / "none.db").exists()


def test_old_doubled_and_ambiguous_runs_are_told_apart(runs, tmp_path):
    """Runs without the tag and without costs; a stage done twice; the same name in two out folders of one store."""
    here = uri(runs[0])
    shared = {"tracking__uri": here}
    recipe = recipe_in(tmp_path / "a", "r", **shared)
    replaced = stage(recipe, "pretrain", [(10, {"train/loss": 3.0})])
    newest = stage(recipe, "pretrain", [(10, {"train/loss": 2.0}), (20, {"train/loss": 1.0})])
    evaluated = stage(recipe, "evaluate", [(20, {"eval/rankme": 5.0})])
    (run,) = find(["r"], here)
    assert {name: stored.info.run_id for name, stored in run.stages.items()} == {
        "pretrain": newest,
        "evaluate": evaluated,
    }
    assert run.notes == [f"r: pretrain also has an older run, {replaced}, which is not shown"]

    from mlflow import MlflowClient

    client = MlflowClient(here)
    client.delete_run(replaced)
    client.delete_tag(newest, "wavemim.run")
    client.delete_tag(evaluated, "wavemim.run")
    text = compare(["r"], uri=here, plot=tmp_path / "c.png")
    assert (
        "Note: r: logged by an earlier version, without the tag wavemim.run; stages were matched by wavemim.recipe"
        in text
    )
    assert "Note: r: its cost is unknown, it was not measured" in text
    assert "One run: nothing to compare" in text
    _, curves = module._read(["r"], here, ("train/loss",), drawn=True)
    assert [point.images for point in curves["train/loss"]["r"]] == [10, 20]
    assert all(0 <= point.seconds < 600 for point in curves["train/loss"]["r"])  # by the times of the values

    stage(recipe_in(tmp_path / "b", "r", **shared), "pretrain", [(10, {"train/loss": 1.0})])
    client.set_tag(newest, "wavemim.run", "r")
    with pytest.raises(SettingError, match=r"r: ambiguous, runs of this name are in 2 out folders"):
        find(["r"], here)
    labels = [run.label for run in find([str(tmp_path / "a/runs/r"), str(tmp_path / "b/runs/r")], None)]
    assert len(set(labels)) == 2


def test_a_run_that_mlflow_never_got_says_so(runs, tmp_path):
    folder = tmp_path / "runs" / "r" / "pretrain"
    folder.mkdir(parents=True)
    (folder / ".mlflow-outbox.jsonl").write_text(json.dumps({"do": "start", "uri": uri(runs[0])}) + "\n")
    with pytest.raises(StageError, match=r"pretrain has not reached MLflow; wavemim sync .* sends it"):
        compare([str(tmp_path / "runs" / "r")])
