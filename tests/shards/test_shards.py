"""The shard format: what is stored is the transform, exactly as far as the step allows; what is damaged is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import pywt
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import LAYOUT, LEVELS, SIDE, photos, write_set

from pipeline.errors import SettingError
from pipeline.shards.errors import ShardError
from pipeline.shards.layout import Layout, PyramidEncoder
from pipeline.shards.row_groups import read_group
from pipeline.shards.shard_set import FAST, MANIFEST, SMALL, ShardSet, manifest_fingerprint
from pipeline.shards.statistics import Moments
from pipeline.shards.verify import verify
from pipeline.storage.folder import Folder
from wavemim.wavelets import bands_of, reconstruct, window


def extremes() -> np.ndarray:
    """Images with the largest coefficients there are, and noise."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    patterns = [np.zeros((SIDE, SIDE)), np.full((SIDE, SIDE), 1)]
    for scale in range(LEVELS):
        patterns += [(rows >> scale) & 1, (columns >> scale) & 1, ((rows >> scale) ^ (columns >> scale)) & 1]
        patterns += [1 - patterns[-1], 1 - patterns[-2], 1 - patterns[-3]]
    grey = np.stack(patterns).astype(np.uint8) * 255
    noise = np.random.default_rng(1).integers(0, 256, (8, 3, SIDE, SIDE), np.uint8)
    return np.concatenate([np.repeat(grey[:, None], 3, 1), noise])


def reference(images: np.ndarray, levels: int = LEVELS, wavelet: str = "haar") -> dict[int, np.ndarray]:
    """PyWavelets' coefficients, (n, C, K, h, w) a level."""
    approximation, *details = pywt.wavedec2(images.astype(np.float64), wavelet, "periodization", levels, axes=(-2, -1))
    pyramid = {levels - i: np.stack(bands, 2) for i, bands in enumerate(details)}
    pyramid[levels] = np.concatenate([approximation[:, :, None], pyramid[levels]], 2)
    return pyramid


@pytest.mark.parametrize(
    "steps",
    [
        (4, 2, 1, 1),
        (65536, 65536, 8192, 8192),
        (8192, 16384, 4096, 2),
        (2, 2, 2, 2),
        (1, 1, 1, 1),
        (0.75, 1.5, 3, 0.3),
        (8, 16, 32, 0.0625),
    ],
)
@pytest.mark.parametrize("images", [photos(6), extremes()], ids=["photos", "extremes"])
def test_stored_integers_are_pywavelets_coefficients_within_half_a_step(steps, images):
    layout = Layout(SIDE, 3, dict(enumerate(steps, 1)))
    assert_within_half_a_step(layout, images)


@pytest.mark.parametrize("wavelet", ["db1", "db4", "sym5", "coif2", "bior2.2", "bior4.4", "rbio3.1", "dmey"])
@pytest.mark.parametrize("images", [photos(2), extremes()], ids=["photos", "extremes"])
def test_so_are_those_of_other_wavelets(wavelet, images):
    assert_within_half_a_step(Layout(SIDE, 3, {1: 2, 2: 1, 3: 1, 4: 0.5}, wavelet), images)


@given(
    st.integers(1, 4),
    st.lists(st.floats(0.01, 50) | st.sampled_from([0.25, 1.0, 2.0, 4.0, 8.0]), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["haar", "db2", "bior2.2"]),
)
def test_the_error_is_at_most_half_a_step_whatever_the_image(channels, steps, seed, wavelet):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (1, channels, 16, 16), np.uint8)
    image[generator.random(image.shape) < 0.5] = generator.choice([0, 255])
    assert_within_half_a_step(Layout(16, channels, dict(enumerate(steps, 1)), wavelet), image)


def assert_within_half_a_step(layout: Layout, images: np.ndarray) -> None:
    stored, wanted = PyramidEncoder(layout).encode(images), reference(images, layout.levels, layout.wavelet)
    # Haar is exact; other wavelets are computed in float32.
    rounding = 1e-9 if layout.windows else 1e-5 * 255 * 2**layout.levels
    for level in range(1, layout.levels + 1):
        assert stored[level].shape == (len(images), *layout.shape(level))
        assert stored[level].dtype == layout.dtype(level)
        error = np.abs(stored[level] * layout.steps[level] - wanted[level]).max()
        assert error <= layout.steps[level] / 2 + rounding


@pytest.mark.parametrize(("size", "at_once"), [(32, 8), (224, 8), (448, 3)])
def test_images_that_are_encoded_together_are_so_as_they_would_be_alone(size, at_once):
    """Of 32 px all levels together, of larger ones all but the finest; a group, and three images of the next."""
    layout = Layout(size, 3, {1: 4, 2: 4, 3: 8, 4: 8, 5: 0.3})
    images = np.random.default_rng(0).integers(0, 256, (at_once + 3, 3, size, size), np.uint8)
    encoder = PyramidEncoder(layout)
    assert encoder.together == at_once
    together = encoder.encode(images)
    for number in range(len(images)):
        alone = PyramidEncoder(layout).encode(images[number : number + 1])
        for level, values in alone.items():
            np.testing.assert_array_equal(together[level][number], values[0])
    assert_within_half_a_step(layout, images)


def test_a_mirrored_image_is_the_mirrored_row():
    images = np.concatenate([photos(4), extremes()])
    stored, mirrored = PyramidEncoder(LAYOUT).encode(images), PyramidEncoder(LAYOUT).encode(images[..., ::-1])
    for level in stored:
        np.testing.assert_array_equal(window(stored[level], level, 0, 0, SIDE, flip=True), mirrored[level])


def test_steps_of_two_to_the_minus_level_lose_nothing():
    layout = Layout(SIDE, 3, {level: 2.0**-level for level in range(1, LEVELS + 1)})
    images = np.concatenate([photos(3), extremes()])
    stored = PyramidEncoder(layout).encode(images)
    pyramid = {level: values * layout.steps[level] for level, values in stored.items()}
    np.testing.assert_array_equal(reconstruct(pyramid), images)


def test_the_smallest_dtype_that_holds_the_level_is_chosen():
    names = [Layout(256, 3, dict.fromkeys(range(1, 6), step)).dtype(1).name for step in (4, 2, 1.9, 1, 0.5)]
    assert names == ["int8", "int8", "int16", "int16", "int16"]
    assert Layout(256, 3, {level: 2.0**-level for level in range(1, 9)}).dtype(8).name == "int32"


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior4.4"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_statistics_are_those_of_pywavelets_at_every_level(tmp_path, wavelet, channels):
    """Of the stored coefficients for Haar, so exact where nothing is lost; of the images for other wavelets."""
    images = np.concatenate([photos(9), photos(9, seed=1)], 1)[:, :channels]
    steps = {level: 2.0**-level for level in range(1, LEVELS + 1)}
    shards = write_set(tmp_path, images, Layout(SIDE, channels, steps, wavelet))
    images, close = images[:6], 1e-9 if wavelet == "haar" else 1e-4  # those of train
    for level in range(1, LEVELS + 1):
        wanted = reference(images, level, wavelet)[level]
        for index, band in enumerate("AHVD"):
            found = shards.statistics[level][band]
            np.testing.assert_allclose(found["mean"], wanted[:, :, index].mean((0, 2, 3)), rtol=close, atol=1e-4)
            np.testing.assert_allclose(found["std"], wanted[:, :, index].std((0, 2, 3)), rtol=close)
    np.testing.assert_allclose(shards.pixel_mean, images.mean((0, 2, 3)))
    np.testing.assert_allclose(shards.pixel_std, images.std((0, 2, 3)))


@pytest.mark.parametrize("images", [photos(6), extremes()], ids=["photos", "extremes"])
def test_sums_are_exact_and_merge_in_any_order(images):
    stored = PyramidEncoder(LAYOUT).encode(images)
    parts = [Moments(LAYOUT), Moments(LAYOUT)]
    for i in range(0, len(images), 5):
        parts[i % 2].add_stored({level: values[i : i + 5] for level, values in stored.items()})
    merged = Moments(LAYOUT)
    for part in reversed(parts):
        merged.merge(json.loads(json.dumps(part.state())))
    state = merged.state()
    assert state["images"] == len(images)
    for level, values in stored.items():
        wide = values.astype(object)
        assert state["sums"][str(level)] == wide.sum((0, 3, 4)).tolist()
        assert state["squares"][str(level)] == (wide**2).sum((0, 3, 4)).tolist()


def test_what_is_written_is_read(tmp_path):
    images = photos(11)
    shards = write_set(tmp_path, images)
    assert (shards.image_size, shards.levels, shards.rows) == (SIDE, LEVELS, {"train": 8, "val": 3})
    wanted = PyramidEncoder(LAYOUT).encode(images)
    [(file, rows)] = shards.files("train")
    assert rows == 8
    row, label, pyramid = read_group(shards, file, 1, [2, 4])
    assert row.tolist() == [13, 15, 17, 19] and label.tolist() == [1, 2, 0, 1]
    assert sorted(pyramid) == [2, 4]
    for level, values in pyramid.items():
        np.testing.assert_array_equal(values, wanted[level][4:8])
    # Slices of tables begin in the middle of Arrow's memory.
    table = pq.read_table(tmp_path / file)
    for level, values in LAYOUT.decode(table.slice(3, 4)).items():
        np.testing.assert_array_equal(values, wanted[level][3:7])
    assert table.column("path").to_pylist()[:2] == ["0.jpg", "1.jpg"]
    assert list(verify(shards)) == [("train-00000.parquet", None), ("val-00000.parquet", None)]
    digests = [xxhash.xxh3_128_digest(np.ascontiguousarray(image)) for image in images[:8]]
    assert table.column("pixels").to_pylist() == digests
    assert {bands_of(level, LEVELS) for level in wanted} == {"HVD", "AHVD"}


def test_compression_changes_the_files_only(tmp_path):
    """The codecs are read from the files: fast compresses no level, and both give the same rows."""
    small, fast = (write_set(tmp_path / name, photos(11), compression=name) for name in (SMALL, FAST))
    assert fast.manifest["compression"] == FAST and "compression" not in small.manifest
    assert small.manifest["statistics"] == fast.manifest["statistics"]
    codecs = {}
    for shards in (small, fast):
        group = pq.ParquetFile(tmp_path / Path(shards.url).name / "train-00000.parquet").metadata.row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
        codecs[shards.url] = {one.path_in_schema: one.compression for one in columns if "level" in one.path_in_schema}
        assert list(verify(shards)) == [("train-00000.parquet", None), ("val-00000.parquet", None)]
    assert set(codecs[fast.url].values()) == {"UNCOMPRESSED"}
    assert codecs[small.url] == {"level1": "ZSTD", **{f"level{level}": "LZ4" for level in range(2, LEVELS + 1)}}
    for name in ("train-00000.parquet", "val-00000.parquet"):
        assert pq.read_table(tmp_path / SMALL / name).equals(pq.read_table(tmp_path / FAST / name))


def test_a_row_decodes_to_the_image_in_plain_parquet_and_numpy(tmp_path):
    """The format's promise to other readers: manifest, pyarrow, numpy, PyWavelets, nothing of ours."""
    image = photos(3)
    write_set(tmp_path, image)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    values = pq.read_table(tmp_path / "train-00000.parquet").to_pylist()[0]
    levels = {}
    for level, entry in manifest["levels"].items():
        integers = np.frombuffer(values[f"level{level}"], entry["dtype"]).reshape(entry["shape"])
        levels[int(level)] = dict(zip(entry["bands"], np.moveaxis(integers * entry["step"], 1, 0), strict=True))
    details = [tuple(levels[level][band] for band in "HVD") for level in (4, 3, 2, 1)]
    pixels = pywt.waverec2([levels[4]["A"], *details], "haar", "periodization", axes=(-2, -1))
    assert np.abs(pixels - image[0]).mean() < 1.5


def test_another_version_is_refused_with_both_versions(tmp_path):
    write_set(tmp_path, photos(3))
    for version, advice in ((7, "update wavemim"), (1, "prepare the images again")):
        manifest = json.loads((tmp_path / MANIFEST).read_text()) | {"format": version}
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ShardError, match=rf"version {version}, .*versions 2 and 3; {advice}"):
            ShardSet.open(tmp_path)


def test_what_is_no_shard_set_is_said(tmp_path):
    with pytest.raises(ShardError, match=r"no manifest\.json: wavemim prepare"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(SettingError):  # exit code 2: a mistake in a path, as in images=
        ShardSet.open(tmp_path / "nowhere")
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ShardError, match="was interrupted"):
        ShardSet.open(tmp_path)
    for content in ("{", "[]", "{}", '{"format": "1"}'):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(ShardError, match="manifest"):
            ShardSet.open(tmp_path)
    hollow = {"format": 2}
    (tmp_path / MANIFEST).write_text(json.dumps(hollow | {"fingerprint": manifest_fingerprint(hollow)}))
    with pytest.raises(ShardError, match="not the manifest"):
        ShardSet.open(tmp_path)


def test_damage_is_found(tmp_path):
    shards = write_set(tmp_path, photos(12))
    file = tmp_path / "train-00000.parquet"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0x10
    file.write_bytes(damaged)
    found = dict(verify(ShardSet.open(tmp_path)))
    assert "SHA-256" in found["train-00000.parquet"] and found["val-00000.parquet"] is None
    with pytest.raises(ShardError, match=r"train-00000\.parquet is damaged .* wavemim verify"):
        _ = [read_group(shards, file.name, group, [1, 2, 3, 4]) for group in range(2)]
    file.write_bytes(whole[:-9])
    assert "bytes" in dict(verify(shards))["train-00000.parquet"]
    with pytest.raises(ShardError, match=rf"has {len(whole) - 9} bytes"):
        ShardSet.open(tmp_path)
    file.unlink()
    assert dict(verify(shards))["train-00000.parquet"] == "is missing"
    with pytest.raises(ShardError, match="is missing"):
        ShardSet.open(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text()) | {"classes": ["x"]}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="changed after it was written"):
        ShardSet.open(tmp_path)


def test_damage_after_the_first_reading_and_in_a_copy_is_found(tmp_path):
    """Checksums are compared once a process for a file as it is: not for one that was written since, nor for another."""
    shards = write_set(tmp_path / "one", photos(12))
    read_group(shards, "train-00000.parquet", 0, [1, 2, 3, 4])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for folder in ("two", "one"):
        file = tmp_path / folder / "train-00000.parquet"
        content = bytearray(file.read_bytes())
        content[60:400] = bytes(byte ^ 0x11 for byte in content[60:400])
        file.write_bytes(content)
        with pytest.raises(ShardError, match="is damaged"):
            read_group(ShardSet.open(tmp_path / folder), "train-00000.parquet", 0, [1, 2, 3, 4])


def test_a_set_is_named_after_its_folder_whatever_the_options_of_its_url(tmp_path):
    shards = write_set(tmp_path / "photos", photos(6))
    assert shards.about["name"] == "photos"
    away = replace(shards, folder=Folder.at("s3://bucket/pets/shards?endpoint_override=127.0.0.1:9000&scheme=http"))
    assert away.about["name"] == "pets"
