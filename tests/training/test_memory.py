"""Memory stays flat while training goes on, and what the reader holds is bounded."""

import gc
import statistics
import threading
import time
import tracemalloc
import weakref

import psutil
import pytest
import torch
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
from pipeline.shards.pages import new_array
from pipeline.shards.reader import Reader
from pipeline.training.pretrain_loop import train

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {3: 1, 4: 2},
    "train.batch": 10,
    "train.workers": 1,
    "train.warmup_epochs": 1,
    "train.log_every": 3,
    "train.ema": 0.9,
}
CHECKPOINTS, WARM, TRACED = 200, 60, 120
MIB = 2**20


def test_memory_is_flat_over_200_checkpoints(tmp_path):
    shards = write_set(tmp_path / "shards", photos(30))  # 20 to train on: 2 steps an epoch
    recipe = with_overrides(load("small"), SETTINGS | {"train.epochs": CHECKPOINTS / 2, "train.checkpoint_every": 0.5})
    process, resident, allocated = psutil.Process(), [], []

    def keep(write, *_):
        if len(resident) % 20 == 0:
            write(tmp_path / "checkpoint")
            gc.collect()
        resident.append(process.memory_info().rss)
        allocated.append(tracemalloc.get_traced_memory()[0])
        if len(resident) == TRACED:  # it makes everything slower
            tracemalloc.start()

    try:
        train(recipe, shards, device=torch.device("cpu"), on_log=lambda *_: None, on_checkpoint=keep)
    finally:
        tracemalloc.stop()
    assert len(resident) == CHECKPOINTS
    for values, warm, bound in ((resident, WARM, 8 * MIB), (allocated, TRACED + 20, 0.1 * MIB)):
        early, late = (statistics.median(part) for part in (values[warm : warm + 20], values[-20:]))
        assert late - early < bound, [round(value / MIB, 2) for value in values[::10]]


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("batch", [4, 8, 16])  # a part of a mix, a mix, two of them
def test_reader_holds_few_mixes_and_batches(tmp_path, monkeypatch, batch, pixels):
    """Rows in memory while nothing is taken, and while all of it is. Would catch: a mix or a batch that is kept."""
    shards = write_set(tmp_path / "shards", photos(96), rows_per_group=4)  # 64 to train on: 16 row groups, 8 mixes
    alive, most = 0, 0
    lock = threading.RLock()

    def count(change: int) -> None:
        nonlocal alive, most
        with lock:
            alive += change
            most = max(most, alive)

    def counted(shape, dtype):
        found = new_array(shape, dtype)
        if len(shape) > 1 and shape[1:] == shards.layout.shape(1):
            count(shape[0])
            weakref.finalize(found.base, count, -shape[0])  # what slices of it keep alive
        return found

    monkeypatch.setattr("pipeline.shards.mixes.new_array", counted)
    monkeypatch.setattr("pipeline.shards.pages.new_array", counted)  # copies
    ahead, threads, mix = 3, 2, 2 * 4
    reader = Reader(
        shards, "train", batch=batch, window=32, flip=True, mix_groups=2, ahead=ahead, threads=threads, pixels=pixels
    )
    taken = reader.epoch(0)
    next(taken)
    time.sleep(0.5)  # the threads go as far as they can
    waiting = alive
    bound = 2 * mix + (ahead + 2 + (threads + 1) * pixels) * batch + mix
    assert waiting <= bound
    assert pixels or waiting >= 2 * mix  # pixels may all be made by now, and the mixes gone
    assert sum(int(each.weight.sum()) for each in taken) == 64 - batch
    assert waiting <= most <= bound
    del taken
    gc.collect()
    assert alive == 0
