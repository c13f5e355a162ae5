"""The benchmark of sweeps runs a real one; no timing is asserted."""

import sys
from pathlib import Path

import pytest
import tiny_shards

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sweep as benchmark

pytestmark = pytest.mark.ray


def test_a_real_sweep_is_timed(tmp_path, monkeypatch):
    """Would catch: a child that does not run the sweep, trials that are missed, numbers that are left out."""
    shards = tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    monkeypatch.setattr(benchmark, "IMAGES", 20)
    found = benchmark.overhead(shards.folder.url, 64, shards.rows["train"], trials=2, reuse=True)
    assert len(found["between"]) == 1 and found["start"] > 0
    assert len(found["probes"]) == 2 and all(0 < share < 1 for share in found["probes"])


def test_readers_count_what_the_disk_gave(tmp_path, monkeypatch):
    shards = tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    fetched = iter([1000, 1500, 1500])
    monkeypatch.setattr(benchmark, "in_child", lambda name, child, *, shards: {"fetched": next(fetched)})
    assert benchmark.shared_reading(Path(shards.folder.url), 2)["ratio"] == 3.0
    assert benchmark.read_epoch(shards.folder.url)["fetched"] >= 0
