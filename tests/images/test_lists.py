"""Lists of images in CSV, TSV and Parquet."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_sources import check_plan, counts, fetched, jpegs, plan_of, write_csv

from pipeline.errors import SettingError
from pipeline.images.sources import fetch, plan_source
from pipeline.storage.folder import Folder

pytest_plugins = ["s3_server"]


def test_a_list_has_splits_and_numbers_as_labels(tmp_path):
    rows = ["path\tlabel\tsplit"]
    rows += [f"{i}.jpg\t{i % 3 * 5}\t{'Train' if i < 6 else 'test' if i < 9 else 'val'}" for i in range(12)]
    plan = plan_of(write_csv(tmp_path / "list.tsv", "\n".join(rows), "utf-8-sig"))
    assert counts(plan) == {"train": 6, "val": 3} and plan.ignored == 3 and plan.classes == ["0", "5", "10"]
    assert set(plan.splits["val"]["path"].to_pylist()) == {"9.jpg", "10.jpg", "11.jpg"}
    assert plan.layout == "a list, train and val; 3 classes"


def test_a_list_may_name_anything_anywhere(tmp_path, bucket, s3):
    image = jpegs(1)[0]
    away = Folder.at(tmp_path / "away")
    for folder, name in ((away, "a.jpg"), (bucket, "b.jpg"), (Folder.at(tmp_path / "here"), "c.jpg")):
        folder.write(name, image)
    paths = [str(tmp_path / "away/a.jpg"), bucket.place("b.jpg"), "c.jpg", "../away/../away/a.jpg", "./c.jpg", ""]
    pq.write_table(pa.table({"file": paths, "label": ["x", "y", "x", "y", "y", "y"]}), tmp_path / "here" / "l.parquet")
    plan = plan_of(tmp_path / "here" / "l.parquet", val_share=0, image_column="file")
    check_plan(plan, 6)
    assert plan.rejects == [("c.jpg (2)", "listed twice"), ("l.parquet#5", "no path in the list")]
    assert set(fetched(plan).values()) == {image} and plan.classes == ["x", "y"]
    # A list on a store: URLs in it are those of the same server.
    url = bucket.url.partition("?")[0] + "/b.jpg"
    bucket.write("lists/l.csv", f"path\n../b.jpg\n{url}\n".encode())
    assert set(fetched(plan_of(bucket.place("lists/l.csv"))).values()) == {image}


def test_missing_labels_are_rejects_unless_all_are_missing(tmp_path):
    plan = plan_of(write_csv(tmp_path / "a.csv", "path,label\n1.jpg,x\n2.jpg,y\n3.jpg,\n4.jpg,x\n"), val_share=0)
    check_plan(plan, 4)
    assert plan.rejects == [("3.jpg", "no label")] and plan.classes == ["x", "y"]
    plan = plan_of(write_csv(tmp_path / "b.csv", "path,label\n1.jpg,\n2.jpg,\n"))
    assert plan.classes is None and plan.inputs == 2 and not plan.rejects
    plan = plan_of(write_csv(tmp_path / "c.csv", "path,label\n1.jpg,x\n2.jpg,x\n"))
    assert plan.classes is None


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_names_of_columns_but_for_case_and_spaces(tmp_path, suffix):
    def write(*columns):
        rows = [["a.jpg", "x", "train"], ["b.jpg", "y", "train"], ["c.jpg", "x", "val"]]
        if suffix == "parquet":
            arrays = [pa.array(column) for column in zip(*rows, strict=True)]
            pq.write_table(pa.Table.from_arrays(arrays[: len(columns)], list(columns)), tmp_path / "l.parquet")
        else:
            lines = [columns, *(row[: len(columns)] for row in rows)]
            between = "," if suffix == "csv" else "\t"
            write_csv(tmp_path / f"l.{suffix}", "\n".join(between.join(line) for line in lines))
        return tmp_path / f"l.{suffix}"

    plan = plan_of(write("path", " Label", "Split "))
    assert plan.classes == ["x", "y"] and counts(plan) == {"train": 2, "val": 1}
    plan = plan_of(write("File", " Kind"), image_column="file", label_column="kind", val_share=0)
    assert plan.classes == ["x", "y"]
    for columns in (("path", "label", "label"), ("path", "Label", "label ")):
        with pytest.raises(SettingError, match="2 columns are named 'label'"):
            plan_of(write(*columns))
    with pytest.raises(SettingError, match="2 columns are named 'path'"):
        plan_of(write("path", "label", "Path"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path;label\na.jpg;1\n", "no column 'path'; the columns seem to be separated by semicolons; use commas"),
        ("path;label\na,b.jpg;1\n", "the columns seem to be separated by semicolons"),
        ("", "the list is empty"),
        ("path,label\n", "the list has no rows"),
        ("document,label\na.jpg,1\n", "no column 'path'; the list has document, label. A list needs a column path"),
        (
            "path,split\na.jpg,train\nb.jpg,part7\n",
            "row 2 has the split 'part7'; allowed are train, validation, valid, val, test",
        ),
        ("path,split\na.jpg,train\nb.jpg,\n", "row 2 has the split ''"),
        ("path,split\na.jpg,val\n", "no row has the split train"),
        ("path,label\na.jpg,1\nb.jpg\n", "the list cannot be parsed"),
        (
            "path,label,split\na.jpg,x,train\nb.jpg,y,train\nc.jpg,z,val\n",
            "'val' has a class that 'train' does not have",
        ),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,train\nc.jpg,,val\n", "train has labels and val has none"),
    ],
)
def test_mistakes_in_lists_are_one_line(tmp_path, text, words):
    with pytest.raises(SettingError) as caught:
        plan_of(write_csv(tmp_path / "list.csv", text))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count("images=") == 1


@pytest.mark.parametrize("names", [("file_name", "label"), ("FileName", "class"), ("image", "labels"), ("path", "cls")])
def test_usual_names_of_columns_are_recognised(tmp_path, names):
    """As in metadata.csv of Hugging Face's image folders, and in lists of Kaggle. `path` comes before the others."""
    lines = "".join(f"{i}.jpg,{'ab'[i % 2]},x\n" for i in range(8))
    plan = plan_of(write_csv(tmp_path / "l.csv", f"{','.join(names)},file\n{lines}"), val_share=None)
    assert plan.classes == ["a", "b"] and plan.splits["train"]["path"].to_pylist()[:2] == ["0.jpg", "1.jpg"]
    plan = plan_of(tmp_path / "l.csv", val_share=None, label_column=names[1], image_column=names[0])
    assert plan.classes == ["a", "b"]


def test_other_mistakes_in_lists(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        with pytest.raises(SettingError, match="not UTF-8"):
            plan_of(write_csv(tmp_path / "list.csv", "path\ncafé.jpg\n", encoding))
    with pytest.raises(SettingError, match="no column 'kind'"):
        plan_of(write_csv(tmp_path / "list.csv", "path\na.jpg\n"), label_column="kind")
    with pytest.raises(SettingError, match="not a complete Parquet file"):
        plan_of(write_csv(tmp_path / "list.parquet", "PAR1 but not really"))
    pq.write_table(pa.table({"path": ["a"], "label": [1.5]}), tmp_path / "list.parquet")
    with pytest.raises(SettingError, match="'label' holds fractions; allowed are integers and strings"):
        plan_of(tmp_path / "list.parquet", label_column="label")


def test_fractions_in_a_csv_are_no_classes_and_names_of_splits_may_vary(tmp_path):
    """Fails where each number becomes a class, or where a usual name of a split is refused."""
    lines = [f"{i}.jpg,{i * 0.37:.2f},{'training' if i % 3 else 'dev'}" for i in range(12)]
    plan = plan_of(write_csv(tmp_path / "l.csv", "path,label,split\n" + "\n".join(lines)))
    assert plan.classes is None and counts(plan) == {"train": 8, "val": 4}
    assert plan.notes[0].startswith("column 'label' holds fractions, so the images are unlabelled")
    plan = plan_of(tmp_path / "l.csv", label_column="none")
    assert plan.classes is None and not plan.notes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1.0", "2.0", ""], ["1", "2"]),
        (["0.0", "1.0", "nan"], ["0", "1"]),
        (["1.000e+00", "-1.000e+00", "<NA>"], ["-1", "1"]),
        (["cat", "dog", "NaN"], ["cat", "dog"]),
        (["007", "010", ""], ["007", "010"]),
        (["tench, Tinca tinca", "maillot, tank suit", ""], ["maillot, tank suit", "tench, Tinca tinca"]),
        (
            ["black bear", "brown bear", "black dog", "brown dog"],
            ["black bear", "black dog", "brown bear", "brown dog"],
        ),
    ],
)
def test_labels_as_programs_write_them(labels, classes, tmp_path):
    """Fails where "nan" becomes a class, where 1.0 is another class than 1, or where words in names are taken for lists."""
    lines = [f'{i}.jpg,"{labels[i % len(labels)]}"' for i in range(24)]
    plan = plan_of(write_csv(tmp_path / "l.csv", "path,label\n" + "\n".join(lines)), val_share=0)
    assert plan.classes == classes
    assert len(plan.rejects) == (8 if len(labels) == 3 else 0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["cat|dog", "cat", "dog|cow", "cow"], "several labels in one text ('cat|dog')"),
        (
            ["haze", "haze primary", "primary water haze", "water", "haze water", "primary"],
            "several labels in one text",
        ),
        (["0,5", "1,5", "2,5"], "lists, or fractions with a comma"),
        ([*(f"id{n}" for n in range(20)), "id0"], "another value for nearly each image"),
    ],
)
def test_what_is_no_class_is_said(labels, words, tmp_path):
    """Fails where combinations of labels, numbers or identifiers become classes."""
    lines = [f'{i}.jpg,"{label}"' for i, label in enumerate(labels)]
    plan = plan_of(write_csv(tmp_path / "l.csv", "path,label\n" + "\n".join(lines)))
    assert plan.classes is None and words in plan.notes[0]


def test_a_test_split_without_labels_is_left_out(tmp_path):
    lines = [f"{i}.jpg,{'ab'[i % 2]},train" for i in range(8)] + [f"{i}.jpg,,test" for i in range(8, 12)]
    plan = plan_of(write_csv(tmp_path / "l.csv", "path,label,split\n" + "\n".join(lines)))
    assert counts(plan) == {"train": 6, "val": 2} and plan.left_out == {"images of other splits": 4}
    assert plan.layout == "a list, train, val held out, test has no labels; 2 classes"
    plan = plan_of(tmp_path / "l.csv", label_column="None")  # without labels it serves as val
    assert counts(plan) == {"train": 8, "val": 4}


def test_paths_that_windows_wrote_and_file_urls_name_the_same_files(tmp_path):
    (tmp_path / "a b").mkdir()
    for name in ("a b/0.png", "a b/1 %.png", "real\\name.png"):
        (tmp_path / name).write_bytes(name.encode())
    url = (tmp_path / "a b" / "1 %.png").as_uri()
    (tmp_path / "list.csv").write_text(f"path\na b\\0.png\nreal\\name.png\n{url}\n")
    plan = plan_source(str(tmp_path / "list.csv"), val_share=None, seed=0)
    found = [content for _, content in fetch(plan.origin, plan.splits["train"].slice())]
    assert found == [b"a b/0.png", b"real\\name.png", b"a b/1 %.png"]
    (tmp_path / "list.csv").write_text("path\nC:\\photos\\0.png\n")
    with pytest.raises(SettingError, match=r"paths of Windows, such as 'C:/photos/0\.png'"):
        plan_source(str(tmp_path / "list.csv"), val_share=None, seed=0)


def test_spaces_around_paths_are_none_of_theirs_unless_a_file_has_them(tmp_path):
    for name in ("0.png", " 1.png"):
        (tmp_path / name).write_bytes(name.encode())
    plan = plan_source(str(write_csv(tmp_path / "l.csv", "label, path\na, 0.png\nb, 1.png\n")), val_share=None, seed=0)
    assert [content for _, content in fetch(plan.origin, plan.splits["train"].slice())] == [b"0.png", b" 1.png"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("foo://x/0.png", "scheme 'foo' cannot be used"),
        ("file://host/0.png", "names the machine 'host'"),
        ("s3:///0.png", "no bucket"),
    ],
)
def test_urls_that_cannot_be_read_are_refused_before_anything_starts(url, words, tmp_path):
    """Fails where a task on a worker is the first to notice, after the stage has begun."""
    with pytest.raises(SettingError, match=words) as caught:
        plan_of(write_csv(tmp_path / "l.csv", f"path\na.png\n{url}\n"))
    assert str(caught.value).startswith(f"images={tmp_path}/l.csv: ")
