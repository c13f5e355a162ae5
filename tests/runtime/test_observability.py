"""What a stage publishes on a cluster: gauges, the file of `wavemim status`, and the dashboard that shows them."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.runtime import observability
from pipeline.runtime.progress import following
from pipeline.tools.status import line

ROOT = Path(__file__).parents[2]


class Gauge:
    """Ray's, as far as it is used; it refuses tags that it was not made for, as Ray's does."""

    set_to = None

    def __init__(self, name, description="", tag_keys=()):
        assert description == observability.METRICS[name]
        self.name, self.keys = name, set(tag_keys)

    def set(self, value, tags):
        assert set(tags) == self.keys
        Gauge.set_to[(self.name, *tags.values())] = value


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The file, and the gauges by name and tags, while something is published."""
    monkeypatch.setattr(Gauge, "set_to", {})
    monkeypatch.setattr(observability, "PAUSE", 0.0)
    file = tmp_path / "logs" / observability.file_of("01000000")
    file.parent.mkdir()
    with observability.publishing(file, Gauge):
        yield file, Gauge.set_to
    assert not list(file.parent.iterdir())  # nothing is left of a stage that has ended
    assert not observability.active()


def test_rate_and_time_left_follow_from_what_was_done(published, monkeypatch):
    file, gauges = published
    clock = iter([10.0, 20.0, 30.0])
    monkeypatch.setattr(observability.time, "monotonic", lambda: next(clock))
    observability.publish("mine", "prepare", 100, 1100, "images")  # an earlier call has made a tenth
    observability.publish("mine", "prepare", 300, 1100, "images", {"wavemim_rejected_images": 4.0})
    assert gauges[("wavemim_images_per_second", "mine", "prepare")] == 20
    assert gauges[("wavemim_seconds_left", "mine", "prepare")] == 40
    assert gauges[("wavemim_progress", "mine", "prepare")] == pytest.approx(300 / 1100)
    content = json.loads(file.read_text())
    assert (content["run"], content["stage"], content["done"], content["unit"]) == ("mine", "prepare", 300, "images")
    assert content["numbers"]["wavemim_rejected_images"] == 4
    observability.publish("mine", "evaluate", 1, 4, "tasks")  # the next stage begins anew
    assert ("wavemim_seconds_left", "mine", "evaluate") not in gauges


def test_trials_are_published_by_state(published):
    _, gauges = published
    observability.publish("mine", "tune", 3, 8, "trials", {"wavemim_trials.failed": 1.0, "wavemim_trials.running": 2.0})
    assert gauges[("wavemim_trials", "mine", "tune", "failed")] == 1
    assert gauges[("wavemim_trials", "mine", "tune", "running")] == 2


def test_little_is_published_but_always_the_end(published, monkeypatch):
    file, _ = published
    monkeypatch.setattr(observability, "PAUSE", 60.0)
    for done in (0, 1, 2):
        observability.publish("mine", "tune", done, 3, "trials")
    assert json.loads(file.read_text())["done"] == 0
    observability.publish("mine", "tune", 3, 3, "trials")
    assert json.loads(file.read_text())["done"] == 3


def test_training_publishes_what_it_logs_also_without_progress_lines(published, tmp_path, capsys):
    _, gauges = published
    metrics = tmp_path / "metrics.jsonl"
    (tmp_path / "images-000000000100").mkdir()
    with following(metrics, total=1000, name="pretrain", run="mine", enabled=False):
        values = {"train/loss": 0.5, "perf/images_per_second": 80.0, "perf/data_wait_share": 0.25}
        metrics.write_text(json.dumps({"step": 200, "metrics": values}) + "\n")
        until = time.monotonic() + 20
        while ("wavemim_loss", "mine", "pretrain") not in gauges and time.monotonic() < until:
            time.sleep(0.05)
    shown = {name: value for (name, *_), value in gauges.items()}
    assert shown["wavemim_loss"] == 0.5 and shown["wavemim_data_wait_share"] == 0.25
    assert shown["wavemim_images_per_second"] == 80 and shown["wavemim_seconds_left"] == pytest.approx(10, abs=5)
    assert shown["wavemim_progress"] == 0.2 and 0 <= shown["wavemim_checkpoint_age_seconds"] < 60
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, caplog):
    with observability.publishing(tmp_path / "missing" / "file.json", Gauge):
        for done in (0, 5):
            observability.publish("mine", "tune", done, 5, "trials")
    assert [record.getMessage()[:25] for record in caplog.records] == ["progress is not published"]


def test_a_private_ray_publishes_nothing(tmp_path):
    observability.publish("mine", "tune", 1, 5, "trials")
    assert not observability.active() and not list(tmp_path.iterdir())


def test_the_dashboard_queries_exactly_the_published_metrics():
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    panels = {}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            panels[panel["title"]] = re.findall(r"ray_(wavemim_\w+)", target["expr"])
            assert ("state" in target["expr"]) == ("wavemim_trials" in target["expr"])
    assert sorted(name for names in panels.values() for name in names) == sorted(observability.METRICS)
    [variable] = [entry for entry in dashboard["templating"]["list"] if entry["name"] == "run"]
    assert set(re.findall(r"ray_(wavemim_\w+)", json.dumps(variable))) <= set(observability.METRICS)


def test_the_line_of_a_running_stage_and_of_other_work():
    job = SimpleNamespace(
        submission_id="raysubmit_1", job_id="01000000", status="RUNNING", start_time=1_000_000, entrypoint="python x.py"
    )
    numbers = {
        "wavemim_progress": 0.25,
        "wavemim_images_per_second": 812.3,
        "wavemim_loss": 0.1234,
        "wavemim_seconds_left": 130,
    }
    about = {"run": "mine", "stage": "pretrain", "done": 2500, "total": 10000, "unit": "images", "time": 1100.0}
    assert line(job, {**about, "numbers": numbers}, 1110.0) == (
        "raysubmit_1  pretrain of mine, for 1 min 50 s: 2,500 of 10,000 images (25.0%), 812 images/s, loss 0.1234, 2 min left"
    )
    assert line(job, {**about, "numbers": numbers}, 1170.0).endswith("1 min left, no update for 1 min 10 s")
    assert line(job, None, 1060.0) == "raysubmit_1  running for 1 min  python x.py"
    job.entrypoint = "wavemim run tracking.uri=http://me:secret@mlflow:5000 out=/mnt/out"
    assert "secret" not in line(job, None, 1060.0) and line(job, None, 1060.0).endswith(":***@mlflow:5000 out=/mnt/out")
    job.submission_id = None  # a command on a machine of the cluster
    trials = {"wavemim_progress": 0.5, "wavemim_trials.running": 2.0, "wavemim_trials.failed": 0.0}
    shown = line(job, {**about, "unit": "trials", "stage": "tune", "done": 3, "total": 6, "numbers": trials}, 1100.0)
    assert shown == "driver 01000000  tune of mine, for 1 min 40 s: 3 of 6 trials (50.0%), 2 running"
