"""`images=` → plan → bytes: every kind of source, local and on S3, and folder trees."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from tiny_sources import (
    CLASSES,
    SOURCES,
    check_plan,
    counts,
    fetched,
    labels,
    plan_of,
    tar_bytes,
    touch,
    write_parquet,
    write_tar,
    write_tree,
)

from pipeline.errors import SettingError
from pipeline.images import files as source_fetch
from pipeline.images.inputs import SourceInputs, SplitRows
from pipeline.images.sources import check_source
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError

pytest_plugins = ["s3_server"]


@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_its_images(kind, where, tmp_path, request, monkeypatch):
    write, name = SOURCES[kind]
    folder = Folder.at(tmp_path) if where == "local" else request.getfixturevalue("bucket").sub("set")
    made = write(folder)
    images = folder.place(name)
    plan = plan_of(images)
    if kind == "parquet glob":
        made = {path.removeprefix("data/"): value for path, value in made.items()}
    check_plan(plan, 24)
    assert counts(plan) == {"train": 18, "val": 6} and plan.ignored == 0
    assert plan.splits["val"]["label"].value_counts().field("counts").to_pylist() == [2, 2, 2]
    assert plan.classes == (["9", "10", "11"] if "tar" in kind else list(CLASSES))
    assert labels(plan) == {path: label for path, (_, label) in made.items()}
    assert fetched(plan) == {path: image for path, (image, _) in made.items()}
    monkeypatch.setattr(source_fetch, "IN_FLIGHT", 3000)  # less than some images together
    assert fetched(plan) == {path: image for path, (image, _) in made.items()}
    assert plan_of(images) == plan and plan_of(images, seed=1) != plan
    assert len(pickle.dumps(plan.origin)) < 1000


# Folder trees


def test_a_flat_folder_is_unlabelled(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(30)), ".hidden.jpg", ".git/x.jpg")
    plan = plan_of(tmp_path, val_share=0.1)
    assert plan.classes is None and counts(plan) == {"train": 27, "val": 3}
    assert plan.layout == "one folder, val held out; unlabelled"
    assert all(set(split["label"].to_pylist()) == {-1} for split in plan.splits.values())


@pytest.mark.parametrize("inner", ["", "images/"])
def test_class_folders_are_labels_and_val_is_stratified(tmp_path, inner):
    touch(
        tmp_path, *(f"{name}/{inner}{i}.JPG" for name, count in (("a", 40), ("b", 20), ("c", 4)) for i in range(count))
    )
    plan = plan_of(tmp_path)
    assert plan.classes == ["a", "b", "c"]
    found = {name: np.bincount(split["label"].to_numpy()).tolist() for name, split in plan.splits.items()}
    assert found == {"train": [30, 15, 3], "val": [10, 5, 1]}
    assert all(path.startswith(label) for path, label in labels(plan).items())
    assert len(set(plan.splits["train"]["label"].to_pylist()[:8])) > 1  # shards mix classes


def test_small_classes_still_fill_val_in_proportion(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "abcdefghij" for i in range(4)))
    plan = plan_of(tmp_path, val_share=0.1)
    assert len(plan.splits["val"]) == 4 and set(plan.splits["train"]["label"].to_pylist()) == set(range(10))


def test_one_image_is_held_out_of_two(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    assert counts(plan_of(tmp_path, val_share=0.1)) == {"train": 1, "val": 1}
    assert counts(plan_of(tmp_path, val_share=0)) == {"train": 2, "val": 0}


def test_nested_trees_are_unlabelled(tmp_path):
    touch(tmp_path, "2021/05/a.jpg", "2022/06/b.jpg", "2022/c.jpg")
    plan = plan_of(tmp_path)
    assert plan.classes is None and plan.inputs == 3


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_given_splits_are_kept(tmp_path, val):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/b/list.csv", f"{val}/a/3.jpg", f"{val}/b/4.jpg")
    touch(tmp_path, "words.txt", "more/5.jpg")
    plan = plan_of(tmp_path)
    assert set(plan.splits["val"]["path"].to_pylist()) == {f"{val}/a/3.jpg", f"{val}/b/4.jpg"}
    assert plan.classes == ["a", "b"] and plan.ignored == 3 and not plan.rejects
    assert plan.layout == f"train/ and {val}/; 2 classes"
    assert plan.left_out == {".txt files": 1, ".csv files": 1, "images in more/ (outside of the splits)": 1}


def test_given_splits_without_classes(tmp_path):
    plan = plan_of(touch(tmp_path, "train/1.jpg", "train/2.jpg", "val/3.jpg"))
    assert plan.classes is None and counts(plan) == {"train": 2, "val": 1}


@pytest.mark.parametrize(("train", "val"), [("Train", "VAL"), ("training", "Validation"), ("TRAINING", "test")])
def test_folders_of_splits_in_any_case(tmp_path, train, val):
    touch(tmp_path, f"{train}/a/1.jpg", f"{train}/b/2.jpg", f"{val}/a/3.jpg", f"{val}/b/4.jpg")
    plan = plan_of(tmp_path)
    assert plan.layout == f"{train}/ and {val}/; 2 classes"
    assert set(plan.splits["val"]["path"].to_pylist()) == {f"{val}/a/3.jpg", f"{val}/b/4.jpg"}


def test_val_may_have_one_class_of_train(tmp_path):
    plan = plan_of(touch(tmp_path / "one", "train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg", "val/b/4.jpg"))
    assert plan.classes == ["a", "b"] and plan.splits["val"]["label"].to_pylist() == [1, 1]
    for other in ("val/c/3.jpg", "val/3.jpg"):
        with pytest.raises(SettingError, match="and 'val' does not; use class folders in both or in neither"):
            plan_of(touch(tmp_path / other.replace("/", "-"), "train/a/1.jpg", "train/b/2.jpg", other))


def test_images_beside_class_folders_are_named(tmp_path):
    plan = plan_of(touch(tmp_path, "logo.png", "a/1.jpg", "b/2.jpg"))
    assert plan.classes is None and plan.inputs == 3
    beside = "unlabelled (1 image is outside the class folders, such as logo.png)"
    assert plan.layout == f"one folder, val held out; {beside}"
    assert "(2 images are outside the class folders, such as a.jpg)" in plan_of(touch(tmp_path, "a.jpg")).layout
    assert "(2 images are outside" in plan_of(touch(tmp_path, "a/x/y.jpg")).layout


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert plan_of(tmp_path, val_share=0).inputs == 2


def test_names_that_are_not_utf8_are_rejects(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "bare")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(b"x")
    plan = plan_of(tmp_path, val_share=0)
    check_plan(plan, 3)
    assert plan.rejects == [("caf\\xe9.jpg", "file name is not valid UTF-8")]
    assert plan.left_out == {"files without a suffix": 1}


def test_the_order_is_that_of_the_names_alone(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(20)))
    plan = plan_of(tmp_path)
    tree = Folder.tree

    def backwards(self, below=""):
        for folder, names in reversed(list(tree(self, below))):
            yield folder, names[::-1]

    monkeypatch.setattr(Folder, "tree", backwards)
    assert plan_of(tmp_path) == plan
    monkeypatch.setattr("pipeline.images.plan.digests", lambda paths, salt: np.zeros(len(paths), np.uint64))
    train = plan_of(tmp_path, val_share=0).splits["train"]["path"].to_pylist()
    assert train == sorted(train)  # equal digests


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(SettingError, match=r"images is not set"):
        check_source(None)
    (tmp_path / "photos").mkdir()
    for check in (check_source, plan_of):
        with pytest.raises(SettingError, match=r"did you mean '.*/photos'"):
            check(str(tmp_path / "photo" / "train"))
        with pytest.raises(SettingError, match="not a known kind of file; give a folder"):
            check(__file__)
        with pytest.raises(SettingError, match="no image in"):
            check(str(touch(tmp_path / "texts", "a.txt")))
    with pytest.raises(SettingError, match=r"'val' has a class that 'train' does not have \(c\)"):
        plan_of(touch(tmp_path / "two", "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"))
    with pytest.raises(SettingError, match="'train' has a folder for each class and 'val' does not"):
        plan_of(touch(tmp_path / "half", "train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"))
    with pytest.raises(SettingError, match=r"no image in '.*/train' or its subfolders"):
        plan_of(touch(tmp_path / "empty", "train/a.txt", "val/1.jpg"))


def test_names_with_brackets_are_no_patterns(tmp_path, monkeypatch, bucket):
    here = tmp_path / "br [1]"
    for name in ("a*/0.tar", "a*/1.tar", "ab/2.tar"):
        Folder.at(here).write(name, tar_bytes([("x.jpg", b"x")]))
        bucket.write(f"br [1]/{name}", tar_bytes([("x.jpg", b"x")]))
    assert plan_of(here / "**/*.tar").inputs == plan_of(bucket.place("br [1]/**/*.tar")).inputs == 3
    assert plan_of(here / "a*/*.tar").inputs == plan_of(bucket.place("br [1]/a*/*.tar")).inputs == 2
    assert plan_of(here / "a*/0.tar").inputs == plan_of(bucket.place("br [1]/a*/0.tar")).inputs == 1
    monkeypatch.chdir(here)
    assert plan_of("ab/*.tar").inputs == plan_of("ab/2.tar").inputs == 1
    with pytest.raises(SettingError, match="no such file or folder"):
        check_source(str(here / "none.tar"))
    with pytest.raises(SettingError, match="no file matches"):
        check_source("[c]*.tar")


def test_a_file_that_is_given_as_a_folder_is_said(tmp_path):
    with pytest.raises(SettingError, match=r"list\.csv' is a file, not a folder"):
        plan_of(touch(tmp_path, "list.csv") / "list.csv" / "images")


def test_mistakes_on_a_store_are_one_line(bucket):
    with pytest.raises(SettingError, match="no such file or folder"):
        check_source(bucket.place("nowhere"))
    with pytest.raises(SettingError, match="no such bucket"):
        check_source(bucket.url.replace("s3://bucket", "s3://no-bucket"))
    with pytest.raises(SettingError, match="no file matches"):
        check_source(bucket.place("x/*.tar"))
    bucket.write("texts/a.txt", b"")
    with pytest.raises(SettingError, match="no image in"):
        plan_of(bucket.place("texts"))


def test_images_or_containers_whichever_are_more(tmp_path):
    write_tar(Folder.at(tmp_path))
    touch(tmp_path, "logo.png")
    plan = plan_of(tmp_path)
    assert plan.origin.kind == "tar" and plan.inputs == 24 and "1 single images in it skipped" in plan.layout
    touch(tmp_path, *(f"{i}.jpg" for i in range(5)))
    plan = plan_of(tmp_path)
    assert plan.origin.kind == "files" and "without the 2 Parquet or tar files in it" in plan.layout
    assert not plan.rejects and plan.left_out == {".tar files": 2}
    write_parquet(Folder.at(tmp_path / "both"))
    write_tar(Folder.at(tmp_path / "both"))
    with pytest.raises(SettingError, match="both Parquet and tar files"):
        plan_of(tmp_path / "both")


# Reading single files


def test_what_cannot_be_read_is_said_in_words(tmp_path, monkeypatch):
    touch(tmp_path, "good.jpg", "secret.jpg", "large.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "large.jpg").write_bytes(b"x" * 2000)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names))
    monkeypatch.setattr(source_fetch, "LARGEST", 1000)
    plan = plan_of(tmp_path / "list.csv")
    found = fetched(plan)
    assert found["good.jpg"] == b"x" and found["empty.jpg"] == "empty file"
    assert found["large.jpg"] == "file too large (2000 bytes)"
    assert found["pipe.jpg"] == found["folder.jpg"] == "not a regular file"
    assert found["gone.jpg"] == "no such file" and found["circle.jpg"].startswith("cannot be read (")
    real = os.open

    def refused(path, *options):
        if str(path).endswith("secret.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(path, *options)

    monkeypatch.setattr(os, "open", refused)  # tests may run as root, who may read everything
    assert fetched(plan)["secret.jpg"] == "permission denied"
    for path in tmp_path.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    tmp_path.rmdir()
    with pytest.raises(StorageError, match="no longer exists"):
        fetched(plan)


def test_what_is_gone_from_a_store_is_a_reject_and_a_lost_store_is_not(bucket, monkeypatch):
    write_tree(bucket)
    bucket.write("sand/empty.jpg", b"")
    plan = plan_of(bucket.url)
    bucket.remove("bark/00.jpg")
    found = fetched(plan)
    assert found["bark/00.jpg"] == "no such file" and found["sand/empty.jpg"] == "empty file"
    lost = OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached")

    def fail(self, name):
        raise lost

    monkeypatch.setattr(Folder, "_open", fail)
    with pytest.raises(StorageError, match="the store does not answer"):
        fetched(plan)


def test_later_images_do_not_lock_out_the_next_one(monkeypatch):
    monkeypatch.setattr(source_fetch, "IN_FLIGHT", 10)

    def one(index, room):
        room(10 if index % 3 else 100)
        return str(index)

    assert [content for _, content in source_fetch.fetch_ahead(one, 200)] == [str(i) for i in range(200)]
    stopped = source_fetch.fetch_ahead(one, 200)
    next(stopped)
    stopped.close()


def test_a_million_is_planned_in_arrow(tmp_path):
    """A hundred thousand here: enough to notice an object for each row."""
    import resource

    table = pa.table({"path": [f"folder/{i:07d}.jpg" for i in range(100_000)], "label": np.arange(100_000) % 10})
    pacsv.write_csv(table, tmp_path / "list.csv")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_of(tmp_path / "list.csv", val_share=0.1)
    assert counts(plan) == {"train": 90_000, "val": 10_000}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


def test_rows_of_a_split_are_made_part_by_part():
    """Against the whole table. Would catch: another order, positions that begin anew, places that are lost."""
    names = pa.chunked_array([["c", "a"], ["b"]], pa.large_string())
    inputs = SourceInputs(names, np.array([2, 0, 1], np.int32), np.zeros(3, np.int8), first=np.array([30, 10, 20]))
    rows = SplitRows(inputs.compact(), np.array([1, 2, 0]))
    whole = [
        {"row": row, "path": path, "label": row, "container": -1, "first": 10 * (row + 1), "second": -1}
        for row, path in enumerate("abc")
    ]
    assert rows.slice().to_pylist() == whole and rows.slice(1, 1).to_pylist() == whole[1:2]
    assert rows.slice(2, 9).to_pylist() == whole[2:] and rows.slice(3).to_pylist() == [] and len(rows) == 3
    assert rows["path"].to_pylist() == ["a", "b", "c"] and rows["second"].to_pylist() == [-1] * 3
    assert rows == SplitRows(inputs, np.array([1, 2, 0])) and rows != SplitRows(inputs, np.array([1, 2]))
