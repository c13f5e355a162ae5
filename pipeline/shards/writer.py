"""Writing one shard: a Parquet file of row groups, under a temporary name until it is whole. No Ray in here."""

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
from pipeline.shards.statistics import Moments

# zstd halves the finest level, mostly small numbers, and takes its time; of the others it would save little.
FINEST_COMPRESSION, COMPRESSION = "zstd", "lz4"
COMPRESSION_LEVEL = 1  # of zstd; on these columns 3 takes twice the time and is no smaller


class ShardWriter:
    """Encodes images and writes them, a row group at a time."""

    def __init__(self, folder: Path, layout: Layout, rows_per_group: int) -> None:
        """`folder` holds the file while it is written; `close` says where it is."""
        self.layout, self.rows = layout, 0
        self.moments = Moments(layout)
        self._encoder = PyramidEncoder(layout)
        self._group = layout.empty(rows_per_group)
        self._rows: list[tuple[int, str, int, bytes]] = []
        self._file = folder / f".{uuid.uuid4().hex}.tmp"
        self._writer: pq.ParquetWriter | None = None

    def append(self, row: int, path: str, label: int, image: np.ndarray) -> None:
        """Add an image (C, H, W), uint8."""
        image = np.ascontiguousarray(image)
        found = self._encoder.analyse(image)
        if not self.layout.windows:
            self.moments.add_found(found, image)
        place = len(self._rows)
        self._encoder.quantise(found, {level: values[place] for level, values in self._group.items()})
        self._rows.append((row, path, label, xxhash.xxh3_128_digest(image.data)))
        self.rows += 1
        if len(self._rows) == len(self._group[1]):
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self.layout.windows:
            self.moments.add_stored({level: values[: len(self._rows)] for level, values in self._group.items()})
        schema = self.layout.schema()
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file,
                schema,
                compression={name: FINEST_COMPRESSION if name == "level1" else COMPRESSION for name in schema.names},
                compression_level={"level1": COMPRESSION_LEVEL},
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
        """Finish the file: where it is, and rows, bytes and SHA-256. None where no image was added."""
        self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        return self._file, {"rows": self.rows, **file_entry(self._file)}

    def abort(self) -> None:
        """Leave nothing behind, also after `close` where nobody has moved the file."""
        if self._writer is not None and self._writer.is_open:
            self._writer.close()
        self._file.unlink(missing_ok=True)


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_rejected(path: Path, rejects: Sequence[tuple[str, str]]) -> None:
    """Write a table of (path, reason) of every input that could not be stored."""
    schema = pa.schema([("path", pa.string()), ("reason", pa.string())])
    columns = [pa.array([reject[i] for reject in rejects], pa.string()) for i in range(2)]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")
