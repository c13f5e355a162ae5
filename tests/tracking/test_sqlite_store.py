"""A SQLite store beside the results: removed and made anew within one process, damaged, locked."""

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.config.recipe import Recipe
from pipeline.tracking import errors
from pipeline.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def _no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def log_once(out: Path) -> Tracker:
    recipe = Recipe.model_validate({"name": "mini", "out": str(out), "tracking": {"system_metrics": False}})
    with Tracker.start(recipe, "prepare", log_dir=out / "prepare") as tracker:
        tracker.log({"a": 1.0}, 1)
    return tracker


def test_a_folder_that_is_removed_and_begun_again_in_one_process_is_tracked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a notebook. Would catch: connections that go on with the removed file."""
    for _ in range(2):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        tracker = log_once(out)
        with closing(sqlite3.connect(out / "mlflow.db")) as store:  # what is in the file, not what a connection says
            assert store.execute("SELECT run_uuid, status FROM runs").fetchall() == [
                (tracker.handle.run_id, "FINISHED")
            ]
            assert store.execute("SELECT value FROM metrics WHERE key = 'a'").fetchall() == [(1.0,)]
    assert not caplog.records


@pytest.mark.timeout(120)
def test_a_damaged_store_costs_one_warning_and_no_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch: the minutes that a server gets which answers, but slowly."""
    log_once(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        store.execute("DROP TABLE metrics")
    begun = time.monotonic()
    tracker = log_once(tmp_path)
    assert time.monotonic() - begun < 20
    [record] = caplog.records
    assert "refuses (no such table: metrics)" in record.getMessage()
    assert Path(tracker.handle.log_file).read_text().count('"a"') == 2  # both calls


def test_a_lock_of_another_process_passes_and_all_else_does_not(tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "store.db")) as one,
        closing(sqlite3.connect(tmp_path / "store.db", timeout=0)) as other,
    ):
        one.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError) as locked:
            other.execute("CREATE TABLE runs (a)")
        one.rollback()
        with pytest.raises(sqlite3.OperationalError) as missing:
            other.execute("SELECT * FROM runs")
    assert not errors.broken_file(locked.value) and errors.broken_file(missing.value)
    assert errors.reason(missing.value) == "no such table: runs"
