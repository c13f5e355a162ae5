"""Checkpoints in a second place: copied there beside training, kept, found again; without Ray, on an S3 server."""

import json
import logging
import shutil
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from faulty_proxy import faulty_proxy
from tiny_shards import photos, write_set

from pipeline.checkpoints import uploader
from pipeline.checkpoints.find import BEST, find, local_copy, name_of, seen
from pipeline.checkpoints.remote import CheckpointStore
from pipeline.checkpoints.uploader import Copier, check_store, opened
from pipeline.checkpoints.writer import FAILURES, Keeper
from pipeline.config.load import load, with_overrides
from pipeline.config.recipe import CHANGEABLE, identity
from pipeline.errors import SettingError, StageError
from pipeline.runtime.stage_folder import SETTINGS, stage_folder
from pipeline.storage import locks, object_stores
from pipeline.storage.folder import OWNER, Folder
from pipeline.training.pretrain_loop import train
from wavemim.weights import checkpoint

pytest_plugins = ["s3_server"]

SETTINGS_OF_RUN = {
    "name": "run",
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "train.epochs": 3,
    "train.batch": 10,
    "train.warmup_epochs": 1,
    "train.log_every": 3,
    "train.checkpoint_every": 0.5,
    "train.ema": 0.9,
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.05)
    monkeypatch.setattr(locks, "RENEW", 0.1)
    monkeypatch.setattr(locks, "STALE", 2.0)
    monkeypatch.setattr(locks, "_LOOK", 0.3)
    monkeypatch.setattr(uploader, "_RETRIES", (0.01, 0.01))


def save(keeper, images, weight=None):
    """A checkpoint of a small model whose weights are all the same number."""
    model = torch.nn.Linear(40, 40)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, images if weight is None else weight)
    keeper.save(checkpoint.Saver(model, torch.optim.AdamW(model.parameters()), None, lambda: {"images": images}))


def kept(place):
    return [images for images, _ in reversed(seen(place))]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def replaced(place, name, content):
    """A file that is there, with other content."""
    assert place.kind(name) == "file"
    place.write(name, content)


def test_the_last_ones_and_the_best_are_there_and_older_ones_are_not(bucket, tmp_path):
    store = CheckpointStore(bucket.sub("runs/run/pretrain"))
    store.folder.write(f"{name_of(5)}/{checkpoint.MODEL}", b"half of one that was killed")
    keeper = Keeper(tmp_path, keep=2, best="train/loss", uploader=Copier(store, tmp_path, keep=2, best=True))
    for images, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0), (50, 5.0)):
        keeper.log({"train/loss": loss})
        save(keeper, images)
        assert keeper.finish() == keeper.uncopied == ""
    assert kept(store.folder) == [20, 40, 50] == [images for images, _ in reversed(checkpoint.seen(tmp_path))]
    assert store.folder.kind(name_of(5)) is None
    assert json.loads(store.folder.read(BEST)) == json.loads((tmp_path / BEST).read_bytes())
    for images in (20, 40, 50):
        files = bytes_of(tmp_path / name_of(images))
        assert {name: store.folder.read(f"{name_of(images)}/{name}") for name in files} == files

    other = tmp_path / "new machine"
    other.mkdir()
    assert store.restore(other, best=True) == name_of(50)
    assert find(other) == other / name_of(50)
    assert bytes_of(other / name_of(50)) == bytes_of(tmp_path / name_of(50))
    assert find(other / BEST) == other / name_of(20)  # so that a worse one is not taken for the best
    assert not list(other.glob(".*"))


def test_the_newer_of_both_places_is_taken(bucket, tmp_path):
    store = CheckpointStore(bucket)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, images in ((here, 20), (there, 10), (there, 30)):
        keeper = Keeper(folder, keep=3, uploader=Copier(store, folder, keep=3, best=False) if folder == there else None)
        save(keeper, images)
        assert keeper.finish() == ""
    assert store.restore(here) == name_of(30)
    assert store.restore(here) is None  # nothing newer
    (here / name_of(30) / checkpoint.MODEL).write_bytes(b"damaged")
    assert store.restore(here) == name_of(30)
    assert checkpoint.latest(here) == here / name_of(30)
    keeper = Keeper(here, keep=3, uploader=Copier(store, here, keep=3, best=False))
    save(keeper, 40)
    keeper.finish()
    assert kept(store.folder) == [10, 30, 40]
    shutil.rmtree(here / name_of(30))
    assert store.restore(here) is None


@pytest.mark.parametrize(
    "harm", ["a file is damaged", "a file is gone", "state.json is no JSON", "state.json is missing"]
)
def test_a_damaged_newest_one_is_passed_over_and_replaced_by_the_next_of_its_name(bucket, tmp_path, caplog, harm):
    store, here = CheckpointStore(bucket), tmp_path / "here"
    keeper = Keeper(here, keep=2, uploader=Copier(store, here, keep=2, best=False))
    for images in (10, 20):
        save(keeper, images)
        assert keeper.finish() == ""
    right = store.folder.read(f"{name_of(20)}/{checkpoint.MODEL}")
    if harm == "a file is damaged":
        replaced(store.folder, f"{name_of(20)}/{checkpoint.MODEL}", right[:-1] + b"!")
    elif harm == "a file is gone":
        store.folder.remove(f"{name_of(20)}/{checkpoint.OPTIMIZER}")
    elif harm == "state.json is no JSON":
        replaced(store.folder, f"{name_of(20)}/{checkpoint.STATE}", b"{")
    else:
        store.folder.remove(f"{name_of(20)}/{checkpoint.STATE}")
    shutil.rmtree(here)
    assert store.restore(here) == name_of(10)
    assert checkpoint.latest(here) == here / name_of(10)
    warned = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(warned) == (harm != "state.json is missing") and all(name_of(20) in line for line in warned)
    assert not list(here.glob(".*"))
    keeper = Keeper(
        here, keep=2, uploader=Copier(store, here, keep=2, best=False)
    )  # training goes on to the same place: the same checkpoint again
    save(keeper, 20)
    assert keeper.finish() == keeper.uncopied == ""
    shutil.rmtree(here)
    assert store.restore(here) == name_of(20)
    assert store.folder.read(f"{name_of(20)}/{checkpoint.MODEL}") == right


def test_names_that_lead_out_of_the_folder_are_not_followed(bucket, tmp_path):
    content = json.dumps({"format": 2, "images": 10, "files": {"../../stolen": "0"}}).encode()
    bucket.write(f"{name_of(10)}/{checkpoint.STATE}", content)
    with pytest.raises(checkpoint.CheckpointError, match=r"\.\./\.\./stolen"):
        local_copy(bucket.url, tmp_path)
    assert not list(tmp_path.rglob("stolen"))


def test_training_does_not_wait_for_a_slow_store_and_the_newest_is_next(tmp_path, monkeypatch):
    store, here = CheckpointStore(Folder.at(tmp_path / "store")), tmp_path / "here"
    go, order, write = threading.Event(), [], Folder.write

    def slow(folder, name, content):
        assert threading.current_thread().name == "copy"
        assert go.wait(20)
        order.append(name)
        write(folder, name, content)

    keeper = Keeper(here, keep=1, uploader=Copier(store, here, keep=1, best=False))
    monkeypatch.setattr(Folder, "write", slow)
    for images in (10, 20, 30):
        save(keeper, images)
        keeper.wait()  # until it is in the folder
    assert kept(store.folder) == []
    assert (here / name_of(10)).is_dir()  # what is being copied stays
    assert not (here / name_of(20)).exists()
    go.set()
    assert keeper.finish() == keeper.uncopied == ""
    files = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    assert order == [f"{name_of(images)}/{file}" for images in (10, 30) for file in files]
    assert kept(store.folder) == kept(Folder.at(here)) == [30]


def test_a_store_that_is_away_ends_nothing_and_gets_the_last_one_later(tmp_path, quick, caplog):
    place, here = tmp_path / "store", tmp_path / "here"
    store = CheckpointStore(Folder.at(place / "run/pretrain"))
    place.write_text("not a folder")
    keeper = Keeper(here, keep=2, uploader=Copier(store, here, keep=2, best=False))
    for number in range(FAILURES + 2):
        save(keeper, 10 + number)
        keeper.wait()
        assert keeper.uploader._thread is None or not keeper.uploader._thread.join()
    assert not keeper.given_up
    lines = [record for record in caplog.records if "training continues" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.ERROR]  # once, and clearly
    assert f"only in {here} until" in lines[0].getMessage()
    assert keeper.finish() == ""
    assert keeper.uncopied.startswith(f"the last checkpoint is only in {here}, not in")
    assert kept(Folder.at(here)) == [10 + FAILURES, 11 + FAILURES]

    place.unlink()
    save(keeper, 90)
    assert keeper.finish() == keeper.uncopied == ""
    assert kept(store.folder) == [90]
    assert caplog.records[-1].getMessage() == f"{store} accepts checkpoints again and has the latest one"
    shutil.rmtree(place)
    Keeper(here, keep=2, uploader=Copier(store, here, keep=2, best=False)).uploader.finish()  # a new process
    assert kept(store.folder) == [90]


def test_a_checkpoint_whose_upload_is_cut_off_does_not_count_and_comes_later(s3, bucket, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(object_stores, "TRIES", 1)
    with faulty_proxy(s3) as proxy:
        where = f"{bucket.url.partition('?')[0]}/run?endpoint_override={proxy.endpoint}&scheme=http"
        store, before = CheckpointStore(Folder.at(where)), []
        uploader = Copier(store, tmp_path, keep=2, best=False, before=lambda: before.append(kept(store.folder)))
        keeper = Keeper(tmp_path, keep=2, uploader=uploader)
        save(keeper, 10)
        assert keeper.finish() == keeper.uncopied == "" and before == [[]]  # what was logged is there before it
        proxy.fault = "cut"
        save(keeper, 20)
        keeper.finish()
        assert "the store does not answer" in keeper.uncopied and proxy.faults
        assert kept(bucket.sub("run")) == [10]
        assert store.restore(tmp_path / "new machine") == name_of(10)
        proxy.fault = ""
        save(keeper, 30)
        assert keeper.finish() == keeper.uncopied == ""
    assert kept(bucket.sub("run")) == [10, 30]


def test_an_s3_endpoint_that_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(uploader, "_RETRIES", ())
    store = CheckpointStore(Folder.at("s3://runs/run/pretrain?endpoint_override=127.0.0.1:9&scheme=http"))
    keeper = Keeper(tmp_path, keep=2, uploader=Copier(store, tmp_path, keep=2, best=False))
    save(keeper, 10)
    assert keeper.finish() == ""
    assert "the store does not answer" in keeper.uncopied and "\n" not in keeper.uncopied
    with pytest.raises(StageError, match="does not answer"):  # what it holds cannot be known: training must not begin
        store.restore(tmp_path / "new machine")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on: 4 steps an epoch


def recipe_of(tmp_path, shards, place, **changes):
    where = {"out": str(tmp_path), "shards": shards.url, "train.checkpoints_at": place.url}
    return with_overrides(load("small"), {**SETTINGS_OF_RUN, **where, **changes})


def checked(recipe, shards):
    check_store(recipe, "pretrain", {**identity(recipe, "pretrain"), "shards": shards.fingerprint})


def open_both(recipe, shards, stack):
    """The stage's folder and the store, as pretraining opens them."""
    same = {**identity(recipe, "pretrain"), "shards": shards.fingerprint}
    more = {"restart": recipe.restart, "changeable": CHANGEABLE, "force": recipe.force}
    stage = stack.enter_context(stage_folder(recipe.stage_dir("pretrain"), same, **more))
    return stage.path, stack.enter_context(opened(recipe, same, stage))


def test_other_settings_are_refused_before_anything_is_written(bucket, shards, tmp_path, quick):
    recipe = recipe_of(tmp_path / "a", shards, bucket)
    checked(recipe, shards)
    with ExitStack() as stack:
        folder, store = open_both(recipe, shards, stack)
        keeper = Keeper(folder, keep=2, uploader=Copier(store, folder, keep=2, best=False))
        save(keeper, 10)
        keeper.finish()
    assert bucket.read(f"run/pretrain/{SETTINGS}") == (folder / SETTINGS).read_bytes()

    new = tmp_path / "b"
    other = recipe_of(new, shards, bucket, **{"encoder.depth": 3, "target.taps": {2: 1, 3: 2, 4: 3}})
    with pytest.raises(SettingError, match=r"of other settings \(encoder\.depth: 2 → 3; .*restart=true$") as refused:
        checked(other, shards)
    assert "force=true" not in str(refused.value) and "train.checkpoints_at=" in str(refused.value)
    with pytest.raises(SettingError, match=r"train\.lr.*resume from them with force=true"):
        checked(recipe_of(new, shards, bucket, **{"train.lr": 1e-3}), shards)
    checked(recipe_of(new, shards, bucket, **{"train.workers": 2}), shards)
    assert not new.exists()

    forced = recipe_of(new, shards, bucket, **{"train.lr": 1e-3, "force": True})
    checked(forced, shards)
    with ExitStack() as stack:
        assert (open_both(forced, shards, stack)[0] / name_of(10)).is_dir()
    assert json.loads(bucket.read(f"run/pretrain/{SETTINGS}"))["train.lr"] == 1e-3
    with ExitStack() as stack:
        folder, store = open_both(with_overrides(other, {"restart": True, "out": str(tmp_path / "c")}), shards, stack)
        assert not seen(store.folder) and not list(folder.glob("images-*"))
    bucket.remove(f"run/pretrain/{SETTINGS}")
    bucket.write(f"run/pretrain/{name_of(10)}/{checkpoint.STATE}", b"{}")
    with pytest.raises(SettingError, match=f"no {SETTINGS}"):
        checked(recipe, shards)


def test_a_second_run_is_refused_and_a_dead_one_is_succeeded(bucket, shards, tmp_path, quick):
    first, second = (recipe_of(tmp_path / name, shards, bucket) for name in "ab")
    mark = f"run/pretrain/{OWNER}"
    with ExitStack() as stack:
        folder, store = open_both(first, shards, stack)
        with pytest.raises(StageError, match=r"is being written by another run; .*train\.checkpoints_at="):
            open_both(second, shards, ExitStack())
        killed = bucket.read(mark)
    assert bucket.kind(mark) is None

    bucket.write(mark, killed)
    began = time.monotonic()
    with ExitStack() as stack:
        open_both(first, shards, stack)  # the folder of the killed run: nobody else can have its lock
        assert time.monotonic() - began < locks.STALE
    bucket.write(mark, killed)
    with ExitStack() as stack:
        open_both(second, shards, stack)  # of another machine: once its mark is void
        assert time.monotonic() - began > locks.STALE

        bucket.write(mark, b'{"id": "another"}')  # this one could not renew its mark, and lost it
        keeper = Keeper(folder, keep=2, uploader=Copier(store, folder, keep=2, best=False))
        save(keeper, 10)
        assert keeper.finish() == ""
        assert "taken over by another run" in keeper.uncopied
        assert not seen(store.folder)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_whose_folder_is_lost_ends_bit_for_bit_as_an_undisturbed_one(bucket, shards, tmp_path, quick, damaged):
    recipe = recipe_of(tmp_path / "a", shards, bucket)

    class Lost(Exception):
        pass

    def go(folder, store=None, stop=None):
        uploader = Copier(store, folder, keep=2, best=False) if store is not None else None
        keeper = Keeper(folder, keep=2, uploader=uploader)

        def on_checkpoint(saver, state):
            keeper.save(saver)
            assert keeper.finish() == keeper.uncopied == ""
            if stop is not None and state["images"] >= stop:
                raise Lost

        device = torch.device("cpu")
        train(recipe, shards, device=device, resume=checkpoint.latest(folder), on_checkpoint=on_checkpoint)
        return checkpoint.read_state(folder / name_of(120))

    undisturbed = go(tmp_path / "whole")
    with ExitStack() as stack, pytest.raises(Lost):
        go(*open_both(recipe, shards, stack), stop=60)
    shutil.rmtree(recipe.out)
    if damaged:
        replaced(bucket, f"run/pretrain/{name_of(60)}/{checkpoint.OPTIMIZER}", b"damaged")
    with ExitStack() as stack:
        folder, store = open_both(recipe, shards, stack)
        assert checkpoint.latest(folder) == folder / name_of(40 if damaged else 60)
        again = go(folder, store)
        assert kept(store.folder) == [100, 120]
    for key in ("files", "history", "step", "streams"):  # files: the checksums of weights, their average, the optimiser
        assert again[key] == undisturbed[key], key


def test_a_checkpoint_is_named_by_url(bucket, tmp_path):
    pretraining = bucket.sub("runs/run/pretrain")
    keeper = Keeper(
        tmp_path / "here",
        keep=2,
        best="train/loss",
        uploader=Copier(CheckpointStore(pretraining), tmp_path / "here", keep=2, best=True),
    )
    for images in (10, 20, 30):
        keeper.log({"train/loss": float(images)})
        save(keeper, images)
        keeper.finish()
    out = tmp_path / "out"
    places = {
        pretraining.sub(name_of(20)).url: 20,
        pretraining.url: 30,
        bucket.sub("runs/run").url: 30,
        pretraining.sub(BEST).url: 10,
        f"{tmp_path}/here/{name_of(20)}": 20,
    }
    for where, images in places.items():
        found = find(local_copy(where, out))
        assert found.is_relative_to(out / "fetched") or "://" not in where
        assert bytes_of(found) == bytes_of(tmp_path / "here" / name_of(images)), where
    pretraining.remove(f"{name_of(20)}/{checkpoint.MODEL}")
    once_more = local_copy(pretraining.sub(name_of(20)).url, out)  # is not fetched again
    assert checkpoint.read_state(once_more)["images"] == 20
    (once_more / checkpoint.MODEL).write_bytes(b"damaged")
    with pytest.raises(checkpoint.CheckpointError, match=f"{name_of(20)}.* lacks {checkpoint.MODEL}"):
        local_copy(pretraining.sub(name_of(20)).url, out)
    with pytest.raises(SettingError, match="neither a checkpoint nor a folder with one in it"):
        local_copy(bucket.sub("elsewhere").url, out)


def test_mistakes_in_the_setting_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for value, message in {
        "s3://key:secret@bucket/runs": "credentials would end up in logs",
        "s3://bucket/runs?secret_key=abc": "credentials would end up in logs",
        str(tmp_path / "out" / "runs"): "the run's own folder",
        str(tmp_path / "file"): "not a folder",
    }.items():
        with pytest.raises(SettingError, match=rf"train\.checkpoints_at.*{message}"):
            with_overrides(load("small"), {"out": str(tmp_path / "out"), "train.checkpoints_at": value})
    with pytest.raises(SettingError, match=r"train\.checkpoints_at=here: with out=s3://b/x other nodes do not see"):
        load("small", ["name=a", "out=s3://b/x", "train.checkpoints_at=here"])
    for where in ("s3://key:secret@b/x", "s3://b/x?secret_key=abc"):
        with pytest.raises(SettingError, match="out: a URL with credentials"):
            load("small", ["name=a", f"out={where}"])
    with pytest.raises(SettingError, match="checkpoint: a URL with credentials"):
        with_overrides(load("small"), {"checkpoint": "s3://key:secret@bucket/runs"})
    recipe = with_overrides(load("small"), {"train.checkpoints_at": str(tmp_path)})
    assert identity(recipe, "pretrain") == identity(load("small"), "pretrain")
