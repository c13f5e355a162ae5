"""The benchmarks of evidence and of growing images: their numbers by hand, and a small run of each."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_shards import photos, write_set

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(name):
    return importlib.import_module(name)


def curve(*top1, seconds=None):
    """Points at 0, 100, 200, … images, of so many percent."""
    seconds = seconds or range(len(top1))
    return [
        {
            "images": 100 * i,
            "seconds": float(s),
            "flops": 10.0 * i,
            "top1": value,
            "low": value - 1,
            "high": value + 1,
            "n": 9,
        }
        for i, (value, s) in enumerate(zip(top1, seconds, strict=True))
    ]


def test_training_to_reach_is_where_the_mean_line_crosses():
    evidence = module("evidence")
    assert evidence.training_to_reach([curve(10, 20, 40)], 30) == 150
    assert evidence.training_to_reach([curve(10, 20, 40), curve(10, 40, 40)], 30) == 100
    assert evidence.training_to_reach([curve(10, 20, 40)], 10) == 0
    assert evidence.training_to_reach([curve(10, 20, 40)], 41) is None
    assert evidence.training_to_reach([curve(10, 20, 40, seconds=[0, 5, 7])], 30, "seconds") == 6


def test_needed_compares_with_the_better_of_the_pixel_targets():
    evidence = module("evidence")
    results = {
        "wavelet": [curve(10, 30, 50)],
        "pixels": [curve(10, 15, 20)],
        "pixels, last block alone": [curve(10, 20, 30)],
    }
    assert evidence.needed(results) == pytest.approx(100 / 200)
    results["wavelet"] = [curve(10, 12, 14)]
    assert evidence.needed(results) is None
    results["wavelet"] = [curve(10, 30, 20)]  # reached on the way
    assert evidence.needed(results) == pytest.approx(0.5)


def test_schedules_are_compared_with_the_fixed_size():
    progressive = module("progressive")
    results = {
        progressive.FIXED: [curve(10, 20, 30, seconds=[0, 10, 20])],
        "other": [curve(10, 30, 40, seconds=[0, 5, 10])],
        "worse": [curve(10, 11, 12, seconds=[0, 5, 10])],
    }
    found = progressive.compare(results)
    assert found["other"] == {
        "time_share": 0.5, "flop_share": 1.0, "gain_in_points": 10, "time_to_equal_accuracy": pytest.approx(0.25)
    }  # fmt: skip
    assert found["worse"]["time_to_equal_accuracy"] is None
    assert found[progressive.FIXED]["time_to_equal_accuracy"] == 1


def test_every_variant_is_a_recipe_that_differs_in_what_it_names():
    from pipeline.config.load import load, with_overrides

    for variants in module("evidence").COMPARISONS.values():
        recipes = [with_overrides(load(name), overrides).dump() for name, overrides in variants.values()]
        for recipe in recipes:
            recipe.pop("name")
        assert all(recipes.count(recipe) == 1 for recipe in recipes)
    for sizes in module("progressive").SCHEDULES.values():
        with_overrides(load("small_wavelet"), {"train.progressive": dict(sizes)})


def test_both_run_and_keep_their_numbers(tmp_path, monkeypatch, capsys):
    shards = write_set(tmp_path / "set", photos(96), rows_per_group=16).folder.url
    curve_of = module("evidence_training").curve
    monkeypatch.setattr(module("evidence"), "in_child", lambda function, threads, **arguments: curve_of(**arguments))
    common = ["--shards", shards, "--images-seen", "128", "--points", "2", "--seeds", "1", "--jobs", "1"]
    tiny = {
        "encoder.width": 24,
        "encoder.depth": 2,
        "encoder.heads": 2,
        "target.taps": {"3": 1, "4": 2},
        "train.batch": 32,
    }
    for name, extra in (("evidence", ["--compare", "targets"]), ("progressive", [])):
        benchmark = module(name)
        small = {"wavelet": ("small_wavelet", tiny), "pixels": ("small_pixels", tiny)}
        monkeypatch.setitem(module("evidence").COMPARISONS, "targets", small)
        if name == "progressive":
            monkeypatch.setattr(benchmark, "SCHEDULES", {benchmark.FIXED: {}, "grows": {32: 0.5, 64: 0.5}})
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [name, *common, *extra, "--json", str(out)])
        benchmark.main()
        kept = json.loads(out.read_text())
        (results,) = kept["results"].values()
        assert len(results) == 2
        for curves in results.values():
            assert [point["images"] for point in curves[0]] == [0, 64, 128]
            assert all(0 <= point["low"] <= point["top1"] <= point["high"] <= 100 for point in curves[0])
            assert curves[0][0]["seconds"] == 0 < curves[0][1]["seconds"] < curves[0][2]["seconds"]
        assert out.with_suffix(".png").stat().st_size > 10_000
        assert "untrained" in capsys.readouterr().out
        if name == "progressive":
            assert results["grows"][0][-1]["flops"] < results[benchmark.FIXED][0][-1]["flops"]
