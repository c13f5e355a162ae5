"""Reading row groups of shards: columns, stored integers, and again after a pause where that fails.

Letters of shapes: n images, C channels, K bands, h × w cells.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.errors import ShardError, UnreadableError
from pipeline.shards.shard_set import ShardSet
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError, reaching

Group = tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]  # row (n,), label (n,), level → (n, C, K, h, w)
PAUSES = (1.0, 4.0, 15.0)  # seconds before rows are read again

_log = logging.getLogger(__name__)
_warned: set[str] = set()  # files


def row_groups(shards: ShardSet, split: str) -> list[tuple[str, int, int]]:
    """(file, row group, rows) of every row group of a split, in the order of the files."""
    size = shards.rows_per_group
    return [
        (file, number, min(size, rows - number * size))
        for file, rows in shards.files(split)
        for number in range(-(-rows // size))
    ]


@functools.lru_cache(maxsize=512)
def _footer(folder: Folder, name: str, sha256: str) -> pq.FileMetaData:
    """A file's footer, read once: an object store would be asked twice for every row group otherwise."""
    with reaching(folder.shown(name)), folder.open(name) as source, pq.ParquetFile(source) as parquet:
        return parquet.metadata


# (path, when it was written, row group, columns) that this process has read whole from a local disk.
_sound: set[tuple[str, int, int, tuple[str, ...]]] = set()


def read_columns(shards: ShardSet, name: str, group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of one row group of a shard. Raises ShardError.

    Checksums of pages cost a tenth of the reading. They are compared whenever bytes come over a network, and of a local
    file when a process reads them for the first time: damage that is there when training starts is met in its first epoch.
    """
    local = shards.folder.local is not None
    try:
        path = shards.folder.place(name)
        key = (path, os.stat(path).st_mtime_ns if local else 0, group, tuple(columns))
        footer = _footer(shards.folder, name, shards.checksums.get(name, ""))
        with (
            reaching(shards.folder.shown(name)),
            shards.folder.open(name) as source,
            pq.ParquetFile(
                source,
                metadata=footer,
                page_checksum_verification=not (local and key in _sound),
                pre_buffer=not local,  # a store is asked once for neighbouring columns
            ) as parquet,
        ):
            table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
        _sound.add(key)
        return table
    except FileNotFoundError:
        raise ShardError(
            f"{shards.folder.shown(name)} is missing (row group {group} was to be read); "
            f"wavemim verify {shards.url} names all such files"
        ) from None
    except StorageError as error:  # of a store: away, or what it gave is damaged
        raise ShardError(f"{error} (row group {group} was to be read)") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        text = " ".join(str(error).split())
        raise ShardError(
            f"{shards.folder.shown(name)} is damaged (row group {group}): {text}; "
            f"wavemim verify {shards.url} names all such files"
        ) from None


def read_group(
    shards: ShardSet, name: str, group: int, levels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """One row group: `row` (n,), `label` (n,) and the stored integers (n, C, K, h, w) of `levels`. Raises ShardError."""
    table = read_columns(shards, name, group, ["row", "label", *(f"level{level}" for level in levels)])
    row, label = (table.column(column).to_numpy() for column in ("row", "label"))
    return row, label, shards.layout.decode(table, levels)


def stored_bytes(shards: ShardSet, name: str, group: int, levels: Sequence[int]) -> int:
    """What `read_group` takes from the disk or the network: its column chunks as they are stored, by the file's footer."""
    columns = {"row", "label", *(f"level{level}" for level in levels)}
    chunks = _footer(shards.folder, name, shards.checksums.get(name, "")).row_group(group)
    found = (chunks.column(index) for index in range(chunks.num_columns))
    return sum(chunk.total_compressed_size for chunk in found if chunk.path_in_schema in columns)


def read_patiently(shards: ShardSet, name: str, group: int, levels: Sequence[int], ended: threading.Event) -> Any:
    """`read_group`, tried again after pauses, unless `ended`. Raises UnreadableError."""
    for pause in (*PAUSES, None):
        try:
            return read_group(shards, name, group, levels)
        except ShardError as error:
            if pause is None or ended.is_set():
                raise UnreadableError(str(error), name, group, levels) from None
            if name not in _warned:
                _warned.add(name)
                _log.warning("%s; it is tried again for %.0f s", error, sum(PAUSES))
        ended.wait(pause)
    raise AssertionError
