"""Tracking against real MLflow stores: SQLite, and a server that is killed."""

import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mlflow_server import free_port

from pipeline.config import load as config
from pipeline.config.recipe import Recipe
from pipeline.tracking import sender
from pipeline.tracking import tracker as tracking
from pipeline.tracking.tracker import RunHandle, Tracker, end_trials, store_uri, ui_command


@pytest.fixture(autouse=True)
def _no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def recipe_in(folder: Path, **settings: object) -> Recipe:
    recipe = Recipe.model_validate({"name": "mini", "out": str(folder), "tracking": {"system_metrics": False}})
    return config.with_overrides(recipe, {key.replace("__", "."): value for key, value in settings.items()})


def client_of(handle: RunHandle):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(handle.uri)


def lines_of(handle: RunHandle) -> list[dict]:
    return [json.loads(line) for line in Path(handle.log_file).read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An out folder whose store most tests share: a fresh one takes seconds."""
    return tmp_path_factory.mktemp("an out folder")


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_store_is_sqlite_in_out_and_holds_settings_metrics_tags_and_recipe(out: Path) -> None:
    recipe = recipe_in(out, target__weights={3: 0.5, 4: 2.0})
    with Tracker.start(recipe, "pretrain", log_dir=out / "logs", tags={"wavemim.shards": "abc"}) as tracker:
        for images in (0, 256, 512):
            tracker.log({"train/loss": 1.0 / (1 + images), "train/loss_level3": 2.0}, images)
        tracker.log({"train/grad_norm": math.nan, "train/lr": 0.5, "train/loss": math.inf}, 768)
        tracker.tag("wavemim.note", "x")
    assert tracker.handle.uri == f"sqlite:///{out}/mlflow.db"
    assert (out / "mlflow.db").is_file()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []

    client = client_of(tracker.handle)
    run = client.get_run(tracker.handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "pretrain-mini"
    assert run.info.artifact_uri.startswith(f"{out}/mlartifacts/")
    params = run.data.params
    assert params["target.weights.3"] == "0.5"
    assert params["train.lr"] == "0.00015"
    assert params["data.steps"] == "[4.0, 4.0, 8.0]"
    assert params["images"] == "null"
    tags = run.data.tags
    assert {tags["wavemim.stage"], tags["wavemim.recipe"], tags["wavemim.shards"]} == {"pretrain", "mini", "abc"}
    assert tags["wavemim.out"] == str(out)
    assert tags["mlflow.user"]
    assert "mlflow.source.git.commit" in tags or "wavemim.version" in tags

    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, 1.0 / (1 + i)) for i in (0, 256, 512)]
    assert client.get_metric_history(run.info.run_id, "train/grad_norm") == []
    lines = lines_of(tracker.handle)
    in_file = {(line["step"], k, v) for line in lines for k, v in line["metrics"].items() if isinstance(v, float)}
    in_store = {
        (m.step, m.key, m.value) for k in run.data.metrics for m in client.get_metric_history(run.info.run_id, k)
    }
    assert in_file == in_store
    assert lines[-1]["metrics"] == {"train/grad_norm": "nan", "train/lr": 0.5, "train/loss": "inf"}

    stored = Path(client.download_artifacts(run.info.run_id, "recipe.yaml")).read_text()
    assert config.validate(yaml.safe_load(stored)) == recipe


def test_dataset_and_description_are_stored_once_also_after_resuming(out: Path) -> None:
    about = {
        "name": "photos", "digest": "f" * 64, "source": "/data/photos", "profile": {"num_rows": 7},
        "columns": {"label": "3 classes"},
    }  # fmt: skip
    for status in ("FAILED", "FINISHED"):
        tracker = Tracker.start(recipe_in(out), "pretrain", log_dir=out / "data", dataset=about)
        tracker.description("# Answer {run_id}\n", ["a.png", "b.png"])
        tracker.end(status)
    client = client_of(tracker.handle)
    run = client.get_run(tracker.handle.run_id)
    [found] = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("photos", "f" * 36)
    assert json.loads(found.dataset.profile) == {"num_rows": 7}
    [column] = json.loads(found.dataset.schema)["mlflow_colspec"]
    assert (column["name"], column["type"]) == ("label", "3 classes")
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("# Answer { run_id }")  # only the project's own place for the id is filled in
    assert f"![a.png](get-artifact?path=a.png&run_uuid={run.info.run_id})" in note
    assert note.count("\n\n") == 2 and "\n\n\n" not in note


def test_an_experiment_without_a_kind_becomes_one_of_model_training_and_a_chosen_kind_stays(out: Path) -> None:
    with Tracker.start(recipe_in(out), "x", log_dir=out / "kind0") as tracker:
        pass
    client = client_of(tracker.handle)
    kind = "mlflow.experimentKind"
    for name, tags in (("plain", {}), ("chosen", {kind: "genai_development"})):
        client.create_experiment(name, artifact_location=str(out / "artifacts"), tags=tags)
        with Tracker.start(recipe_in(out, tracking__experiment=name), "x", log_dir=out / name):
            pass
    kinds = {e.name: e.tags.get(kind) for e in client.search_experiments()}
    assert (kinds["wavemim"], kinds["plain"]) == ("custom_model_development", "custom_model_development")
    assert kinds["chosen"] == "genai_development"


def test_costs_have_another_name_in_mlflow_and_are_read_back(out: Path) -> None:
    from pipeline.tracking import mlflow_client

    with Tracker.start(recipe_in(out), "x", log_dir=out / "cost") as tracker:
        tracker.log({"cost/flops": 2.0, "train/loss": 1.0}, 1)
    client = client_of(tracker.handle)
    run = client.get_run(tracker.handle.run_id)
    assert run.data.metrics == {"usage/flops": 2.0, "train/loss": 1.0}
    assert mlflow_client.metrics_of(run) == {"cost/flops": 2.0, "train/loss": 1.0}
    assert mlflow_client.history(client, run.info.run_id, "cost/flops")[1][0] == 2.0


def test_children_are_nested_and_those_left_running_are_ended(out: Path) -> None:
    recipe = recipe_in(out)
    with Tracker.start(recipe, "tune", log_dir=out / "sweep") as sweep:
        trials = [
            Tracker.start(
                recipe, "trial", parent=sweep.handle, name=f"trial-{n}", params={"mask": {"ratio": 0.1 * n}},
                log_dir=out / f"trial{n}",
            )
            for n in range(4)
        ]  # fmt: skip
        trials[0].end()
        statuses = {trials[1].handle.run_id: "FAILED", "trial-2": "FINISHED", trials[0].handle.run_id: "KILLED"}
        end_trials(sweep.handle.uri, sweep.handle.run_id, statuses)
    client = client_of(sweep.handle)
    runs = [client.get_run(trial.handle.run_id) for trial in trials]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {sweep.handle.run_id}
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED", "FINISHED", "KILLED"]
    assert runs[1].data.params == {"mask.ratio": "0.1"}
    assert client.get_run(sweep.handle.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit(0), "FINISHED"), (SystemExit(2), "FAILED")],
)
def test_status_says_how_the_run_ended(out: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(BaseException), Tracker.start(recipe_in(out), "x", log_dir=out / "x") as tracker:  # noqa: PT011,B017
        raise error
    assert client_of(tracker.handle).get_run(tracker.handle.run_id).info.status == status


def test_resuming_goes_on_with_the_run_if_the_store_has_it(out: Path) -> None:
    first = Tracker.start(recipe_in(out), "pretrain", log_dir=out / "r")
    first.log({"train/loss": 2.0}, 1)
    first.tag("wavemim.reason", "the disk is gone")
    first.end("FAILED")
    assert "wavemim.reason" in client_of(first.handle).get_run(first.handle.run_id).data.tags
    longer = recipe_in(out, train__epochs=200)
    second = Tracker.start(longer, "pretrain", log_dir=out / "r")
    assert second.handle == first.handle
    second.log({"train/loss": 1.0}, 2)
    assert second.flush(20)
    run = client_of(second.handle).get_run(second.handle.run_id)
    assert run.info.status == "RUNNING" and "wavemim.reason" not in run.data.tags
    assert json.loads(run.data.tags["wavemim.resumed_with"]) == {"train.epochs": "200.0"}
    second.end()
    history = client_of(second.handle).get_metric_history(second.handle.run_id, "train/loss")
    assert [m.value for m in history] == [2.0, 1.0]
    other = Tracker.start(longer, "pretrain", log_dir=out / "r")
    assert other.handle.run_id not in ("", first.handle.run_id)
    other.end()


def test_a_run_that_was_deleted_is_begun_anew_with_all_its_metrics(out: Path) -> None:
    first = Tracker.start(recipe_in(out), "pretrain", log_dir=out / "d")
    first.log({"train/loss": 2.0}, 1)
    first.end("FAILED")
    client_of(first.handle).delete_run(first.handle.run_id)
    with Tracker.start(recipe_in(out), "pretrain", log_dir=out / "d") as second:
        second.log({"train/loss": 1.0}, 2)
    assert second.handle.run_id not in ("", first.handle.run_id)
    history = client_of(second.handle).get_metric_history(second.handle.run_id, "train/loss")
    assert [m.value for m in history] == [2.0, 1.0]


def test_long_parameters_and_odd_names_are_kept(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = {"long": "y" * 9000, "n": {str(n): n for n in range(250)}, "a@b": None, "empty": {}}
    with Tracker.start(recipe_in(out), "x", params=params, log_dir=out / "x") as tracker:
        tracker.log({"eval/top@1": 0.5}, 1)
    run = client_of(tracker.handle).get_run(tracker.handle.run_id)
    assert run.data.params["long"] == "y" * 5999 + "…"
    assert run.data.params["n.249"] == "249"
    assert (run.data.params["a_b"], run.data.params["empty"]) == ("null", "{}")
    assert run.data.metrics == {"eval/top_1": 0.5}
    assert not [record for record in caplog.records if str(out) in record.getMessage()]


def test_attached_tracker_logs_artifacts_and_does_not_end_the_run(out: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.txt").write_text("a")
    with Tracker.start(recipe_in(out), "x", log_dir=out / "x") as tracker:
        with Tracker.attach(pickle.loads(pickle.dumps(tracker.handle))) as worker:  # noqa: S301
            worker.artifact(tmp_path / "figures", "shown")
            worker.artifact(tmp_path / "figures" / "a.txt")
            assert worker.flush(20)
        client = client_of(tracker.handle)
        assert client.get_run(tracker.handle.run_id).info.status == "RUNNING"
        assert {file.path for file in client.list_artifacts(tracker.handle.run_id)} == {"a.txt", "recipe.yaml", "shown"}
        assert [file.path for file in client.list_artifacts(tracker.handle.run_id, "shown")] == ["shown/a.txt"]


def test_system_metrics_are_sampled(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.3")
    recipe = config.with_overrides(recipe_in(out), {"tracking.system_metrics": True})
    with Tracker.start(recipe, "x", log_dir=out / "x") as tracker:
        time.sleep(1.5)
    metrics = client_of(tracker.handle).get_run(tracker.handle.run_id).data.metrics
    assert "system/cpu_utilization_percentage" in metrics


def test_a_clock_that_is_set_back_loses_and_doubles_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    recipe = config.with_overrides(recipe_in(out), {"tracking.system_metrics": True})
    back = [0.0]
    clock = SimpleNamespace(time=lambda: time.time() - back[0], monotonic=time.monotonic)
    monkeypatch.setattr(tracking, "time", clock)
    with Tracker.start(recipe, "x", log_dir=out / "clock") as tracker:
        for images in range(20):
            back[0] = 7200.0 * (images // 5)
            tracker.log({"train/loss": float(images % 2)}, images // 2)  # also the same values, twice at a step
            time.sleep(0.05)
    client = client_of(tracker.handle)
    assert len(client.get_metric_history(tracker.handle.run_id, "train/loss")) == 20
    steps = [line["step"] for line in lines_of(tracker.handle) if any(k.startswith("system/") for k in line["metrics"])]
    assert steps and min(steps) >= 0


def _attach_and_log(handle: RunHandle, worker: int) -> None:
    tracker = Tracker.attach(handle)
    for step in range(20):
        tracker.log({f"worker{worker}": float(step)}, step)
    flushed = any(tracker.flush(25) for _ in range(5))  # the others' turns take long where the machine is busy
    tracker.end()
    sys.exit(0 if flushed else 1)


def test_four_processes_log_at_once_to_a_fresh_store(tmp_path: Path) -> None:
    with Tracker.start(recipe_in(tmp_path), "x", log_dir=tmp_path) as tracker:
        context = multiprocessing.get_context("forkserver")
        workers = [context.Process(target=_attach_and_log, args=(tracker.handle, n)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=300)
        assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    client = client_of(tracker.handle)
    for n in range(4):
        assert len(client.get_metric_history(tracker.handle.run_id, f"worker{n}")) == 20
    assert len(lines_of(tracker.handle)) == 80


def _start_and_log(out: Path) -> bool:
    with Tracker.start(recipe_in(out), "x", log_dir=out / str(os.getpid())) as tracker:
        tracker.log({"a": 1.0}, 1)
    assert tracker.handle.run_id
    assert not tracker._warned
    return True


def test_two_runs_begin_at_once_in_a_fresh_folder(tmp_path: Path) -> None:
    other = multiprocessing.get_context("forkserver").Process(target=_start_and_log, args=(tmp_path,))
    other.start()
    assert _start_and_log(tmp_path)
    other.join(timeout=120)
    assert other.exitcode == 0
    client = client_of(RunHandle(f"sqlite:///{tmp_path}/mlflow.db", "", ""))
    experiment = client.get_experiment_by_name("wavemim")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_store_missing_on_a_workers_machine_is_not_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.attach(RunHandle(f"sqlite:///{tmp_path}/none.db", "1" * 32, str(tmp_path / "m.jsonl")))
    tracker.log({"a": 1.0}, 1)
    tracker.end()
    assert not (tmp_path / "none.db").exists()
    assert len(lines_of(tracker.handle)) == 1
    assert len([record for record in caplog.records if str(tmp_path) in record.getMessage()]) == 1


def test_a_deleted_experiment_is_named_in_the_warning(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_in(out, tracking__experiment="gone")
    with Tracker.start(recipe, "x", log_dir=out / "gone") as tracker:
        pass
    client = client_of(tracker.handle)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with Tracker.start(recipe, "x", log_dir=out / "gone") as tracker:
        tracker.log({"a": 1.0}, 1)
    assert tracker.handle.run_id == ""
    [record] = [record for record in caplog.records if str(out) in record.getMessage()]
    assert "refuses (experiment 'gone' was deleted; restore it" in record.getMessage()


@pytest.mark.timeout(60)
def test_a_server_dead_at_the_start_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_in(tmp_path, tracking__uri=f"http://me:secret@127.0.0.1:{free_port()}")
    begun = time.monotonic()
    with Tracker.start(recipe, "pretrain", log_dir=tmp_path / "logs") as tracker:
        for step in range(50):
            tracker.log({"train/loss": 1.0}, step)
        tracker.artifact(tmp_path)
        tracker.tag("a", "b")
        with Tracker.start(recipe, "trial", parent=tracker.handle, log_dir=tmp_path / "trial") as trial:
            trial.log({"train/loss": 1.0}, 0)
    end_trials(tracker.handle.uri, tracker.handle.run_id, {})
    assert time.monotonic() - begun < 20
    assert tracker.handle.run_id == trial.handle.run_id == ""
    assert len(lines_of(tracker.handle)) == 50
    assert len(lines_of(trial.handle)) == 1
    [record] = [record for record in caplog.records if str(tmp_path) in record.getMessage()]
    assert "does not answer (Connection refused)" in record.getMessage()
    assert tracker.handle.log_file in record.getMessage()
    assert "secret" not in record.getMessage()


@pytest.mark.timeout(60)
def test_a_call_that_hangs_is_given_up(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender, "CALL_LIMIT", 0.5)
    with Tracker.start(recipe_in(out), "x", log_dir=out / "hang") as tracker, monkeypatch.context() as patch:
        patch.setattr(tracker._sender._client, "log_batch", lambda *_, **__: time.sleep(30))
        begun = time.monotonic()
        for step in range(20):
            tracker.log({"a": float(step)}, step)
        assert time.monotonic() - begun < 0.2
        assert not tracker.flush(5)
    [record] = [record for record in caplog.records if str(out) in record.getMessage()]
    assert "no answer in" in record.getMessage()
    # What was logged in the meantime is sent at the end.
    assert client_of(tracker.handle).get_run(tracker.handle.run_id).data.metrics == {"a": 19.0}
    assert len([record for record in caplog.records if str(out) in record.getMessage()]) == 1


def test_uris_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def uri(value: str | None) -> str:
        return store_uri(recipe_in(Path("o"), tracking__uri=value))

    assert uri(None) == f"sqlite:///{tmp_path}/o/mlflow.db"
    assert uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert uri("sqlite:///b.db?timeout=9") == f"sqlite:///{tmp_path}/b.db?timeout=9"
    assert uri("sqlite:////x/b.db") == "sqlite:////x/b.db"
    assert uri("file:runs") == f"file:{tmp_path}/runs"
    assert uri("file:///x/runs") == "file:///x/runs"
    assert uri("./runs") == f"{tmp_path}/runs"
    assert uri("http://h:5000") == "http://h:5000"
    assert uri("postgresql://u:p@h/db") == "postgresql://u:p@h/db"
    assert uri("databricks") == "databricks"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///env.db")
    assert uri(None) == f"sqlite:///{tmp_path}/env.db"
    assert uri("http://h:5000") == "http://h:5000"


def test_ui_command_names_the_store(tmp_path: Path) -> None:
    end = "--host 127.0.0.1 --port 5000 --workers 1"
    assert ui_command(recipe_in(tmp_path)) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db {end}"
    spaced = ui_command(recipe_in(tmp_path / "a b"))
    assert spaced == f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/a b/mlflow.db' {end}"
    assert "secret" not in ui_command(recipe_in(tmp_path, tracking__uri="postgresql://u:secret@h/db"))
