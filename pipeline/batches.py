"""The training reader: batches of windows out of a shard set, in an order that is a pure function. No Ray in here.

The order of an epoch depends on (seed, epoch, batch, streams) alone. The row groups of the split are permuted,
concatenated and cut into `streams` contiguous chunks; within a chunk rows are mixed over a few row groups at a time; a
global batch takes the same number of rows from every chunk. Ranks share each global batch out among them, so that with
the same `streams` any number of ranks sees the same global batches, and a run goes on in the middle of an epoch with
what it would have seen.

Threads read row groups and cut batches ahead of the consumer. What they hold is bounded: in every stream of this rank
the mix in use, the next one, and of the one before what batches that are being cut still look at, so
3 · mix_groups · rows_per_group rows at most; and over all streams `threads` + 1 batches being cut and `ahead` + 2
finished ones. With the defaults (8 groups of 64 rows) a mix of 256-px images is 98 MiB, at most 293 MiB a stream; of
64-px images 18 MiB.

Letters of shapes: B rows, C channels, K bands, h × w cells of a level's window.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.shard_retries import read_patiently
from pipeline.shards import ShardSet, read_group, stored_bytes
from wavemim.inputs import Crop
from wavemim.integer_haar import HaarPixels
from wavemim.randomness import uniform
from wavemim.wavelets import bands_of

Item = TypeVar("Item")
Group = tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]  # row (n,), label (n,), level -> (n, C, K, h, w)
Pick = tuple[Group, int, float]  # row group, row in it, weight


@dataclass
class Batch:
    """One rank's part of a global batch. Rows of weight 0 only fill it up and count for nothing."""

    rows: torch.Tensor  # int64 (B,): the column `row`
    weight: torch.Tensor  # float32 (B,)
    total: float  # sum of the weights over all ranks
    levels: dict[int, torch.Tensor]  # level -> stored integers (B, C, K, h, w): windows, or whole where crop is given
    labels: torch.Tensor  # int64 (B,), -1 for none
    crop: Crop | None = None  # windows still to be cut (wavelets other than Haar)
    pixels: torch.Tensor | None = None  # uint8 (B, C, H, W), in place of levels, where the reader was asked for them


@dataclass(frozen=True)
class _Mix:
    """Row groups mixed with each other: (group, first row, end row) of each part, and the order of their rows."""

    parts: tuple[tuple[int, int, int], ...]
    rows: int
    number: int  # within the epoch, over all streams


class Reader:
    """Reads a split for training. `batch` is the global batch; every rank gets batch/world rows of it, rounded up."""

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        window: int,
        flip: bool,
        mix_groups: int = 8,
        finest: int = 1,
        pixels: bool = False,
        streams: int | None = None,
        ahead: int = 4,
        threads: int = 2,
        pin: bool = False,
    ) -> None:
        """`pin`: batches lie in pinned memory, for a GPU. `pixels`: batches hold 8-bit images in place of coefficients, for what needs none (Haar only).

        `window`: side in pixels of the stored images. `finest`: levels below it are not read: images are then
        1/2^(finest-1) of the window's side, out of fewer bytes. `streams`: chunks of the order, by default one a rank;
        a restart with another `world` keeps the first one's."""
        self.shards, self.split, self.batch, self.rank, self.world = shards, split, batch, rank, world
        self.seed, self.window, self.flip, self.mix_groups = seed, window, flip, mix_groups
        self.ahead, self.threads, self.pin = ahead, threads, pin
        self.levels = _checked_levels(shards, finest, window)
        assert not pixels or shards.layout.windows, shards.layout.wavelet
        self._inverse = _Inverse(shards, self.levels, window) if pixels else None
        self.streams = world if streams is None else streams
        self.rows = shards.rows[split]
        assert 0 <= rank < world, (rank, world)
        assert 0 < batch <= self.rows, f"a batch of {batch} out of {self.rows} rows: clip it"
        assert batch % self.streams == 0 and self.streams <= self.rows, (batch, self.streams, self.rows)
        self._groups = _groups(shards, split)
        self.bytes_read = 0  # of row groups, as they are stored: since it was made

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch, the same for every rank; the last one may be filled up with rows of weight 0."""
        return -(-self.rows // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batches of one epoch from batch `start` on, read ahead by threads that end with the generator."""
        return _read_ahead(self._batches(epoch, start), self.ahead)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        mixes = self._mixes(epoch)
        take = self.batch // self.streams
        per_rank = -(-self.batch // self.world)
        # This rank's places in a global batch; beyond the end only where batch/world leaves a rest.
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        parts = [
            (stream, max(mine.start, stream * take), min(mine.stop, (stream + 1) * take))
            for stream in range(self.streams)
            if max(mine.start, stream * take) < min(mine.stop, (stream + 1) * take)
        ] or [(self.streams - 1, self.batch, self.batch)]
        sizes = [sum(mix.rows for mix in stream) for stream in mixes]
        pending: collections.deque[Future[Batch]] = collections.deque()
        ended = threading.Event()
        with ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="shards") as pool:
            try:
                streams = {stream: _Stream(self, mixes[stream], epoch, pool, ended) for stream, _, _ in parts}
                for k in range(start, self.batches_per_epoch):
                    total = float(sum(min(max(size - k * take, 0), take) for size in sizes))
                    picks = [
                        pick
                        for stream, low, high in parts
                        for pick in streams[stream].rows(k * take + low - stream * take, high - low)
                    ]
                    if len(picks) < per_rank:
                        group, i, _ = picks[-1] if picks else streams[parts[-1][0]].rows(k * take, 1)[0]
                        picks += [(group, i, 0.0)] * (per_rank - len(picks))
                    pending.append(pool.submit(self._batch, epoch, picks, total))
                    if len(pending) > self.threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _mixes(self, epoch: int) -> list[list[_Mix]]:
        """The epoch's plan: for every stream the row groups that are mixed with each other, one mix after another."""
        order = _permutation(self.seed, "groups", epoch, len(self._groups))
        ends = np.cumsum([self._groups[group][2] for group in order])
        plan: list[list[_Mix]] = []
        number = 0
        for stream in range(self.streams):
            low, high = stream * self.rows // self.streams, (stream + 1) * self.rows // self.streams
            parts = []
            for place in range(int(np.searchsorted(ends, low, "right")), len(order)):
                begin = int(ends[place]) - self._groups[order[place]][2]
                if begin >= high:
                    break
                parts.append((int(order[place]), max(low - begin, 0), min(high, int(ends[place])) - begin))
            mixes = []
            for i in range(0, len(parts), self.mix_groups):
                chosen = tuple(parts[i : i + self.mix_groups])
                mixes.append(_Mix(chosen, sum(end - begin for _, begin, end in chosen), number))
                number += 1
            plan.append(mixes)
        return plan

    def _batch(self, epoch: int, picks: list[Pick], total: float) -> Batch:
        """Cut the windows of the chosen rows into new arrays."""
        rows = torch.tensor([int(group[0][i]) for group, i, _ in picks], dtype=torch.int64)
        unit = 2**self.shards.levels
        places = (self.shards.image_size - self.window) // unit + 1
        draws = uniform(self.seed, "window", epoch, rows, 3).numpy().astype(np.float64)
        corners = np.floor(draws[:, :2] * places).astype(np.int64) * unit
        mirrored = (draws[:, 2] < 0.5) & self.flip
        sources = [(group, i) for group, i, _ in picks]
        pixels = self._inverse(sources, corners, mirrored) if self._inverse else None
        levels, crop = (
            ({}, None) if self._inverse else _windows(self.shards, sources, self.levels, corners, self.window, mirrored)
        )
        weight = torch.tensor([weight for _, _, weight in picks], dtype=torch.float32)
        if self.pin:  # a GPU fetches from such memory by itself
            rows, weight = rows.pin_memory(), weight.pin_memory()
            levels = {level: values.pin_memory() for level, values in levels.items()}
        return Batch(
            rows=rows,
            weight=weight,
            total=total,
            levels=levels,
            labels=torch.tensor([int(group[1][i]) for group, i, _ in picks], dtype=torch.int64),
            crop=crop,
            pixels=pixels,
        )


class _Stream:
    """One chunk of an epoch: gives the rows at any place, and reads the next mix while this one is used."""

    def __init__(
        self, reader: Reader, mixes: list[_Mix], epoch: int, pool: ThreadPoolExecutor, ended: threading.Event
    ) -> None:
        self._reader, self._mixes, self._epoch, self._pool, self._ended = reader, mixes, epoch, pool, ended
        self._ends = np.cumsum([mix.rows for mix in mixes])
        self._reading: dict[int, list[Future[Group]]] = {}
        self._current: tuple[int, list[tuple[Group, int]]] = (-1, [])

    def rows(self, first: int, count: int) -> list[Pick]:
        """(row group, row in it, weight) at places first … first + count - 1; the last row, weight 0, beyond the end."""
        last = int(self._ends[-1]) - 1
        chosen = []
        for place in range(first, first + count):
            at = min(place, last)
            mix = int(np.searchsorted(self._ends, at, "right"))
            group, i = self._mixed(mix)[at - int(self._ends[mix]) + self._mixes[mix].rows]
            chosen.append((group, i, float(place <= last)))
        return chosen

    def _mixed(self, mix: int) -> list[tuple[Group, int]]:
        if self._current[0] != mix:
            self._start(mix)
            groups = [future.result() for future in self._reading.pop(mix)]
            self._reader.bytes_read += sum(
                stored_bytes(self._reader.shards, *self._reader._groups[group][:2], self._reader.levels)
                for group, _, _ in self._mixes[mix].parts
            )
            self._start(mix + 1)
            parts = self._mixes[mix].parts
            rows = [(g, i) for g, (_, low, high) in zip(groups, parts, strict=True) for i in range(low, high)]
            order = _permutation(self._reader.seed, f"mix {self._mixes[mix].number}", self._epoch, len(rows))
            self._current = (mix, [rows[i] for i in order])
        return self._current[1]

    def _start(self, mix: int) -> None:
        if mix in self._reading or mix >= len(self._mixes):
            return
        reader = self._reader
        places = [reader._groups[group][:2] for group, _, _ in self._mixes[mix].parts]
        self._reading[mix] = [
            self._pool.submit(read_patiently, reader.shards, file, group, reader.levels, self._ended)
            for file, group in places
        ]


def sequential(
    shards: ShardSet,
    split: str,
    batch: int,
    *,
    window: int,
    max_rows: int | None = None,
    finest: int = 1,
    pixels: bool = False,
    part: tuple[int, int] = (0, 1),
    ahead: int = 4,
) -> Generator[Batch, None, None]:
    """Batches for evaluation: rows in the order of the files, the middle window, no mirroring, a smaller last batch.

    The corner of the middle window is the multiple of 2^levels nearest to the true one from below. `part`: (number,
    parts), so that several workers share these rows, `max_rows` from all over the split, out among them, every row to
    one of them.
    """
    levels = _checked_levels(shards, finest, window)
    inverse = _Inverse(shards, levels, window) if pixels else None
    groups = _some_groups(shards, split, max_rows)[part[0] :: part[1]]
    return _read_ahead(_sequential(shards, groups, batch, window, None, levels, inverse), ahead)


def positions_of_part(shards: ShardSet, split: str, part: tuple[int, int], max_rows: int | None = None) -> np.ndarray:
    """Places, in the order of the files, of the rows that `sequential` gives of this part: int64, ascending."""
    groups = _some_groups(shards, split, max_rows)
    ends = np.cumsum([rows for _, _, rows in groups])
    places = [np.arange(end - rows, end) for end, (_, _, rows) in zip(ends, groups, strict=True)]
    return np.concatenate(places[part[0] :: part[1]] or [np.zeros(0, np.int64)])


def chosen_evenly(places: np.ndarray, count: int, total: int) -> np.ndarray:
    """Which of `places` are among `count` of `total` that lie evenly: bool. Such a place is the
    `place * count // total`-th of them, from 0."""
    count = min(count, total)
    return np.asarray(places * count // total > (places - 1) * count // total)


def _some_groups(shards: ShardSet, split: str, max_rows: int | None) -> list[tuple[str, int, int]]:
    """As `_groups`, of `max_rows` rows alone, from all over the split: the first ones may be of a few classes."""
    groups = _groups(shards, split)
    if max_rows is None or max_rows >= shards.rows[split]:
        return groups
    enough = min(len(groups), -(-max_rows * len(groups) // shards.rows[split]))
    first = chosen_evenly(np.arange(len(groups)), enough, len(groups))
    kept, left = [], max_rows
    for index in [*np.flatnonzero(first), *np.flatnonzero(~first)]:  # the others where a chosen one has few rows
        if left <= 0:
            break
        file, number, rows = groups[index]
        kept.append((index, (file, number, min(rows, left))))
        left -= rows
    return [group for _, group in sorted(kept)]


def _sequential(
    shards: ShardSet,
    groups: list[tuple[str, int, int]],
    batch: int,
    window: int,
    max_rows: int | None,
    levels: list[int],
    inverse: _Inverse | None,
) -> Iterator[Batch]:
    unit = 2**shards.levels
    corner = (shards.image_size - window) // 2 // unit * unit
    rows_of_groups = sum(rows for _, _, rows in groups)
    left = rows_of_groups if max_rows is None else min(max_rows, rows_of_groups)
    pending: list[tuple[Group, int]] = []
    for file, number, rows in groups:
        if left <= 0:
            break
        group = read_group(shards, file, number, levels)
        pending += [(group, i) for i in range(min(rows, left))]
        left -= rows
        while len(pending) >= batch or (pending and left <= 0):
            chosen, pending = pending[:batch], pending[batch:]
            count = len(chosen)
            corners, mirrored = np.full((count, 2), corner), np.zeros(count, bool)
            cut, crop = ({}, None) if inverse else _windows(shards, chosen, levels, corners, window, mirrored)
            yield Batch(
                rows=torch.tensor([int(source[0][i]) for source, i in chosen], dtype=torch.int64),
                weight=torch.ones(count),
                total=float(count),
                levels=cut,
                labels=torch.tensor([int(source[1][i]) for source, i in chosen], dtype=torch.int64),
                crop=crop,
                pixels=inverse(chosen, corners, mirrored) if inverse else None,
            )


def split_bytes(shards: ShardSet, split: str, max_rows: int | None = None, *, finest: int = 1) -> int:
    """What `sequential` takes from the disk or the network for so many rows: row groups as they are stored."""
    levels = range(finest, shards.levels + 1)
    return sum(stored_bytes(shards, file, number, levels) for file, number, _ in _some_groups(shards, split, max_rows))


class _Inverse:
    """Windows as 8-bit images, straight from the row groups; one transform a thread, since it keeps its arrays."""

    def __init__(self, shards: ShardSet, levels: Sequence[int], window: int) -> None:
        self._channels, self._side = shards.channels, window >> (levels[0] - 1)
        self._steps = {level: shards.steps[level] for level in levels}
        self._window = window
        self._own = threading.local()

    def __call__(self, sources: list[tuple[Group, int]], corners: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        """uint8 (B, C, H, W) of the rows `sources`, with corners (B, 2) in pixels of level 0 and mirrored (B,)."""
        if not hasattr(self._own, "transform"):
            self._own.transform = HaarPixels(self._channels, self._window, self._steps)
        images = np.empty((len(sources), self._channels, self._side, self._side), np.uint8)
        for b, ((_, _, pyramid), i) in enumerate(sources):
            top, left = corners[b].tolist()
            cut = {}
            for level in self._steps:
                rows, columns = (slice(at >> level, (at + self._window) >> level) for at in (top, left))
                cut[level] = pyramid[level][i, :, :, rows, columns]
            self._own.transform(cut, out=images[b])
            if mirrored[b]:
                images[b] = images[b, ..., ::-1].copy()
        return torch.from_numpy(images)


def _windows(
    shards: ShardSet,
    sources: list[tuple[Group, int]],
    levels: Sequence[int],
    corners: np.ndarray,
    window: int,
    mirrored: np.ndarray,
) -> tuple[dict[int, torch.Tensor], Crop | None]:
    """Windows (B, C, K, h, w) a level of the rows `sources`, with corners (B, 2) in pixels and mirrored (B,).

    As `wavemim.wavelets.window`, but straight into the batch's memory: mirroring reverses the columns and changes the
    sign of V and D. Where the wavelet does not allow it: whole levels, and the windows that are to be cut. In numpy
    alone: torch would start its own threads in each of the reader's, and they would wait for each other.
    """
    whole = not shards.layout.windows
    out: dict[int, torch.Tensor] = {}
    for level in levels:
        side = (shards.image_size if whole else window) >> level
        cells = (0 * corners if whole else corners >> level).tolist()
        shape = (len(sources), shards.channels, len(bands_of(level, shards.levels)), side, side)
        values = np.empty(shape, shards.layout.dtype(level))
        for b, ((_, _, pyramid), i) in enumerate(sources):
            top, left = cells[b]
            cut = pyramid[level][i, :, :, top : top + side, left : left + side]
            if mirrored[b] and not whole:
                np.copyto(values[b], cut[..., ::-1])
                np.negative(values[b, :, -2:], out=values[b, :, -2:])
            else:
                np.copyto(values[b], cut)
        out[level] = torch.from_numpy(values)
    crop = Crop(torch.from_numpy(corners.copy()), torch.from_numpy(mirrored.copy()), window) if whole else None
    return out, crop


def _checked_levels(shards: ShardSet, finest: int, window: int) -> list[int]:
    assert 1 <= finest <= shards.levels, (finest, shards.levels)
    assert 0 < window <= shards.image_size and window % 2**shards.levels == 0, (window, shards.image_size)
    return list(range(finest, shards.levels + 1))


def _groups(shards: ShardSet, split: str) -> list[tuple[str, int, int]]:
    """(file, row group, rows) of every row group of a split, in the order of the files."""
    size = shards.rows_per_group
    return [
        (file, number, min(size, rows - number * size))
        for file, rows in shards.files(split)
        for number in range(-(-rows // size))
    ]


def _permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """A random order of 0 … count - 1, by sorting random keys: the same with every version of every library."""
    keys = uniform(seed, purpose, epoch, torch.arange(count), 2).numpy()
    return np.lexsort((keys[:, 1], keys[:, 0]))


def _read_ahead(items: Iterator[Item], ahead: int) -> Generator[Item, None, None]:
    """Iterate `items` in a thread, at most `ahead` of them early. The thread ends when this generator is closed."""
    ready: queue.Queue[tuple[Any, BaseException | None, bool]] = queue.Queue(maxsize=max(ahead, 1))
    stop = threading.Event()

    def put(item: Any, error: BaseException | None, more: bool) -> bool:
        while not stop.is_set():
            try:
                ready.put((item, error, more), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None, True):
                    return
            put(None, None, False)
        except BaseException as error:  # handed to the consumer, whatever it is
            put(None, error, False)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error, more = ready.get()
            if error is not None:
                raise error
            if not more:
                return
            yield item
    finally:
        stop.set()
        thread.join()
