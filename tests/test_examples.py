"""The scripts in examples/, run as a user runs them, on generated images."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from loss_equality.cases import TWO_LEVELS
from PIL import Image
from tiny_shards import SIDE, photos, write_set

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["encoder.width=32", "encoder.depth=2", "encoder.heads=2", "target.taps={3: 1, 4: 2}", "train.batch=8"]
TINY += ["decoder.width=16", "decoder.heads=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A shard set of 36 images, two of them the same."""
    images = photos(36)
    images[1] = images[0]
    return write_set(tmp_path_factory.mktemp("examples") / "shards", images, rows_per_group=8)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """What pretrain_from_python.py wrote, and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    return out / "checkpoint", printed_by(
        "pretrain_from_python", "--shards", shards.url, "--steps", 5, "--out", out, "--recipe", TWO_LEVELS, *TINY
    )


def printed_by(name, *arguments):
    """Run an example as ``python examples/NAME.py ARGUMENTS``; returns what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [f"examples/{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def losses_in(text):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]


def test_pretraining_prints_falling_losses_and_leaves_a_checkpoint(trained):
    folder, text = trained
    losses = losses_in(text)
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert "40 images   loss" in text and "features of 8 images: (8, 32)" in text
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_features_of_images_finds_the_twin(trained, tmp_path):
    folder, _ = trained
    for number, image in enumerate(photos(4, 2 * SIDE, seed=5)):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{number}.png")
    Image.open(tmp_path / "2.png").resize((90, 90)).save(tmp_path / "small.png")
    paths = sorted(tmp_path.glob("*.png"))
    text = printed_by("features_of_images", folder, *paths, "--out", tmp_path / "features.npz")
    assert re.search(r"^small.png +2.png ", text, re.MULTILINE) and re.search(r"^2.png +small.png ", text, re.MULTILINE)
    saved = np.load(tmp_path / "features.npz")
    assert saved["features"].shape == (5, 32) and saved["features"].dtype == np.float32
    assert saved["names"].tolist() == [str(path) for path in paths]


def test_duckdb_counts_what_the_manifest_says(shards):
    text = printed_by("shards_with_duckdb", shards.url)
    counts = {name: (int(train), int(val)) for name, train, val in re.findall(r"│ ([abc]) +│ +(\d+) │ +(\d+) │", text)}
    assert set(counts) == {"a", "b", "c"}
    assert [sum(split) for split in zip(*counts.values(), strict=True)] == [shards.rows["train"], shards.rows["val"]]
    assert "0.jpg, 1.jpg" in text  # stored twice
    assert re.search(r"empty file +│ +1 │ bad.jpg", text)
    assert all(f"level{level}" in text for level in range(1, shards.levels + 1))


def test_a_target_of_ones_own_is_trained(shards):
    arguments = ["--shards", shards.url, "--steps", 6, *TINY, "train.batch=4", "train.lr=0.3"]
    text = printed_by("own_target", *arguments)
    losses = losses_in(text)
    assert len(losses) == 6 and sum(losses[3:]) < sum(losses[:3])
    assert re.search(r"level 3 \d.*level 4 \d", text)
    other = printed_by("own_target", *arguments, "target.options.distance=4")
    assert losses_in(other) != losses


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES.glob("*.py")])
def test_mistakes_end_in_one_line(name, tmp_path):
    arguments = {"features_of_images": [tmp_path / "run", "photo.jpg"], "shards_with_duckdb": [tmp_path / "shards"]}
    with pytest.raises(SystemExit) as ended:
        printed_by(name, *arguments.get(name, ["--shards", tmp_path / "shards"]))
    assert str(ended.value).startswith("error: ") and str(tmp_path) in str(ended.value) and "\n" not in str(ended.value)


def test_every_example_says_what_it_shows_and_how_it_is_called():
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == ["features_of_images.py", "own_target.py", "pretrain_from_python.py", "shards_with_duckdb.py"]
    for name in names:
        assert f"python examples/{name}" in (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
