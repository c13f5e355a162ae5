"""pipeline/shards/FORMAT.md: its examples run as they stand, on real shard sets, and give back what was stored."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import pywt
from tiny_shards import photos, write_set

import pipeline
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import FAST, FORMAT_VERSION, MANIFEST

TEXT = (Path(pipeline.__file__).parent / "shards" / "FORMAT.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
FINGERPRINT, READ, DUCKDB = BLOCKS
SIDE = 32


def run(block: str, folder: Path) -> dict:
    """The names an example leaves; its placeholder stands for `folder`."""
    assert block.count("SHARDS") == 1
    found: dict = {}
    exec(compile(block.replace("SHARDS", str(folder)), "FORMAT.md", "exec"), found)
    return found


def pixel_bound(layout: Layout) -> float:
    """How far a pixel can be off: half a step a coefficient, through the inverse's largest row sums."""
    wavelet = pywt.Wavelet(layout.wavelet)
    low, high = (
        max(np.abs(taps[phase::2]).sum() for phase in (0, 1))
        for taps in map(np.array, (wavelet.rec_lo, wavelet.rec_hi))
    )
    bound = layout.steps[layout.levels] / 2
    for level in range(layout.levels, 0, -1):
        bound = low * low * bound + (2 * low * high + high * high) * layout.steps[level] / 2
    return bound


@pytest.mark.parametrize(
    ("wavelet", "channels", "steps"),
    [("haar", 3, (4, 2, 1)), ("haar", 1, (4, 4, 4)), ("bior2.2", 3, (4, 2, 1)), ("db3", 5, (1, 0.5, 0.5))],
)
def test_the_reading_example_gives_the_image_within_the_quantisation(tmp_path, wavelet, channels, steps):
    layout = Layout(SIDE, channels, dict(enumerate(steps, 1)), wavelet)
    images = np.concatenate([photos(6, SIDE), photos(6, SIDE, seed=1)], 1)[:, :channels]
    write_set(tmp_path, images, layout)
    found = run(READ, tmp_path)
    off = np.abs(found["pixels"] - images[0]).max()
    assert 0.01 < off <= pixel_bound(layout) + 1e-3
    assert np.abs(found["picture"].astype(int) - images[0]).max() <= off + 0.5
    assert found["image"]["path"] == "0.jpg"
    if wavelet == "haar":  # the text's formula
        formula = 1.5 * sum(step / 2**level for level, step in layout.steps.items())
        assert pixel_bound(layout) == pytest.approx(formula + 0.5 * steps[-1] / 2**layout.levels)


def test_the_reading_example_gives_the_very_image_of_a_lossless_set(tmp_path):
    images = photos(6, SIDE)
    write_set(tmp_path, images, Layout(SIDE, 3, {level: 2.0**-level for level in (1, 2, 3)}))
    np.testing.assert_array_equal(run(READ, tmp_path)["picture"], images[0])


def test_the_duckdb_example(tmp_path):
    pytest.importorskip("duckdb", reason="DuckDB is not installed")
    images = photos(9, SIDE)
    images[3], images[7] = images[1], images[0]
    write_set(tmp_path, images, Layout(SIDE, 3, {1: 4, 2: 2, 3: 1}))
    found = run(DUCKDB, tmp_path)
    assert found["per_label"] == [(split, label, n) for split, n in (("train", 2), ("val", 1)) for label in range(3)]
    assert found["duplicates"] == [(2, ["train: 0.jpg", "val: 7.jpg"]), (2, ["train: 1.jpg", "train: 3.jpg"])]
    assert [row[1:] for row in found["folders"]] == [(9, 1, "empty file")]


def test_the_fingerprint_example(tmp_path):
    write_set(tmp_path, photos(6, SIDE), Layout(SIDE, 3, {1: 4, 2: 2}), compression=FAST)
    run(FINGERPRINT, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"image_size": 16}))
    with pytest.raises(AssertionError):
        run(FINGERPRINT, tmp_path)


def test_every_field_column_and_version_is_described(tmp_path):
    shards = write_set(tmp_path, photos(6, SIDE), Layout(SIDE, 3, {1: 4, 2: 2}))
    assert TEXT.startswith(f"# The shard format, version {FORMAT_VERSION}\n")
    manifest = shards.manifest
    names = {*manifest, *manifest["levels"]["1"], *manifest["splits"]["train"], *manifest["counts"]}
    names |= {*manifest["splits"]["train"]["files"][0], *manifest["statistics"]["pixels"]}
    names |= {column for column in shards.layout.schema().names if not column.startswith("level")}
    described = set(re.findall(r"[a-z0-9_]+", " ".join(re.findall(r"`([^`\n]+)`", TEXT))))
    assert names <= described


def test_the_hash_of_the_pixels_is_what_the_text_says(tmp_path):
    import xxhash

    images = photos(6, SIDE)
    write_set(tmp_path, images, Layout(SIDE, 3, {1: 4, 2: 2}))
    digest = run(READ, tmp_path)["image"]["pixels"]
    assert digest == xxhash.xxh3_128(images[0].tobytes()).intdigest().to_bytes(16, "big")
