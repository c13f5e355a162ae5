"""`wavemim verify` finds every kind of damage and names it; what `wavemim inspect` says is true."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pywt
from PIL import Image
from stage_calls import wavemim
from tiny_shards import photos, write_set

from pipeline import cli
from pipeline.errors import SettingError
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import FORMAT_VERSION, MANIFEST, REJECTED, manifest_fingerprint
from pipeline.shards.verify import check
from pipeline.shards.writer import file_entry, write_rejected
from pipeline.tools.inspect_shards import describe, inspect, show, write_picture
from wavemim.figures.plots import nested

SIDE = 32
LAYOUT = Layout(SIDE, 3, {1: 4, 2: 2, 3: 1})
TRAIN, VAL = "train-00000.parquet", "val-00000.parquet"


@pytest.fixture
def folder(tmp_path):
    """Nine images, three of them for val, in a shard set of its own folder."""
    write_set(tmp_path / "set", photos(9, SIDE), LAYOUT)
    return tmp_path / "set"


def verdict(folder):
    """What `check` gives back, and its lines."""
    lines: list[str] = []
    return check(str(folder), progress=False, say=lines.append), lines


def edit(folder, change):
    """Change the manifest, and make its fingerprint fit again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["fingerprint"] = manifest_fingerprint(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rewrite(folder, name, change):
    """Change a shard's table; its manifest entry fits it again."""
    table = change(pq.read_table(folder / name))
    pq.write_table(table, folder / name, row_group_size=4, use_dictionary=False)
    split = name.partition("-")[0]
    edit(folder, lambda manifest: manifest["splits"][split]["files"][0].update(file_entry(folder / name)))


def with_column(name, values):
    """A change of one column."""

    def change(table):
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return change


def test_a_whole_set_is_whole(folder):
    assert verdict(folder) == (True, ["4 files, 9 rows: intact"])


def test_one_flipped_bit_anywhere_names_the_shard(folder):
    whole = (folder / VAL).read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (folder / VAL).write_bytes(damaged)
        good, lines = verdict(folder)
        assert not good
        assert lines == [f"{VAL}: is damaged: its SHA-256 differs from the manifest", "4 files, 9 rows: 1 damaged"]


def test_missing_and_truncated_shards_are_each_named(folder):
    size = (folder / TRAIN).stat().st_size
    (folder / TRAIN).write_bytes((folder / TRAIN).read_bytes()[:-7])
    (folder / VAL).unlink()
    (folder / REJECTED).write_bytes(b"PAR1")
    good, lines = verdict(folder)
    assert not good
    assert lines[0] == f"{TRAIN}: has {size - 7} bytes, the manifest says {size}"
    assert lines[1] == f"{VAL}: is missing"
    assert lines[2].startswith(f"{REJECTED}: ") and "cannot be read" in lines[2]
    assert lines[3:] == ["4 files, 9 rows: 3 damaged"]
    (folder / REJECTED).unlink()
    assert f"{REJECTED} is missing" in verdict(folder)[1][2]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TRAIN, with_column("row", [1, 2, 3, 3, 4, 4]), "train: 2 row numbers are repeated"),
        (TRAIN, with_column("label", [0, 1, 2, 3, 0, 0]), f"{TRAIN}: has labels from 0 to 3, but there are 3 classes"),
        (TRAIN, lambda table: table.slice(1), f"{TRAIN}: has 5 rows, the manifest says 6"),
        (VAL, lambda table: table.drop(["level2"]), f"{VAL}: its columns differ from the manifest"),
    ],
)
def test_content_that_does_not_fit_is_named_though_its_checksum_fits(folder, name, change, message):
    rewrite(folder, name, change)
    assert verdict(folder) == (False, [message, "4 files, 9 rows: 1 damaged"])


def test_row_groups_of_other_sizes_are_found(folder):
    edit(folder, lambda manifest: manifest.update(rows_per_group=3))
    assert verdict(folder)[1][0] == f"{TRAIN}: has row groups of sizes other than the manifest's 3"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"inputs": 12}, f"{MANIFEST}: counts 12 inputs, but 9 kept and 1 rejected"),
        ({"inputs": 11, "rejected": 2}, f"{REJECTED}: has 1 rows, but the manifest counts 2 rejected"),
        (
            {"inputs": 9, "kept": 8},
            f"{MANIFEST}: counts 8 images kept and 9 rows in its splits, which disagrees with its files",
        ),
    ],
)
def test_counts_that_do_not_add_up_are_said(folder, counts, message):
    edit(folder, lambda manifest: manifest["counts"].update(counts))
    assert verdict(folder) == (False, [message, "4 files, 9 rows: 1 damaged"])


def test_verify_as_a_command(folder, monkeypatch, capsys, tmp_path):
    assert wavemim(monkeypatch, capsys, "verify", folder, "-q") == (0, "4 files, 9 rows: intact\n", "")
    code, out, err = wavemim(monkeypatch, capsys, "verify", folder)
    assert (code, out.splitlines()[-1]) == (0, "4 files, 9 rows: intact") and "100%" in err
    (folder / VAL).unlink()
    code, out, err = wavemim(monkeypatch, capsys, "verify", folder, "-q")
    assert (code, out, err) == (1, f"{VAL}: is missing\n4 files, 9 rows: 1 damaged\n", "")

    def refused(where, expected, *words):
        code, out, err = wavemim(monkeypatch, capsys, "verify", where, "-q")
        assert (code, out, err.count("\n")) == (expected, "", 1)
        assert err.startswith("wavemim: ") and all(word in err for word in words), err

    refused(tmp_path / "nowhere", 2, f"{tmp_path / 'nowhere'}: no such folder")
    refused(folder / TRAIN, 2, "a file; give the folder")
    refused(tmp_path, 2, "is not a shard set")
    edit(folder, lambda manifest: manifest.update(format=FORMAT_VERSION + 7))
    refused(folder, 1, f"version {FORMAT_VERSION + 7}", f"versions {FORMAT_VERSION} and")
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format": FORMAT_VERSION, "classes": ["x"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(folder, 1, "changed after it was written")
    assert wavemim(monkeypatch, capsys, "verify")[0] == 2


def test_a_set_behind_a_url(folder):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/wavemim-verify", recursive=True)
    try:
        assert verdict("memory://wavemim-verify") == (True, ["4 files, 9 rows: intact"])
        _, facts = inspect("memory://wavemim-verify", progress=False)
        assert facts["where"] == "memory://wavemim-verify" and facts["duplicates"]["distinct"] == 9
        store.pipe(f"/wavemim-verify/{VAL}", b"PAR1")
        assert verdict("memory://wavemim-verify")[1][0].startswith(f"{VAL}: has 4 bytes")
    finally:
        store.rm("/wavemim-verify", recursive=True)


def test_copies_and_leaks_are_counted(tmp_path):
    images = photos(15, SIDE)  # 0 … 9 are train, 10 … 14 val
    for own, first in ((4, 2), (7, 2), (12, 2), (13, 2), (10, 9), (14, 11)):
        images[own] = images[first]
    images[5] = images[6]
    images[5, 0, 0, 0] ^= 1  # nearly the same is not the same
    write_set(tmp_path, images, LAYOUT)
    _, facts = inspect(str(tmp_path), progress=False)
    found = facts["duplicates"]
    assert (found["distinct"], found["copies"], found["val_in_train"]) == (9, 6, 3)
    assert found["examples"] == [
        ["train: 2.jpg", "val: 12.jpg"],
        ["train: 9.jpg", "val: 10.jpg"],
        ["train: 2.jpg", "train: 4.jpg"],
    ]
    text = describe(facts)
    assert "6  rows that duplicate" in text and "3  val images that are also in train" in text
    assert "train: 9.jpg  =  val: 10.jpg" in text


@pytest.mark.filterwarnings("ignore:Level value")  # small images
@pytest.mark.parametrize(("channels", "wavelet"), [(1, "haar"), (3, "haar"), (3, "db2"), (5, "bior2.2")])
def test_numbers_are_those_of_pywavelets_and_the_picture_is_drawn(tmp_path, channels, wavelet):
    layout = Layout(SIDE, channels, {1: 4, 2: 2, 3: 1}, wavelet)
    images = np.concatenate([photos(12, SIDE), photos(12, SIDE, seed=1)], 1)[:, :channels]
    write_set(tmp_path, images, layout)
    shards, facts = inspect(str(tmp_path), progress=False)
    train = images[:8].astype(float)
    a, *details = pywt.wavedec2(train, wavelet, "periodization", 3, axes=(-2, -1))
    energies = {"level 3 A": a.var((0, 2, 3)).sum() / 4**3}
    for level, bands in zip((3, 2, 1), details, strict=True):
        energies[f"level {level}"] = sum(np.square(band).mean((0, 2, 3)).sum() for band in bands) / 4**level
        for band, values in zip("HVD", bands, strict=True):
            std = facts["statistics"][str(level)][band]["std"]
            np.testing.assert_allclose(std, values.std((0, 2, 3)), atol=layout.steps[level] / 2)
    assert list(facts["energy"]) == list(energies)
    assert sum(facts["energy"].values()) == pytest.approx(1)
    for name, energy in energies.items():
        assert facts["energy"][name] == pytest.approx(energy / sum(energies.values()), abs=2e-3)
    if wavelet != "bior2.2":  # orthogonal: the bands share the pixels' variance
        assert sum(energies.values()) == pytest.approx(train.var((0, 2, 3)).sum())
        assert facts["energy_of"] == "the variance of the pixels"
    np.testing.assert_allclose(facts["pixels"]["mean"], train.mean((0, 2, 3)), atol=0.5)
    columns = facts["bytes"]["columns"]
    assert facts["bytes"]["shards"] == sum((tmp_path / name).stat().st_size for name in (TRAIN, VAL))
    assert columns["level1"]["uncompressed"] >= 12 * layout.row_bytes(1)
    assert 0.7 < sum(column["share"] for column in columns.values()) < 1
    assert ("channels together" in describe(facts)) == (channels > 4)

    shown = write_picture(shards, facts, tmp_path / "p.png", 2)
    assert shown == {1: "2 images (grey)", 3: "2 images"}.get(
        channels, "2 images (the first 3 of 5 channels, as red, green, blue)"
    )
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    assert min(picture.shape[:2]) > 600 and picture.std() > 20
    coloured = np.abs(picture[: len(picture) // 3, :, 0] - picture[: len(picture) // 3, :, 2]).max() > 10
    assert coloured == (channels > 1)


def test_the_mosaic_has_pywavelets_order():
    image = photos(1, SIDE)[0].astype(float)
    a, second, first = pywt.wavedec2(image, "haar", "periodization", 2, axes=(-2, -1))
    pyramid = {2: np.stack((a, *second), 1), 1: np.stack(first, 1)}
    found = nested(pyramid, {1: 0.5, 2: 0.25})
    half, quarter = SIDE // 2, SIDE // 4
    np.testing.assert_allclose(found[:, :quarter, :quarter], a / 4)
    np.testing.assert_allclose(found[:, :quarter, quarter:half], 127.5 + second[0] / 4)
    np.testing.assert_allclose(found[:, half:, :half], 127.5 + first[1] / 2)
    np.testing.assert_allclose(found[:, half:, half:], 127.5 + first[2] / 2)


def test_classes_and_rejects(folder):
    rewrite(folder, TRAIN, with_column("label", [0, 0, 1, 2, 0, -1]))
    rejects = [("a.jpg", "too small (3×9)"), ("b.jpg", "empty file"), ("c.jpg", "too small (1×1)")]
    write_rejected(folder / REJECTED, rejects)
    edit(folder, lambda manifest: manifest["counts"].update(inputs=12, rejected=3))
    assert verdict(folder)[0]
    _, facts = inspect(str(folder), progress=False)
    assert facts["classes"]["unlabelled"] == {"train": 1, "val": 0}
    assert facts["classes"]["largest"]["train"] == {"name": "a", "rows": 3}
    assert facts["classes"]["smallest"]["train"] == {"name": "b", "rows": 1}
    assert facts["rejected"] == [
        {"reason": "too small", "count": 2, "example": "a.jpg: too small (3×9)"},
        {"reason": "empty file", "count": 1, "example": "b.jpg: empty file"},
    ]
    assert "smallest b (1), largest a (3), unlabelled 1" in describe(facts)


def test_an_unlabelled_set_without_val_and_rejects(tmp_path):
    write_set(tmp_path, photos(2, SIDE), LAYOUT)
    rewrite(tmp_path, TRAIN, with_column("label", [-1, -1]))
    write_rejected(tmp_path / REJECTED, [])
    counts = {"inputs": 2, "kept": 2, "rejected": 0, "ignored": 0}
    edit(tmp_path, lambda manifest: manifest.update(classes=None, counts=counts))
    assert verdict(tmp_path) == (True, ["3 files, 2 rows: intact"])
    shards, facts = inspect(str(tmp_path), progress=False)
    assert facts["classes"] is None and facts["rows"] == {"train": 2, "val": 0} and facts["rejected"] == []
    assert "the set is unlabelled" in describe(facts)
    assert write_picture(shards, facts, tmp_path / "p.png", 8) == "2 images"


def test_inspect_as_a_command(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("not a picture")
    for picture, word in (
        ("notes.png", "is not a PNG"),
        ("a.jpg", "ends with .png"),
        ("x/a.png", "its folder does not exist"),
    ):
        code, out, err = wavemim(monkeypatch, capsys, "inspect", folder, "-q", "--picture", picture)
        assert (code, out, err.count("\n")) == (2, "", 1) and word in err
    assert (tmp_path / "notes.png").read_text() == "not a picture"
    assert wavemim(monkeypatch, capsys, "inspect", "nowhere", "-q")[0] == 2
    for _ in range(2):  # its own picture is replaced
        code, out, err = wavemim(monkeypatch, capsys, "inspect", folder, "-q", "--images", 1, "--json", "n.json")
        assert (code, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inspect.png", "n.json", "notes.png", "set"]
    assert "picture: 1 image → inspect.png\nnumbers: → n.json\n" in out
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["fingerprint"] in out and numbers["rows"] == {"train": 6, "val": 3}
    damaged = bytearray((folder / TRAIN).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / TRAIN).write_bytes(damaged[:-1])
    code, _, err = wavemim(monkeypatch, capsys, "inspect", folder, "-q")
    assert code == 1 and TRAIN in err and err.count("\n") == 1


def test_ctrl_c_ends_with_130(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.shards.verify.verify", interrupted)
    code, _, err = wavemim(monkeypatch, capsys, "verify", folder, "-q")
    assert code == 130 and err.strip().startswith("wavemim: interrupted") and err.strip().count("\n") == 0


def test_numbers_are_not_written_over_the_set(tmp_path):
    write_set(tmp_path, photos(3))
    before = (tmp_path / MANIFEST).read_bytes()
    for target, words in (
        (tmp_path / MANIFEST, "lies in a shard set"),
        (tmp_path / ".." / "numbers.txt", r"ends with \.json"),
    ):
        with pytest.raises(SettingError, match=words):
            show(str(tmp_path), picture=str(tmp_path.parent / "y.png"), images=1, numbers=str(target), progress=False)
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_damage_ends_a_process_of_its_own_with_1(folder, tmp_path):
    (folder / VAL).unlink()
    root = os.path.dirname(os.path.dirname(cli.__file__))
    command = [sys.executable, "-m", "pipeline.cli", "verify", "set"]
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, f"{VAL}: is missing\n4 files, 9 rows: 1 damaged\n")
    assert "Traceback" not in done.stderr
