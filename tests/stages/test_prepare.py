"""Images → shard set: every input kept or rejected with a reason, and interruption anywhere."""

import contextlib
import errno
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import bucket, new_bucket, s3, s3_server  # noqa: F401 — two are fixtures
from stage_calls import run_stage
from tiny_shards import smooth_texture

from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.images.arrays import Pixels
from pipeline.images.decode import decode_image
from pipeline.images.sources import plan_source
from pipeline.runtime.stage_folder import stage_folder
from pipeline.shards.layout import Layout
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import MANIFEST, ShardSet
from pipeline.shards.verify import verify
from pipeline.shards.writer import ShardWriter
from pipeline.stages import prepare
from pipeline.storage.folder import Folder
from wavemim.wavelets import reconstruct

SIZE = 64


@pytest.fixture(autouse=True)
def _one_store(monkeypatch, mlflow_uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)


def recipe(images: Path | str, out: Path, *overrides: str) -> Recipe:
    return load("small", [f"images={images}", f"out={out}", "data.levels=4", f"data.image_size={SIZE}", *overrides])


def photo(seed: int = 0, width: int = 96, height: int = 80) -> Image.Image:
    return smooth_texture(np.random.default_rng(seed), width, height)


def shard_rows(folder: Path) -> dict[str, dict[str, tuple]]:
    """split → path → everything stored of it."""
    found: dict[str, dict[str, tuple]] = {"train": {}, "val": {}}
    for file in sorted(folder.glob("*-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            found[file.name.partition("-")[0]][row["path"]] = tuple(row.values())
    return found


def _saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def broken_inputs(folder: Path) -> dict[str, str]:
    """One input of every kind that cannot be stored: path → words that the reason has to contain."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = _saved(photo(4), folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "short.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "header.jpg").write_bytes(whole[:30])
    (folder / "text.png").write_text("no image at all")
    (folder / "page.jpg").write_text("<html><body>404 Not Found</body></html>")
    (folder / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    Image.fromarray(np.ones((70, 70), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((70, 70), 9, np.int32)).save(folder / "deep.tif")
    np.save(folder / "bands.npy", np.zeros((70, 70, 5), np.uint8))
    np.save(folder / "text.npy", np.array([["a"]], object), allow_pickle=True)
    _saved(photo(1, 200, 5), folder / "narrow.png")
    png = bytearray(_saved(photo(5), folder / "crc.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (folder / "crc.png").write_bytes(png)
    _saved(Image.new("1", (20_000, 20_000)), folder / "bomb.png")
    gif = _saved(photo(6).convert("P"), folder / "cut.gif").read_bytes()
    (folder / "cut.gif").write_bytes(gif[:200])
    return {
        "empty.jpg": "empty file",
        "short.jpg": "truncated",
        "header.jpg": "",
        "text.png": "not an image",
        "page.jpg": "not an image",
        "drawing.png": "not an image",
        "dangling.jpg": "no such file",
        "pipe.jpg": "not a regular file",
        "float.tif": "floating-point",
        "deep.tif": "without a known range",
        "bands.npy": "wrong channel count",
        "text.npy": "",
        "narrow.png": "too small",
        "crc.png": "",
        "bomb.png": "too large",
        "cut.gif": "",
    }


# The stage


@pytest.mark.ray
def test_a_labelled_folder_becomes_a_shard_set(ray_local, photo_folder, tmp_path, capfd):
    seen: list[dict] = []
    summary = run_stage(prepare, recipe(photo_folder, tmp_path / "one"), ray_local, on_unit=seen.append)
    assert summary["state"] == "new" and summary["rows"] == {"train": 108, "val": 12} and summary["classes"] == 3
    assert summary["counts"] == {"inputs": 120, "kept": 120, "rejected": 0, "ignored": 0}
    assert [unit["done"] for unit in seen] == [1, 2, 3] and {unit["total"] for unit in seen} == {3}
    folder = tmp_path / "one" / "shards"
    shards = ShardSet.open(folder)
    assert not any(problem for _, problem in verify(shards))
    assert shards.classes == ["bark", "moss", "sand"] and shards.fingerprint == summary["fingerprint"]
    rows = shard_rows(folder)
    assert sorted({*rows["train"], *rows["val"]}) == sorted(
        str(p.relative_to(photo_folder)) for p in photo_folder.glob("*/*")
    )
    for path, values in rows["val"].items():
        assert shards.classes[values[2]] == path.split("/")[0]
        stored = {
            n: np.frombuffer(v, shards.layout.dtype(n)).reshape(shards.layout.shape(n))
            for n, v in enumerate(values[4:], 1)
        }
        pixels = reconstruct({n: v.astype(float) * shards.steps[n] for n, v in stored.items()})
        image = decode_image((photo_folder / path).read_bytes(), path, Pixels(SIZE))
        assert np.abs(pixels - image).mean() < 2
    again = run_stage(prepare, recipe(photo_folder, tmp_path / "one"), ray_local)
    assert again["state"] == "finished already" and again["fingerprint"] == summary["fingerprint"]
    run_stage(prepare, recipe(photo_folder, tmp_path / "two"), ray_local)
    other = tmp_path / "two" / "shards"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert "Running 0" not in capfd.readouterr().err  # Ray Data's own bars


@pytest.mark.ray
def test_every_input_is_kept_or_rejected(ray_local, photo_folder, tmp_path):
    images = tmp_path / "images"
    reasons = broken_inputs(images)
    assert len(reasons) >= 15
    good = sorted(photo_folder.glob("*/*"))[:16]
    for number, path in enumerate(good):
        (images / f"good{number}.jpg").symlink_to(path)
    # What does not matter: a wrong suffix, damaged EXIF.
    _saved(photo(7), images / "png.jpg", format="PNG")
    (images / "exif.jpg").write_bytes(_with_bad_exif(good[0].read_bytes()))
    (images / "notes.txt").write_text("no image by its suffix: not among the inputs")
    summary = run_stage(prepare, recipe(images, tmp_path / "out", "data.max_rejected=1"), ray_local)
    folder = tmp_path / "out" / "shards"
    rejected = {row["path"]: row["reason"] for row in pq.read_table(folder / "rejected.parquet").to_pylist()}
    assert rejected.keys() == reasons.keys()
    assert [(name, rejected[name]) for name, words in reasons.items() if words not in rejected[name]] == []
    assert all("\n" not in reason and reason for reason in rejected.values())
    rows = shard_rows(folder)
    kept = {*rows["train"], *rows["val"]}
    assert kept == {"png.jpg", "exif.jpg", *(f"good{i}.jpg" for i in range(16))}
    assert sum(summary["rejects"].values()) == len(reasons)
    assert summary["counts"] == {"inputs": 18 + len(reasons), "kept": 18, "rejected": len(reasons), "ignored": 1}


def _with_bad_exif(jpeg: bytes) -> bytes:
    content = b"Exif\x00\x00" + b"II*\x00\xff\xff\xff\xff" + b"garbage" * 5
    return jpeg[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


@pytest.mark.ray
def test_too_many_rejects_end_the_stage_and_can_be_allowed(ray_local, photo_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(photo_folder.glob("*/*"))[:8]):
        (images / f"good{number}.jpg").symlink_to(path)
    for number in range(11):
        (images / f"bad{number}.jpg").write_bytes(b"")
    with pytest.raises(
        StageError, match=r"11 of 19 inputs are rejected.*max_rejected=0\.01.*bad\d+\.jpg, .* and 7 more: empty file"
    ):
        run_stage(prepare, recipe(images, tmp_path / "out"), ray_local)
    assert not (tmp_path / "out" / "shards" / MANIFEST).exists()
    summary = run_stage(prepare, recipe(images, tmp_path / "out", "data.max_rejected=0.9"), ray_local)
    assert summary["state"] == "continued" and summary["units"]["reused"] >= 1
    for path in images.glob("good*"):
        path.unlink()
    with pytest.raises(StageError, match=r"no image of .* could be stored"):
        run_stage(prepare, recipe(images, tmp_path / "none", "data.max_rejected=1"), ray_local)


def one_task(photo_folder: Path, out: Path | Folder):
    """The task of the val split, ready to be called without Ray."""
    from pipeline.stages.prepare_task import Task, make_units
    from pipeline.stages.prepare_units import write_plan

    plan = plan_source(str(photo_folder), val_share=0.1, seed=0)
    units = make_units(plan, 1024)
    task = Task(
        out if isinstance(out, Folder) else Folder.at(out), plan.origin, Layout(SIZE, 3, {1: 4, 2: 4}), Pixels(SIZE), 8
    )
    write_plan(task.folder, plan, units)
    [unit] = [unit for unit in units if unit.split == "val"]
    return {"unit": json.dumps(vars(unit))}, task


def test_a_unit_whose_worker_is_lost_again_and_again_is_given_up(photo_folder, tmp_path):
    from pipeline.stages.prepare_task import MAX_TRIES, make_shard

    item, task = one_task(photo_folder, tmp_path)
    (tmp_path / "units" / "val-00000.tries").write_bytes(b"." * MAX_TRIES)
    assert "val-00000: its worker was lost 4 times" in make_shard(item, task)["error"]


def test_a_failing_disk_leaves_no_shard_and_no_report(photo_folder, tmp_path, monkeypatch):
    from pipeline.stages.prepare_task import make_shard

    item, task = one_task(photo_folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "_flush", full)
    assert make_shard(item, task) == {"report": "", "error": "val-00000: No space left on device"}
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "units" / "val-00000.tries"]
    monkeypatch.undo()
    assert make_shard(item, task)["error"] == ""
    assert (tmp_path / "val-00000.parquet").is_file()


@pytest.mark.ray
def test_a_full_disk_is_said_and_the_call_goes_on_when_there_is_room(ray_local, photo_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be made here: {made.stderr.strip()}")
    try:
        settings = recipe(photo_folder, tmp_path / "out", f"shards={disk}/set", "data.rows_per_shard=12")
        with pytest.raises((StageError, OSError), match="No space left"):
            run_stage(prepare, settings, ray_local)
        assert not (disk / "set" / MANIFEST).exists() and (disk / "set" / "settings.json").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        summary = run_stage(prepare, settings, ray_local)
        assert summary["state"] == "continued" and summary["rows"] == {"train": 108, "val": 12}
        assert not any(problem for _, problem in verify(ShardSet.open(disk / "set")))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.ray
def test_a_second_prepare_into_the_same_folder_is_refused(ray_local, photo_folder, tmp_path):
    settings = recipe(photo_folder, tmp_path / "out")
    with (
        stage_folder(tmp_path / "out" / "shards", {"a": 1}),
        pytest.raises(StageError, match=f"shards is being written by process {os.getpid()}"),
    ):
        run_stage(prepare, settings, ray_local)


def test_what_is_written_must_not_become_input(photo_folder, tmp_path):
    for settings, key in (
        (recipe(photo_folder, photo_folder / "out"), "out"),
        (recipe(photo_folder, tmp_path / "out", f"shards={photo_folder}/set"), "shards"),
    ):
        with pytest.raises(SettingError, match=f"{key}=.*would be read as images"):
            run_stage(prepare, settings)
    with pytest.raises(SettingError, match=r"data\.steps: step 1e-07 of level 1 is too small"):
        run_stage(prepare, recipe(photo_folder, tmp_path / "out", "data.steps=[1e-7]"))
    assert list(tmp_path.iterdir()) == []


# Other inputs than folders


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    photo(seed).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, seeds: range) -> None:
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            for suffix, content in (("jpg", jpeg(seed)), ("cls", str(seed % 2).encode())):
                member = tarfile.TarInfo(f"{seed:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, seeds: range) -> None:
    images = [{"bytes": jpeg(seed), "path": f"{seed}.jpg"} for seed in seeds]
    pq.write_table(pa.table({"image": images, "label": [seed % 2 for seed in seeds]}), path, row_group_size=7)


@pytest.mark.ray
def test_lists_tars_and_parquet_files_give_the_same_images(ray_local, tmp_path):
    (tmp_path / "files").mkdir()
    for seed in range(30):
        (tmp_path / "files" / f"{seed}.jpg").write_bytes(jpeg(seed))
    lines = [f"files/{seed}.jpg,{seed % 2}" for seed in range(30)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", range(20))
    write_tar(tmp_path / "tars" / "1.tar", range(20, 30))
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "0.parquet", range(12))
    write_parquet(tmp_path / "parquet" / "1.parquet", range(12, 30))
    found = {}
    for source in ("list.csv", "tars", "parquet"):
        out = tmp_path / f"out-{source}"
        compression = "fast" if source == "tars" else "small"  # has to make no difference
        summary = run_stage(prepare, recipe(tmp_path / source, out, f"data.compression={compression}"), ray_local)
        assert ShardSet.open(out / "shards").manifest.get("compression", "small") == compression
        assert summary["classes"] == 2 and summary["rows"] == {"train": 27, "val": 3}
        rows = shard_rows(out / "shards")
        found[source] = sorted(values[2:] for split in rows.values() for values in split.values())
    assert found["list.csv"] == found["tars"] == found["parquet"]


@pytest.mark.ray
def test_from_and_to_an_object_store(ray_local, photo_folder, tmp_path, bucket):  # noqa: F811
    local = run_stage(prepare, recipe(photo_folder, tmp_path / "local", "data.rows_per_shard=40"), ray_local)
    source, target = bucket.sub("photos"), bucket.sub("sets/one")
    for path in sorted(photo_folder.glob("*/*")):
        source.write(str(path.relative_to(photo_folder)), path.read_bytes())
    settings = recipe(source.url, tmp_path / "out", f"shards={target.url}", "data.rows_per_shard=40")
    summary = run_stage(prepare, settings, ray_local)
    assert summary["fingerprint"] == local["fingerprint"] and summary["rows"] == local["rows"]
    shards = ShardSet.open(target.url)
    assert not any(problem for _, problem in verify(shards))
    assert target.sub("units").names() == []
    batches = Reader(shards, "train", batch=40, window=SIZE, flip=True).epoch(0)
    assert sum(len(batch.rows) for batch in batches) == 120  # 108, the last batch filled up
    assert run_stage(prepare, settings, ray_local)["state"] == "finished already"
    target.write("train-00000.parquet", b"other bytes")
    with pytest.raises(StageError, match=r"train-00000\.parquet.* has 11 bytes"):
        ShardSet.open(target.url)


def test_a_lost_connection_is_said_and_leaves_no_manifest(photo_folder, tmp_path):
    """A task whose store goes away in the middle ends with one line; the same task goes well when the store is back."""
    from pipeline.stages.prepare_task import make_shard

    with s3_server() as endpoint:
        target = new_bucket(endpoint).sub("set")
        item, task = one_task(photo_folder, target)
        assert make_shard(item, task)["error"] == ""
    result = make_shard(item, task)
    assert "does not answer" in result["error"] and "val-00000" in result["error"]


# Interruption

KILLED = """
import os, sys
import ray
from pipeline.config.load import load
from pipeline.runtime.ray_session import SessionInfo
from pipeline.stages import prepare
ray.init(address=sys.argv[1], log_to_driver=False)
print("begins", flush=True)
recipe = load("small", sys.argv[2:])
session = SessionInfo(2, 0, 1, sys.argv[1], private=False)
prepare.run(recipe, session, prepare.check(recipe), progress=False, on_unit=lambda unit: print(unit["unit"], flush=True))
"""


def finished_units(folder: Path) -> dict[str, int]:
    """When the shards that have a report were written."""
    found = {}
    for report in (folder / "units").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found[report.stem] = (folder / f"{report.stem}.parquet").stat().st_mtime_ns
    return found


def kill_workers() -> int:
    """kill -9 of every process that makes a shard now."""
    killed = 0
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if words.startswith("ray::") and "make_shard" in words:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed += 1
    return killed


@pytest.mark.faults
@pytest.mark.ray
def test_ten_kills_at_random_moments_change_nothing(ray_local, tmp_path):
    """Drivers and workers in turn; what was finished is not done again, and the set is that of an undisturbed call."""
    import ray

    images = tmp_path / "images"
    images.mkdir()
    for seed in range(20):
        photo(seed, 500, 400).save(images / f"{seed}.png")
    for number in range(20, 500):  # PNG takes its time: a unit is a quarter of a second
        (images / f"{number}.png").symlink_to(images / f"{number % 20}.png")
    (images / "bad.png").write_bytes(b"")
    overrides = ["data.rows_per_shard=20"]
    settings = recipe(images, tmp_path / "killed", *overrides)
    folder = Path(settings.shards_at)
    arguments = [f"images={images}", f"out={tmp_path / 'killed'}", "data.levels=4", f"data.image_size={SIZE}"]
    generator = random.Random(0)
    kills = {"driver": 0, "worker": 0}
    finished: dict[str, int] = {}
    while sum(kills.values()) < 10:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, ray.get_runtime_context().gcs_address, *arguments, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "begins\n"
            if kills["driver"]:  # the first is killed anywhere, also while it plans
                assert process.stdout.readline()
            time.sleep(generator.uniform(0, 0.3))
            for _ in range(2 if kills["driver"] else 0):
                kills["worker"] += bool(kill_workers())
                time.sleep(generator.uniform(0, 0.5))
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        kills["driver"] += 1
        assert not (folder / MANIFEST).exists()
        now = finished_units(folder)
        assert finished.items() <= now.items()
        finished = now
    assert kills["driver"] >= 3 and kills["worker"] >= 3
    # What a kill in the middle of writing leaves: half a file, and a report whose shard is not the one it names.
    (folder / ".0123.tmp").write_bytes(b"half")
    broken = folder / f"{sorted(finished)[0]}.parquet"
    broken.write_bytes(broken.read_bytes()[:100])
    summary = run_stage(prepare, settings, ray_local)
    assert summary["state"] == "continued" and summary["units"]["reused"] >= len(finished) - 1
    whole = recipe(images, tmp_path / "whole", *overrides)
    assert run_stage(prepare, whole, ray_local)["fingerprint"] == summary["fingerprint"]
    assert shard_rows(folder) == shard_rows(Path(whole.shards_at))
    names = [sorted(path.name for path in Path(one.shards_at).iterdir()) for one in (settings, whole)]
    assert names[0] == names[1]
    assert summary["counts"] == {"inputs": 501, "kept": 500, "rejected": 1, "ignored": 0}
