"""The benchmark of scale runs the real planning, merging and reading code; no time is asserted."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scale as benchmark


def test_every_phase_runs_on_a_small_number(monkeypatch):
    """Would catch: a phase that does not fit the code any more, or numbers that are left out."""
    monkeypatch.setattr(benchmark, "in_child", lambda name, **values: getattr(benchmark, name[6:])(**values))
    monkeypatch.setattr(benchmark, "SETS", 3)
    found = {**benchmark.listing(5000), **benchmark.preparing(5000), **benchmark.reading(benchmark.SHARD * 64)}
    found |= benchmark.merging(5000)
    assert set(found) == {"tree", "plan", "resume", "merge", "open", "epoch", "merge_sets", "open_merged"}
    assert found["merge_sets"]["images"] == found["open_merged"]["images"] == 3 * 5 * benchmark.SHARD
    assert all(about["seconds"] > 0 and about[benchmark.MEMORY] >= 0 for about in found.values())
    assert found["tree"]["units"] == found["plan"]["units"] == 8 + 2  # small sets are cut finer
    assert found["plan"]["bytes"] > 5000 and found["merge"]["bytes"] > 6 * 64


def test_the_model_counts_what_all_gpus_need():
    rates = argparse.Namespace(
        images_per_second=1000.0,
        batch=100,
        parameters=100.0,
        image_bytes=1e5,
        network=64.0,
        storage=8.0,
        disk=1.2,
        checkpoint_minutes=10.0,
    )
    rows = {row["gpus"]: row for row in benchmark.model(rates)}
    assert rows[8]["storage_gb_per_s"] == 0.8 and rows[64]["storage_gb_per_s"] == 6.4
    assert abs(rows[8]["all_reduce_share"] - 2 * 7 / 8 * 0.4 / 8 / 0.1) < 1e-9  # 400 MB at 8 GB/s, in steps of 0.1 s
    assert rows[8]["checkpoint_seconds"] == 1.0
    assert rows[8]["first"] == "network" and rows[1024]["first"] == "storage"
