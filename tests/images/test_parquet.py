"""Parquet files that hold images."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_sources import counts, fetched, hf_schema, jpegs, parquet_bytes, plan_of

from pipeline.errors import SettingError
from pipeline.images.sources import fetch
from pipeline.storage.object_stores import StorageError


def test_splits_of_parquet_and_rows_of_a_group_stay_together(tmp_path):
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        cells = [{"bytes": image, "path": "x"} for image in jpegs(30)]
        table = pa.table({"image": cells, "label": [i // 10 for i in range(30)]}, hf_schema())
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.parquet").write_bytes(parquet_bytes(table))
    plan = plan_of(tmp_path)
    assert counts(plan) == {"train": 30, "val": 30} and plan.ignored == 30
    assert plan.layout == "3 Parquet files, images in 'image', train and validation; 3 classes"
    groups = plan.splits["train"]["first"].to_numpy()
    assert (np.diff(groups) != 0).sum() == 5 and not (np.diff(groups) >= 0).all()
    order = [index for index, _ in fetch(plan.origin, plan.splits["train"].slice())]
    assert len({plan.splits["train"]["label"][i].as_py() for i in order[:8]}) > 1
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 15


def test_plain_columns_and_missing_cells(tmp_path):
    images = jpegs(4)
    table = pa.table({"hash": [b"1"] * 5, "jpg": [*images, None], "cls": ["b", "a", "b", "a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    plan = plan_of(tmp_path / "a.parquet", val_share=0)
    assert plan.classes == ["a", "b"] and fetched(plan)["a.parquet#4"] == "the image is null"
    assert fetched(plan)["a.parquet#1"] == images[1]
    cells = pa.array([{"bytes": images[0]}, None, {"bytes": None}, {"bytes": b""}], pa.struct({"bytes": pa.binary()}))
    pq.write_table(pa.table({"img": cells, "n": [1, 2, 3, 4]}), tmp_path / "b.parquet")
    null = "the image is null"
    assert [fetched(plan_of(tmp_path / "b.parquet"))[f"b.parquet#{i}"] for i in range(4)] == [
        images[0],
        null,
        null,
        "empty file",
    ]


def test_images_that_are_not_embedded_are_rejects(tmp_path):
    cells = [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": None}, None, {"bytes": b"x", "path": "b.jpg"}]
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 2, 0]}, hf_schema()), tmp_path / "a.parquet")
    found = fetched(plan_of(tmp_path / "a.parquet", val_share=0))
    null = "the image is null"
    assert found == {
        "a.parquet#0": "the image is not embedded, only its path",
        "a.parquet#1": null,
        "a.parquet#2": null,
        "a.parquet#3": b"x",
    }


@pytest.mark.parametrize(
    "columns", [("image", "label", "label"), ("image", "Label", "label"), ("image", "l", " IMAGE")]
)
def test_doubled_columns_of_parquet_are_an_error(tmp_path, columns):
    arrays = [pa.array(jpegs(2)), pa.array([1, 2]), pa.array([3, 4])]
    pq.write_table(pa.Table.from_arrays(arrays, list(columns)), tmp_path / "a.parquet")
    name = "label" if columns[1] != "l" else "image"
    for images in (tmp_path, tmp_path / "a.parquet"):
        for asked in ({}, {f"{name}_column": name}):
            with pytest.raises(SettingError, match=f"2 columns are named '{name}'"):
                plan_of(images, **asked)


def test_mistakes_in_parquet_are_one_line(tmp_path):
    def wrong(words, table, **columns):
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(SettingError, match=words):
            plan_of(tmp_path / "a.parquet", **columns)

    wrong("neither a column of images", pa.table({"x": [1]}))
    wrong("several columns may hold the images; set image_column to one of u, v", pa.table({"u": [b"1"], "v": [b"1"]}))
    wrong("did you mean 'photo'", pa.table({"photo": [b"1"]}), image_column="photos")
    wrong(
        "column of paths holds int64; it has to hold strings", pa.table({"photo": [b"1"], "n": [1]}), image_column="n"
    )
    wrong("no column label_column=kind", pa.table({"photo": [b"1"]}), label_column="kind")
    wrong("no rows", pa.table({"photo": pa.array([], pa.binary())}))
    lists = pa.table({"photo": [b"1"], "label": [[1]]})
    wrong(r"holds list<.*>; allowed are integers and strings", lists, label_column="label")
    wrong(
        "holds the label 7, but there are names for 3 classes",
        pa.table({"image": [{"bytes": b"", "path": ""}], "label": [7]}, hf_schema()),
    )


def test_a_damaged_row_group_rejects_its_rows_alone(tmp_path):
    images = jpegs(12)
    data = bytearray(parquet_bytes(pa.table({"image": images}), 4))
    with pq.ParquetFile(pa.BufferReader(bytes(data))) as parquet:
        chunk = parquet.metadata.row_group(1).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(data)
    found = fetched(plan_of(tmp_path / "a.parquet", val_share=0))
    assert [i for i in range(12) if isinstance(found[f"a.parquet#{i}"], str)] == [4, 5, 6, 7]
    assert "the Parquet file is damaged (" in found["a.parquet#5"] and found["a.parquet#11"] == images[11]
    plan = plan_of(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(StorageError, match="no such file; it existed"):
        fetched(plan)


def test_a_split_column_decides_and_is_named_where_it_cannot(tmp_path):
    """Fails where test rows are trained on, or where a column of splits is passed over without a word."""
    splits = ["test", "train", "train"] * 4
    table = pa.table({"image": jpegs(12), "label": [0, 1] * 6, "split": splits})
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(table))
    plan = plan_of(tmp_path / "a.parquet")
    assert counts(plan) == {"train": 8, "val": 4} and not plan.notes
    assert {int(path.partition("#")[2]) for path in plan.splits["val"]["path"].to_pylist()} == {0, 3, 6, 9}
    assert "train and test by the column 'split'" in plan.layout
    numbers = table.set_column(2, "split", pa.array([0, 1, 2] * 4))
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(numbers))
    plan = plan_of(tmp_path / "a.parquet")
    assert counts(plan) == {"train": 9, "val": 3}
    assert "column 'split' is not used (column 'split' holds int64" in plan.notes[0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([i * 0.37 for i in range(12)], "column 'label' holds fractions"),
        ([[i % 3, 1] for i in range(12)], "column 'label' holds list<"),
        ([f"image {i}" for i in range(12)], "column 'label' holds another value for each image"),
        (list(range(12)), "column 'label' holds another value for each image"),
    ],
)
def test_what_is_no_class_makes_the_images_unlabelled_with_a_word(labels, words, tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(pa.table({"image": jpegs(12), "label": labels})))
    plan = plan_of(tmp_path / "a.parquet")
    assert plan.classes is None and plan.inputs == 12 and not plan.rejects
    assert len(plan.notes) == 1 and words in plan.notes[0] and "data.label_column" in plan.notes[0]
    with pytest.raises(SettingError, match="allowed are integers and strings"):
        plan_of(tmp_path / "a.parquet", label_column="label")
    plan = plan_of(tmp_path / "a.parquet", label_column="none")
    assert plan.classes is None and not plan.notes
