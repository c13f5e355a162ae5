"""A worker that is slower than the others is named, whether it reads or computes: two real processes without Ray."""

import json
import logging
import multiprocessing
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
from tiny_shards import photos, write_set
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.load import load, with_overrides
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import ShardSet
from pipeline.training.pretrain_loop import train
from pipeline.workers import stragglers
from pipeline.workers.stragglers import KEEP_BUFFERS, WINDOWS, StragglerDetector

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "train.epochs": 4,
    "train.batch": 10,
    "train.warmup_epochs": 1,
    "train.log_every": 4,
    "train.workers": 2,
}
PAUSE = 0.4  # seconds: longer than a step takes on a busy machine


def slow_to_compute(model):
    """As a worker on a slower machine, in the first half of the steps."""
    calls = iter(range(100))
    model.register_forward_hook(lambda *_: time.sleep(PAUSE if next(calls) < 8 else 0))
    return model


def slow_to_read(epoch):
    """As a worker with a slower disk, in the second half."""
    calls = iter(range(100))

    def slowly(*arguments, **options):
        for batch in epoch(*arguments, **options):
            time.sleep(PAUSE if next(calls) >= 8 else 0)
            yield batch

    return slowly


def one_of_two(rank, port, shards, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    logging.basicConfig(filename=folder / f"{rank}.log", format="%(message)s")
    stragglers.SLOW = 1.0  # on a busy machine both are slow
    logged = []
    if rank == 1:
        Reader.epoch = slow_to_read(Reader.epoch)
    train(
        with_overrides(load("small"), SETTINGS),
        ShardSet.open(shards),
        device=torch.device("cpu"),
        rank=rank,
        world=2,
        wrap=lambda model: DistributedDataParallel(slow_to_compute(model) if rank else model, **KEEP_BUFFERS),
        on_log=lambda metrics, images: logged.append(metrics),
    )
    if rank == 0:
        (folder / "logged.json").write_text(json.dumps(logged))
    dist.destroy_process_group()


@pytest.mark.timeout(200)
def test_the_slow_one_of_two_is_named(tmp_path):
    shards = write_set(tmp_path / "set", photos(60)).folder.url  # 40 to train on: 4 steps an epoch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=one_of_two, args=(rank, port, shards, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    logged = json.loads((tmp_path / "logged.json").read_text())
    assert len(logged) == 4
    for number, metrics in enumerate(logged[1:], 1):  # the first holds what is done once
        assert metrics["perf/slowest_rank"] == 1
        assert metrics["perf/slowest_seconds"] > PAUSE
        assert (metrics["perf/slowest_data_share"] > 0.5) == (number >= 2)
    lines = (tmp_path / "0.log").read_text().splitlines()
    assert lines[0].startswith(f"rank 1 on {socket.gethostname()} (") and "is slow" in lines[0]
    assert (tmp_path / "1.log").read_text() == ""


def test_it_is_named_after_windows_in_a_row_and_once(caplog):
    own = StragglerDetector(torch.device("cpu"), 0, 4, hosts=["a", "b", "c", "d"])
    even, slow = [[0.1, 1.0]] * 4, [[0.1, 1.0], [0.1, 1.1], [4.0, 1.5], [0.1, 0.9]]
    with caplog.at_level(logging.WARNING):
        for times in [slow, even] * 3:  # now and then: a checkpoint, a pause of the machine
            metrics = own._compare(times)
        assert not caplog.messages
        assert metrics["perf/slowest_ratio"] == 1
        for _ in range(WINDOWS + 3):
            metrics = own._compare(slow)
    assert metrics["perf/slowest_rank"] == 2
    assert metrics["perf/slowest_ratio"] == pytest.approx(5.0)
    assert metrics["perf/slowest_data_share"] == pytest.approx(4 / 5.5)
    (line,) = caplog.messages
    assert (
        "rank 2 on c is slow: it takes 5.5 s per step" in line and "waits 4 s for data and computes for 1.5 s" in line
    )


def test_one_worker_has_nobody_to_be_compared_with():
    own = StragglerDetector(torch.device("cpu"), 0, 1)
    own.follow(torch.nn.Linear(2, 2))
    own.begin(3.0)
    assert own.read() == {}
