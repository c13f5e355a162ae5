"""Images → shard set: layouts, every input kept or rejected with a reason, and interruption anywhere."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_shards import smooth_texture

from pipeline.config import Recipe, SettingError, load
from pipeline.image_decoding import RejectedImage, read_image
from pipeline.image_folder import check_folder, plan_folder
from pipeline.shards import MANIFEST, Layout, ShardSet, verify
from pipeline.stage import StageError
from wavemim.wavelets import reconstruct

SIZE = 64


def recipe(images: Path, out: Path, *overrides: str) -> Recipe:
    return load("small", [f"images={images}", f"out={out}", "data.levels=4", f"data.image_size={SIZE}", *overrides])


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def photo(seed: int = 0, width: int = 96, height: int = 80) -> Image.Image:
    return smooth_texture(np.random.default_rng(seed), width, height)


def shard_rows(folder: Path) -> dict[str, dict[str, tuple]]:
    """split → path → everything stored of it."""
    found: dict[str, dict[str, tuple]] = {"train": {}, "val": {}}
    for file in sorted(folder.glob("*-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            found[file.name.partition("-")[0]][row["path"]] = tuple(row.values())
    return found


# Reading one image


def middle(image: Image.Image) -> np.ndarray:
    """The middle square resized by Pillow alone, (3, SIZE, SIZE)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1).astype(int)


def test_the_middle_square_is_read(tmp_path):
    for size in ((96, 80), (80, 96), (64, 64), (40, 200)):
        photo(1, *size).save(tmp_path / "a.png")
        # Cropping first or last differs in what the filter sees beyond the edge of the square.
        difference = np.abs(read_image(tmp_path / "a.png", SIZE) - middle(photo(1, *size)))
        assert difference[:, 4:-4, 4:-4].max() <= 1 and difference.mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = photo(2, 96, 80)
    wanted = read_image(_saved(upright, tmp_path / "upright.png"), SIZE)
    # The stored image is the upright one turned the other way: 6 and 8 undo each other, the rest undo themselves.
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # values of Image.Transpose
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    # Pillow rounds between its two passes, whose order is another one for a turned image.
    assert np.abs(read_image(tmp_path / "turned.png", SIZE).astype(int) - wanted).max() <= 2


def _saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_every_mode_becomes_rgb(tmp_path):
    rgb = photo(3)
    grey = rgb.convert("L")
    wanted = middle(rgb)
    assert np.abs(read_image(_saved(rgb.convert("CMYK"), tmp_path / "cmyk.jpg", quality=95), SIZE) - wanted).mean() < 6
    for name in ("grey.jpg", "grey.png"):
        found = read_image(_saved(grey, tmp_path / name), SIZE)
        assert (found[0] == found[1]).all() and np.abs(found - middle(grey.convert("RGB"))).mean() < 3
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.abs(read_image(_saved(deep, tmp_path / "deep.png"), SIZE) - middle(grey.convert("RGB"))).mean() < 1
    clear = rgb.copy()
    clear.putalpha(0)
    assert (read_image(_saved(clear, tmp_path / "clear.png"), SIZE) == 255).all()
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(read_image(_saved(palette, tmp_path / "palette.png"), SIZE) - wanted).mean() < 6
    hole = Image.new("P", (80, 80), 1)
    hole.putpalette([0, 0, 0, 10, 20, 30])
    assert (read_image(_saved(hole, tmp_path / "hole.gif", transparency=1), SIZE) == 255).all()
    frames = [Image.new("RGB", (70, 70), colour) for colour in ("red", "blue")]
    found = read_image(_saved(frames[0], tmp_path / "film.gif", save_all=True, append_images=frames[1:]), SIZE)
    assert found[:, 5, 5].tolist() == [255, 0, 0]
    assert (read_image(_saved(Image.new("RGB", (1, 1), (9, 8, 7)), tmp_path / "dot.png"), SIZE)[2] == 7).all()
    assert read_image(_saved(Image.new("1", (70, 70), 1), tmp_path / "bits.png"), SIZE).min() == 255


def test_a_very_long_image_is_no_more_memory(tmp_path):
    assert read_image(_saved(Image.new("L", (1, 60_000), 5), tmp_path / "long.png"), SIZE).max() == 5


def broken_inputs(folder: Path) -> dict[str, str]:
    """Inputs that cannot be stored: path → words that the reason has to contain."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.jpg").write_bytes(b"")
    whole = _saved(photo(4), folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "short.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image at all")
    (folder / "notes.txt").write_text("notes")
    (folder / "bare").write_text("no suffix")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    Image.fromarray(np.ones((70, 70), np.float32)).save(folder / "float.tif")
    png = bytearray(_saved(photo(5), folder / "crc.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (folder / "crc.png").write_bytes(png)
    return {
        "empty.jpg": "empty file",
        "short.jpg": "truncated",
        "text.png": "not an image that Pillow reads",
        "notes.txt": "not an image (suffix .txt)",
        "bare": "not an image (no suffix)",
        "dangling.jpg": "no such file",
        "float.tif": "floating-point",
        "crc.png": "",
    }


def test_reasons_are_in_words(tmp_path, monkeypatch):
    for name, words in broken_inputs(tmp_path).items():
        if name not in ("notes.txt", "bare"):
            with pytest.raises(RejectedImage) as caught:
                read_image(tmp_path / name, SIZE)
            assert words in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RejectedImage, match="too large"):
        read_image(_saved(photo(6, 40, 40), tmp_path / "bomb.png"), SIZE)
    # A wrong suffix does not matter, what is in the file does.
    assert read_image(_saved(photo(7, 20, 20), tmp_path / "a.jpg", format="PNG"), SIZE).shape == (3, SIZE, SIZE)


# Layouts


def test_a_flat_folder_is_unlabelled(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(30)), ".hidden.jpg", ".git/x.jpg")
    plan = plan_folder(tmp_path, val_share=0.1, seed=0)
    assert plan.classes is None and {split: len(inputs) for split, inputs in plan.splits.items()} == {
        "train": 27,
        "val": 3,
    }
    assert all(entry.label == -1 for inputs in plan.splits.values() for entry in inputs)


@pytest.mark.parametrize("inner", ["", "images/"])
def test_class_folders_are_labels_and_val_is_stratified(tmp_path, inner):
    touch(
        tmp_path, *(f"{name}/{inner}{i}.JPG" for name, count in (("a", 40), ("b", 20), ("c", 4)) for i in range(count))
    )
    plan = plan_folder(tmp_path, val_share=0.25, seed=0)
    assert plan.classes == ["a", "b", "c"]
    counts = {split: np.bincount([e.label for e in inputs]).tolist() for split, inputs in plan.splits.items()}
    assert counts == {"train": [30, 15, 3], "val": [10, 5, 1]}
    for inputs in plan.splits.values():
        assert [entry.row for entry in inputs] == list(range(len(inputs)))
        assert all(entry.path.startswith("abc"[entry.label]) for entry in inputs)
    assert len({entry.label for entry in plan.splits["train"][:8]}) > 1  # shards mix classes
    assert plan_folder(tmp_path, val_share=0.25, seed=0) == plan
    assert plan_folder(tmp_path, val_share=0.25, seed=1) != plan


def test_small_classes_still_fill_val_in_proportion(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "abcdefghij" for i in range(4)))
    plan = plan_folder(tmp_path, val_share=0.1, seed=0)
    assert len(plan.splits["val"]) == 4 and {entry.label for entry in plan.splits["train"]} == set(range(10))


def test_one_image_is_held_out_of_two(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    assert [len(inputs) for inputs in plan_folder(tmp_path, val_share=0.1, seed=0).splits.values()] == [1, 1]
    assert [len(inputs) for inputs in plan_folder(tmp_path, val_share=0, seed=0).splits.values()] == [2, 0]


def test_nested_trees_are_unlabelled(tmp_path):
    touch(tmp_path, "2021/05/a.jpg", "2022/06/b.jpg", "2022/c.jpg")
    plan = plan_folder(tmp_path, val_share=0.1, seed=0)
    assert plan.classes is None and plan.inputs == 3


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_given_splits_are_kept(tmp_path, val):
    touch(
        tmp_path,
        "train/a/1.jpg",
        "train/b/2.jpg",
        "train/b/list.csv",
        f"{val}/a/3.jpg",
        f"{val}/b/4.jpg",
        "words.txt",
        "more/5.jpg",
    )
    plan = plan_folder(tmp_path, val_share=0.5, seed=0)
    assert {e.path for e in plan.splits["val"]} == {f"{val}/a/3.jpg", f"{val}/b/4.jpg"}
    assert plan.classes == ["a", "b"] and plan.ignored == 2
    assert plan.rejects == [("train/b/list.csv", "not an image (suffix .csv)")]


def test_given_splits_without_classes(tmp_path):
    touch(tmp_path, "train/1.jpg", "train/2.jpg", "val/3.jpg")
    plan = plan_folder(tmp_path, val_share=0.5, seed=0)
    assert plan.classes is None and [len(inputs) for inputs in plan.splits.values()] == [2, 1]


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert plan_folder(tmp_path, val_share=0, seed=0).inputs == 2


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(SettingError, match=r"images=… is needed"):
        check_folder(None)
    (tmp_path / "photos").mkdir()
    with pytest.raises(SettingError, match=r"did you mean '.*/photos'"):
        check_folder(str(tmp_path / "photo" / "train"))
    with pytest.raises(SettingError, match="a file, not a folder"):
        check_folder(__file__)
    with pytest.raises(SettingError, match="no image in"):
        plan_folder(touch(tmp_path / "texts", "a.txt"), val_share=0.1, seed=0)
    with pytest.raises(SettingError, match=r"'val' has 1 classes that 'train' has not \(c\)"):
        plan_folder(
            touch(tmp_path / "two", "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"), val_share=0, seed=0
        )
    with pytest.raises(SettingError, match="'train' has a folder for each class and 'val' has not"):
        plan_folder(touch(tmp_path / "half", "train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"), val_share=0, seed=0)


# The stage


@pytest.mark.ray
def test_a_labelled_folder_becomes_a_shard_set(ray_local, photo_folder, tmp_path, capfd):
    from pipeline.prepare import prepare

    seen: list[dict] = []
    summary = prepare(recipe(photo_folder, tmp_path / "one"), progress=False, on_unit=seen.append)
    assert summary["state"] == "new" and summary["rows"] == {"train": 108, "val": 12} and summary["classes"] == 3
    assert summary["counts"] == {"inputs": 120, "kept": 120, "rejected": 0, "ignored": 0}
    assert [unit["done"] for unit in seen] == [1, 2, 3] and {unit["total"] for unit in seen} == {3}
    folder = tmp_path / "one" / "shards"
    shards = ShardSet.open(folder)
    verify(shards)
    assert shards.classes == ["bark", "moss", "sand"] and shards.fingerprint == summary["fingerprint"]
    rows = shard_rows(folder)
    assert sorted({*rows["train"], *rows["val"]}) == sorted(
        str(p.relative_to(photo_folder)) for p in photo_folder.glob("*/*")
    )
    for path, values in rows["val"].items():
        assert shards.classes[values[2]] == path.split("/")[0]
        stored = {
            n: np.frombuffer(v, shards.layout.dtype(n)).reshape(shards.layout.shape(n))
            for n, v in enumerate(values[3:], 1)
        }
        pixels = reconstruct({n: v.astype(float) * shards.steps[n] for n, v in stored.items()})
        assert np.abs(pixels - read_image(photo_folder / path, SIZE)).mean() < 2
    again = prepare(recipe(photo_folder, tmp_path / "one"), progress=False)
    assert again["state"] == "finished already" and again["fingerprint"] == summary["fingerprint"]
    prepare(recipe(photo_folder, tmp_path / "two"), progress=False)
    other = tmp_path / "two" / "shards"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert "Running 0" not in capfd.readouterr().err  # Ray Data's own bars


@pytest.mark.ray
def test_every_input_is_kept_or_rejected(ray_local, photo_folder, tmp_path):
    from pipeline.prepare import prepare

    images = tmp_path / "images"
    reasons = broken_inputs(images)
    good = sorted(photo_folder.glob("*/*"))[:16]
    for number, path in enumerate(good):
        (images / f"good{number}.jpg").symlink_to(path)
    summary = prepare(recipe(images, tmp_path / "out"), progress=False)
    folder = tmp_path / "out" / "shards"
    rejected = {row["path"]: row["reason"] for row in pq.read_table(folder / "rejected.parquet").to_pylist()}
    assert rejected.keys() == reasons.keys()
    assert all(words in rejected[name] for name, words in reasons.items())
    rows = shard_rows(folder)
    kept = {*rows["train"], *rows["val"]}
    assert kept == {f"good{i}.jpg" for i in range(16)} and sum(summary["rejects"].values()) == len(reasons)
    assert summary["counts"] == {"inputs": 16 + len(reasons), "kept": 16, "rejected": len(reasons), "ignored": 0}


@pytest.mark.ray
def test_too_many_rejects_end_the_stage_and_can_be_allowed(ray_local, photo_folder, tmp_path):
    from pipeline.prepare import prepare

    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(photo_folder.glob("*/*"))[:8]):
        (images / f"good{number}.jpg").symlink_to(path)
    for number in range(11):
        (images / f"bad{number}.jpg").write_bytes(b"")
    with pytest.raises(StageError, match=r"11 of 19 inputs are rejected.*max_rejected=0\.01.*bad0\.jpg: empty file"):
        prepare(recipe(images, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out" / "shards" / MANIFEST).exists()
    summary = prepare(recipe(images, tmp_path / "out", "data.max_rejected=0.9"), progress=False)
    assert summary["state"] == "continued" and summary["units"]["reused"] == summary["units"]["total"]
    for path in images.glob("good*"):
        path.unlink()
    with pytest.raises(StageError, match=r"no image of .* could be stored"):
        prepare(recipe(images, tmp_path / "none", "data.max_rejected=1"), progress=False)


def test_a_unit_whose_worker_is_lost_again_and_again_is_given_up(photo_folder, tmp_path):
    from pipeline.prepare import MAX_TRIES, make_shard, make_units

    plan = plan_folder(photo_folder, val_share=0.1, seed=0)
    [unit] = [unit for unit in make_units(plan, 1024) if unit.split == "val"]
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "val-00000.tries").write_bytes(b"." * MAX_TRIES)
    layout = Layout(SIZE, 3, {1: 1})
    result = make_shard({"unit": json.dumps(asdict(unit))}, str(photo_folder), str(tmp_path), layout, 8)
    assert "val-00000: its worker was lost 4 times" in result["error"]


KILLED = """
import os, sys, time
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
import ray
from pipeline.config import load
from pipeline.prepare import prepare
ray.init(num_cpus=1, object_store_memory=int(100e6), include_dashboard=False, log_to_driver=False)
prepare(load("small", sys.argv[1:]), progress=False, on_unit=lambda unit: (print(unit["done"], flush=True), time.sleep(60)))
"""


@pytest.mark.ray
def test_a_killed_call_is_continued_with_the_same_rows(ray_local, photo_folder, tmp_path):
    from pipeline.prepare import prepare

    settings = recipe(photo_folder, tmp_path / "killed", "data.rows_per_shard=12")
    folder = settings.shards_dir
    arguments = [f"images={photo_folder}", f"out={tmp_path / 'killed'}", "data.levels=4", f"data.image_size={SIZE}"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments, "data.rows_per_shard=12"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == b"1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    time.sleep(0.5)
    assert not (folder / MANIFEST).exists()
    # What a kill in the middle of writing leaves: half a file, and a report whose shard is not the one it names.
    (folder / ".train-00001.parquet.0.tmp").write_bytes(b"half")
    reports = sorted((folder / "units").glob("*.json"))
    broken = folder / json.loads(reports[0].read_text())["file"]["name"]
    broken.write_bytes(broken.read_bytes()[:100])
    summary = prepare(settings, progress=False)
    assert summary["state"] == "continued" and summary["units"]["total"] == 10
    assert summary["units"]["reused"] == len(reports) - 1
    whole = recipe(photo_folder, tmp_path / "whole", "data.rows_per_shard=12")
    assert prepare(whole, progress=False)["fingerprint"] == summary["fingerprint"]
    assert shard_rows(folder) == shard_rows(whole.shards_dir)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.shards_dir.iterdir())
