"""benchmarks/tracking_server.py notices what is lost, what is stored twice, and what is left running."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.load import load
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracker import Tracker


def test_values_are_read_back_and_faults_are_noticed(tmp_path: Path) -> None:
    import tracking_server

    recipe = load("small", [f"out={tmp_path / 'out'}"])
    with Tracker.start(recipe, "tune", log_dir=tmp_path / "sweep") as sweep:
        tracking_server.trial(recipe, sweep.handle, tmp_path, 7, 3, 0.1)
    uri, parent = sweep.handle.uri, sweep.handle.run_id

    def found() -> dict:
        return tracking_server.read_back(uri, parent, tmp_path)

    assert found() == {"runs": {"FINISHED": 1}, "lost": 0, "doubled": 0, "files": 1}
    log = tmp_path / "007" / "metrics.jsonl"
    line = json.loads(log.read_text().splitlines()[0])
    with log.open("a") as more:
        more.write(json.dumps({**line, "step": 10_000}) + "\n")  # logged, and never sent
    assert found()["lost"] == len(line["metrics"])
    client = connect(uri, create=False)
    experiment = client.get_run(parent).info.experiment_id
    again = client.create_run(experiment, tags={"mlflow.parentRunId": parent}, run_name="#007")
    client.log_metric(again.info.run_id, "train/loss", 1.0, step=1)
    assert found()["doubled"] == 1 and found()["runs"] == {"FINISHED": 1, "RUNNING": 1}
