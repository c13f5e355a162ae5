"""Memory stays flat while training goes on, and what the reader holds is bounded."""

import gc
import statistics
import tracemalloc

import psutil
import torch
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
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


def test_reader_holds_two_mixes_and_few_batches(tmp_path):
    """Row groups that are alive while nothing is taken, and while all of it is: never more than the two mixes."""
    from pipeline.shards import row_groups

    shards = write_set(tmp_path / "shards", photos(96), rows_per_group=4)  # 64 to train on: 16 row groups
    alive, most = 0, 0
    real = row_groups.read_group

    class Kept(dict):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def read_group(*arguments):
        nonlocal alive, most
        rows, labels, levels = real(*arguments)
        alive += 1
        most = max(most, alive)
        return rows, labels, Kept(levels)

    row_groups.read_group = read_group
    try:
        reader = Reader(shards, "train", batch=4, window=32, flip=True, mix_groups=2, ahead=2, threads=2)
        seen = sum(int(batch.weight.sum()) for batch in reader.epoch(0))
    finally:
        row_groups.read_group = real
    assert seen == 64
    # and of the mix before, what the batches that are being cut still look at
    assert 4 <= most <= 3 * 2
    gc.collect()
    assert alive == 0
