"""The benchmarks of evidence and of growing images: small runs of each, which are cut, resumed and limited in time."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import photos, write_set

from pipeline.shards.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
TINY = {"encoder.width": 24, "encoder.depth": 8, "encoder.heads": 2, "decoder.width": 16, "decoder.heads": 2}
TINY |= {"train.batch": 32, "finetune.batch": 16, "finetune.lr": 1e-2}
BLOCKED = ("ray", "mlflow", "tifffile", "imagecodecs", "xxhash", "optuna", "click", "pynvml")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(name + " is not installed")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("shards") / "set", photos(96), rows_per_group=16).folder.url


@pytest.fixture
def in_process(benchmarks, monkeypatch):
    """Run what would run in new processes in this one; returns the names of the functions called."""
    called = []

    def call(function, child, **arguments):
        name = function.partition(":")[2]
        called.append(name)
        return json.loads(json.dumps(getattr(import_module("evidence_training"), name)(**arguments)))

    monkeypatch.setattr(import_module("evidence_journal"), "in_child", call)
    return called


def arguments_of(**settings):
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def call(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    import_module(name).main()


def training(shards, **changes):
    task = {"shards_at": shards, "recipe_name": "small_wavelet", "overrides": TINY, "seed": 0, "images_seen": 128}
    return {**task, "points": 2, "device": "cpu", **changes}


def test_evidence_trains_probes_fine_tunes_and_reports(shards, in_process, tmp_path, monkeypatch, capsys):
    out = tmp_path / "e.json"
    options = ["--shards", shards, "--images-seen", 128, "--seeds", 2, "--jobs", 1, "--json", out, "--finetune", 1]
    options += ["--compare", "claims", "--variants", "wavelet", "pixels", "--set", *arguments_of(**TINY)]
    call(monkeypatch, "evidence", *options)
    assert in_process.count("curve") == in_process.count("finetuned") == 4 and in_process.count("untrained") == 2
    kept = json.loads(out.read_text())
    results = kept["results"]["claims"]
    assert list(results) == ["wavelet", "pixels"]
    for curves in results.values():
        for points in curves:
            assert [point["images"] for point in points] == [0, 64, 128]
            assert all(0 <= point["low"] <= point["top1"] <= point["high"] <= 100 for point in points)
            assert points[0]["seconds"] == 0 < points[1]["seconds"] < points[2]["seconds"]
    assert results["wavelet"][0][0] == results["pixels"][0][0] != results["wavelet"][1][0]
    found = kept["differences"]["claims"]["pixels"]["images"]
    assert (found["seeds"], found["images"], found["at"]) == (2, 32, 128)
    means = {name: np.mean([points[-1]["top1"] for points in curves]) for name, curves in results.items()}
    assert found["points"] == pytest.approx(means["pixels"] - means["wavelet"])
    assert kept["goals"]["target_alone_difference_end"] == pytest.approx(-found["points"])
    tuned = kept["finetuned"]["claims"]["wavelet"]
    assert [point["n"] for point in tuned] == [32, 32]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out + "\n"
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.md", "e.png"}, "something is left over"


def test_progressive_runs_and_compares_with_the_fixed_size(shards, in_process, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.json"
    options = ["--shards", shards, "--images-seen", 128, "--points", 2, "--jobs", 1, "--json", out]
    call(monkeypatch, "progressive", *options, "--schedules", "32 px for a half", "--set", *arguments_of(**TINY))
    kept = json.loads(out.read_text())["results"]["schedules"]
    assert set(kept) == {"64 px", "32 px for a half"}
    assert kept["32 px for a half"][0][-1]["flops"] < kept["64 px"][0][-1]["flops"]
    assert kept["32 px for a half"][0][-1]["sizes"] == {"32": 64, "64": 64}
    assert "time to equal accuracy" in capsys.readouterr().out


def test_32_px_images_are_a_testbed_of_their_own(in_process, tmp_path, monkeypatch):
    images = photos(96, 32)
    small = write_set(tmp_path / "set", images, Layout(32, 3, {1: 4, 2: 2, 3: 1}), rows_per_group=16).folder.url
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "base: small_wavelet\ndata: {image_size: 32, levels: 3}\nencoder: {image_size: 32, patch_size: 4}\n"
        "target: {taps: {2: 6, 3: 8}}\n"
    )
    out = tmp_path / "p.json"
    options = ["--shards", small, "--images-seen", 64, "--points", 1, "--jobs", 1, "--json", out, "--recipe", recipe]
    call(monkeypatch, "progressive", *options, "--schedules", "32 px for a half", "--set", *arguments_of(**TINY))
    kept = json.loads(out.read_text())["results"]["schedules"]
    assert kept["64 px"][0][-1]["sizes"] == {"32": 64}
    assert kept["32 px for a half"][0][-1]["sizes"] == {"16": 32, "32": 32}


def test_schedules_are_compared_with_the_fixed_size(benchmarks):
    progressive = import_module("progressive")

    def curve(*top1, seconds):
        points = enumerate(zip(top1, seconds, strict=True))
        return [{"images": 100 * i, "seconds": float(s), "flops": 10.0 * i, "top1": value} for i, (value, s) in points]

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


def test_an_interrupted_run_goes_on_at_its_last_point(shards, benchmarks, tmp_path, monkeypatch):
    module = import_module("evidence_training")
    whole = module.curve(**training(shards))
    probed, original = [], module._probed

    def cut_at_the_second(*arguments):
        probed.append(arguments[-1].name)
        if len(probed) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_probed", cut_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            module.curve(**training(shards), work=str(tmp_path))
    assert probed == ["64", "128"] and {"64", "128"} <= {path.name for path in tmp_path.iterdir()}
    first = json.loads((tmp_path / module.POINTS).read_text())
    resumed = module.curve(**training(shards), work=str(tmp_path))
    assert resumed[0] == first, "the first point was computed again"
    for mine, theirs in zip(resumed, whole, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    assert resumed[1]["seconds"] > first["seconds"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["128"], "only the last checkpoint is kept"
    assert module.curve(**training(shards), work=str(tmp_path)) == resumed  # finished: nothing is trained


def test_probes_take_no_part_in_training(shards, benchmarks):
    """The end is the same with one probe and with four."""
    module = import_module("evidence_training")
    ends = [module.curve(**training(shards, points=points))[-1] for points in (1, 4)]
    assert ends[0]["correct"] == ends[1]["correct"] and ends[0]["flops"] == ends[1]["flops"]


def test_fine_tuning_classifies_val_as_its_own_count_says(shards, benchmarks, tmp_path, monkeypatch):
    module, loop = import_module("evidence_training"), import_module("pipeline.training.finetune_loop")
    module.curve(**training(shards, points=1), work=str(tmp_path))
    done, original = [], loop.finetune
    monkeypatch.setattr(loop, "finetune", lambda *a, **k: done.append(original(*a, **k)) or done[-1])
    point = module.finetuned(shards, str(tmp_path), TINY, seed=1, epochs=2, device="cpu")
    counts = done[0].counts
    assert module.correct_of(point).sum() == counts.diagonal().sum() and point["n"] == counts.sum() == 32
    assert done[0].position.epoch == 2
    again = module.finetuned(shards, str(tmp_path), TINY, seed=1, epochs=2, device="cpu")
    assert again == point
    smaller = {**TINY, "finetune.image_size": 32}
    point = module.finetuned(shards, str(tmp_path), smaller, seed=1, epochs=1, device="cpu")
    assert module.correct_of(point).sum() == done[-1].counts.diagonal().sum()


def test_pace_is_by_image_size_and_gives_the_seconds_of_a_curve(shards, benchmarks):
    module = import_module("evidence_training")
    overrides = {**TINY, "train.optimizer": "adamw", "train.progressive": {32: 0.5, 64: 0.5}}
    rates = module.pace(shards, "small_wavelet", overrides, steps=60, device="cpu")
    assert set(rates) == {"32", "64"} and rates["32"] > rates["64"] > 0
    points = [
        {"images": 0, "seconds": 9.0, "sizes": {}},
        {"images": 300, "seconds": 9.0, "sizes": {"32": 200, "64": 100}},
    ]
    assert [p["seconds"] for p in module.at_pace(points, {"32": 100.0, "64": 10.0})] == [0, 12]


def test_journal_runs_no_task_twice_and_survives_a_broken_line(benchmarks, tmp_path, monkeypatch):
    module, calls = import_module("evidence_journal"), []
    monkeypatch.setattr(
        module, "in_child", lambda function, *_, **arguments: calls.append(function) or {"n": len(calls)}
    )
    path = tmp_path / "a.unfinished.jsonl"
    journal = module.Journal(path)
    assert journal.result("curve", "a", 1, seed=0) == journal.result("curve", "b", 1, seed=0) == {"n": 1}
    assert journal.result("curve", "a", 1, seed=1) == {"n": 2}
    with path.open("a") as file:
        file.write('\n{"task": "cut')
    again = module.Journal(path)
    assert again.result("curve", "a", 1, seed=1) == {"n": 2} and len(calls) == 2
    again.forget("curve", seed=1)
    assert again.result("curve", "a", 1, seed=1) == {"n": 3}
    assert again.close() and not path.exists()


def test_what_fails_is_named_and_the_rest_goes_on(benchmarks, tmp_path, monkeypatch, capsys):
    module = import_module("evidence_journal")

    def fails(function, *_, **arguments):
        raise module.BenchmarkError("a tear")

    monkeypatch.setattr(module, "in_child", fails)
    journal = module.Journal(tmp_path / "a.unfinished.jsonl")
    assert journal.result("curve", "wavelet, seed 0", 1) is None
    assert not journal.close()
    assert "wavelet, seed 0: a tear" in capsys.readouterr().out


def test_what_does_not_fit_into_the_minutes_is_skipped(benchmarks, tmp_path, monkeypatch, capsys):
    """10 s for 100 images: of the 60 s, 45 are left after the first, less than 500 images take; 100 images fit."""
    module, now, limits = import_module("evidence_journal"), [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def child(function, how, **arguments):
        limits.append(how.time_limit)
        now[0] += 10
        return {}

    monkeypatch.setattr(module, "in_child", child)
    journal = module.Journal(tmp_path / "a.unfinished.jsonl", minutes=1, reserve=5)
    assert journal.result("curve", "first", 1, amount=100, seed=0) == {}
    assert journal.result("curve", "long", 1, amount=500, seed=1) is None
    assert journal.result("curve", "short", 1, amount=100, seed=2) == {}
    assert journal.result("pace", "speed", 1) == {}
    assert limits == [55, 45, 40], "the reserve is for pace alone"
    assert journal.missing == ["long"]
    assert "long: skipped: it takes about 50 s, 45 s are left" in capsys.readouterr().out


def test_children_say_what_they_print_at_once_and_are_ended_in_time(benchmarks, tmp_path, monkeypatch):
    measure = import_module("measure")
    (tmp_path / "own.py").write_text(
        "import time\ndef talk(): print('one', flush=True); time.sleep(0.5); print('two', flush=True); return 3\n"
        "def sleep(): time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = []
    assert measure.in_child("own:talk", measure.Child(say=lambda line: said.append((line, time.monotonic())))) == 3
    assert [line for line, _ in said] == ["one", "two"] and said[1][1] - said[0][1] > 0.3
    began = time.monotonic()
    with pytest.raises(measure.OutOfTime, match="2 s"):
        measure.in_child("own:sleep", measure.Child(time_limit=2))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.batch"], "--set train.batch: must be KEY=VALUE"),
        (["--set", "train.bach=3"], "bach"),
        (["--variants", "wavelets"], "--variants wavelets: unknown"),
        (["--screen", "--finals"], "not allowed with"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    shards, benchmarks, tmp_path, monkeypatch, capsys, options, message
):
    with pytest.raises(SystemExit) as raised:
        call(monkeypatch, "evidence", "--shards", shards, "--json", tmp_path / "out" / "a.json", *options)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_full_runs_a_vit_small_without_ray_and_mlflow(shards, tmp_path):
    """In processes of its own that cannot import what training does not need, on a CPU."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    settings = {"encoder.width": 24, "encoder.heads": 2, "decoder.width": 16, "decoder.heads": 2}
    settings |= {"train.compile": False, "train.batch": 32}
    out = tmp_path / "full.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "evidence.py"),
        "--full",
        "--shards",
        shards,
        "--json",
        str(out),
    ]
    command += ["--images-seen", "64", "--points", "1", "--seeds", "1", "--jobs", "1", "--variants", "wavelet"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--set", *arguments_of(**settings)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(out.read_text())
    assert kept["settings"]["minutes"] == "8.0"
    assert "wavelet, seed 0: " in done.stdout and kept["results"]["claims"]["wavelet"][0][-1]["images"] == 64
    blocked = subprocess.run([sys.executable, "-c", "import ray"], env=environment, capture_output=True, text=True)
    assert "ray is not installed" in blocked.stderr, "the blocker blocks nothing"
