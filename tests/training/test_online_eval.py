"""Pictures and probes while training: when they are made, what they cost, and that they cannot hurt."""

import logging
import shutil
import threading
import time

import pytest
import torch
from PIL import Image
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
from pipeline.periodic import Periodic
from pipeline.training import online_eval as monitor
from pipeline.training.online_eval import PICTURES, CpuBudget, OnlineEvaluator, monitoring, work
from pipeline.training.pretrain_loop import train
from wavemim.weights import checkpoint

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "train.epochs": 2,
    "train.batch": 10,
    "train.workers": 1,
    "train.warmup_epochs": 1,
    "train.checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(shard set, folder with two checkpoints)."""
    shards = write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on, 20 of val
    folder = tmp_path_factory.mktemp("stage")
    train(
        with_overrides(load("small"), SETTINGS),
        shards,
        device=torch.device("cpu"),
        on_checkpoint=lambda write, state: write(folder / f"images-{state['images']:012d}"),
    )
    return shards, folder


@pytest.fixture
def stage(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "stage")
    return tmp_path / "stage"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Logged:
    def __init__(self):
        self.metrics, self.files = [], []

    def of(self, folder, shards, **changes):
        settings = {"labelled": True, "minutes": 10, "clock": Clock()} | changes
        return OnlineEvaluator(
            folder,
            shards.folder.url,
            log=lambda metrics, images: self.metrics.append((images, dict(metrics))),
            artifact=lambda path, into: self.files.append((path, into)),
            **settings,
        )


def test_a_look_in_a_process_of_its_own(trained, stage):
    logged = Logged()
    shards = trained[0]
    watching = logged.of(stage, shards)
    assert not watching.evaluate_if_due()
    watching.clock.now += 100_000
    before = torch.get_num_threads()
    assert watching.evaluate_if_due()
    newest = max(path.name for path in stage.glob("images-*"))
    assert logged.files == [(stage / PICTURES / f"{newest}.png", PICTURES)]
    assert Image.open(logged.files[0][0]).size[0] > 500
    ((images, metrics),) = logged.metrics
    assert images == checkpoint.read_state(stage / newest)["images"] == int(newest.removeprefix("images-"))
    assert metrics["monitor/linear_top1_low"] <= metrics["monitor/linear_top1"] <= metrics["monitor/linear_top1_high"]
    cost = watching.pictures.spent + watching.probes.spent
    assert 0 < watching.probes.spent < cost <= metrics["monitor/cpu_seconds"] + 0.1
    assert cost >= 0.8 * metrics["monitor/cpu_seconds"]
    watching.clock.now += 100_000
    assert not watching.evaluate_if_due()  # no newer checkpoint
    assert torch.get_num_threads() == before


def test_pictures_of_two_looks_have_the_same_images_and_masks(trained, stage, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "wavemim.figures.reconstruction.reconstruction_figure",
        lambda path, *, views, stored, rows, names, **_: drawn.append((views(stored, rows, epoch=0), names)),
    )
    for path in sorted(stage.glob("images-*")):
        picture = str(stage / PICTURES / f"{path.name}.png")
        work({"checkpoint": str(path), "shards": trained[0].folder.url, "picture": picture, "probe": None})
    (first, names), (second, again) = drawn
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.images, second.images)
    assert names == again
    assert len(names) == monitor.IMAGES
    assert all(name.startswith("val row ") for name in names)


def test_a_probe_that_costs_more_than_allowed_is_put_off(trained, stage):
    path = min(stage.glob("images-*"))
    job = {"checkpoint": str(path), "shards": trained[0].folder.url, "picture": None}
    answer = work({**job, "probe": 1e-6})
    assert answer["expected"] > answer["probe"] > 0
    assert answer["metrics"] == {}
    assert "monitor/linear_top1" in work({**job, "probe": 1e6})["metrics"]


def test_probe_is_what_the_checkpoint_is_worth(trained, stage):
    """The numbers are those of the average of the weights on the first images of both splits."""
    from pipeline.evaluation.features import features_of
    from pipeline.models.build import build_inputs, build_model
    from wavemim.evaluation.probes import linear_probe

    shards, path = trained[0], max(stage.glob("images-*"))
    found = work({"checkpoint": str(path), "shards": shards.folder.url, "picture": None, "probe": 1e6})["metrics"]
    model = build_model(with_overrides(load("small"), SETTINGS), shards)
    checkpoint.load_trained(path, model)
    sets = [
        features_of(model.encoder.model.eval(), build_inputs(shards), shards, split, window=64, batch=7, max_rows=None)
        for split in ("train", "val")
    ]
    expected, _ = linear_probe(*sets, strengths=(0.1,), seed=0, max_iterations=100)
    assert found["monitor/linear_top1"] == pytest.approx(expected.top1)


def fake(watching, picture=5.0, probe=20.0):
    """Looks that cost so much, in place of the child process."""
    jobs = []

    def ask(job):
        jobs.append(job)
        answer = {"images": 1, "common": 3.0, "total": 0.0}
        if job["picture"]:
            answer["picture"] = picture
        if job["probe"] is not None:
            answer |= {"probe": probe} if 3.0 + probe <= job["probe"] else {"probe": 0.1, "expected": 3.0 + probe}
        return answer

    watching._run_child = ask
    return jobs


def test_looks_stay_below_their_share_of_the_time(trained, stage):
    numbers = iter(range(10**6))
    logged = Logged()
    watching = logged.of(stage, trained[0], newest=lambda: stage / f"images-{next(numbers)}")
    jobs = fake(watching)
    times = []
    for _ in range(24 * 60):  # a day, a minute each
        watching.clock.now += 60
        if watching.evaluate_if_due():
            times.append(watching.clock.now - 1000)
            spent = watching.pictures.spent + watching.probes.spent
            assert spent <= monitor.SHARE * times[-1]
    pictures, probes = ([job for job in jobs if job[kind] is not None] for kind in ("picture", "probe"))
    assert spent >= 0.95 * monitor.SHARE * 86400  # and they use it
    assert len(pictures) > 2 * len(probes) > 40
    assert times[0] >= 800


def test_cadence_is_as_set_where_evaluations_are_cheap(trained, stage):
    numbers = iter(range(10**6))
    watching = Logged().of(stage, trained[0], labelled=False, newest=lambda: stage / f"images-{next(numbers)}")
    jobs = fake(watching, picture=0.1)
    looks = 0
    for _ in range(600):
        watching.clock.now += 60
        looks += watching.evaluate_if_due()
    assert looks == len(jobs) == 60
    assert all(job["probe"] is None for job in jobs)


def test_a_checkpoint_that_went_away_is_no_failure(trained, stage):
    path = min(stage.glob("images-*"))
    shutil.rmtree(path)
    answer = work({"checkpoint": str(path), "shards": trained[0].folder.url, "picture": None, "probe": None})
    assert answer == {"gone": True}


def test_a_damaged_checkpoint_is(trained, stage):
    path = min(stage.glob("images-*"))
    file = path / checkpoint.MODEL
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        work({"checkpoint": str(path), "shards": trained[0].folder.url, "picture": None, "probe": None})


def test_failures_give_one_warning_and_end(trained, stage, caplog):
    watching = Logged().of(stage, trained[0])
    calls = []

    def newest():
        calls.append(1)
        raise OSError("the disk is gone")

    watching.newest = newest
    watching.clock.now += 100_000
    with caplog.at_level(logging.WARNING):
        while watching.attempt():
            pass
    assert len(calls) == monitor.FAILURES
    assert [record.getMessage() for record in caplog.records] == [
        "online evaluation failed: the disk is gone; training continues"
    ]


def test_the_last_line_of_a_failing_child_is_the_reason(trained, stage, monkeypatch):
    script = stage / "fails"
    script.write_text("#!/bin/sh\necho Traceback >&2\necho 'ValueError: nothing here' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(monitor.sys, "executable", str(script))
    watching = Logged().of(stage, trained[0])
    watching.clock.now += 100_000
    with pytest.raises(RuntimeError, match=r"^ValueError: nothing here$"):
        watching.evaluate_if_due()
    assert watching.pictures.spent > 0


def test_stopping_ends_a_look(trained, stage, monkeypatch):
    monkeypatch.setattr(monitor, "FIRST_COST", 0.0)
    watching = Logged().of(stage, trained[0], minutes=0, clock=time.monotonic)
    watching.pictures.cost = 0.0
    thread = Periodic(watching.attempt, 0.01, name="evaluation", join=5).start()
    while watching._child is None:
        time.sleep(0.01)
    child = watching._child
    watching.stop()
    thread.stop()
    assert not thread._thread.is_alive()
    assert child.poll() is not None


def test_off(tmp_path):
    before = threading.active_count()
    with monitoring(tmp_path, "", labelled=True, log=None, artifact=None, minutes=None):
        assert threading.active_count() == before


def test_account():
    account = CpuBudget(0.01, cost=8.0)
    assert not account.allows(799)
    assert account.allows(800)
    account.charge(2.0)
    assert not account.allows(399)
    assert account.allows(400)
