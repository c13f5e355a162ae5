"""The training reader: batches of random windows from a shard set, in a reproducible order. No Ray in here.

The order of an epoch depends only on (seed, epoch, batch, streams). The row groups of the split are permuted,
concatenated and divided into `streams` contiguous chunks. Within a chunk, the rows of a few row groups at a time are
shuffled (a *mix*). A global batch takes the same number of rows from every chunk, and is divided among the ranks. Thus,
with the same `streams`, any number of ranks sees the same global batches, and a run resumed in the middle of an epoch
continues with the batches that it would have seen.

Batches hold whole rows; their windows are cut where they are used (`wavemim.inputs.haar_windows`), on a GPU if there is one.
Cut here, row by row, threads would wait for each other: only one of them can run Python at a time.

Threads read row groups into mixes ahead of the consumer, with bounded memory: for each stream of this rank the current mix and
the next one, and the rows of the batches that wait. These are `ahead` + 2 finished ones, and `threads` + 1 unfinished ones if
batches are of pixels or for a GPU. A batch whose rows lie in one mix is a slice, which keeps the whole mix in memory; others are
copies. Each thread also has a row group. With the defaults (8 groups of 64 rows), a mix of 256-pixel images takes 98 MiB.

Dimensions: B rows of a batch.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.shards.batches import Batch, read_ahead
from pipeline.shards.mixes import Mix, Span, joined
from pipeline.shards.row_groups import RowGroups, read_patiently, stored_bytes
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.windows import PixelWindows, checked_levels
from wavemim.inputs import Crop
from wavemim.randomness import uniform


@dataclass(frozen=True)
class _Order:
    """One stream's part of the order of an epoch: n row groups, of which `size` at a time are shuffled together."""

    groups: np.ndarray  # (n,), int64: indices of the row groups
    low: np.ndarray  # (n,), int64: their first rows
    high: np.ndarray  # (n,), int64: their end rows
    size: int
    first: int  # number of its first mix in the epoch, over all streams

    def ends(self) -> np.ndarray:
        """Rows up to the end of each mix (mixes,), int64."""
        starts = np.arange(0, len(self.groups), self.size)
        return np.cumsum(np.add.reduceat(self.high - self.low, starts)) if len(starts) else starts

    def parts(self, mix: int) -> list[tuple[int, int, int]]:
        """(index of the row group, first row, end row) of each row group of a mix."""
        part = slice(mix * self.size, (mix + 1) * self.size)
        return list(zip(self.groups[part].tolist(), self.low[part].tolist(), self.high[part].tolist(), strict=True))


class Reader:
    """Reads a split for training.

    Attributes:
        bytes_read: Bytes of row groups read so far, as they are stored.
    """

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
        """Prepare to read a split.

        Args:
            shards: The shard set.
            split: "train" or "val".
            batch: Rows in a global batch, over all ranks; each rank gets batch/world rows, rounded up.
            rank: Index of this rank.
            world: Number of ranks.
            seed: Decides the order, the windows and the mirroring.
            window: Side of the windows in pixels of the stored images.
            flip: Whether half of the windows are mirrored horizontally.
            mix_groups: Row groups that are shuffled together.
            finest: The finest level to read. Images then have 1/2^(finest-1) of the window's side.
            pixels: Whether batches hold 8-bit pixels instead of coefficients (Haar only).
            streams: Number of chunks of the order; by default one per rank. A run resumed with another `world` keeps
                it.
            ahead: Finished batches read ahead.
            threads: Threads that read, and make pixels.
            pin: Whether batches are in pinned memory, for a GPU.
        """
        self.shards, self.split, self.batch, self.rank, self.world = shards, split, batch, rank, world
        self.seed, self.window, self.flip, self.mix_groups = seed, window, flip, mix_groups
        self.ahead, self.threads, self.pin = ahead, threads, pin
        self.levels = checked_levels(shards, finest, window)
        assert not pixels or shards.layout.windows, shards.layout.wavelet
        self._pixel_windows = PixelWindows(shards, self.levels, window) if pixels else None
        self.streams = world if streams is None else streams
        self.rows = shards.rows[split]
        assert 0 <= rank < world, (rank, world)
        assert 0 < batch <= self.rows, f"a batch of {batch} out of {self.rows} rows: clip it"
        assert batch % self.streams == 0 and self.streams <= self.rows, (batch, self.streams, self.rows)
        self._groups = RowGroups(shards, split)
        self.bytes_read = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch, the same for every rank. The last batch may be padded with rows of weight 0."""
        return -(-self.rows // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """Iterate over one epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: Index of the first batch.

        Returns:
            The batches of this rank, read ahead by threads that end with the generator.

        Raises:
            UnreadableError: A row group could not be read, even after several attempts.
        """
        return read_ahead(self._batches(epoch, start), self.ahead)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        take = self.batch // self.streams
        per_rank = -(-self.batch // self.world)
        # This rank's positions in a global batch; some exceed it if batch is not divisible by world.
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        parts = [
            (stream, max(mine.start, stream * take), min(mine.stop, (stream + 1) * take))
            for stream in range(self.streams)
            if max(mine.start, stream * take) < min(mine.stop, (stream + 1) * take)
        ] or [(self.streams - 1, self.batch, self.batch)]
        bounds = self._bounds()
        orders = self._orders(epoch, bounds, [stream for stream, _, _ in parts])
        pending: collections.deque[Future[Batch]] = collections.deque()
        ended = threading.Event()
        with ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="shards") as pool:
            try:
                streams = {stream: _Stream(self, order, epoch, pool, ended) for stream, order in orders.items()}
                for k in range(start, self.batches_per_epoch):
                    total = float(np.clip(np.diff(bounds) - k * take, 0, take).sum())
                    spans = [
                        span
                        for stream, low, high in parts
                        for span in streams[stream].rows(k * take + low - stream * take, high - low)
                    ]
                    if (missing := per_rank - sum(last - first for _, first, last, _ in spans)) > 0:
                        mix, _, end, _ = spans[-1] if spans else streams[parts[-1][0]].rows(k * take, 1)[0]
                        spans += [(mix, end - 1, end, 0.0)] * missing
                    if self._pixel_windows is None and not self.pin:  # a slice, or a copy of a few
                        yield self._batch(epoch, spans, total)
                        continue
                    pending.append(pool.submit(self._batch, epoch, spans, total))
                    if len(pending) > self.threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _bounds(self) -> np.ndarray:
        """Rows of an epoch before each stream, and those of all (streams + 1,), int64."""
        return np.array([stream * self.rows // self.streams for stream in range(self.streams + 1)], np.int64)

    def _orders(self, epoch: int, bounds: np.ndarray, streams: Iterable[int]) -> dict[int, _Order]:
        """The order of an epoch in some of its streams: a rank needs its own only, of very many on a large cluster."""
        order = _permutation(self.seed, "groups", epoch, len(self._groups))
        rows = self._groups.rows[order]
        ends = np.cumsum(rows)
        begins = ends - rows
        first, last = np.searchsorted(ends, bounds[:-1], "right"), np.searchsorted(begins, bounds[1:], "left")
        mixes = -(-(last - first) // self.mix_groups)
        number = np.cumsum(mixes) - mixes
        found = {}
        for stream in streams:
            part = slice(int(first[stream]), int(last[stream]))
            low = np.maximum(bounds[stream] - begins[part], 0)
            high = np.minimum(bounds[stream + 1], ends[part]) - begins[part]
            found[stream] = _Order(order[part], low, high, self.mix_groups, int(number[stream]))
        return found

    def _batch(self, epoch: int, spans: list[Span], total: float) -> Batch:
        """Make a batch of rows of mixes, and draw their windows."""
        rows = np.concatenate([mix.content[0][first:last] for mix, first, last, _ in spans])
        labels = np.concatenate([mix.content[1][first:last] for mix, first, last, _ in spans])
        weights = np.repeat([weight for *_, weight in spans], [last - first for _, first, last, _ in spans])
        row, weight = torch.from_numpy(rows), torch.from_numpy(weights.astype(np.float32))
        unit = 2**self.shards.levels
        places = (self.shards.image_size - self.window) // unit + 1
        draws = uniform(self.seed, "window", epoch, row, 3).numpy().astype(np.float64)
        corners = np.floor(draws[:, :2] * places).astype(np.int64) * unit
        mirrored = (draws[:, 2] < 0.5) & self.flip
        pixels, levels, crop = None, dict[int, torch.Tensor](), None
        if self._pixel_windows:
            sources = [(mix.content, i) for mix, first, last, _ in spans for i in range(first, last)]
            pixels = self._pixel_windows(sources, corners, mirrored)
        else:
            levels = {level: torch.from_numpy(joined(spans, level)) for level in self.levels}
            if self.flip or self.window < self.shards.image_size or not self.shards.layout.windows:
                crop = Crop(torch.from_numpy(corners), torch.from_numpy(mirrored), self.window)
        if self.pin:  # a GPU copies from pinned memory asynchronously
            row, weight = row.pin_memory(), weight.pin_memory()
            levels = {level: values.pin_memory() for level, values in levels.items()}
        return Batch(
            rows=row,
            weight=weight,
            total=total,
            levels=levels,
            labels=torch.from_numpy(labels),
            crop=crop,
            pixels=pixels,
        )


class _Stream:
    """One chunk of an epoch: finds the rows at any position, and reads the next mix while the current one is used."""

    def __init__(
        self, reader: Reader, order: _Order, epoch: int, pool: ThreadPoolExecutor, ended: threading.Event
    ) -> None:
        self._reader, self._order, self._epoch, self._pool, self._ended = reader, order, epoch, pool, ended
        self._ends = order.ends()
        self._reading: dict[int, tuple[Mix, list[Future[None]]]] = {}
        self._current: tuple[int, Mix] | None = None

    def rows(self, first: int, count: int) -> list[Span]:
        """Rows at positions from `first`; beyond the end, the last row with weight 0."""
        last = int(self._ends[-1]) - 1
        chosen: list[Span] = []
        place, end = first, first + count
        while place < end:
            at = min(place, last)
            mix = int(np.searchsorted(self._ends, at, "right"))
            begin = int(self._ends[mix - 1]) if mix else 0
            weight = float(place <= last)
            upto = min(end, int(self._ends[mix])) if weight else place + 1
            chosen.append((self._mix(mix), at - begin, at - begin + upto - place, weight))
            place = upto
        return chosen

    def _mix(self, number: int) -> Mix:
        """A mix, complete."""
        if self._current is None or self._current[0] != number:
            self._current = None
            self._start(number)
            # Before this mix is complete, so that no thread is idle while the last row groups of it are read.
            self._start(number + 1)
            mix, parts = self._reading.pop(number)
            for part in parts:
                part.result()
            reader = self._reader
            reader.bytes_read += sum(
                stored_bytes(reader.shards, *reader._groups[group][:2], reader.levels)
                for group, _, _ in self._order.parts(number)
            )
            self._current = (number, mix)
        return self._current[1]

    def _start(self, number: int) -> None:
        """Begin to read a mix, unless that has begun, or there is no such mix."""
        if number in self._reading or number >= len(self._ends):
            return
        reader, parts = self._reader, self._order.parts(number)
        starts = np.cumsum([0, *(high - low for _, low, high in parts)]).tolist()
        order = _permutation(reader.seed, f"mix {self._order.first + number}", self._epoch, starts.pop())
        mix = Mix(reader.shards.layout, reader.levels, order)
        jobs = [self._pool.submit(self._read, mix, first, *part) for first, part in zip(starts, parts, strict=True)]
        self._reading[number] = mix, jobs

    def _read(self, mix: Mix, first: int, group: int, low: int, high: int) -> None:
        """Read a row group into a mix."""
        reader = self._reader
        file, number, _ = reader._groups[group]
        mix.put(first, read_patiently(reader.shards, file, number, reader.levels, self._ended), low, high)


def _permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """A random permutation (count,) by sorting random keys, so that it does not depend on versions of libraries."""
    keys = uniform(seed, purpose, epoch, torch.arange(count), 2).numpy()
    return np.lexsort((keys[:, 1], keys[:, 0]))
