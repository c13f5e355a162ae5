"""Writing one shard: a Parquet file, under a temporary name until it is complete. No Ray in here."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.shards.layout import DIGEST_BYTES, Layout, PyramidEncoder
from pipeline.shards.shard_set import FAST, SMALL
from pipeline.shards.statistics import Moments

REJECTS = pa.schema([("path", pa.string()), ("reason", pa.string())])  # of rejected.parquet
ZSTD_LEVEL = 1  # level 3 takes twice the time here and saves nothing


def codecs(compression: str, columns: Sequence[str]) -> dict[str, Any]:
    """Parquet's codec of each column, as arguments of `pyarrow.parquet.ParquetWriter`.

    SMALL: zstd halves the size of the finest level, which has mostly small numbers, but takes most of the time of reading;
    other levels gain little by it. FAST: levels are not compressed, which takes a sixth of the time of SMALL and about
    twice the space; LZ4 would save a quarter of that space, and take half of SMALL's time.
    """
    if compression == FAST:
        return {"compression": {name: "none" if name.startswith("level") else "lz4" for name in columns}}
    return {
        "compression": {name: "zstd" if name == "level1" else "lz4" for name in columns},
        "compression_level": {"level1": ZSTD_LEVEL},
    }


class ShardWriter:
    """Encodes images and writes them in row groups.

    Attributes:
        moments: Statistics of the images so far.
        rows: Number of images so far.
    """

    def __init__(self, folder: Path, layout: Layout, rows_per_group: int, *, compression: str = SMALL) -> None:
        """Begin a shard in `folder`, with a temporary name; `compression` is SMALL or FAST."""
        self.layout, self.rows, self._compression = layout, 0, compression
        self.moments = Moments(layout)
        self._encoder = PyramidEncoder(layout)
        self._group = layout.empty(rows_per_group)
        self._rows: list[tuple[int, str, int, bytes]] = []
        self._waiting: list[np.ndarray] = []  # the last images of the group, which are not encoded yet
        self._file = folder / f".{uuid.uuid4().hex}.tmp"
        self._writer: pq.ParquetWriter | None = None

    def append(self, row: int, path: str, label: int, image: np.ndarray) -> None:
        """Add an image.

        Args:
            row: Its number, unique in the split.
            path: Its path, relative to the source.
            label: Its class index, -1 for none.
            image: Its pixels (C, H, W), uint8. They must not change any more: some images are encoded together.
        """
        image = np.ascontiguousarray(image)
        self._rows.append((row, path, label, xxhash.xxh3_128_digest(image.data)))
        self.rows += 1
        if self.layout.windows:
            self._waiting.append(image)
        else:
            found = self._encoder.analyse(image)
            self.moments.add_found(found, image)
            place = len(self._rows) - 1
            self._encoder.quantise(found, {level: values[place] for level, values in self._group.items()})
        if len(self._waiting) == self._encoder.together:
            self._encode()
        if len(self._rows) == len(self._group[1]):
            self._flush()

    def _encode(self) -> None:
        end = len(self._rows)
        rows = {level: values[end - len(self._waiting) : end] for level, values in self._group.items()}
        self.moments.add_stored(self._encoder.encode(self._waiting, rows))
        self._waiting = []

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._waiting:
            self._encode()
        schema = self.layout.schema()
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file,
                schema,
                **codecs(self._compression, schema.names),
                use_dictionary=False,
                write_statistics=["row", "label"],
                write_page_checksum=True,
            )
        rows, paths, labels, digests = zip(*self._rows, strict=True)
        columns = [pa.array(rows, pa.int64()), pa.array(paths, pa.string()), pa.array(labels, pa.int32())]
        columns.append(pa.array(digests, pa.binary(DIGEST_BYTES)))
        for level, values in self._group.items():
            binary = pa.binary(self.layout.row_bytes(level))
            buffer = pa.py_buffer(values[: len(rows)])
            columns.append(pa.FixedSizeBinaryArray.from_buffers(binary, len(rows), [None, buffer]))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(rows))
        self._rows = []

    def close(self) -> tuple[Path, dict[str, Any]] | None:
        """Finish the file.

        Returns:
            Its temporary path, and `rows`, `bytes` and `sha256`; None if no image was added.
        """
        self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        return self._file, {"rows": self.rows, **file_entry(self._file)}

    def abort(self) -> None:
        """Remove the file, unless it was moved after `close`."""
        if self._writer is not None and self._writer.is_open:
            self._writer.close()
        self._file.unlink(missing_ok=True)


def file_entry(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_rejected(path: Path, rejects: Sequence[tuple[str, str]]) -> None:
    """Write the (path, reason) of each input that could not be stored to a Parquet file."""
    columns = [pa.array([reject[i] for reject in rejects], pa.string()) for i in range(2)]
    pq.write_table(pa.Table.from_arrays(columns, schema=REJECTS), path, compression="zstd")
