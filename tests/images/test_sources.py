"""`images=` → plan → bytes: every kind of source, local and on S3, every input kept or rejected with a reason."""

import io
import itertools
import json
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from tiny_shards import smooth_texture

from pipeline.errors import SettingError
from pipeline.images import files as source_fetch
from pipeline.images.plan import ImagePlan
from pipeline.images.sources import check_source, fetch, plan_source
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError

pytest_plugins = ["s3_server"]

CLASSES = ("bark", "moss", "sand")


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Real JPEGs, each another one."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        file = io.BytesIO()
        smooth_texture(generator, 24, 20).save(file, "JPEG", quality=80)
        found.append(file.getvalue())
    return found


def plan_of(images, *, val_share: float = 0.25, seed: int = 0, **columns) -> ImagePlan:
    check_source(str(images))
    return plan_source(str(images), val_share=val_share, seed=seed, **columns)


def counts(plan: ImagePlan) -> dict[str, int]:
    return {name: len(split) for name, split in plan.splits.items()}


def labels(plan: ImagePlan) -> dict[str, str | None]:
    """path → class name."""
    rows = [row for split in plan.splits.values() for row in split.to_pylist()]
    return {row["path"]: plan.classes[row["label"]] if plan.classes else None for row in rows}


def fetched(plan: ImagePlan) -> dict[str, bytes | str]:
    """path → content, by a copy of the origin as another process would have it."""
    origin = pickle.loads(pickle.dumps(plan.origin))  # noqa: S301
    found: dict[str, bytes | str] = {}
    for split in plan.splits.values():
        first, again = list(fetch(origin, split)), list(fetch(origin, split))
        assert first == again and sorted(index for index, _ in first) == list(range(len(split)))
        found |= {split["path"][index].as_py(): content for index, content in first}
    return found


def check_plan(plan: ImagePlan, inputs: int) -> None:
    """What holds for every plan."""
    paths = [path for split in plan.splits.values() for path in split["path"].to_pylist()]
    assert plan.inputs == inputs == len(paths) + len(plan.rejects)
    assert len({*paths, *(path for path, _ in plan.rejects)}) == inputs
    for split in plan.splits.values():
        assert split["row"].to_pylist() == list(range(len(split)))
        assert split.schema.names == ["row", "path", "label", "container", "first", "second"]
    assert all("\n" not in reason for _, reason in plan.rejects)


# The sources, each written by a function that gives back what has to come out: path → (bytes, class)


def write_tree(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made = {}
    for number, image in enumerate(jpegs(24)):
        path = f"{CLASSES[number % 3]}/{number:02d}.jpg"
        folder.write(path, image)
        made[path] = (image, CLASSES[number % 3])
    return made


def hf_schema(names=CLASSES) -> pa.Schema:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    return pa.schema({"image": image, "label": pa.int64()}).with_metadata({"huggingface": about})


def parquet_bytes(table: pa.Table, rows_per_group: int = 5) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_per_group)
    return sink.getvalue().to_pybytes()


def write_parquet(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made = {}
    for part in range(2):
        images, numbers = jpegs(12, part), sorted(i % 3 for i in range(12))
        cells = [{"bytes": image, "path": None} for image in images]
        name = f"data/train-{part:05d}-of-00002.parquet"
        folder.write(name, parquet_bytes(pa.table({"image": cells, "label": numbers}, hf_schema())))
        made |= {f"{name}#{i}": (images[i], CLASSES[numbers[i]]) for i in range(12)}
    return made


def tar_bytes(members: list[tuple[str, bytes]], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made = {}
    for part in range(2):
        members = []
        for number, image in enumerate(jpegs(12, part)):
            key = f"{part}/{number:04d}"
            members += [(f"{key}.json", b"{}"), (f"{key}.jpg", image), (f"{key}.cls", str(number % 3 + 9).encode())]
            made[f"set-{part:03d}.tar!{key}.jpg"] = (image, str(number % 3 + 9))
        folder.write(f"set-{part:03d}.tar", tar_bytes(members))
    return made


def write_list(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made, lines = {}, ["label,path,other"]
    for number, image in enumerate(jpegs(24)):
        path = f"photos/{number} é, x.jpg"
        folder.write(path, image)
        lines.append(f'{CLASSES[number % 3]},"{path}",{number}')
        made[path] = (image, CLASSES[number % 3])
    random.Random(0).shuffle(lines[1:])
    folder.write("list.csv", "\n".join(lines).encode())
    return made


SOURCES: dict[str, tuple[Callable[[Folder], dict[str, tuple[bytes, str | None]]], str]] = {
    "tree": (write_tree, ""),
    "parquet": (write_parquet, ""),
    "tar": (write_tar, ""),
    "list": (write_list, "list.csv"),
    "parquet glob": (write_parquet, "data/*-of-0000[2].parquet"),
    "tar glob": (write_tar, "set-00?.tar"),
}


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


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


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
    assert plan.classes == ["a", "b"] and plan.ignored == 2
    assert plan.layout == f"train/ and {val}/; 2 classes"
    assert plan.rejects == [("train/b/list.csv", "not an image (suffix .csv)")]


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
    assert plan_of(touch(tmp_path, "a/x/y.jpg")).layout == "one folder, val held out; unlabelled"


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert plan_of(tmp_path, val_share=0).inputs == 2


def test_names_that_are_not_utf8_are_rejects(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "bare")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(b"x")
    plan = plan_of(tmp_path, val_share=0)
    check_plan(plan, 4)
    assert plan.rejects == [("bare", "not an image (no suffix)"), ("caf\\xe9.jpg", "file name is not valid UTF-8")]


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
    assert [path for path, _ in plan.rejects] == ["set-000.tar", "set-001.tar"]
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


# Lists


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


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
        ("file,label\na.jpg,1\n", "no column 'path'; the list has file, label. A list needs a column path"),
        (
            "path,split\na.jpg,train\nb.jpg,dev\n",
            "row 2 has the split 'dev'; allowed are train, validation, valid, val, test",
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
        plan_of(tmp_path / "list.parquet")


# Parquet


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
    order = [index for index, _ in fetch(plan.origin, plan.splits["train"])]
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
    wrong(r"holds list<.*>; allowed are integers and strings", pa.table({"photo": [b"1"], "label": [[1]]}))
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


# Tar


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_other_members(tmp_path, style):
    images = jpegs(5)
    folder = "f" * 90 + ("" if style == tarfile.USTAR_FORMAT else "ü" * 90)
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as tar:

        def add(name, content=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))

        add("photos", type=tarfile.DIRTYPE)
        add(f"./{folder}/{'n' * 60}.JPG", images[0])
        add("photos/1.seg.png", b"mask")
        add("photos/1.jpg", images[1])
        add("photos/2.txt", b"words")
        add("photos/3.jpg", type=tarfile.SYMTYPE, linkname="photos/1.jpg")
        add("photos/4.jpg", type=tarfile.FIFOTYPE)
        add("photos/._5.jpg", b"hidden")
        add("photos/6.jpg", b"")
        add("photos/1.jpg", images[2])
    plan = plan_of(tmp_path / "a.tar", val_share=0, image_column="jpg")
    check_plan(plan, 7)
    assert dict(plan.rejects) == {
        "a.tar!photos/2.txt": "no .jpg in this sample",
        "a.tar!photos/3.jpg": "a link inside the tar file",
        "a.tar!photos/4.jpg": "not a regular file",
        "a.tar!photos/1.jpg (2)": "a second time in the tar file",
    }
    found = fetched(plan)
    assert found == {
        f"a.tar!{folder}/{'n' * 60}.JPG": images[0],
        "a.tar!photos/1.jpg": images[1],
        "a.tar!photos/6.jpg": "empty file",
    }
    several = dict(plan_of(tmp_path / "a.tar", val_share=0).rejects)
    assert "another image of the same sample" in several["a.tar!photos/1.seg.png"]


def test_a_tar_that_is_cut_off_keeps_what_is_whole(tmp_path):
    images = jpegs(4)
    whole = tar_bytes([(f"{i}.{e}", c) for i in range(4) for e, c in (("jpg", images[i]), ("cls", b"%d" % (i % 2)))])
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmember("3.jpg")
    for cut, reason in ((last.offset_data + 10, "ends inside it"), (last.offset + 100, "is cut off here")):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        plan = plan_of(tmp_path / "a.tar", val_share=0)
        check_plan(plan, 4)
        assert len(plan.rejects) == 1 and reason in plan.rejects[0][1]
        assert fetched(plan) == {f"a.tar!{i}.jpg": images[i] for i in range(3)}
    damaged = bytearray(whole)
    damaged[last.offset : last.offset + 20] = b"?" * 20
    (tmp_path / "a.tar").write_bytes(damaged)
    (tmp_path / "b.tar").write_bytes(b"")
    plan = plan_of(tmp_path, val_share=0)
    assert [reason.partition(" (")[0] for _, reason in plan.rejects] == ["the tar file is damaged", "empty file"]
    (tmp_path / "a.tar").write_bytes(whole[: last.offset])  # between two members: nothing is missing that is known
    assert plan_of(tmp_path / "a.tar").inputs == 3


@pytest.mark.parametrize("size", ["base-256", "-1536", "abc"])
def test_a_size_that_is_none_is_damage(tmp_path, size):
    whole = tar_bytes([("0.jpg", b"0"), ("1.jpg", b"1")])
    if size == "base-256":
        bad = tarfile.TarInfo("2.jpg").tobuf(tarfile.GNU_FORMAT)
        field = (2**96 - 512).to_bytes(12, "big")
        bad = bad[:124] + field + bad[136:148] + b" " * 8 + bad[156:]
        bad = bad[:148] + b"%06o\0 " % sum(bad) + bad[156:]
    else:
        info = tarfile.TarInfo("2.jpg")
        info.pax_headers = {"size": size}
        bad = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(whole[:2048] + bad + b"x" * 2048)
    plan = plan_of(tmp_path / "a.tar", val_share=0)
    check_plan(plan, 3)
    assert plan.rejects == [("a.tar!(byte 2048)", "the tar file is damaged here")]


@pytest.mark.parametrize("kind", ["huge", "chain"])
def test_extended_headers_cannot_use_up_the_memory_or_the_stack(tmp_path, kind):
    def header(size):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
        return info.tobuf(tarfile.GNU_FORMAT)

    whole = tar_bytes([("0.jpg", b"0"), ("1.jpg", b"1")])
    bad = header(1 << 40) if kind == "huge" else (header(1) + b"x".ljust(512, b"\0")) * 5000
    (tmp_path / "a.tar").write_bytes(whole[:2048] + bad + whole[2048:])
    plan = plan_of(tmp_path / "a.tar", val_share=0)
    check_plan(plan, 3)
    assert plan.rejects == [("a.tar!(byte 2048)", "the tar file is damaged here")]


def test_mistakes_with_tars_are_one_line(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(SettingError, match="not a tar file"):
        plan_of(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(__file__)
    for images in ("b.tar.gz", "*.gz"):
        with pytest.raises(SettingError, match="decompress it"):
            check_source(str(tmp_path / images))
    (tmp_path / "a.tar").write_bytes((tmp_path / "b.tar.gz").read_bytes())
    with pytest.raises(SettingError, match="a compressed tar file"):
        plan_of(tmp_path / "a.tar")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(SettingError, match="compressed tar files; decompress them"):
        plan_of(tmp_path)
    (tmp_path / "c.tar").write_bytes(tar_bytes([("a.jpg", b"x")]))
    with pytest.raises(SettingError, match=r"no sample has a member \.kind"):
        plan_of(tmp_path / "c.tar", label_column="kind")


def test_splits_of_tars_by_folder_or_name(tmp_path):
    for name in ("train/0.tar", "train/1.tar", "val/0.tar", "extra/0.tar"):
        Folder.at(tmp_path).write(name, tar_bytes([(f"{i}.jpg", b"x") for i in range(3)]))
    plan = plan_of(tmp_path)
    assert counts(plan) == {"train": 6, "val": 3} and plan.ignored == 3
    assert plan_of(tmp_path / "**/*.tar") == plan
    for name in ("in1k-train-0000.tar", "in1k-validation-00.tar"):
        Folder.at(tmp_path / "named").write(name, tar_bytes([(f"{i}.jpg", b"x") for i in range(3)]))
    assert counts(plan_of(tmp_path / "named")) == {"train": 3, "val": 3}


def test_a_million_is_planned_in_arrow(tmp_path):
    """A hundred thousand here: enough to notice an object for each row."""
    import resource

    table = pa.table({"path": [f"folder/{i:07d}.jpg" for i in range(100_000)], "label": np.arange(100_000) % 10})
    pacsv.write_csv(table, tmp_path / "list.csv")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_of(tmp_path / "list.csv", val_share=0.1)
    assert counts(plan) == {"train": 90_000, "val": 10_000}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB
