"""The training reader: every row once, the same batches however they are asked for, windows that are exact crops."""

import contextlib
import itertools
import threading
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import pytest
import pywt
import torch
from tiny_shards import LAYOUT, LEVELS, SIDE, photos, write_set

from pipeline.shards.batches import Batch, chosen_evenly, positions_of_part, sequential
from pipeline.shards.errors import ShardError
from pipeline.shards.layout import Layout, PyramidEncoder
from pipeline.shards.reader import Reader
from pipeline.shards.row_groups import RowGroups, read_group
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.windows import reverse_columns
from wavemim.inputs import Inputs, haar_windows
from wavemim.targets import Statistics
from wavemim.wavelets import window

IMAGES = photos(61)  # 41 rows for train, 20 for val
# Rows of the batches of epoch 2 from batch 1 on, by the reader of November 2026: batches of 12 in 3 streams, seed 5.
RECORDED = [
    [27, 81, 23, 21, 33, 71, 35, 31, 17, 57, 9, 11],
    [61, 67, 37, 63, 29, 69, 73, 75, 7, 5, 45, 51],
    [65, 65, 65, 65, 15, 13, 13, 13, 49, 47, 47, 47],
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("shards"), IMAGES)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> ShardSet:
    layout = Layout(SIDE, 3, {level: 2.0**-level for level in range(1, LEVELS + 1)})
    return write_set(tmp_path_factory.mktemp("lossless"), IMAGES, layout)


class CutReader(Reader):
    """Cuts the windows of Haar pyramids, as their users do."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        with contextlib.closing(super().epoch(epoch, start)) as batches:
            for batch in batches:
                if batch.crop is not None and self.shards.layout.windows:
                    batch = replace(batch, levels=haar_windows(batch.levels, batch.crop), crop=None)
                yield batch


def reader(shards: ShardSet, batch: int, **options) -> CutReader:
    return CutReader(shards, "train", **({"batch": batch, "window": 32, "flip": True, "mix_groups": 2} | options))


def assert_same(first: Batch, second: Batch) -> None:
    for name in ("rows", "weight", "labels"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
    assert first.total == second.total and list(first.levels) == list(second.levels)
    for level, values in first.levels.items():
        assert torch.equal(values, second.levels[level])


def join(parts: list[Batch]) -> Batch:
    """The global batch of all ranks' parts."""
    assert len({part.total for part in parts}) == 1
    return Batch(
        rows=torch.cat([part.rows for part in parts]),
        weight=torch.cat([part.weight for part in parts]),
        total=parts[0].total,
        levels={level: torch.cat([part.levels[level] for part in parts]) for level in parts[0].levels},
        labels=torch.cat([part.labels for part in parts]),
    )


SIZES = [
    (batch, world, streams)
    for batch, world, streams in itertools.product((1, 4, 6, 12, 40, 41), (1, 2, 3), (1, 2, 3, 4, 6, 12))
    if batch % streams == 0
]


@pytest.mark.parametrize(("batch", "world", "streams"), SIZES)
def test_every_row_counts_once_in_an_epoch(shards, batch, world, streams):
    readers = [reader(shards, batch, rank=rank, world=world, streams=streams, finest=4) for rank in range(world)]
    seen: list[int] = []
    batches = 0
    for parts in zip(*(one.epoch(0) for one in readers), strict=True):
        whole = join(list(parts))
        filled = world * -(-batch // world)
        assert whole.rows.shape == (filled,) and whole.levels[4].shape == (filled, 3, 4, 2, 2)
        assert len({len(part.rows) for part in parts}) == 1
        assert whole.total == whole.weight.sum()
        seen += whole.rows[whole.weight == 1].tolist()
        batches += 1
    assert sorted(seen) == [2 * i + 5 for i in range(41)]
    assert batches == readers[0].batches_per_epoch == -(-41 // batch)


def test_the_order_changes_with_epoch_and_seed_and_mixes_files_rows(shards):
    orders = [
        [row for batch in reader(shards, 8, seed=seed).epoch(epoch) for row in batch.rows.tolist()]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])
    # Rows of at least two row groups in the first batch.
    assert len({(row - 5) // 2 // 4 for row in orders[0][:8]}) > 1


@pytest.mark.parametrize("streams", [1, 2])
def test_starting_late_gives_the_same_batches(shards, streams):
    one = reader(shards, 6, streams=streams)
    whole = list(one.epoch(3))
    for start in range(one.batches_per_epoch + 1):
        rest = list(one.epoch(3, start))
        assert len(rest) == len(whole) - start
        for first, second in zip(whole[start:], rest, strict=True):
            assert_same(first, second)


def kept(batch: Batch) -> Batch:
    """Without the rows that only fill up."""
    chosen = batch.weight > 0
    levels = {level: values[chosen] for level, values in batch.levels.items()}
    return Batch(batch.rows[chosen], batch.weight[chosen], batch.total, levels, batch.labels[chosen])


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_another_number_of_ranks_sees_the_same_global_batches(shards, world):
    alone = reader(shards, 8, streams=4).epoch(1)
    ranks = [reader(shards, 8, rank=rank, world=world, streams=4).epoch(1) for rank in range(world)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert_same(kept(whole), kept(join(list(parts))))


@pytest.mark.parametrize(("before", "after"), [(4, 3), (2, 5), (1, 4)])
def test_a_restart_with_other_ranks_reads_the_rest_of_the_epoch_and_nothing_twice(shards, before, after):
    def rows(world, start, stop):
        ranks = [reader(shards, 8, rank=r, world=world, streams=before).epoch(0, start) for r in range(world)]
        found = []
        for parts in itertools.islice(zip(*ranks, strict=True), stop - start):
            found += [row for part in parts for row in part.rows[part.weight > 0].tolist()]
        return found

    assert sorted(rows(before, 0, 2) + rows(after, 2, 6)) == [2 * i + 5 for i in range(41)]


def test_a_row_has_its_window_in_whatever_batch_it_is(shards):
    found = []
    for options in ({"batch": 4}, {"batch": 40, "streams": 2, "mix_groups": 5}):
        rows = {}
        for batch in reader(shards, **options).epoch(2):
            for i, row in enumerate(batch.rows.tolist()):
                rows[row] = [values[i] for values in batch.levels.values()]
        found.append(rows)
    for row, levels in found[0].items():
        assert all(torch.equal(a, b) for a, b in zip(levels, found[1][row], strict=True))


@pytest.mark.parametrize("size", [16, 48, 64])
def test_windows_are_the_transform_of_cropped_and_mirrored_images(lossless, size):
    """Search, for every row, the aligned crop whose own transform the batch holds; exactly one has to fit."""
    corners, mirrors = set(), set()
    for batch in reader(lossless, 10, window=size).epoch(0):
        for i, row in enumerate(batch.rows.tolist()):
            image = IMAGES[(row - 5) // 2]
            fits = []
            for top, left in itertools.product(range(0, SIDE - size + 1, 16), repeat=2):
                crop = image[:, top : top + size, left : left + size]
                for flip in (False, True):
                    encoded = PyramidEncoder(Layout(size, 3, lossless.steps)).encode(
                        (crop[..., ::-1] if flip else crop)[None]
                    )
                    if all(
                        np.array_equal(values[0], batch.levels[level][i].numpy()) for level, values in encoded.items()
                    ):
                        fits.append((top, left, flip))
            assert len(fits) == 1
            corners.add(fits[0][:2])
            mirrors.add(fits[0][2])
    assert mirrors == {False, True}
    for side in zip(*corners, strict=True):
        assert set(side) == set(range(0, SIDE - size + 1, 16))


def test_without_flip_nothing_is_mirrored(lossless):
    for batch in reader(lossless, 41, window=SIDE, flip=False).epoch(0):
        wanted = PyramidEncoder(lossless.layout).encode(IMAGES[(batch.rows.numpy() - 5) // 2])
        for level, values in wanted.items():
            np.testing.assert_array_equal(batch.levels[level], values)


def test_whole_rows_are_handed_over_with_the_windows_to_cut(lossless):
    """The same rows, whether they are cut as they are stored or, by PyWavelets' definition, one by one."""
    [batch] = Reader(lossless, "train", batch=41, window=32, flip=True).epoch(0)
    assert batch.crop is not None and batch.crop.size == 32 and 0 < batch.crop.mirrored.sum() < 41
    stored = PyramidEncoder(lossless.layout).encode(IMAGES[(batch.rows.numpy() - 5) // 2])
    before = {level: values.clone() for level, values in batch.levels.items()}
    cut = haar_windows(batch.levels, batch.crop)
    for level, values in stored.items():
        np.testing.assert_array_equal(batch.levels[level], values)
        assert torch.equal(batch.levels[level], before[level])  # not in place: a batch may be used again
        for i, (corner, mirrored) in enumerate(zip(batch.crop.corners.tolist(), batch.crop.mirrored, strict=True)):
            wanted = window(values[i], level, *corner, 32, bool(mirrored))
            np.testing.assert_array_equal(cut[level][i], wanted)
    [plain] = Reader(lossless, "train", batch=41, window=SIDE, flip=False).epoch(0)
    assert plain.crop is None


def test_labels_belong_to_rows(shards):
    for batch in reader(shards, 8).epoch(0):
        assert batch.labels.dtype == batch.rows.dtype == torch.int64
        assert torch.equal(batch.labels, (batch.rows - 5) // 2 % 3)


@pytest.fixture(scope="module")
def smooth(tmp_path_factory) -> ShardSet:
    """Of another wavelet than Haar."""
    layout = Layout(SIDE, 3, dict.fromkeys(range(1, LEVELS + 1), 0.5), "bior2.2")
    return write_set(tmp_path_factory.mktemp("smooth"), IMAGES, layout)


def statistics_of(shards: ShardSet) -> Statistics:
    mean = {level: {band: v["mean"] for band, v in bands.items()} for level, bands in shards.statistics.items()}
    std = {level: {band: v["std"] for band, v in bands.items()} for level, bands in shards.statistics.items()}
    return Statistics(mean, std, [0.0] * 3, [1.0] * 3)


def test_other_wavelets_are_windowed_after_the_inverse(smooth):
    """Image and coefficients of one batch are cut at the same place, out of the (mirrored) whole."""
    inputs = Inputs(smooth.steps, statistics_of(smooth), "bior2.2")
    places, mirrors = set(), set()
    for batch in reader(smooth, 8).epoch(0):
        pixels, pyramid = inputs(batch.levels, batch.crop)
        assert pixels.shape[-2:] == (32, 32) and batch.crop is not None
        for i, row in enumerate(batch.rows.tolist()):
            (top, left), mirrored = batch.crop.corners[i].tolist(), bool(batch.crop.mirrored[i])
            image = IMAGES[(row - 5) // 2].astype(np.float64)
            image = image[..., ::-1] if mirrored else image
            assert np.abs(pixels[i].numpy() - image[:, top : top + 32, left : left + 32]).max() < 2
            bands = pywt.wavedec2(image, "bior2.2", "periodization", LEVELS)
            for level in range(1, LEVELS + 1):
                cells = slice(top >> level, (top + 32) >> level), slice(left >> level, (left + 32) >> level)
                wanted = np.stack(bands[LEVELS + 1 - level], 1)[(..., *cells)]
                assert np.abs(pyramid[level][i, :, -3:].numpy() - wanted).max() < 3
            places.add((top, left))
            mirrors.add(mirrored)
    assert len(places) > 2 and mirrors == {False, True}


@pytest.mark.parametrize("finest", [1, 2, 3])
def test_pixels_on_the_cpu_are_the_images(lossless, finest):
    """Exactly, and at lower resolutions the mean of the pixels below, rounded."""
    inverse = Inputs(lossless.steps, statistics_of(lossless))
    readers = (
        reader(lossless, 8, window=48, **options)
        for options in ({"finest": finest, "pixels": True}, {"finest": finest}, {})
    )
    for images, batch, whole in zip(*(one.epoch(0) for one in readers), strict=True):
        assert torch.equal(batch.rows, whole.rows) and torch.equal(batch.rows, images.rows)
        exact = inverse(whole.levels)[0]
        wanted = torch.nn.functional.avg_pool2d(exact, 2 ** (finest - 1))
        assert (inverse(batch.levels)[0] - wanted).abs().max() < 1e-4
        assert images.pixels is not None and not images.levels
        assert (images.pixels - wanted).abs().max() <= 0.5 + 1e-4


def test_only_the_levels_asked_for_are_read(shards):
    [batch] = reader(shards, 41, finest=2).epoch(0)
    assert {level: (tuple(v.shape), v.dtype) for level, v in batch.levels.items()} == {
        2: ((41, 3, 3, 8, 8), torch.int16),
        3: ((41, 3, 3, 4, 4), torch.int16),
        4: ((41, 3, 4, 2, 2), torch.int16),
    }


def test_sequential_reads_in_the_order_of_the_files(shards):
    batches = list(sequential(shards, "val", 8, window=32))
    assert [len(batch.rows) for batch in batches] == [8, 8, 4]
    assert torch.cat([batch.rows for batch in batches]).tolist() == [2 * i + 5 for i in range(41, 61)]
    whole = PyramidEncoder(LAYOUT).encode(IMAGES[41:])
    for level, values in whole.items():
        low, high = 16 >> level, 48 >> level
        found = torch.cat([batch.levels[level] for batch in batches]).numpy()
        np.testing.assert_array_equal(found, values[..., low:high, low:high])
    assert sum(len(batch.rows) for batch in sequential(shards, "val", 8, window=64, max_rows=9)) == 9
    assert sum(len(batch.rows) for batch in sequential(shards, "val", 64, window=64, max_rows=999)) == 20


def test_a_damaged_shard_reaches_the_consumer(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.shards.row_groups.PAUSES", (0.01,))
    shards = write_set(tmp_path, photos(24))
    file = tmp_path / "train-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ShardError, match=r"train-00000\.parquet is damaged"):
        list(reader(shards, 8).epoch(0))
    with pytest.raises(ShardError, match=r"train-00000\.parquet is damaged"):
        list(sequential(shards, "train", 8, window=32))


def test_closing_ends_the_threads(shards):
    before = set(threading.enumerate())
    batches = reader(shards, 4).epoch(0)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
    assert set(threading.enumerate()) <= before


def test_reading_goes_on_while_a_batch_is_in_use(shards, monkeypatch):
    """Row groups of the next mix are fetched, several at once, before the consumer asks for its second batch."""
    asked, together = [], []
    running = 0
    lock, enough = threading.Lock(), threading.Event()
    both = threading.Barrier(2, timeout=30)

    def slow(shards, name, group, levels):
        nonlocal running
        with lock:
            running += 1
            together.append(running)
            asked.append(group)
            if len(asked) == 4:
                enough.set()
        if len(asked) <= 2:
            both.wait()  # as a far store: the first answer comes when the second has been asked for
        try:
            return read_group(shards, name, group, levels)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr("pipeline.shards.row_groups.read_group", slow)
    batches = reader(shards, 2, mix_groups=2, ahead=1, threads=2).epoch(0)
    next(batches)
    assert enough.wait(30), "the next mix was not read ahead"
    assert max(together) == 2
    batches.close()


def test_a_part_of_a_split_is_from_all_over_it(tmp_path):
    shards = write_set(tmp_path / "sorted", photos(90), rows_per_group=4)
    total = shards.rows["train"]
    for most in (1, 9, 20, total - 1, total, total + 5):
        rows = torch.cat([batch.rows for batch in sequential(shards, "train", 7, window=64, max_rows=most)])
        assert len(rows) == min(most, total) == len(set(rows.tolist()))
        assert len(positions_of_part(shards, "train", (0, 1), most)) == len(rows)
        if 9 <= most < total:  # as far apart as whole row groups allow
            assert rows.min() < total / 4 and rows.max() > total / 2
    chosen = chosen_evenly(np.arange(10), 4, 10)
    assert np.flatnonzero(chosen).tolist() == [0, 3, 5, 8]
    assert (np.flatnonzero(chosen) * 4 // 10).tolist() == [0, 1, 2, 3]
    assert chosen_evenly(np.arange(3), 5, 3).all()


def test_the_order_is_that_of_earlier_versions(shards):
    """Old checkpoints resume with the same data. Would catch: another draw, another division into streams or mixes."""
    found = [batch.rows.tolist() for batch in reader(shards, 12, streams=3, seed=5).epoch(2, start=1)]
    assert found == RECORDED


def test_row_groups_are_those_of_the_files(tmp_path, shards):
    """By plain loops. Would catch: a file with a short last group, the first group of a file, an index too far."""
    files = [{"name": name, "rows": rows} for name, rows in (("a", 9), ("b", 8), ("c", 1))]
    manifest = {**shards.manifest, "rows_per_group": 4, "splits": {"train": {"files": files}, "val": {"files": []}}}
    groups = RowGroups(ShardSet(shards.folder, manifest, shards.layout), "train")
    expected = [("a", 0, 4), ("a", 1, 4), ("a", 2, 1), ("b", 0, 4), ("b", 1, 4), ("c", 0, 1)]
    assert list(groups) == expected == groups[:] and groups[1::2] == expected[1::2] and len(groups) == 6
    assert list(RowGroups(ShardSet(shards.folder, manifest, shards.layout), "val")) == []


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("width", [1, 7, 12, 16, 112])
def test_columns_are_reversed_whatever_their_size_and_alignment(dtype, width):
    values = np.random.default_rng(width).integers(0, 100, (3, 2, 5, width + 9)).astype(dtype)
    for left in (0, 3, 8):
        cut = values[:, :, 1:4, left : left + width]
        out = np.zeros(cut.shape, dtype)
        reverse_columns(cut, out)
        assert np.array_equal(out, cut[..., ::-1])
