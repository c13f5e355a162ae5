"""Nothing is lost or doubled in MLflow: a real server killed and restarted, a writer killed around each mark."""

import errno
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import free_port, mlflow_server

from pipeline import cli
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.storage import jsonl as metrics_file
from pipeline.storage.jsonl import JsonLines
from pipeline.tools.sync import sync
from pipeline.tracking import background as sending_thread
from pipeline.tracking import errors, journal
from pipeline.tracking import mlflow_client as mlflow_store
from pipeline.tracking import tracker as tracking
from pipeline.tracking.tracker import Tracker, ui_command


@pytest.fixture(autouse=True)
def _no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store that most tests share: a fresh one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_store.import_mlflow()
    mlflow_store.connect(f"sqlite:///{path}", create=True)
    return f"sqlite:///{path}"


def recipe_in(out: Path, uri: str) -> Recipe:
    return Recipe.model_validate({"name": "mini", "out": str(out), "tracking": {"uri": uri, "system_metrics": False}})


def dead_uri() -> str:
    return f"http://127.0.0.1:{free_port()}"


def client_of(uri: str):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(uri)


def run_of(folder: Path) -> str:
    return str(json.loads((folder / ".mlflow-sent.json").read_text())["run_id"])


Points = Counter[tuple[str, int, int, float]]


def in_file(folder: Path, start: int = 0) -> Points:
    """Name, step, time in ms, value of all that was logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[start:]]
    return Counter((k, x["step"], round(1000 * x["time"]), v) for x in lines for k, v in x["metrics"].items())


def in_store(uri: str, run_id: str) -> Points:
    client = client_of(uri)
    with pytest.MonkeyPatch.context() as patched:  # a busy machine may answer a test later than training would wait
        patched.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "90")
        names = client.get_run(run_id).data.metrics
        histories = [client.get_metric_history(run_id, name) for name in names]
    return Counter((m.key, m.step, m.timestamp, m.value) for history in histories for m in history)


def log_some(tracker: Tracker, start: int, stop: int) -> None:
    for step in range(start, stop):
        tracker.log({"train/loss": 1 / (1 + step), "train/lr": 0.1 * step}, step)


def warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about runs below `folder`: a tracker that another test has left behind may speak as well."""
    return [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()]


def said_by_sync(where: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    sync(where, say=lines.append, **options)
    return lines


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_server_is_killed_and_restarted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    recipe = recipe_in(tmp_path, url)
    folders = [tmp_path / "runs" / "mini" / stage for stage in ("ended", "going_on", "late")]
    (tmp_path / "picture.png").write_text("a picture")
    assert ui_command(recipe) == f"open {url}"
    with mlflow_server(tmp_path, port):
        ended, going_on = (Tracker.start(recipe, folder.name, log_dir=folder) for folder in folders[:2])
        for tracker in (ended, going_on):
            log_some(tracker, 0, 10)
            assert tracker.flush(20)
            assert in_store(url, tracker.handle.run_id) == in_file(folders[tracker is going_on])
    begun = time.monotonic()
    log_some(ended, 10, 1500)
    log_some(going_on, 10, 300)
    ended.artifact(tmp_path / "picture.png", "shown")
    ended.tag("wavemim.shards", "abc")
    ended.end()
    with Tracker.start(recipe, "late", log_dir=folders[2]) as late:  # nobody answers when it begins
        log_some(late, 0, 20)
        assert late.handle.run_id == ""
    assert time.monotonic() - begun < 30
    warnings = warned_of(tmp_path, caplog)
    assert all("does not answer" in line for line in warnings)
    assert len(warnings) in (2, 3)  # `going_on` may have had no reason to say so yet
    log_some(going_on, 300, 310)
    with mlflow_server(tmp_path, port):
        assert going_on.flush(20)
        assert in_store(url, going_on.handle.run_id) == in_file(folders[1])
        monkeypatch.setattr(sys, "argv", ["wavemim", "sync", str(tmp_path)])
        capfd.readouterr()
        cli.main()
        ids = [run_of(folder) for folder in folders]
        assert capfd.readouterr().out.splitlines() == [
            f"mini/ended: 2,980 values of 2 metrics, 1 file; run {ids[0]}",
            f"mini/going_on: nothing to send; run {ids[1]}",
            f"mini/late: 40 values of 2 metrics; run {ids[2]}",
        ]
        for _ in range(2):
            for folder, run_id in zip(folders, ids, strict=True):
                assert in_store(url, run_id) == in_file(folder)
            assert [line.partition(": ")[2] for line in said_by_sync(tmp_path)] == [
                f"nothing to send; run {i}" for i in ids
            ]
        client = client_of(url)
        infos = [client.get_run(run_id).info for run_id in ids]
        assert [info.status for info in infos] == ["FINISHED", "RUNNING", "FINISHED"]
        assert len(client.search_runs([infos[0].experiment_id])) == 3
        entries = [json.loads(line) for line in (folders[2] / ".mlflow-outbox.jsonl").read_text().splitlines()]
        assert (infos[2].start_time, infos[2].end_time) == (entries[0]["time"], entries[-1]["time"])
        assert client.get_run(ids[2]).data.params["train.lr"] == "0.00015"
        assert {f.path for f in client.list_artifacts(ids[0])} == {"recipe.yaml", "shown"}
        assert client.get_run(ids[0]).data.tags["wavemim.shards"] == "abc"
        going_on.end()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "INFO" not in captured.err


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_sync import log_some, mlflow_store, recipe_in, Tracker
out, uri, point = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def killing(call, before):
    def body(*args, **kwargs):
        if not before:
            call(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    return body

if point == "created":
    mlflow_store.find_or_create_run = killing(mlflow_store.find_or_create_run, False)
tracker = Tracker.start(recipe_in(out, uri), "pretrain", log_dir=out)
log_some(tracker, 0, 10)
assert tracker.flush(20)
mlflow_store.log_values = killing(mlflow_store.log_values, point == "before")
log_some(tracker, 10, 30)
tracker.flush(20)
"""


@pytest.mark.faults
@pytest.mark.timeout(480)
def test_a_writer_is_killed_before_and_after_sending_and_after_creating_its_run(tmp_path: Path, store: str) -> None:
    script = KILLED.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    points = ("before", "after", "created")
    writers = {
        point: subprocess.Popen([sys.executable, "-c", script, str(tmp_path / point), store, point]) for point in points
    }
    for writer in writers.values():
        assert writer.wait(timeout=200) == -signal.SIGKILL
    marked = {point: journal.SendOffset.of(tmp_path / point) for point in points}
    assert marked["created"].run_id == ""
    for point in ("before", "after"):
        assert 0 < marked[point].metrics < (tmp_path / point / "metrics.jsonl").stat().st_size
    # The mark is the same on both sides; what MLflow has is not.
    assert [in_store(store, marked[p].run_id).total() for p in ("before", "after")] == [20, 60]
    for point in points:
        folder = tmp_path / point
        if point != "created":
            left = "40 values of 2 metrics" if point == "before" else "nothing to send"
            assert said_by_sync(folder) == [f"{point}: {left}; run {marked[point].run_id}"]
            assert said_by_sync(folder) == [f"{point}: nothing to send; run {marked[point].run_id}"]
            assert in_store(store, marked[point].run_id) == in_file(folder)
        with Tracker.start(recipe_in(folder, store), "pretrain", log_dir=folder) as again:
            log_some(again, 30, 40)
        assert again.handle.run_id == (marked[point].run_id or again.handle.run_id) != ""
        assert in_store(store, again.handle.run_id) == in_file(folder)
        client = client_of(store)
        run = client.get_run(again.handle.run_id)
        assert run.info.status == "FINISHED"
        assert len(client.search_runs([run.info.experiment_id], f"tags.`wavemim.out` = '{folder}'")) == 1


def test_a_sweep_that_nobody_heard_of_is_sent_with_its_trials(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_in(tmp_path, dead_uri())
    folder = tmp_path / "runs" / "mini" / "tune"
    with Tracker.start(recipe, "tune", log_dir=folder) as sweep:
        for number in range(2):
            trial = Tracker.start(
                recipe, "trial", parent=sweep.handle, name=f"trial-{number}", log_dir=folder / "trials" / str(number)
            )
            log_some(trial, 0, 5)
            if number == 0:
                trial.end("FAILED")
    assert len(warned_of(tmp_path, caplog)) == 1
    with pytest.raises(StageError, match=r"^MLflow at http://127.0.0.1:\d+ does not answer \(Connection refused\); "):
        sync(tmp_path)
    lines = said_by_sync(tmp_path, uri=store)
    assert [line.partition(";")[0] for line in lines] == [
        "mini/tune: settings and state",
        "mini/tune/trials/0: 10 values of 2 metrics",
        "mini/tune/trials/1: 10 values of 2 metrics",
    ]
    assert all("nothing to send" in line for line in said_by_sync(tmp_path))  # and knows the store now
    client = client_of(store)
    children = [client.get_run(run_of(folder / "trials" / str(number))) for number in range(2)]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {run_of(folder)}
    assert [child.info.status for child in children] == ["FAILED", "KILLED"]
    assert [child.info.run_name for child in children] == ["trial-0", "trial-1"]


def test_runs_one_after_another_in_a_folder_keep_their_own_values(tmp_path: Path, store: str) -> None:
    dead = recipe_in(tmp_path, dead_uri())
    keys = []
    for start in (0, 10):
        with Tracker.start(dead, "prepare", log_dir=tmp_path) as tracker:
            log_some(tracker, start, start + 10)
    said_by_sync(tmp_path, uri=store)
    keys = [json.loads(line).get("key") for line in (tmp_path / ".mlflow-outbox.jsonl").read_text().splitlines()]
    client = client_of(store)
    experiment = client.get_experiment_by_name("wavemim").experiment_id
    for key, part in zip(dict.fromkeys(filter(None, keys)), (slice(0, 10), slice(10, 20)), strict=True):
        [run] = client.search_runs([experiment], f"tags.`{mlflow_store.KEY}` = '{key}'")
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(20))[part]
        assert run.info.status == "FINISHED"


def test_a_store_that_lost_the_run_gets_all_of_it(tmp_path: Path, store: str) -> None:
    with Tracker.start(recipe_in(tmp_path, store), "pretrain", log_dir=tmp_path / "p") as tracker:
        log_some(tracker, 0, 10)
        tracker.tag("a", "b")
    other = f"sqlite:///{tmp_path}/other.db"
    assert said_by_sync(tmp_path / "p", uri=other)[0].startswith("p: nothing to send")
    with Tracker.start(recipe_in(tmp_path, other), "pretrain", log_dir=tmp_path / "q") as second:
        log_some(second, 0, 3)
    client_of(other).delete_run(second.handle.run_id)
    JsonLines(tmp_path / "q" / "metrics.jsonl").append({"step": 4, "time": 1.0, "metrics": {"a": 1.0}})
    with pytest.raises(StageError, match=r"q: its run \w+ was deleted; the logs are kept"):
        sync(tmp_path / "q")
    # The other store is asked for a run it never had.
    JsonLines(tmp_path / "p" / "metrics.jsonl").append({"step": 10, "time": 1.0, "metrics": {"a": 1.0}})
    assert said_by_sync(tmp_path / "p", uri=other)[0].startswith("p: 21 values of 3 metrics")
    run = client_of(other).get_run(run_of(tmp_path / "p"))
    assert in_store(other, run.info.run_id) == in_file(tmp_path / "p")
    assert (run.info.status, run.data.tags["a"]) == ("FINISHED", "b")


def test_a_file_that_cannot_be_stored_now_waits(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_text("a")
    (tmp_path / "gone.png").write_text("a")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store, "log_file", full)
        with Tracker.start(recipe_in(tmp_path, store), "x", log_dir=tmp_path) as tracker:
            tracker.artifact(tmp_path / "a.png")
            tracker.artifact(tmp_path / "gone.png")
            log_some(tracker, 0, 5)
        with pytest.raises(StageError, match=r"does not accept 2 files \(No space left on device\)"):
            sync(tmp_path)
    (tmp_path / "gone.png").unlink()
    assert "a.png for now (No space left on device)" in caplog.text
    run = client_of(store).get_run(tracker.handle.run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 0.2)
    assert said_by_sync(tmp_path)[0].split(": ", 1)[1].startswith("1 file, 1 file no longer exist; run ")
    assert "nothing to send" in said_by_sync(tmp_path)[0]
    assert {f.path for f in client_of(store).list_artifacts(run.info.run_id)} == {"a.png", "recipe.yaml"}


def test_a_value_that_mlflow_refuses_takes_no_other_with_it(tmp_path: Path, store: str) -> None:
    with Tracker.start(recipe_in(tmp_path, store), "x", log_dir=tmp_path) as tracker:
        for step in range(20):
            tracker.log({"a": 1.0 * step, **({"b//../c": 1.0} if step == 7 else {})}, step)
    assert tracker._sender.tally.refused == 1
    assert [m.step for m in client_of(store).get_metric_history(tracker.handle.run_id, "a")] == list(range(20))


def test_a_full_disk_loses_nothing_while_the_process_lives(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.write
    with Tracker.start(recipe_in(tmp_path, store), "x", log_dir=tmp_path) as tracker:
        log_some(tracker, 0, 5)
        with monkeypatch.context() as patch:
            patch.setattr(metrics_file.os, "write", lambda file, data: real(file, data[:7]))
            log_some(tracker, 5, 10)
            assert in_file(tmp_path).total() == 10  # and no half line
            assert tracker.flush(20)
            assert in_store(store, tracker.handle.run_id).total() == 20
        log_some(tracker, 10, 11)
    assert in_file(tmp_path).total() == 22
    assert in_store(store, tracker.handle.run_id) == in_file(tmp_path)
    assert warned_of(tmp_path, caplog) == [
        f"metrics cannot be written to {tmp_path}/metrics.jsonl (No space left on device); the run continues"
    ]


def test_a_torn_line_does_not_join_the_next_one(tmp_path: Path) -> None:
    record = JsonLines(tmp_path / "m.jsonl")
    record.append({"a": 1})
    with record.path.open("a") as file:
        file.write('{"a": 2, "' + "x" * 9000)
    assert [entry for entry, _ in record.read()] == [{"a": 1}]
    record.append({"a": 3})
    assert record.path.read_text() == '{"a": 1}\n{"a": 3}\n'
    with record.path.open("a") as file:
        file.write("damaged\n")
    record.append({"a": 4})
    entries = list(record.read())
    assert [entry for entry, _ in entries] == [{"a": 1}, {"a": 3}, {}, {"a": 4}]
    assert [entry for entry, _ in record.read(entries[1][1])] == [{}, {"a": 4}]


class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(3)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.timeout(60)
def test_a_slow_server_holds_up_no_step_and_the_end_not_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_START_LIMIT", 0.5)
    monkeypatch.setattr(tracking, "_END_LIMIT", 1.0)
    slow = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    begun = time.monotonic()
    with Tracker.start(recipe_in(tmp_path, f"http://127.0.0.1:{slow.server_port}"), "x", log_dir=tmp_path) as tracker:
        times = []
        for step in range(500):
            before = time.perf_counter()
            log_some(tracker, step, step + 1)
            times.append(time.perf_counter() - before)
    assert time.monotonic() - begun < 8
    slow.shutdown()
    assert sorted(times)[490] < 0.02
    assert in_file(tmp_path).total() == 1000
    [warning] = warned_of(tmp_path, caplog)
    assert warning.endswith(f"wavemim sync {tmp_path} sends what is missing")


def test_a_server_that_is_away_is_asked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending_thread, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(sending_thread, "_LONGEST_PAUSE", 0.8)
    monkeypatch.setattr(sending_thread.random, "uniform", lambda low, high: 1.0)
    tries: list[float] = []

    def send(urgent: bool) -> bool:
        tries.append(time.monotonic())
        return False

    thread = sending_thread.SendingThread(send)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        thread.wake()
        time.sleep(0.001)
    waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert [round(wait, 1) for wait in waits] == [0.2, 0.4, 0.8, 0.8]
    assert not thread.flush(5)  # forced, and not for five seconds
    assert time.monotonic() < until + 1
    thread.close()


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker.start(recipe_in(tmp_path, dead_uri()), "x", log_dir=tmp_path / "x"):
        pass
    (tmp_path / "empty").mkdir()
    for arguments, code, words in (
        ([str(tmp_path / "none")], 2, "none is not a folder; give OUT"),
        ([str(tmp_path / "empty")], 2, "empty holds no logs of a stage"),
        ([str(tmp_path / "x"), "train.lr=1"], 2, "train.lr=1: sync takes no setting except tracking.uri=URI"),
        ([str(tmp_path / "x")], 1, "does not answer (Connection refused); unsent logs stay in"),
    ):
        monkeypatch.setattr(sys, "argv", ["wavemim", "sync", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert ended.value.code == code
        assert captured.out == ""
        assert captured.err.startswith("wavemim: ")
        assert captured.err.count("\n") == 1
        assert words in captured.err


def test_a_password_is_not_kept_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = dead_uri().replace("://", "://me:secret@")
    with Tracker.start(recipe_in(tmp_path, uri), "x", log_dir=tmp_path / "x") as tracker:
        log_some(tracker, 0, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    with pytest.raises(SettingError, match=r"or its password; give tracking\.uri="):
        sync(tmp_path / "x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(StageError, match=r"MLflow at http://me:\*\*\*@127.* does not answer"):
        sync(tmp_path / "x")


def test_a_place_for_files_that_fails_holds_up_no_metrics(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/mlflow")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_text", denied)
        with Tracker.start(recipe_in(tmp_path, store), "x", log_dir=tmp_path) as tracker:
            log_some(tracker, 0, 5)
        assert in_store(store, tracker.handle.run_id) == in_file(tmp_path)
        with pytest.raises(StageError, match=r"does not accept 1 file \(Permission denied\)"):
            sync(tmp_path)
    sync(tmp_path, say=lambda _: None)
    assert {f.path for f in client_of(store).list_artifacts(tracker.handle.run_id)} == {"recipe.yaml"}


def test_answers_are_told_from_none() -> None:
    import requests

    for none in (requests.ConnectionError("x"), requests.ReadTimeout("x"), ConnectionResetError(), TimeoutError()):
        assert errors.unreachable(none)
    for answer in (requests.exceptions.RetryError("500"), requests.HTTPError("507"), PermissionError("x")):
        assert not errors.unreachable(answer)


def test_values_that_are_refused_for_want_of_permission_are_sent_when_it_is_there(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def denied(*_: object) -> None:
        raise MlflowException("read only", PERMISSION_DENIED)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store, "log_values", denied)
        with Tracker.start(recipe_in(tmp_path, store), "x", log_dir=tmp_path) as tracker:
            log_some(tracker, 0, 5)
    assert in_store(store, tracker.handle.run_id).total() == 0
    sync(tmp_path, say=lambda _: None)
    assert in_store(store, tracker.handle.run_id) == in_file(tmp_path)
