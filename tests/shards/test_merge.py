"""`wavemim merge`: sets in the folders of a folder become one, which has their rows once each and is read as any other."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import bucket, s3  # noqa: F401 — fixtures
from stage_calls import wavemim
from tiny_shards import photos, write_set

from pipeline.errors import SettingError
from pipeline.images.columns import encode_labels
from pipeline.runtime.stage_folder import stage_folder
from pipeline.shards import merge as merging
from pipeline.shards.batches import sequential
from pipeline.shards.errors import ShardError
from pipeline.shards.layout import Layout
from pipeline.shards.merge import ROWS_APART, merge
from pipeline.shards.reader import Reader
from pipeline.shards.row_groups import RowGroups, read_columns
from pipeline.shards.shard_set import MANIFEST, REJECTED, ShardSet
from pipeline.shards.verify import check
from pipeline.storage.folder import Folder
from pipeline.tools.inspect_shards import describe, inspect

SIDE = 32
LAYOUT = Layout(SIDE, 3, {1: 4, 2: 2, 3: 1})
FIRST, SECOND = photos(9, SIDE), photos(15, SIDE, seed=1)
CLASSES = (("a", "c", "e"), ("c", "b", "e"))  # of the two sets, not in alphabetical order
SPLITS = ("train", "val")


def write_parts(folder, layout=LAYOUT):
    folder.mkdir()
    write_set(folder / "part-00", FIRST, layout, classes=CLASSES[0])
    write_set(folder / "part-01", SECOND, layout, classes=CLASSES[1])
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged set, only for reading."""
    return merge(str(write_parts(tmp_path_factory.mktemp("merged") / "set")), progress=False)


@pytest.fixture
def folder(tmp_path):
    """Two sets that are not merged yet."""
    return write_parts(tmp_path / "set")


def contents(folder):
    """Every file below a folder, but for locks."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def images_of(batches, classes):
    """How often an image (class, coefficients) is in batches."""
    found = Counter()
    for batch in batches:
        for i in np.flatnonzero(batch.weight):
            label = int(batch.labels[i])
            pyramid = b"".join(values[i].numpy().tobytes() for values in batch.levels.values())
            found[(None if label < 0 else classes[label], pyramid)] += 1
    return found


def test_only_the_manifest_and_the_rejects_are_written(folder):
    """Would catch: a part that is touched, or a list of rejects without those of a part."""
    before = contents(folder)
    merge(str(folder), progress=False)
    after = contents(folder)
    written = {str(folder / MANIFEST), str(folder / REJECTED)}
    assert {name: content for name, content in after.items() if name not in written} == before
    assert after.keys() - before.keys() == written
    assert pq.read_table(folder / REJECTED).to_pylist() == [{"path": "bad.jpg", "reason": "empty file"}] * 2


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_statistics_are_those_of_a_set_that_was_prepared_in_one_go(tmp_path, wavelet):
    """Would catch: parts that count alike whatever their size, a variance without the distance of the means."""
    layout = Layout(SIDE, 3, {1: 4, 2: 2, 3: 1}, wavelet)
    images = np.concatenate([FIRST[:6], SECOND[:10] // 2, FIRST[6:], SECOND[10:] // 2])
    whole = write_set(tmp_path / "whole", images, layout)
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set" / "dark", SECOND // 2, layout)
    write_set(tmp_path / "set" / "light", FIRST, layout)
    found = merge(str(tmp_path / "set"), progress=False)
    assert found.rows == whole.rows and found.manifest["levels"] == whole.manifest["levels"]
    for level, bands in whole.statistics.items():
        for band, wanted in bands.items():
            for which in ("mean", "std"):
                np.testing.assert_allclose(found.statistics[level][band][which], wanted[which], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.pixel_mean, whole.pixel_mean, rtol=1e-9)
    np.testing.assert_allclose(found.pixel_std, whole.pixel_std, rtol=1e-9)


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_read_once_with_its_class_and_its_pixels(merged, split):
    """Would catch: labels or rows that stay those of the part, shards of one part read from another."""
    shards = ShardSet.open(merged.url)
    assert shards.classes == ["a", "b", "c", "e"]
    parts = [ShardSet.open(f"{shards.url}/{name}") for name in shards.parts]
    wanted = sum((images_of(sequential(part, split, 4, window=SIDE), part.classes) for part in parts), Counter())
    assert images_of(sequential(shards, split, 4, window=SIDE), shards.classes) == wanted
    reader = Reader(shards, split, batch=4, window=SIDE, flip=False, seed=3)
    batches = list(reader.epoch(0))
    assert images_of(batches, shards.classes) == wanted
    rows = [int(row) for batch in batches for row in batch.rows[batch.weight > 0]]
    assert len(set(rows)) == len(rows) == shards.rows[split]
    own = [int(row) for part in parts for batch in sequential(part, split, 4, window=SIDE) for row in batch.rows]
    assert sorted(row % ROWS_APART for row in rows) == sorted(own)


def test_columns_are_those_of_the_set(merged):
    """As `wavemim replay` finds the paths of rows."""
    name, group, _ = RowGroups(merged, "train")[len(RowGroups(merged, "train")) - 1]
    assert name == "part-01/train-00000.parquet"
    table = read_columns(merged, name, group, ["path", "row"])
    assert table.to_pylist()[-1] == {"path": "9.jpg", "row": ROWS_APART + 23}
    assert table.schema.field("row") == LAYOUT.schema().field("row")


def test_verify_and_inspect_know_its_parts(folder):
    """Would catch: labels of parts that are taken for those of the set, damage in a part that is not seen."""
    images = SECOND.copy()
    images[14] = FIRST[0]  # a val image of one part that is in train of the other
    write_set(folder / "part-01", images, LAYOUT, classes=CLASSES[1])
    merge(str(folder), progress=False)
    lines: list[str] = []
    assert check(str(folder), progress=False, say=lines.append)
    assert lines == ["6 files, 24 rows: intact"]
    _, facts = inspect(str(folder), progress=False)
    assert facts["parts"] == ["part-00", "part-01"] and "merged of    2 sets" in describe(facts)
    assert facts["classes"]["largest"]["train"] == {"name": "c", "rows": 2 + 4}
    assert facts["classes"]["smallest"]["train"] == {"name": "a", "rows": 2}
    assert facts["duplicates"]["examples"] == [["train: 0.jpg", "val: 14.jpg"]]
    file = folder / "part-01" / "val-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert not check(str(folder), progress=False, say=lines.append)
    assert lines[1].startswith("part-01/val-00000.parquet: is damaged")


def test_a_label_without_a_class_in_its_part_is_damage(folder):
    """A manifest may have been made by other software: -2 and 3 are no indices from the end, and no other part's."""
    shards = merge(str(folder), progress=False)
    for label in (3, -2):
        table = pa.table({"label": pa.array([0, label], pa.int32())})
        with pytest.raises(ShardError, match=r"part-01/x has labels from .*, but its part has 3 classes"):
            shards.numbered("part-01/x", table)
    table = pa.table({"label": pa.array([2, -1, 0], pa.int32())})
    assert shards.numbered("part-01/x", table).column("label").to_pylist() == [3, -1, 2]


def test_a_set_grows_and_is_then_another_one(folder, monkeypatch, capsys):
    """Would catch: a merge that keeps the old manifest, or that takes a merged set for a prepared one."""
    first = merge(str(folder), progress=False)
    assert merge(str(folder), progress=False).fingerprint == first.fingerprint
    write_set(folder / "part-02", photos(6, SIDE, seed=2), LAYOUT, classes=("x", "a", "c"))
    write_set(folder / ".hidden", photos(3, SIDE), LAYOUT)
    code, out, err = wavemim(monkeypatch, capsys, "merge", folder, "--quiet")
    assert (code, err) == (0, "")
    said = "merge: 3 sets with 30 images (20 train, 10 val; 5 classes), 3 rejected"
    assert out == f"{said} → {folder}\n"
    grown = ShardSet.open(folder)
    assert grown.fingerprint != first.fingerprint and grown.classes == ["a", "b", "c", "e", "x"]
    assert [grown.parts[part].row_offset for part in first.parts] == [0, ROWS_APART]  # old rows keep their numbers


def test_a_set_of_parts_has_a_version_that_older_readers_refuse(folder):
    """Version 2 of wavemim reads version 2 only; a set without parts stays of that version, and has no new field."""
    manifest = merge(str(folder), progress=False).manifest
    part = json.loads((folder / "part-00" / MANIFEST).read_text())
    assert manifest["format"] == 3 and part["format"] == 2
    assert manifest.keys() - part.keys() == {"parts"}


def test_parts_that_changed_since_are_found_when_the_set_is_opened(folder):
    """Would catch: sizes that are looked for in the folder itself, or not at all."""
    merge(str(folder), progress=False)
    write_set(folder / "part-01", photos(12, SIDE, seed=5), LAYOUT, classes=CLASSES[1])
    with pytest.raises(ShardError, match=r"part-01/.* bytes, the manifest says .* run wavemim merge .*set again"):
        ShardSet.open(folder)
    shutil.rmtree(folder / "part-01")
    with pytest.raises(ShardError, match=r"part-01/train-00000\.parquet is missing"):
        ShardSet.open(folder)


def test_prepare_does_not_mix_with_it(folder):
    merge(str(folder), progress=False)
    for restart in (False, True):
        with (
            pytest.raises(SettingError, match="was not made by a stage"),
            stage_folder(folder, {"seed": 0}, mark=MANIFEST, restart=restart),
        ):
            pass


def _prepared(folder):
    (folder / "settings.json").write_text("{}")


def _a_set(folder):
    write_set(folder, FIRST, LAYOUT)


def _unfinished(folder):
    (folder / "part-02").mkdir()
    (folder / "part-02" / "settings.json").write_text("{}")


def _foreign(folder):
    (folder / "runs").mkdir()


def _nested(folder):
    write_parts(folder / "part-02")
    merge(str(folder / "part-02"), progress=False)


def _incomplete(folder):
    (folder / "part-01" / "val-00000.parquet").unlink()


def _other(**options):
    def write(folder):
        layout = Layout(SIDE, **{"channels": 3, "steps": LAYOUT.steps, **options.get("layout", {})})
        images = FIRST[:, : layout.channels]
        more = {"classes": CLASSES[0], **{key: value for key, value in options.items() if key != "layout"}}
        write_set(folder / "part-02", images, layout, **more)

    return write


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_prepared, "/set: wavemim prepare has worked here; to merge"),
        (_a_set, "/set: wavemim prepare has worked here; to merge"),
        (_unfinished, "/set/part-02 is not a shard set, it has no manifest.json: prepare was interrupted there"),
        (_foreign, "/set/runs is not a shard set, it has no manifest.json"),
        (_nested, "/set/part-02 is a merged set itself; put its parts into"),
        (_incomplete, "/set/part-01/val-00000.parquet is missing"),
        (_other(layout={"channels": 1}), "data.channels: 3 in part-00, 1 in part-02; all sets"),
        (_other(layout={"wavelet": "db2"}), "data.wavelet: haar in part-00, db2 in part-02; all sets"),
        (_other(layout={"steps": {1: 4, 2: 0.5}}), "data.steps: [4, 2, 1] in part-00, [4, 0.5] in part-02; all sets"),
        (_other(rows_per_group=8), "data.rows_per_group: 4 in part-00, 8 in part-02; all sets"),
        (_other(classes=None), "labels: some in part-00, none in part-02; all sets"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(folder, monkeypatch, capsys, spoil, said):
    """Would catch: a setting that is not compared, a set that is left out or overwritten without a word."""
    spoil(folder)
    before = contents(folder)
    code, _, err = wavemim(monkeypatch, capsys, "merge", folder, "--quiet")
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert contents(folder) == before


def test_a_folder_of_nothing_and_sets_that_are_not_merged_yet(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for place, said in ((tmp_path / "empty", "no folders in it"), (tmp_path / "nowhere", "no such folder")):
        code, _, err = wavemim(monkeypatch, capsys, "merge", place)
        assert code == 2 and said in err
    with pytest.raises(ShardError, match=r"no manifest\.json: wavemim merge .*set makes one of the sets in it"):
        ShardSet.open(folder)
    (folder / MANIFEST).write_text("{}")  # of something else: it is not overwritten
    code, _, err = wavemim(monkeypatch, capsys, "merge", folder, "--quiet")
    assert code == 2 and "remove that file" in err and (folder / MANIFEST).read_text() == "{}"


def test_it_works_in_an_object_store(folder, bucket):  # noqa: F811 — a fixture
    """Would catch: sizes or folders that are only found on a disk."""
    for path in folder.rglob("*.*"):
        if path.is_file():
            bucket.write(f"set/{path.relative_to(folder)}", path.read_bytes())
    place = bucket.sub("set")
    remote, local = merge(place.url, progress=False), merge(str(folder), progress=False)
    assert remote.fingerprint == local.fingerprint
    assert sorted(place.names()) == [MANIFEST, REJECTED] and place.folders() == ["part-00", "part-01"]
    shards = ShardSet.open(place.url)
    found = images_of(sequential(shards, "val", 4, window=SIDE), shards.classes)
    assert found == images_of(sequential(local, "val", 4, window=SIDE), local.classes)
    place.remove("part-01/val-00000.parquet")
    with pytest.raises(ShardError, match=r"part-01/val-00000\.parquet\?.* is missing"):
        ShardSet.open(place.url)


@pytest.mark.parametrize("names", [["b", "a", "C", "ß"], ["10", "9", "-1"], ["10", "9", "x"], ["1", "01", "2"]])
def test_classes_are_sorted_as_prepare_sorts_them(names):
    """Would catch: 10 before 9, for which the same images prepared in one go would have other labels."""
    wanted = encode_labels(pa.chunked_array([names * 2]), None, "labels")[1]
    assert merging._classes([names[:2], names[1:]]) == wanted
    assert merging._classes([names, names]) == names  # the order of all parts


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True), st.integers(1, 5), st.integers(0, 5)),
        min_size=1,
        max_size=6,
    )
)
def test_nothing_is_lost_and_every_class_keeps_its_name(drawn):
    """Would catch: counts or files of a part that are left out, an index that leads to another name."""
    statistics = {"levels": {"1": {"A": {"mean": [1.0], "std": [2.0]}}}, "pixels": {"mean": [3.0], "std": [4.0]}}
    parts = [
        merging._Part(
            name=f"part-{number}",
            layout=Layout(4, 1, {1: 1}),
            rows_per_group=4,
            classes=classes,
            compression="small",
            statistics=statistics,
            counts={"inputs": train + rejected, "kept": train, "rejected": rejected, "ignored": 0},
            rows={"train": train, "val": 0},
            files={"train": [{"name": f"part-{number}/x", "rows": train, "bytes": 1, "sha256": ""}], "val": []},
        )
        for number, (classes, train, rejected) in enumerate(drawn)
    ]
    manifest = merging._manifest(parts)
    shards = ShardSet(Folder.at("."), manifest, parts[0].layout)
    assert shards.rows == {"train": sum(part.rows["train"] for part in parts), "val": 0}
    assert manifest["counts"] == {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    assert len({part.row_offset for part in shards.parts.values()}) == len(parts)
    for part in parts:
        rows = pa.table({"label": pa.array(range(len(part.classes)), pa.int32())})
        labels = shards.numbered(f"{part.name}/x", rows).column("label").to_pylist()
        assert [shards.classes[label] for label in labels] == part.classes
    assert manifest["statistics"]["pixels"] == {"mean": [pytest.approx(3)], "std": [pytest.approx(4)]}
