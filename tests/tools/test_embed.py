"""`wavemim embed` without Ray: which images are meant, the file that is written, mistakes in one line each."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import _group
from pipeline.errors import SettingError, StageError
from pipeline.images.sources import fetch
from pipeline.models.encoder_source import EncoderSource
from pipeline.tools.embed import check_out, embed
from pipeline.tools.embed_file import Writer
from pipeline.tools.embed_sources import plan_images, units_of

SUBJECT = EncoderSource("/m", "folder", "f" * 64, 8, 3, (1.0,) * 3, (2.0,) * 3, None, None)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def named(source):
    rows, classes = source.rows.to_pylist(), source.plan.classes
    return [(row["path"], classes[row["label"]] if row["label"] >= 0 else None) for row in rows]


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("",), ("", "extra")])
def test_every_image_of_a_tree_by_path_with_its_label(parts, tmp_path):
    wanted = {}
    for part in parts:
        for label in ("b", "a"):
            for number in (2, 10, 1):
                path = picture(tmp_path / part / label / f"{number}.png")
                wanted[str(path.relative_to(tmp_path))] = label
    (source,) = plan_images([str(tmp_path)])
    if "extra" in parts:  # a class of its own: the folders of the first level are the classes
        wanted |= {path: "extra" for path in wanted if path.startswith("extra/")}
    assert named(source) == sorted(wanted.items())


def test_a_list_as_it_comes_with_images_of_no_split_and_no_label(tmp_path):
    (tmp_path / "l.csv").write_text("path,label,split\nz.png,cat,test\na.png,,train\nhttp-like.png,dog,test\n")
    (source,) = plan_images([str(tmp_path / "l.csv")])
    assert named(source) == [("z.png", "cat"), ("a.png", None), ("http-like.png", "dog")]


def test_single_files_are_one_source_and_keep_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/a.png", "x/b.png", "c.png", "d.png"):
        picture(tmp_path / name)
    sources = plan_images(["d.png", "c.png", "x", str(tmp_path / "c.png")])
    assert [source.name for source in sources] == ["", "x", ""]
    assert [path for source in sources for path, _ in named(source)] == [
        "d.png", "c.png", "a.png", "b.png", str(tmp_path / "c.png"),
    ]  # fmt: skip
    for source in sources:
        found = dict(fetch(source.plan.origin, source.rows))
        assert all(isinstance(content, bytes) for content in found.values()) and len(found) == len(source.rows)


def units(tmp_path, count):
    names = [str(picture(tmp_path / f"{number:04d}.png")) for number in range(count)]
    return list(units_of(plan_images(names)[0]))


def test_units_are_all_rows_once_and_enough_for_several_workers(tmp_path):
    found = units(tmp_path, 100)
    assert [len(unit.rows) for unit in found] == [32, 32, 32, 4]
    assert [row["row"] for unit in found for row in unit.rows.to_pylist()] == list(range(100))


def write(folder, parts, *, name="f.parquet", fail=False):
    """As `embed` does, of features that count up, every fifth image rejected."""
    rejects = []
    done = iter([(np.full(4, number, np.float32), "bad" if number % 5 == 0 else "") for number in range(1000)])
    with Writer(folder, name, SUBJECT) as writer:
        for unit in parts:
            rejects += writer.write(unit, done)
        if fail:
            raise KeyboardInterrupt
        writer.finish(rejects)
    return rejects


def test_rows_are_kept_or_rejected_and_nothing_is_half_written(tmp_path):
    from pipeline.storage.folder import Folder

    parts = units(tmp_path / "images", 40)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write(Folder.at(out), parts, fail=True)
    assert list(out.iterdir()) == []
    rejects = write(Folder.at(out), parts)
    assert sorted(path.name for path in out.iterdir()) == ["f.parquet", "f.rejected.parquet"]
    table = pq.read_table(out / "f.parquet")
    assert [int(row[0]) for row in table.column("embedding").to_pylist()] == [n for n in range(40) if n % 5]
    assert table.column("path").to_pylist() == [str(tmp_path / "images" / f"{n:04d}.png") for n in range(40) if n % 5]
    assert table.num_rows + len(rejects) == 40
    assert [tuple(row.values()) for row in pq.read_table(out / "f.rejected.parquet").to_pylist()] == rejects
    with Writer(Folder.at(out), "f.parquet", SUBJECT) as writer:  # without rejects the earlier list goes
        writer.write(parts[0], iter([(np.zeros(4, np.float32), "")] * 40))
        writer.finish([])
    assert sorted(path.name for path in out.iterdir()) == ["f.parquet"]


def test_ray_data_is_closed_where_no_image_could_be_embedded(tmp_path, monkeypatch):
    """Would catch: a generator that lives on in the error, and is closed when there is no Ray: it starts another one."""
    from pipeline.tools import embed_task

    closed = []

    def none_of(subject, units, session, batch):
        try:
            while True:
                yield np.zeros(4, np.float32), "not an image"
        finally:
            closed.append(True)

    monkeypatch.setattr(embed_task, "features_of", none_of)
    picture(tmp_path / "x.png")
    with pytest.raises(StageError, match="no image could be embedded of 1") as error:
        embed(SUBJECT, plan_images([str(tmp_path / "x.png")]), str(tmp_path / "f.parquet"), None, progress=False)
    assert closed and error.value.__traceback__ is not None  # which refers to the generator
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_mistakes_are_found_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.parquet").write_bytes(b"old")
    (tmp_path / "folder.parquet").mkdir()
    for out, message in (
        ("there.parquet", r"--out there\.parquet: .*already exists; --overwrite replaces it"),
        ("folder.parquet", "is a folder; use another name"),
        ("features.csv", r"the name has to end in \.parquet"),
        ("absent/f.parquet", "the folder '.*absent' does not exist"),
        ("/proc/f.parquet", "--out=/proc cannot be written"),
    ):
        with pytest.raises(SettingError, match=message):
            _group.main(["embed", "timm:resnet18", "x.png", "--out", out], standalone_mode=False)
    check_out("there.parquet", overwrite=True)
    for images, message in (("absent.png", r"absent\.png: no such file"), ("absent", "no such folder")):
        with pytest.raises(SettingError, match=message):
            plan_images([images])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="empty: contains no images"):
        plan_images(["empty"])
    picture(tmp_path / "x.png")
    with pytest.raises(SettingError, match="checkpoint=nowhere"):
        _group.main(["embed", "nowhere", "x.png", "--out", "f.parquet"], standalone_mode=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.parquet", "there.parquet", "x.png"]
