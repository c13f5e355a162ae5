"""What becomes of trials that fail, in the ledger and on a real Ray."""

import math
import os
from pathlib import Path

import mlflow
import pytest
import ray.tune
import tiny_shards
from stage_calls import run_stage

from pipeline.config.load import load
from pipeline.errors import StageError
from pipeline.runtime.ray_session import SessionInfo
from pipeline.stages import tune
from pipeline.stages.tune_engine import CURVE, FAILED, _Planned, ended_of, run_plan
from pipeline.stages.tune_schedulers import RUNG, RungScheduler
from pipeline.stages.tune_trial import TrialTask, run_trial
from pipeline.sweeps.ledger import Ledger
from pipeline.sweeps.plan import Budget, Plan
from pipeline.tracking.tracker import Tracker, store_uri

OBJECTIVE = "eval/linear_top1_heldout"
REPORT = {
    OBJECTIVE: 31.5,
    "eval/rankme": 12.0,
    "train/loss_level2": 0.5,
    "train/lr": 1e-3,
    "cost/flops": 5e9,
    "images": 900,
    "mlflow_run": "abc",
    CURVE: [(900, 31.5)],
    "time_total_s": 3.0,  # of Ray
}


def test_a_finished_trial_keeps_what_the_report_and_the_table_need():
    ended = ended_of(7, REPORT, OBJECTIVE, error=False)
    assert (ended.number, ended.state, ended.objective, ended.reason) == (7, "finished", 31.5, "")
    assert ended.metrics == {"eval/rankme": 12.0, "train/loss_level2": 0.5, "images": 900, "mlflow_run": "abc"}
    assert ended.cost == {"cost/flops": 5e9} and ended.curve == ((900, 31.5),)
    on = {"objective_images": 2000, "curve_images": 1000}
    assert on.items() <= ended_of(7, {**REPORT, **on}, OBJECTIVE, error=False).metrics.items()
    at_rung = {OBJECTIVE: 9.0, RUNG: 1, "curve_images": 1000}
    stopped = ended_of(7, at_rung, OBJECTIVE, error=False, stopped="behind", curve=[(5, 9.0)])
    assert (stopped.objective, stopped.metrics["objective_images"]) == (9.0, 1000)  # a point of its curve
    lost = ended_of(7, at_rung, OBJECTIVE, error=True)
    assert lost.state == "failed" and "objective_images" not in lost.metrics


def test_a_trial_that_says_why_it_failed_has_failed_for_this_reason():
    ended = ended_of(7, {FAILED: "out of memory"}, OBJECTIVE, error=False)
    assert (ended.state, ended.objective, ended.reason) == ("failed", None, "out of memory")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_an_objective_that_is_no_finite_number_is_a_failure(value):
    report = {name: number for name, number in {**REPORT, OBJECTIVE: value}.items() if number is not None}
    ended = ended_of(7, report, OBJECTIVE, error=False)
    assert (ended.state, ended.objective, ended.reason) == ("failed", None, f"{OBJECTIVE} is not a finite number")
    assert ended.metrics["mlflow_run"] == "abc"


def test_a_trial_whose_settings_are_refused_has_a_run_with_the_reason_and_its_values(tmp_path, mlflow_uri, monkeypatch):
    """Would catch: a refusal before there is a run, a reason that is not on it, a run that ends as FINISHED."""
    shards = tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    recipe = load("small", [f"out={tmp_path}", f"tracking.uri={mlflow_uri}", "tracking.system_metrics=false"])
    reported = []
    monkeypatch.setattr(ray.tune, "report", reported.append)
    with Tracker.start(recipe, "tune", log_dir=tmp_path / "sweep") as parent:
        task = TrialTask(
            settings=recipe.dump(), shards=shards.folder.url, parent=parent.handle, objective=OBJECTIVE,
            logs=str(tmp_path / "trials"), searched=["mask.ratio"], use_gpu=False, gpu_share=1, rungs=1, rung_images=0, end_images=10,
        )  # fmt: skip
        run_trial({"number": 4, "role": "search", "point": {"mask.ratio": 7.0}, "seed": 0}, task)
    reason = "mask.ratio=7.0: input should be less than 1"
    assert reported[0][FAILED].startswith(reason)
    client = mlflow.MlflowClient(mlflow_uri)
    (run,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()],
        f"tags.`mlflow.parentRunId` = '{parent.handle.run_id}'",
    )
    assert run.info.status == "FAILED" and run.data.tags["wavemim.reason"].startswith(reason)
    assert run.data.params == {"mask.ratio": "7.0"} and run.info.run_name == "#04 mask=7"


class Counted:
    """Points without meaning."""

    def draw(self, number):
        return {"mask.ratio": number / 100}, {"number": number}

    def restore(self, number, drawn):
        pass

    def tell(self, number, ended):
        pass


def disturbed():
    """A trial, made here since Ray's processes cannot import this file."""

    def trial(config, folder):
        """Trial 1 finds a disk that never answers, 2 loses its process once, 3 has a wrong setting, 4 nothing."""
        number = config["number"]
        attempt = len(list(Path(folder).glob(f"{number}-*")))
        (Path(folder) / f"{number}-{attempt}").touch()
        if number == 1:
            raise OSError(5, "disk is gone")
        if number == 2 and attempt == 0:
            os._exit(1)
        ray.tune.report(
            {FAILED: "width=7 is not possible", "x": math.nan} if number == 3 else {"x": 1.0, CURVE: [(1, 1.0)]}
        )

    return trial


def test_trials_begin_on_nodes_that_join_and_not_where_nodes_were_lost(tmp_path, monkeypatch):
    """Would catch: room that is read once, or not from Ray; a limit that is not kept; one that is set and not obeyed."""
    there, clock = {"CPU": 1.0}, [0.0]
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    session = SessionInfo(cpus=1, gpus=0, nodes=2, address="10.0.0.1:6379", private=False)
    room = tune._concurrent(load("small"), session, False)
    plan = Plan(Ledger(tmp_path / "l"), Counted(), Budget(trials=9, recipe_seeds=0, finalists=0), own={}, seed=0)
    planned = _Planned(plan, RungScheduler(plan, "x", None, lambda number: None), "x", room, lambda ended: None)

    def begun(names):
        return [name for name in names if planned.suggest(name) is not None]

    assert begun("abc") == ["a"]
    there["CPU"], clock[0] = 3.0, 60.0
    assert begun("bcd") == ["b", "c"]
    there["CPU"], clock[0] = 2.0, 120.0
    planned.on_trial_complete("a", {"x": 1.0})
    assert begun("d") == []
    planned.on_trial_complete("b", {"x": 1.0})
    assert begun("de") == ["d"]
    assert tune._concurrent(load("small", ["tune.concurrent=7"]), session, False)() == 7


@pytest.mark.ray
def test_what_a_repetition_may_mend_is_repeated_and_a_wrong_setting_is_not(ray_local, tmp_path, caplog):
    """Would catch: a lost process that fails the trial, a failure that is repeated, a reason that is lost."""
    plan = Plan(Ledger(tmp_path / "l"), Counted(), Budget(trials=4, recipe_seeds=0, finalists=0), own={}, seed=0)
    (tmp_path / "seen").mkdir()
    ended = []
    run_plan(
        plan,
        ray.tune.with_parameters(disturbed(), folder=str(tmp_path / "seen")),
        scheduler=RungScheduler(plan, "x", None, lambda number: None),
        objective="x",
        resources={"cpu": 1},
        concurrent=lambda: 2,
        retries=2,
        folder=str(tmp_path),
        on_end=ended.append,
    )
    trials = {trial.number: trial for trial in plan.ledger.trials()}
    assert {number: trial.state for number, trial in trials.items()} == {
        1: "failed", 2: "finished", 3: "failed", 4: "finished",
    }  # fmt: skip
    assert (
        trials[1].reason == "[Errno 5] disk is gone, in every attempt" and trials[3].reason == "width=7 is not possible"
    )
    attempts = [sum(path.name.startswith(f"{n}-") for path in (tmp_path / "seen").iterdir()) for n in (1, 2, 3, 4)]
    assert attempts == [3, 2, 1, 1] and len(ended) == 4
    assert "trial #02 is begun again: its process or node was lost" in caplog.text
    assert "Traceback" not in caplog.text  # Ray Tune's own, one for each attempt


@pytest.mark.ray
def test_trials_that_diverge_are_rows_and_runs_with_their_reason_and_three_of_them_end_the_sweep(ray_local, tmp_path):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24), classes=None)
    (tmp_path / "space.yaml").write_text("question: Q?\nspace: {train.lr: {grid: [1.0e+25, 2.0e+25, 3.0e+25, 1.0e-3]}}")
    settings = [
        *("encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"),
        *("target.taps={3: 1, 4: 2}", "train.batch=10", "train.warmup_epochs=0", "train.max_skipped=1"),
        *(
            "tune.recipe_seeds=1",
            "tune.epochs=3",
            "tune.trials=4",
            "tune.concurrent=1",
            "tracking.system_metrics=false",
        ),
        *(f"out={tmp_path}", f"tune.space={tmp_path}/space.yaml"),
    ]
    recipe = load("small", settings)
    for _ in range(2):  # a second call tries those three again, and no more
        with pytest.raises(StageError, match=r"3 trials in a row failed for the same reason: .* is not finite"):
            run_stage(tune, recipe, ray_local)
        trials = Ledger(recipe.stage_dir("tune") / "trials.jsonl").trials()
        assert [trial.state for trial in trials] == ["finished", "failed", "failed", "failed"]
        client = mlflow.MlflowClient(store_uri(recipe))
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        parents = [run for run in runs if run.data.tags["wavemim.stage"] == "tune"]
        children = {run.info.run_name[:3]: run for run in runs if "mlflow.parentRunId" in run.data.tags}
        assert [run.info.status for run in parents] == ["FAILED"] and len(runs) == 5
        assert {name: run.info.status for name, run in children.items()} == {
            "#01": "FINISHED", "#02": "FAILED", "#03": "FAILED", "#04": "FAILED",
        }  # fmt: skip
        for trial in trials[1:]:
            assert children[f"#{trial.number:02d}"].data.tags["wavemim.reason"] == trial.reason
