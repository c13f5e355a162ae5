"""Batches of images: the type, reading in the order of the files, and reading ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.shards.row_groups import Group, RowGroups, read_group, read_patiently, stored_bytes
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.windows import PixelWindows, checked_levels, gathered
from wavemim.inputs import Crop

Item = TypeVar("Item")


@dataclass
class Batch:
    """One rank's part of a global batch, with B rows. Rows of weight 0 are padding.

    Attributes:
        rows: The column `row` (B,), int64.
        weight: Weights (B,), float32.
        total: Sum of the weights over all ranks.
        levels: Stored integers (B, C, K, h, w) of each level: windows, or whole levels if `crop` is set.
        labels: Class indices (B,), int64, -1 for none.
        crop: Windows still to be cut, where the batch is used: in training, and for other wavelets than Haar.
        pixels: Pixels (B, C, H, W), uint8, instead of `levels`, if the reader was asked for them.
    """

    rows: torch.Tensor
    weight: torch.Tensor
    total: float
    levels: dict[int, torch.Tensor]
    labels: torch.Tensor
    crop: Crop | None = None
    pixels: torch.Tensor | None = None


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
    """Batches for evaluation: rows in the order of the files, central windows, no mirroring, a smaller last batch.

    Args:
        shards: The shard set.
        split: "train" or "val".
        batch: Rows in a batch.
        window: Side of the windows in pixels of the stored images. Their corner is rounded down to a multiple of
            2^levels.
        max_rows: Number of rows over all parts, taken from all over the split; None for all.
        finest: The finest level to read.
        pixels: Whether batches hold 8-bit pixels instead of coefficients (Haar only).
        part: (index, number of parts), to divide the rows among workers.
        ahead: Batches read ahead by a thread, which ends with the generator.
        patiently: Whether reading a row group is retried for a while.

    Raises:
        ShardError: A row group cannot be read; with `patiently`, its subclass UnreadableError.
    """
    levels = checked_levels(shards, finest, window)
    pixel_windows = PixelWindows(shards, levels, window) if pixels else None
    groups = _some_groups(shards, split, max_rows)[part[0] :: part[1]]
    return read_ahead(_sequential(shards, groups, batch, window, levels, pixel_windows, patiently), ahead)


def positions_of_part(shards: ShardSet, split: str, part: tuple[int, int], max_rows: int | None = None) -> np.ndarray:
    """Positions (n,), int64, ascending, of the rows that `sequential` reads for a part, in the order of the files."""
    groups = _some_groups(shards, split, max_rows)
    ends = np.cumsum([rows for _, _, rows in groups])
    places = [np.arange(end - rows, end) for end, (_, _, rows) in zip(ends, groups, strict=True)]
    return np.concatenate(places[part[0] :: part[1]] or [np.zeros(0, np.int64)])


def chosen_evenly(places: np.ndarray, count: int, total: int) -> np.ndarray:
    """Which positions (n,) are among `count` evenly spaced ones of 0 … total - 1: (n,), bool.

    A chosen position is number `position * count // total` of these, from 0.
    """
    count = min(count, total)
    return np.asarray(places * count // total > (places - 1) * count // total)


def _some_groups(shards: ShardSet, split: str, max_rows: int | None) -> Sequence[tuple[str, int, int]]:
    """As `RowGroups`, with `max_rows` rows from all over the split: the first ones may have only a few classes."""
    groups = RowGroups(shards, split)
    if max_rows is None or max_rows >= shards.rows[split]:
        return groups
    enough = min(len(groups), -(-max_rows * len(groups) // shards.rows[split]))
    first = chosen_evenly(np.arange(len(groups)), enough, len(groups))
    kept, left = [], max_rows
    for index in [*np.flatnonzero(first), *np.flatnonzero(~first)]:  # more groups, if some of the chosen ones are short
        if left <= 0:
            break
        file, number, rows = groups[index]
        kept.append((index, (file, number, min(rows, left))))
        left -= rows
    return [group for _, group in sorted(kept)]


def _sequential(
    shards: ShardSet,
    groups: Sequence[tuple[str, int, int]],
    batch: int,
    window: int,
    levels: list[int],
    pixel_windows: PixelWindows | None,
    patiently: bool,
) -> Iterator[Batch]:
    never = threading.Event()
    unit = 2**shards.levels
    corner = (shards.image_size - window) // 2 // unit * unit
    cuts = shards.layout.windows
    left = sum(rows for _, _, rows in groups)
    pending: list[tuple[Group, int]] = []
    for file, number, rows in groups:
        if patiently:
            group = read_patiently(shards, file, number, levels, never)
        else:
            group = read_group(shards, file, number, levels)
        pending += [(group, i) for i in range(rows)]
        left -= rows
        while len(pending) >= batch or (pending and left <= 0):
            chosen, pending = pending[:batch], pending[batch:]
            count = len(chosen)
            corners, mirrored = np.full((count, 2), corner), np.zeros(count, bool)
            found: dict[int, torch.Tensor] = {}
            if pixel_windows is None:
                found = gathered(shards, chosen, levels, *((corner, window) if cuts else (0, shards.image_size)))
            yield Batch(
                rows=torch.tensor([int(source[0][i]) for source, i in chosen], dtype=torch.int64),
                weight=torch.ones(count),
                total=float(count),
                levels=found,
                labels=torch.tensor([int(source[1][i]) for source, i in chosen], dtype=torch.int64),
                crop=None if cuts else Crop(torch.from_numpy(corners), torch.from_numpy(mirrored), window),
                pixels=pixel_windows(chosen, corners, mirrored) if pixel_windows else None,
            )


def split_bytes(shards: ShardSet, split: str, max_rows: int | None = None, *, finest: int = 1) -> int:
    """Bytes that `sequential` reads from the disk or the network for `max_rows` rows."""
    levels = range(finest, shards.levels + 1)
    return sum(stored_bytes(shards, file, number, levels) for file, number, _ in _some_groups(shards, split, max_rows))


def read_ahead(items: Iterator[Item], ahead: int) -> Generator[Item, None, None]:
    """Iterate over `items` in a thread, up to `ahead` of them in advance. The thread ends with the generator."""
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
        except BaseException as error:  # of any kind: the consumer raises it
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
