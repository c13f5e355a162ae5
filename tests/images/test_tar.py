"""Tar files of samples, damaged ones among them."""

import io
import json
import tarfile

import pytest
from tiny_sources import check_plan, counts, fetched, jpegs, plan_of, tar_bytes

from pipeline.errors import SettingError
from pipeline.images.sources import check_source
from pipeline.images.tar import incomplete
from pipeline.storage.folder import Folder


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
    assert plan_of(tmp_path / "a.tar", val_share=0).left_out == {".txt files": 1, "masks beside images": 1}


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
        [note] = incomplete([*plan.rejects, ("a.tar!1.jpg", "damaged")])
        assert reason in note and note.endswith("; what follows is missing")
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


@pytest.mark.parametrize(
    ("sidecar", "classes"),
    [
        (lambda i: {"label": ["cat", "dog"][i % 2], "width": 24}, ["cat", "dog"]),
        (lambda i: {"kind": i % 3}, ["0", "1", "2"]),
        (lambda i: i % 2, ["0", "1"]),
        (lambda i: {"width": i, "height": i % 2}, None),
        (lambda i: {"label": [i % 2]}, None),
    ],
)
def test_labels_in_json_members(sidecar, classes, tmp_path):
    """Fails where a set with JSON sidecars is unlabelled, or where one of their other values becomes the label."""
    members = [
        (f"{i}.{e}", c) for i in range(12) for e, c in (("jpg", b"x"), ("json", json.dumps(sidecar(i)).encode()))
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    plan = plan_of(tmp_path / "a.tar")
    assert plan.classes == classes and plan.inputs == 12
    assert plan_of(tmp_path / "a.tar", label_column="none").classes is None
    if sidecar(0) == {"width": 0, "height": 0}:
        assert plan_of(tmp_path / "a.tar", label_column="height").classes == ["0", "1"]
    assert bool(plan.notes) == (sidecar(0) == {"label": [0]})


def test_keys_with_dots_are_explained(tmp_path):
    members = [(f"img.v1.{i:03d}.{e}", b"0") for i in range(3) for e in ("jpg", "cls")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    reasons = {reason for _, reason in plan_of(tmp_path / "a.tar", val_share=0).rejects}
    assert len(reasons) == 1 and "a key ends at the first dot, here 'img', so other dots" in reasons.pop()


@pytest.mark.parametrize("members", [("jpg", "seg.png"), ("seg.png", "jpg"), ("depth.png", "rgb.jpg"), ("png", "jpg")])
def test_masks_in_tars_are_left_out_by_kind(members, tmp_path):
    """Fails where masks count as damaged, or where one is trained on because it comes first."""
    content = [(f"{i}.{e}", e.encode()) for i in range(20) for e in members]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*content, ("README.md", b""), ("meta.csv", b"")]))
    plan = plan_of(tmp_path / "a.tar")
    assert plan.left_out == {".md files": 1, ".csv files": 1, "masks beside images": 20} and not plan.rejects
    assert set(fetched(plan).values()) == {next(e for e in members if "jpg" in e).encode()}


def test_members_apart_from_their_sample_are_said(tmp_path):
    content = [(f"{i}.jpg", b"x") for i in range(12)] + [(f"{i}.cls", b"1") for i in range(12)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(content))
    (note,) = plan_of(tmp_path / "a.tar").notes
    assert note.startswith("12 labels have no image beside them") and "sorted by name" in note


def test_folders_inside_of_tars_are_said(tmp_path):
    """Fails where val/ of a packed folder is trained on, or where its class folders are lost without a word."""
    for name, folders in (("split", ("set/train/cat", "set/val/cat")), ("classes", ("cat", "dog"))):
        content = [(f"{folder}/{i}.jpg", b"x") for folder in folders for i in range(4)]
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(content))
    with pytest.raises(
        SettingError, match=r"folders for train and val inside \(set/train/cat, set/val/cat\); unpack it"
    ):
        plan_of(tmp_path / "split.tar")
    assert plan_of(tmp_path / "split.tar", val_share=None).inputs == 8
    assert "no classes: unpack them" in plan_of(tmp_path / "classes.tar").notes[0]


def test_a_test_split_of_tars_without_labels_is_left_out(tmp_path):
    images = [(f"{i}.jpg", b"x") for i in range(8)]
    labelled = [member for i in range(8) for member in (images[i], (f"{i}.cls", b"%d" % (i % 2)))]
    (tmp_path / "train-0.tar").write_bytes(tar_bytes(labelled))
    (tmp_path / "test-0.tar").write_bytes(tar_bytes(images))
    plan = plan_of(tmp_path)
    assert counts(plan) == {"train": 6, "val": 2} and "test has no labels" in plan.layout
    assert plan.left_out == {"images of other splits": 8}
