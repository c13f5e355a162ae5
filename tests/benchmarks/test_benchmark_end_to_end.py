"""The benchmark of training from shards on a tiny network: what it names is there and sane; no timing is asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_shards import photos, write_set

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import end_to_end as benchmark
import end_to_end_shards
import end_to_end_training as training_runs

from pipeline.config.load import load
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from pipeline.training import setup as training

TINY = ["encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"]
TINY += ["target.taps={3: 1, 4: 2}", "train.batch=8"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on: 5 steps an epoch


def test_all_numbers(shards, tmp_path, capsys):
    file = tmp_path / "end.json"
    arguments = ["--json", str(file), "--shards", str(shards.folder.local), "--set", *TINY, "--workers", "1"]
    arguments += ["--device", "cpu", "--repeats", "2", "--seconds", "0", "--log-every", "2", "--warm", "2"]
    threads = torch.get_num_threads()
    assert benchmark.main(arguments) == 0
    assert torch.get_num_threads() == threads
    assert training.Reader is Reader
    result = json.loads(file.read_text())
    rates, repeats = result["images_per_second"], result["repeats"]
    assert set(rates) == set(repeats) == {"synthetic", "shards"}
    assert all(len(made) == 2 for made in repeats.values())
    assert result["numbers"]["end_to_end_vs_synthetic"] == pytest.approx(rates["shards"] / rates["synthetic"])
    assert 0 <= result["numbers"]["data_wait_share"] <= 1
    assert result["steps"] == 4
    assert result["batch"] == 8
    assert set(result["goals"]) == set(result["numbers"])
    assert {"commit", "date", "cpu", "torch"} <= set(result["machine"])
    said = capsys.readouterr().out
    assert "end_to_end_vs_synthetic" in said
    assert "from shards" in said


def job(shards, **changes):
    return training_runs.Job("small_wavelet", tuple(TINY), str(shards.folder.local), log_every=2, warm=2, **changes)


@pytest.mark.parametrize("kind", ["synthetic", "shards"])
def test_both_train_on_the_same_kind_of_batches(shards, monkeypatch, kind):
    """Same steps, same shapes and types; from shards every row, from memory the same few again."""
    seen = []
    call = training.TrainStep.__call__

    def watched(this, stored, rows, weight, total, **named):
        seen.append((tuple(rows.tolist()), {level: (v.shape, v.dtype) for level, v in stored.items()}, total))
        return call(this, stored, rows, weight, total, **named)

    monkeypatch.setattr(training.TrainStep, "__call__", watched)
    found = training_runs.train_once(job(shards), kind, 12)
    assert len(seen) == 12  # more than two epochs
    assert found["steps"] == 10
    batches = {rows for rows, _, _ in seen}
    assert len(batches) == (training_runs.KEPT if kind == "synthetic" else 12)
    assert all(total == 8 for _, _, total in seen)
    first = next(iter(Reader(ShardSet.open(shards.folder.local), "train", batch=8, window=64, flip=True).epoch(0)))
    assert all(form == {level: (v.shape, v.dtype) for level, v in first.levels.items()} for _, form, _ in seen)


def test_the_first_steps_do_not_count():
    measured = training_runs.Measured(
        [(0.0, 50.0, 8.0, 1.0), (100.0, 101.0, 8.0, 3.0), (104.0, 104.5, 6.0, 5.0)], 108.0, 10.0
    )
    found = measured.result(1)
    assert found["images_per_second"] == pytest.approx(14 / 8)
    assert found["wait"] == pytest.approx(1.5 / 8)
    assert found["cpu_seconds_per_image"] == pytest.approx(7 / 14)
    assert found["steps"] == 2


def test_rates_out_of_the_metrics_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged = [(80, 1.0, 0.9), (160, 40.0, 0.5), (320, 20.0, 0.25)]
    lines = [{"step": 7, "metrics": {"system/cpu": 1.0}}]
    for step, rate, wait in logged:
        metrics = {"train/loss": 1.0, "perf/images_per_second": rate, "perf/data_wait_share": wait}
        lines.append({"step": step, "metrics": metrics})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = training_runs.from_metrics(path, 1)
    assert found["seconds"] == pytest.approx(80 / 40 + 160 / 20)
    assert found["images_per_second"] == pytest.approx(240 / 10)
    assert found["wait"] == pytest.approx((1.0 + 2.0) / 10)


def test_a_set_is_made(photo_folder, tmp_path):
    overrides = [*TINY, "data.rows_per_group=8"]
    for name, images in (("folder", str(photo_folder)), ("made", None)):
        end_to_end_shards.make_shards("small_wavelet", overrides, str(tmp_path / name), 30, images)
        made = ShardSet.open(tmp_path / name)
        assert made.rows == {"train": 30, "val": 0}
        assert made.image_size == 64
        assert made.steps == load("small_wavelet", overrides).steps_by_level()
        rows = [row for batch in Reader(made, "train", batch=5, window=64, flip=False).epoch(0) for row in batch.rows]
        assert sorted(map(int, rows)) == list(range(30))


def test_a_wrong_warm_up_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--json", str(tmp_path / "x.json"), "--warm", "5", "--log-every", "10"])
    assert "--warm 5: not a multiple of --log-every 10" in capsys.readouterr().err
