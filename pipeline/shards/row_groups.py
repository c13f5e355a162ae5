"""Reading row groups of shards, with retries.

Dimensions: n images, C channels, K bands, h × w cells.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.errors import ShardError, UnreadableError
from pipeline.shards.pages import read_page
from pipeline.shards.shard_set import ShardSet
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError, reaching

Group = tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]  # row (n,), label (n,), level → (n, C, K, h, w)
PAUSES = (1.0, 4.0, 15.0)  # seconds before each retry

_log = logging.getLogger(__name__)
_warned: set[str] = set()  # names of shards


class RowGroups(Sequence[tuple[str, int, int]]):
    """(name of the shard, number of the row group, rows) of each row group of a split, in the order of the files.

    There are millions in a large set, so entries are made when they are asked for.
    """

    def __init__(self, shards: ShardSet, split: str) -> None:
        size, files = shards.rows_per_group, shards.files(split)
        self._names = [name for name, _ in files]
        rows = np.array([rows for _, rows in files], np.int64)
        counts = -(-rows // size)
        self._ends = np.cumsum(counts)
        file = np.repeat(np.arange(len(files)), counts)
        number = np.arange(len(file)) - (self._ends - counts)[file]
        self.rows = np.minimum(size, rows[file] - number * size)  # (row groups,), int64

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, int, int] | list[tuple[str, int, int]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, "right"))
        before = int(self._ends[file - 1]) if file else 0
        return self._names[file], int(index) - before, int(self.rows[index])


@functools.lru_cache(maxsize=512)
def _footer(folder: Folder, name: str, sha256: str) -> pq.FileMetaData:
    """The footer of a shard, cached: otherwise every row group would need another request to an object store."""
    with reaching(folder.shown(name)), folder.open(name) as source, pq.ParquetFile(source) as parquet:
        return parquet.metadata


# (path, modification time, row group, columns) that this process has read from a local disk without an error.
_sound: set[tuple[str, int, int, tuple[str, ...]]] = set()


def read_columns(shards: ShardSet, name: str, group: int, columns: Sequence[str]) -> pa.Table:
    """Read columns of one row group; `row` and `label` are those of the whole set, also where it is merged.

    Verifying checksums takes a tenth of the time. They are verified for remote files always, and for local files when a
    process reads a row group for the first time, so that existing damage is found in the first epoch.

    Args:
        shards: The shard set.
        name: Name of the shard.
        group: Number of the row group.
        columns: Names of the columns.

    Raises:
        ShardError: The file is missing, damaged, or cannot be reached.
    """
    with _reading(shards, name, group):
        return _read_columns(shards, name, group, columns)


@contextlib.contextmanager
def _reading(shards: ShardSet, name: str, group: int) -> Iterator[None]:
    """Turns what can go wrong with a row group into a ShardError that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise ShardError(
            f"{shards.folder.shown(name)} is missing (reading row group {group}); "
            f"wavemim verify {shards.url} lists all such files"
        ) from None
    except StorageError as error:  # an object store does not answer, or returned damaged data
        raise ShardError(f"{error} (reading row group {group})") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        text = " ".join(str(error).split())
        raise ShardError(
            f"{shards.folder.shown(name)} is damaged (row group {group}): {text}; "
            f"wavemim verify {shards.url} lists all such files"
        ) from None


def _read_columns(shards: ShardSet, name: str, group: int, columns: Sequence[str]) -> pa.Table:
    known = _key(shards, name, group, columns)
    footer = _footer(shards.folder, name, shards.checksums.get(name, ""))
    with (
        reaching(shards.folder.shown(name)),
        shards.folder.open(name) as source,
        pq.ParquetFile(
            source,
            metadata=footer,
            page_checksum_verification=known not in _sound,
            pre_buffer=known is None,  # one request for adjacent columns
        ) as parquet,
    ):
        table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
    if known is not None:
        _sound.add(known)
    return shards.numbered(name, table)


def _key(
    shards: ShardSet, name: str, group: int, columns: Sequence[str]
) -> tuple[str, int, int, tuple[str, ...]] | None:
    """The entry of `_sound` for a row group; None for one that is not on a local disk."""
    if shards.folder.local is None:
        return None
    path = shards.folder.place(name)
    return path, os.stat(path).st_mtime_ns, group, tuple(columns)


def read_group(
    shards: ShardSet, name: str, group: int, levels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Read one row group.

    Args:
        shards: The shard set.
        name: Name of the shard.
        group: Number of the row group.
        levels: The levels to read.

    Returns:
        `row` (n,), `label` (n,), and the stored integers (n, C, K, h, w) of each level.

    Raises:
        ShardError: The file is missing, damaged, or cannot be reached.
    """
    numbers, columns = ["row", "label"], [f"level{level}" for level in levels]
    with _reading(shards, name, group):
        known = _key(shards, name, group, [*numbers, *columns])
        found = _read_pages(shards, known[0], name, group, levels) if known in _sound else {}
        table = _read_columns(shards, name, group, numbers if found else [*numbers, *columns])
    row, label = (table.column(column).to_numpy() for column in numbers)
    return row, label, found or shards.layout.decode(table, levels)


def _read_pages(shards: ShardSet, path: str, name: str, group: int, levels: Sequence[int]) -> dict[int, np.ndarray]:
    """The coefficients of a row group in a local file; nothing if one of the columns is not a single page."""
    footer = _footer(shards.folder, name, shards.checksums.get(name, "")).row_group(group)
    places = {footer.column(index).path_in_schema: index for index in range(footer.num_columns)}
    found = {}
    with open(path, "rb", buffering=0) as file:
        for level in levels:
            size = footer.num_rows * shards.layout.row_bytes(level)
            values = read_page(file.fileno(), footer.column(places[f"level{level}"]), size)
            if values is None:
                return {}
            found[level] = shards.layout.shaped(values, level)
    return found


def stored_bytes(shards: ShardSet, name: str, group: int, levels: Sequence[int]) -> int:
    """Bytes that `read_group` reads from the disk or the network, according to the footer of the file."""
    columns = {"row", "label", *(f"level{level}" for level in levels)}
    chunks = _footer(shards.folder, name, shards.checksums.get(name, "")).row_group(group)
    found = (chunks.column(index) for index in range(chunks.num_columns))
    return sum(chunk.total_compressed_size for chunk in found if chunk.path_in_schema in columns)


def read_patiently(shards: ShardSet, name: str, group: int, levels: Sequence[int], ended: threading.Event) -> Any:
    """As `read_group`, with retries after pauses until `ended` is set. Raises UnreadableError."""
    for pause in (*PAUSES, None):
        try:
            return read_group(shards, name, group, levels)
        except ShardError as error:
            if pause is None or ended.is_set():
                raise UnreadableError(str(error), name, group, levels) from None
            if name not in _warned:
                _warned.add(name)
                _log.warning("%s; retrying for %.0f s", error, sum(PAUSES))
        ended.wait(pause)
    raise AssertionError
