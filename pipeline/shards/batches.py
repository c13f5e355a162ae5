"""From row groups of shards to batches: windows, read-ahead and sequential reading."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.shards.shard_set import ShardSet, read_group, read_patiently, stored_bytes
from wavemim.inputs import Crop
from wavemim.integer_haar import HaarPixels
from wavemim.wavelets import bands_of

Item = TypeVar("Item")
Group = tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]  # row (n,), label (n,), level -> (n, C, K, h, w)


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
    patiently: bool = False,
) -> Generator[Batch, None, None]:
    """Batches for evaluation: rows in the order of the files, the middle window, no mirroring, a smaller last batch.

    The corner of the middle window is the multiple of 2^levels nearest to the true one from below. `part`: (number,
    parts), so that several workers share these rows, `max_rows` from all over the split, out among them, every row to
    one of them. `patiently`: rows that cannot be read are tried again for a while, then an UnreadableError is raised.
    """
    levels = checked_levels(shards, finest, window)
    inverse = Inverse(shards, levels, window) if pixels else None
    groups = _some_groups(shards, split, max_rows)[part[0] :: part[1]]
    return read_ahead(_sequential(shards, groups, batch, window, None, levels, inverse, patiently), ahead)


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
    """As `row_groups`, of `max_rows` rows alone, from all over the split: the first ones may be of a few classes."""
    groups = row_groups(shards, split)
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
    inverse: Inverse | None,
    patiently: bool = False,
) -> Iterator[Batch]:
    never = threading.Event()
    unit = 2**shards.levels
    corner = (shards.image_size - window) // 2 // unit * unit
    rows_of_groups = sum(rows for _, _, rows in groups)
    left = rows_of_groups if max_rows is None else min(max_rows, rows_of_groups)
    pending: list[tuple[Group, int]] = []
    for file, number, rows in groups:
        if left <= 0:
            break
        if patiently:
            group = read_patiently(shards, file, number, levels, never)
        else:
            group = read_group(shards, file, number, levels)
        pending += [(group, i) for i in range(min(rows, left))]
        left -= rows
        while len(pending) >= batch or (pending and left <= 0):
            chosen, pending = pending[:batch], pending[batch:]
            count = len(chosen)
            corners, mirrored = np.full((count, 2), corner), np.zeros(count, bool)
            cut, crop = ({}, None) if inverse else draw_windows(shards, chosen, levels, corners, window, mirrored)
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


class Inverse:
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


def draw_windows(
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


def checked_levels(shards: ShardSet, finest: int, window: int) -> list[int]:
    """Levels that are read from `finest` on; the window has to be an exact crop at all of them."""
    assert 1 <= finest <= shards.levels, (finest, shards.levels)
    assert 0 < window <= shards.image_size and window % 2**shards.levels == 0, (window, shards.image_size)
    return list(range(finest, shards.levels + 1))


def row_groups(shards: ShardSet, split: str) -> list[tuple[str, int, int]]:
    """(file, row group, rows) of every row group of a split, in the order of the files."""
    size = shards.rows_per_group
    return [
        (file, number, min(size, rows - number * size))
        for file, rows in shards.files(split)
        for number in range(-(-rows // size))
    ]


def read_ahead(items: Iterator[Item], ahead: int) -> Generator[Item, None, None]:
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
