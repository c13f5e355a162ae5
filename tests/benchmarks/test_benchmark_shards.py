"""The shard benchmark on a handful of tiny images: every child answers, and what cannot run is said."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import photos

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import measure
import shards as benchmark
import shards_preparing
import shards_public
import shards_reading

ROWS, SIDE, WINDOW = 12, 64, 32


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pixels") / "photos.npy"
    np.save(path, photos(8, SIDE))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, pixels) -> tuple[str, dict]:
    out = str(tmp_path_factory.mktemp("set") / "shards")
    overrides = ["data.rows_per_group=4", "data.rows_per_shard=8"]
    return out, shards_reading.write_shards(pixels, out, ROWS, overrides)


def test_shard_sets(shards, pixels, tmp_path):
    folder, made = shards
    assert 0 < made["bytes_per_image"] < 4 * 3 * SIDE * SIDE
    fidelity = shards_reading.fidelity(folder, pixels)
    assert 40 < fidelity["psnr_db_lowest"] <= fidelity["psnr_db"] <= fidelity["psnr_db_mean_of_images"] + 0.1
    shards_reading.recode_shards(folder, str(tmp_path / "lz4"), {"level2": "lz4"})
    assert shards_reading.fidelity(str(tmp_path / "lz4"), pixels) == fidelity
    for options in ({}, {"finest": 2}, {"pixels": True}, {"pixels": True, "finest": 2}):
        assert shards_reading.read_rate(folder, 0, window=WINDOW, batch=4, **options) > 0


def test_photos(photo_folder):
    paths = benchmark.find_photos(photo_folder)[:6]
    plain = shards_reading.decode_plainly(Path(paths[0]).read_bytes(), paths[0], SIDE)
    assert plain.shape == (3, SIDE, SIDE) and plain.dtype == np.uint8
    assert shards_reading.pil_rate(paths, 0, WINDOW, batch=4, workers=0) > 0


@pytest.mark.parametrize("stored", shards_public.FORMATS)
def test_public_loaders(pixels, tmp_path, stored):
    for library in (*shards_public.PACKAGES, shards_public.REFERENCE):
        folder = str(tmp_path / library)
        try:
            made = shards_public.write(library, stored, pixels, folder, ROWS)
        except measure.Missing:
            continue
        assert made["bytes_per_image"] > 100 and made["version"]
        assert shards_public.read_rate(library, stored, folder, SIDE, WINDOW, 4, 0) > 0


def test_the_parts_of_a_task_add_up(photo_folder, tmp_path):
    """Fails where a part has another name in the code, or is counted twice: then the rest is negative."""
    parts = shards_preparing.task_parts(str(photo_folder), str(tmp_path), repeats=1)
    total = parts.pop("task")
    assert sum(parts.values()) == pytest.approx(total)
    measured = {name: ms for name, ms in parts.items() if name != "Parquet: compression"}  # too little to measure here
    assert len(measured) == 9 and min(measured.values()) > 0, parts
    assert not list(tmp_path.iterdir())


def test_interleaved_and_ratios():
    order = []

    def contender(name, value):
        def call():
            order.append(name)
            if value is None:
                raise measure.Missing("a thing")
            return float(value + len(order))

        return call

    rates = measure.interleaved(
        {"a": contender("a", 10), "b": contender("b", 1), "c": contender("c", None)}, 2, lambda text: None
    )
    assert order == ["a", "b", "c", "a", "b"] and rates.skipped == {"c": "a thing"}
    assert rates.ratio("a", ("b", "c")) == pytest.approx(12.5 / 4.5)
    assert rates.ratio("a", ("c",)) is None and rates.ratio("c", ("a",)) is None


def test_exponent():
    assert shards_preparing.exponent([(10, 3), (100, 30), (1000, 300)]) == pytest.approx(1)


def test_a_child_is_tied_to_its_core_and_answers():
    cores = measure.in_child("measure:usable_cores", measure.Child(cores=1))
    assert cores == measure.usable_cores()[-1:]
    with pytest.raises(measure.BenchmarkError, match="nothing_of_the_kind"):
        measure.in_child("measure:nothing_of_the_kind")


def test_command_line(tmp_path, photo_folder, monkeypatch, capsys):
    """A part that cannot be measured is named, and the others are written down."""
    (tmp_path / "empty").mkdir()
    file = tmp_path / "result.json"
    assert benchmark.main(["--images", str(tmp_path / "empty"), "--json", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not file.exists()

    def answer(function, *_, **arguments):
        if function.endswith("decode_photos"):
            return {"photos": 2, "bytes": 1000}
        if function.endswith("write_shards"):
            return {"bytes_per_image": 400, "written_per_second": 1}
        if function.endswith("fidelity"):
            return {"psnr_db": 44.0}
        raise measure.Missing("what is not there")

    monkeypatch.setattr(benchmark, "in_child", answer)
    names = ["bytes_vs_jpeg", "psnr_db", "plan_memory_gb"]
    assert benchmark.main(["--images", str(photo_folder), "--json", str(file), "--only", *names]) == 0
    result = json.loads(file.read_text())
    assert result["goals"] == {
        "bytes_vs_jpeg": "<= 0.9: reached",
        "psnr_db": ">= 45: missed",
        "plan_memory_gb": "<= 1.5: not measured",
    }
    assert result["left_out"] == {"plan_memory_gb": "needs what is not there"}
    assert "missed" in capsys.readouterr().out and not list(tmp_path.glob(".*.tmp"))


def test_a_child_is_given_arguments_named_as_options_of_a_measurement(tmp_path, monkeypatch):
    """Those of a reader were once taken for the child's: it could not be read, and a reader with two threads had one."""
    (tmp_path / "own.py").write_text("def given(**named):\n    return named\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    named = {"cores": 3, "threads": 2, "libraries": "x", "say": "y", "time_limit": 2.0, "function": "z", "child": 1}
    assert measure.in_child("own:given", measure.Child(cores=1), **named) == named
