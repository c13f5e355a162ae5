"""The Parquet file of `wavemim embed`."""

from __future__ import annotations

import contextlib
import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.folder import Folder
from pipeline.tools.embed_sources import Unit
from wavemim import __version__

if TYPE_CHECKING:
    from pipeline.models.encoder_source import EncoderSource

ROW_GROUP = 8192  # images per row group, about
METADATA = b"wavemim"  # key of the file's metadata: JSON that names the encoder
_ABOUT = ("fingerprint", "image_size", "channels", "pixel_mean", "pixel_std", "images_seen")


def parent_of(place: str) -> tuple[Folder, str]:
    """The folder of a file, local or in a store, and its name."""
    above, _, name = place.rpartition("/")
    return Folder.at(above or ("/" if place.startswith("/") else ".")), name


def rejected_of(name: str) -> str:
    """The file that lists what could not be embedded."""
    return f"{name.removesuffix('.parquet')}.rejected.parquet"


class Writer:
    """Writes the features under a temporary name, and renames the file when it is complete."""

    def __init__(self, folder: Folder, name: str, subject: EncoderSource) -> None:
        self.rows = 0
        self._folder, self._name, self._subject = folder, name, subject
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Writer:
        self._stack = contextlib.ExitStack()
        room = self._folder.local
        if room is None:
            room = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="wavemim-")))
        mark = uuid.uuid4().hex[:8]
        self._file, self._rejected = (room / f".{self._name}.{mark}.{part}.tmp" for part in ("features", "rejected"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None and self._writer.is_open:
            self._writer.close()
        for file in (self._file, self._rejected):
            file.unlink(missing_ok=True)
        self._stack.close()

    def write(self, unit: Unit, done: Iterator[tuple[np.ndarray, str]]) -> list[tuple[str, str, str]]:
        """Write the features of a unit, taken from `done`; returns its rejects as (source, path, reason)."""
        found = [next(done) for _ in range(len(unit.rows))]
        paths, labels = (unit.rows.column(name).to_pylist() for name in ("path", "label"))
        kept = [index for index, (_, reason) in enumerate(found) if not reason]
        if kept:
            features = np.stack([found[index][0] for index in kept])
            names = [unit.classes[labels[i]] if unit.classes and labels[i] >= 0 else None for i in kept]
            columns = [
                pa.array([unit.source] * len(kept), pa.string()),
                pa.array([paths[index] for index in kept], pa.string()),
                pa.array(names, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]),
            ]
            self._add(pa.Table.from_arrays(columns, schema=self._schema(features.shape[1])))
        return [(unit.source, path, reason) for path, (_, reason) in zip(paths, found, strict=True) if reason]

    def finish(self, rejects: Sequence[tuple[str, str, str]]) -> None:
        """Rename the files: the list of rejects first, if there are any."""
        self._flush()
        assert self._writer is not None
        self._writer.close()
        listed = rejected_of(self._name)
        if rejects:
            table = {key: [reject[i] for reject in rejects] for i, key in enumerate(("source", "path", "reason"))}
            pq.write_table(pa.table(table, pa.schema([(key, pa.string()) for key in table])), self._rejected)
            self._folder.put(self._rejected, listed)
        elif self._folder.kind(listed) == "file":  # of the call whose file is replaced
            self._folder.remove(listed)
        self._folder.put(self._file, self._name)

    def _add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self.rows += len(table)
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
            self._writer.write_table(table, row_group_size=len(table))
            self._waiting = []

    def _schema(self, width: int) -> pa.Schema:
        subject = self._subject
        about = {"encoder": subject.place, **{key: getattr(subject, key) for key in _ABOUT}, "wavemim": __version__}
        texts = [(key, pa.string()) for key in ("source", "path", "label")]
        return pa.schema([*texts, ("embedding", pa.list_(pa.float32(), width))], {METADATA: json.dumps(about)})
