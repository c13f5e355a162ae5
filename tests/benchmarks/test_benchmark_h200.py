"""The benchmark for one GPU, on tiny networks and a CPU: every part runs and is kept; no timing is asserted."""

import json
import sys
from pathlib import Path

import tiny_shards

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import h200 as benchmark
import step
import step_contenders

from pipeline.config.load import load
from pipeline.shards.layout import Layout

TINY = ["data.image_size=64", "encoder.image_size=64", "encoder.width=24", "encoder.heads=2"]
TINY += ["decoder.width=16", "decoder.depth=1", "decoder.heads=2"]


def test_every_part_is_measured_and_kept(tmp_path, capsys, monkeypatch):
    """Would catch: a part that does not fit the code any more, that is lost, or that ends the others."""
    layout = Layout(tiny_shards.SIDE, 3, load("wamim_vit_base", TINY).steps_by_level())
    shards = tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24), layout)
    called = {"peak_memory": step_contenders.peak_memory}
    monkeypatch.setattr(step, "in_child", lambda name, **more: called[name.partition(":")[2]](**more))
    monkeypatch.setattr(benchmark, "SMALL", ("small_wavelet",))
    monkeypatch.setattr(benchmark, "small", lambda settings: benchmark.steps(settings)["no such"])
    file = tmp_path / "gpu.json"
    call = ["--json", str(file), "--shards", shards.folder.url, "--batch", "2", "--seconds", "0", "--set", *TINY]
    assert benchmark.main(call) == 0
    found = json.loads(file.read_text())
    assert set(found["left_out"]) == {"small"} and "KeyError" in found["left_out"]["small"]
    assert {"wamim_vs_mae_step", "mfu", "target_share_device"} <= set(found["step"])
    shares = [found["input"][f"{name}_share"] for name in ("copy", "inverse_transform", "views")]
    assert all(share > 0 for share in shares) and shares[1] < shares[2]
    # Whole rows as they are stored: a byte for each coefficient of three levels, two at the coarsest.
    assert found["input"]["bytes_per_image"] == 3 * (3 * (32**2 + 16**2 + 8**2) + 2 * 4 * 4**2)
    assert found["end_to_end"]["end_to_end_vs_synthetic"] > 0
    assert set(found["goals"]) == set(benchmark.GOALS)
    assert "end_to_end_vs_synthetic" in capsys.readouterr().out


def test_no_part_begins_too_late(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    assert benchmark.main(["--json", str(file), "--minutes", "-1"]) == 0
    assert set(json.loads(file.read_text())["left_out"]) == {"step", "input", "small"}


def test_small_recipes_are_measured():
    settings = step_contenders.Settings(batch=2, repeats=1, seconds=0.0)
    assert benchmark.small(settings, ("small32_wavelet",))["small32_wavelet"] > 0
