"""Checkpoints beside training, without Ray: what is kept, what happens when they cannot be written, other workers."""

import json
import logging
import multiprocessing
import os
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist
from loss_equality.cases import TWO_LEVELS
from safetensors.torch import load_file
from tiny import make_step, photos
from tiny_shards import photos as images_of
from tiny_shards import write_set
from torch.nn.parallel import DistributedDataParallel

from pipeline.checkpoints import writer as checkpoints
from pipeline.checkpoints.find import BEST, find, name_of
from pipeline.checkpoints.writer import FAILURES, Keeper
from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.shards.shard_set import ShardSet
from pipeline.training.pretrain_loop import train
from pipeline.workers.coordination import CheckpointTimer, Coordinator
from wavemim.atomic import PARTIAL
from wavemim.weights import checkpoint


class Training:
    """A model whose weights change, as what a Keeper saves."""

    def __init__(self):
        self.step = make_step(photos(4))
        self.images = 0
        self.saver = checkpoint.Saver(self.step.model, self.step.optimizer, None, lambda: {"images": self.images})

    def at(self, images):
        self.images = images
        with torch.no_grad():
            for parameter in self.step.model.parameters():
                parameter.fill_(float(images))
        return self.saver


def kept(folder):
    return [images for images, _ in reversed(checkpoint.seen(folder))]


def finished(keeper):
    assert keeper.finish() == ""


def test_the_last_ones_are_kept_and_hold_what_was_trained_when_they_were_taken(tmp_path):
    training, keeper = Training(), Keeper(tmp_path, keep=2)
    for images in (10, 20, 30):
        keeper.save(training.at(images))
        training.at(-1)  # training goes on while it is written
    finished(keeper)
    assert kept(tmp_path) == [20, 30]
    assert not list(tmp_path.glob(".*"))
    for images in (20, 30):
        model = make_step(photos(4)).model
        assert checkpoint.read_state(tmp_path / name_of(images))["images"] == images
        checkpoint.load_model(tmp_path / name_of(images), model)
        assert all((parameter == images).all() for parameter in model.parameters())


def test_only_one_is_written_at_a_time(tmp_path, monkeypatch):
    training, keeper = Training(), Keeper(tmp_path, keep=5)
    go, order, write = threading.Event(), [], checkpoint.Snapshot.write

    def slow(snapshot, folder):
        order.append(("begun", snapshot.state["images"]))
        assert go.wait(10)
        write(snapshot, folder)
        order.append(("done", snapshot.state["images"]))

    monkeypatch.setattr(checkpoint.Snapshot, "write", slow)
    keeper.save(training.at(10))  # returns before it is written
    assert kept(tmp_path) == []
    threading.Timer(0.2, go.set).start()
    keeper.save(training.at(20))
    finished(keeper)
    assert order == [("begun", 10), ("done", 10), ("begun", 20), ("done", 20)]


def test_the_best_is_kept_too_and_can_be_named(tmp_path):
    training = Training()
    for images, losses in ((10, (3.0,)), (20, (0.5, 1.5)), (30, (2.0,)), (40, (1.9,))):
        keeper = Keeper(tmp_path, keep=1, best="train/loss")  # a new one each time: as after a restart
        for loss in losses:
            keeper.log({"train/loss": loss})
        keeper.save(training.at(images))
        finished(keeper)
    assert kept(tmp_path) == [20, 40]
    assert json.loads((tmp_path / BEST).read_text()) == {
        "checkpoint": name_of(20),
        "metric": "train/loss",
        "value": 1.0,
    }
    assert find(tmp_path / BEST) == tmp_path / name_of(20)
    assert find(tmp_path) == find(tmp_path / name_of(40)) == tmp_path / name_of(40)
    (tmp_path / BEST).write_text("{}")
    with pytest.raises(SettingError, match=r"train\.keep_best"):
        find(tmp_path / BEST)


def test_measures_of_evaluation_are_better_when_larger(tmp_path):
    training, keeper = Training(), Keeper(tmp_path, keep=1, best="eval/rankme")
    for images, value in ((10, 3.0), (20, 7.0), (30, 5.0), (40, float("nan"))):
        keeper.log({"eval/rankme": value})
        keeper.save(training.at(images))
    finished(keeper)
    assert kept(tmp_path) == [20, 40]


def test_newer_ones_that_were_passed_over_do_not_push_out_whole_ones(tmp_path):
    training, keeper = Training(), Keeper(tmp_path, keep=2)
    for images in (10, 90):
        keeper.save(training.at(images))
    finished(keeper)
    (tmp_path / name_of(90) / checkpoint.OPTIMIZER).unlink()
    assert find(tmp_path) == tmp_path / name_of(10)
    keeper = Keeper(tmp_path, keep=2)  # the run goes on from 10
    keeper.save(training.at(20))
    finished(keeper)
    assert kept(tmp_path) == [10, 20]


def test_a_full_disk_is_a_warning_until_it_has_been_full_for_long(tmp_path, monkeypatch, caplog):
    training, keeper = Training(), Keeper(tmp_path, keep=2)
    monkeypatch.setattr(checkpoints, "_RETRIES", (0.01, 0.01))
    full, write = [True], checkpoint.save_file

    def save_file(tensors, path):
        if full[0]:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with caplog.at_level(logging.WARNING):
        keeper.save(training.at(10))
        keeper.save(training.at(20))
        keeper.wait()
        full[0] = False
        keeper.save(training.at(30))
        finished(keeper)
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1, 1]
    assert kept(tmp_path) == [30]
    assert not keeper.given_up
    assert not list(tmp_path.glob(".*"))  # what was half written

    full[0] = True
    for number in range(FAILURES):
        assert not keeper.given_up
        keeper.save(training.at(40 + number))
        keeper.wait()
    assert keeper.given_up.startswith(f"{FAILURES} checkpoints in a row could not be written")
    assert "No space left" in keeper.finish()
    full[0] = False
    assert keeper.finish() == ""  # the last one is tried again
    assert kept(tmp_path) == [30, 40 + FAILURES - 1]


def test_the_end_waits_for_a_slow_disk_and_gives_signs_of_life(tmp_path, monkeypatch):
    training, keeper, signs = Training(), Keeper(tmp_path, keep=2), []
    monkeypatch.setattr(checkpoints, "_LOOK", 0.05)
    monkeypatch.setattr(checkpoints, "_RETRIES", (0.01,))
    write, tries = checkpoint.save_file, []

    def save_file(tensors, path):
        time.sleep(0.4)
        tries.append(len(signs))
        if len(tries) == 1:
            raise OSError(5, "Input/output error")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    keeper.save(training.at(10))
    assert keeper.finish(lambda: signs.append(1)) == ""
    assert kept(tmp_path) == [10]
    assert 3 < tries[0] < tries[1] < len(signs)  # during the first try, and during the second


def test_what_killed_workers_left_by_half_is_removed(tmp_path):
    half = tmp_path / f".{name_of(10)}.0123{PARTIAL}"
    half.mkdir()
    (half / checkpoint.STATE).write_text('{"format": 2, "files": {}, "images": 10}')
    assert checkpoint.latest(tmp_path) is None
    Keeper(tmp_path, keep=1)
    assert not half.exists()


def test_orders_are_asked_for_once_a_second():
    now, asked = [0.0], []
    orders = Coordinator(0, 1, stop=lambda: asked.append(now[0]) or False, clock=lambda: now[0])
    for step in range(100):
        now[0] = step * 0.1
        orders.after_step()
    assert len(asked) == pytest.approx(10, abs=1)
    now[0] += 5
    assert Coordinator(0, 1, stop=lambda: True, save=lambda: True, clock=lambda: now[0]).after_step() == (True, True)


def test_minutes_count_from_the_last_checkpoint():
    now = [0.0]
    due = CheckpointTimer(2, clock=lambda: now[0])
    now[0] = 119
    assert not due()
    now[0] = 120
    assert due()
    due.reset()
    assert not due()
    now[0] = 1e9
    assert due()
    assert not CheckpointTimer(None, clock=lambda: now[0])()


SETTINGS = {
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


def go(shards, folder, rank, world, resume=None, stop_at=None):
    """Train in this process; rank 0 keeps every checkpoint, and the metrics as JSON."""
    torch.set_num_threads(1)
    recipe = with_overrides(load(TWO_LEVELS), {**SETTINGS, "train.workers": world})
    logged = {}
    steps = iter(range(1, 1000))
    orders = Coordinator(rank, world, stop=lambda: stop_at is not None and next(steps) >= stop_at)

    def keep(saver, state):
        if rank == 0:
            saver(folder / name_of(state["images"]))

    trained = train(
        recipe,
        ShardSet.open(shards),
        device=torch.device("cpu"),
        rank=rank,
        world=world,
        wrap=DistributedDataParallel if world > 1 else None,
        resume=resume,
        on_log=lambda metrics, images: logged.update({images: metrics}),
        on_checkpoint=keep,
        coordinator=orders,
    )
    if rank == 0:
        (folder / "logged.json").write_text(json.dumps({"logged": logged, "history": trained.position.history}))
    return trained


def one_of_two(rank, port, shards, folder, resume, stop_at, ended):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    trained = go(shards, folder, rank, 2, resume, stop_at)
    ended.put((rank, trained.position.step, trained.stopped))
    dist.destroy_process_group()


def with_two(shards, folder, resume=None, stop_at=None):
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    ended = context.Queue()
    processes = [
        context.Process(target=one_of_two, args=(rank, port, shards, folder, resume, stop_at, ended))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    return [ended.get(timeout=5)[1:] for _ in processes]


def compare(folder, other, images):
    """Same data, lr and number of steps; weights and losses but for the order in which gradients are added up."""
    name = name_of(images)
    states = [checkpoint.read_state(place / name) for place in (folder, other)]
    for key in ("step", "images", "epoch", "batch", "streams"):
        assert states[0][key] == states[1][key], key
    for file in (checkpoint.MODEL, checkpoint.AVERAGED):
        first, second = (load_file(place / name / file) for place in (folder, other))
        for key, value in first.items():
            assert torch.allclose(value, second[key], atol=2e-5, rtol=1e-4), (key, (value - second[key]).abs().max())
    logs = [json.loads((place / "logged.json").read_text())["logged"] for place in (folder, other)]
    for seen in logs[1]:
        assert logs[0][seen]["train/lr"] == logs[1][seen]["train/lr"]
        assert logs[0][seen]["train/loss"] == pytest.approx(logs[1][seen]["train/loss"], rel=1e-4)


def test_stopping_between_two_logged_lines_changes_neither(tmp_path):
    shards = write_set(tmp_path / "set", images_of(60)).folder.url
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    go(shards, tmp_path / "whole", 0, 1)
    assert go(shards, tmp_path / "parts", 0, 1, stop_at=1).stopped  # after the first step; metrics come every third
    assert json.loads((tmp_path / "parts" / "logged.json").read_text())["logged"] == {}
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "parts"))["step"] == 1
    go(shards, tmp_path / "parts", 0, 1, resume=checkpoint.latest(tmp_path / "parts"))
    whole, parts = (json.loads((tmp_path / name / "logged.json").read_text()) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]
    for seen, metrics in whole["logged"].items():
        assert parts["logged"][seen].keys() == metrics.keys()
        assert all(parts["logged"][seen][k] == v for k, v in metrics.items() if not k.startswith(("perf/", "cost/"))), (
            seen
        )
    files = [checkpoint.read_state(tmp_path / name / name_of(120))["files"] for name in ("whole", "parts")]
    assert files[0] == files[1]  # their checksums


@pytest.mark.timeout(200)
def test_other_workers_go_on_with_the_same_data_and_learning_rate(tmp_path):
    shards = write_set(tmp_path / "set", images_of(60)).folder.url  # 40 to train on: 4 steps an epoch
    assert with_two(shards, tmp_path / "two") == [(12, False), (12, False)]
    mixed = tmp_path / "one, two, one"
    mixed.mkdir()
    # Began with the reading order of two, as the other: at the first checkpoint, in the middle of an epoch.
    go(shards, mixed, 0, 1, resume=tmp_path / "two" / name_of(20), stop_at=1)
    first = checkpoint.latest(mixed)
    ends = with_two(shards, mixed, resume=first, stop_at=2)
    assert ends[0] == ends[1], "both stop after the same step"
    step, stopped = ends[0]
    assert stopped and checkpoint.read_state(first)["step"] < step < 12
    go(shards, mixed, 0, 1, resume=checkpoint.latest(mixed))
    compare(tmp_path / "two", mixed, 120)
