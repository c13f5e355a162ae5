"""The shard format: images stored once, as quantised Haar pyramids in Parquet files. No Ray in here.

A *shard set* is a folder with ``train-00000.parquet`` …, ``val-00000.parquet`` …, ``rejected.parquet`` (path and reason
of every input that could not be stored) and ``manifest.json``, written last: a folder without one is no shard set.

One row is one image:

    row              int64   unique and stable within its split, not necessarily dense: the place in the plan, which is
                             made before it is known which inputs can be decoded
    path             string  relative to the folder of images
    label            int32   index into the manifest's class names, -1 for none
    level1 … levelL  fixed-size binary: little-endian int8, int16 or int32, (C, K, h, w) in C order

A stored integer is round(coefficient / step), halves towards zero, so that a mirrored image is the mirrored row.
Letters of shapes: n images, C channels, H × W pixels, K bands (H, V, D; at the coarsest level A, H, V, D), h × w cells.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import StageError
from wavemim.wavelets import bands_of, coefficient_bound, haar_sums, is_haar

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
SPLITS = ("train", "val")
COMPRESSION_LEVEL = 1  # of zstd; on these columns 3 is half as fast and no smaller


class ShardError(StageError):
    """A shard set is missing, damaged or of another format: one line."""


@dataclass(frozen=True)
class Layout:
    """How the pyramid of one image is stored: image side, channels and the quantisation step of every level."""

    image_size: int
    channels: int
    steps: Mapping[int, float]
    wavelet: str = "haar"

    def __post_init__(self) -> None:
        assert is_haar(self.wavelet), self.wavelet
        # A step of 4 and one of 4.0 are the same step, also in JSON.
        object.__setattr__(self, "steps", {level: float(step) for level, step in sorted(self.steps.items())})
        assert list(self.steps) == list(range(1, len(self.steps) + 1)), self.steps

    @property
    def levels(self) -> int:
        """Number of levels; the coarsest one."""
        return len(self.steps)

    def shape(self, level: int) -> tuple[int, int, int, int]:
        """(C, K, h, w) of a level."""
        side = self.image_size >> level
        return self.channels, len(bands_of(level, self.levels)), side, side

    def dtype(self, level: int) -> np.dtype[Any]:
        """Smallest integer type that holds every coefficient of a level that an 8-bit image can have."""
        bands = bands_of(level, self.levels)
        peak = max(coefficient_bound(level, band, self.wavelet) for band in bands) / self.steps[level]
        for kind in ("<i1", "<i2", "<i4"):
            # Half more than the largest integer still rounds to it; the factor forgives the bound's own rounding.
            if peak * (1 - 1e-9) <= np.iinfo(kind).max + 0.5:
                return np.dtype(kind)
        raise ShardError(f"step {self.steps[level]} of level {level} is too fine: values would not fit 32 bits")

    def row_bytes(self, level: int) -> int:
        """Bytes of a level in one row."""
        return int(np.prod(self.shape(level))) * self.dtype(level).itemsize

    def schema(self) -> pa.Schema:
        """Arrow schema of a shard."""
        fields = [pa.field("row", pa.int64()), pa.field("path", pa.string()), pa.field("label", pa.int32())]
        for level in range(1, self.levels + 1):
            fields.append(pa.field(f"level{level}", pa.binary(self.row_bytes(level))))
        return pa.schema([field.with_nullable(False) for field in fields])

    def quantise(self, sums: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Integers to store, (n, C, K, h, w) a level, from `haar_sums` (coefficient = sum / 2^level)."""
        return {
            level: _divide(sums[level], 2**level * self.steps[level]).astype(self.dtype(level))
            for level in range(1, self.levels + 1)
        }

    def encode(self, images: np.ndarray) -> dict[int, np.ndarray]:
        """Integers to store, (n, C, K, h, w) a level, of uint8 images (n, C, H, W)."""
        return self.quantise(haar_sums(images.astype(np.int32), self.levels))

    def decode(self, data: pa.RecordBatch | pa.Table, levels: Iterable[int] | None = None) -> dict[int, np.ndarray]:
        """Stored integers (n, C, K, h, w) of the levels asked for; read-only views of Arrow's memory, not copies."""
        wanted = range(1, self.levels + 1) if levels is None else levels
        return {level: self._view(data.column(f"level{level}"), level) for level in wanted}

    def _view(self, column: pa.Array | pa.ChunkedArray, level: int) -> np.ndarray:
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        width, dtype = self.row_bytes(level), self.dtype(level)
        if column.type != pa.binary(width):
            raise ShardError(f"column level{level} holds {column.type}, the manifest says {pa.binary(width)}")
        values = np.frombuffer(column.buffers()[1], dtype, len(column) * width // dtype.itemsize, column.offset * width)
        return values.reshape(len(column), *self.shape(level))


def _divide(sums: np.ndarray, divisor: float) -> np.ndarray:
    """round(sums / divisor), halves towards zero; exact where the divisor is a whole number."""
    if divisor == 1:
        return sums
    whole = int(divisor)
    if divisor != whole:
        scaled = np.abs(sums) / divisor
        return np.copysign(np.ceil(scaled - 0.5), sums).astype(np.int64)
    if whole & (whole - 1) == 0:  # a shift: for d = 2h, floor((s + h - 1) / d), and for s < 0 floor((s + h) / d)
        half = whole // 2
        return (sums + (half - 1) - (sums >> 31)) >> (whole.bit_length() - 1)
    return np.sign(sums) * ((2 * np.abs(sums) + (whole - 1)) // (2 * whole))


class ShardWriter:
    """Writes one shard, a row group at a time, under a temporary name; `close` gives it its name."""

    def __init__(self, path: Path, layout: Layout, rows_per_group: int) -> None:
        self.path, self.layout, self.rows_per_group = path, layout, rows_per_group
        self.rows = 0
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._pending: list[tuple[int, str, int, dict[int, np.ndarray]]] = []
        self._writer: pq.ParquetWriter | None = None

    def append(self, row: int, path: str, label: int, pyramid: dict[int, np.ndarray]) -> None:
        """Add an image: its integers (C, K, h, w) a level."""
        self._pending.append((row, path, label, pyramid))
        self.rows += 1
        if len(self._pending) == self.rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        schema = self.layout.schema()
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._temporary,
                schema,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                use_dictionary=False,
                write_statistics=["row", "label"],
                write_page_checksum=True,
            )
        rows, paths, labels, pyramids = zip(*self._pending, strict=True)
        columns = [pa.array(rows, pa.int64()), pa.array(paths, pa.string()), pa.array(labels, pa.int32())]
        for level in range(1, self.layout.levels + 1):
            values = np.ascontiguousarray(np.stack([pyramid[level] for pyramid in pyramids]))
            binary = pa.binary(self.layout.row_bytes(level))
            columns.append(pa.FixedSizeBinaryArray.from_buffers(binary, len(rows), [None, pa.py_buffer(values)]))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(rows))
        self._pending = []

    def close(self) -> dict[str, Any] | None:
        """Finish the file: its manifest entry, or None where no image was added and there is no file."""
        self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        return {"name": self.path.name, "rows": self.rows, **file_entry(self.path)}

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_rejected(path: Path, rejects: Sequence[tuple[str, str]]) -> None:
    """Write rejected.parquet: (path, reason) of every input that could not be stored."""
    schema = pa.schema([("path", pa.string()), ("reason", pa.string())])
    columns = [pa.array([reject[i] for reject in rejects], pa.string()) for i in range(2)]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, compression="zstd")
    os.replace(temporary, path)


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a manifest without its own fingerprint."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def make_manifest(
    layout: Layout,
    *,
    rows_per_group: int,
    classes: list[str] | None,
    splits: Mapping[str, list[dict[str, Any]]],
    statistics: Mapping[str, Any],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest of a shard set whose files are all written. No times and no absolute paths: same data, same bytes."""
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "wavelet": layout.wavelet,
        "image_size": layout.image_size,
        "channels": layout.channels,
        "levels": {
            str(level): {
                "step": layout.steps[level],
                "bands": bands_of(level, layout.levels),
                "dtype": layout.dtype(level).name,
                "shape": list(layout.shape(level)),
            }
            for level in range(1, layout.levels + 1)
        },
        "rows_per_group": rows_per_group,
        "classes": classes,
        "splits": {split: {"rows": sum(f["rows"] for f in files), "files": files} for split, files in splits.items()},
        "statistics": dict(statistics),
        "counts": dict(counts),
    }
    manifest["fingerprint"] = manifest_fingerprint(manifest)
    return manifest


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set."""

    path: Path
    manifest: dict[str, Any]
    layout: Layout

    @classmethod
    def open(cls, path: str | Path) -> ShardSet:
        """Read the manifest of the shard set at `path` and see that its files are there. Raises ShardError."""
        folder = Path(path)
        manifest = _read_manifest(folder)
        try:
            steps = {int(level): float(entry["step"]) for level, entry in manifest["levels"].items()}
            layout = Layout(manifest["image_size"], manifest["channels"], steps, manifest["wavelet"])
            for level, entry in manifest["levels"].items():
                stored = (tuple(entry["shape"]), entry["dtype"])
                assert stored == (layout.shape(int(level)), layout.dtype(int(level)).name), (level, stored)
            shards = cls(folder, manifest, layout)
            files = [(folder / entry["name"], entry["bytes"]) for entry in shards._entries()]
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ShardError(f"{folder / MANIFEST} is not a manifest of a shard set ({error!r})") from None
        for file, size in files:
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, the manifest says {size}"
                raise ShardError(f"{file} {state}; copy the shard set again or prepare it with restart=true")
        return shards

    @property
    def image_size(self) -> int:
        """Side of the stored images in pixels."""
        return self.layout.image_size

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.layout.channels

    @property
    def levels(self) -> int:
        """Number of stored levels."""
        return self.layout.levels

    @property
    def steps(self) -> dict[int, float]:
        """Quantisation step of every level: coefficient ≈ stored integer · step."""
        return dict(self.layout.steps)

    @property
    def rows_per_group(self) -> int:
        """Rows of a row group; only the last of a file may have fewer."""
        return int(self.manifest["rows_per_group"])

    @property
    def classes(self) -> list[str] | None:
        """Class names; None for an unlabelled set."""
        names: list[str] | None = self.manifest["classes"]
        return names

    @property
    def rows(self) -> dict[str, int]:
        """Rows of every split."""
        return {split: content["rows"] for split, content in self.manifest["splits"].items()}

    @cached_property
    def statistics(self) -> dict[int, dict[str, dict[str, list[float]]]]:
        """statistics[level][band]["mean" or "std"]: a number per channel, in units of orthonormal Haar coefficients."""
        return {int(level): bands for level, bands in self.manifest["statistics"]["levels"].items()}

    @property
    def pixel_mean(self) -> list[float]:
        """Mean of the train pixels per channel, 0 to 255."""
        return list(self.manifest["statistics"]["pixels"]["mean"])

    @property
    def pixel_std(self) -> list[float]:
        """Standard deviation of the train pixels per channel, 0 to 255."""
        return list(self.manifest["statistics"]["pixels"]["std"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, and with it of all files."""
        return str(self.manifest["fingerprint"])

    def files(self, split: str) -> list[tuple[Path, int]]:
        """(file, rows) of a split's shards, in their order."""
        assert split in SPLITS, split
        return [(self.path / entry["name"], entry["rows"]) for entry in self.manifest["splits"][split]["files"]]

    def _entries(self) -> list[dict[str, Any]]:
        return [entry for split in SPLITS for entry in self.manifest["splits"][split]["files"]]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / "settings.json").is_file()
        hint = "prepare was not finished there; call it again" if unfinished else "wavemim prepare writes one"
        raise ShardError(f"{folder} is not a shard set, it has no {MANIFEST}: {hint}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ShardError(f"{path} is not a manifest of a shard set: it names no format version")
    if version > FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}, this wavemim reads up to version {FORMAT_VERSION}; update wavemim"
        )
    if manifest.get("fingerprint") != manifest_fingerprint(manifest):
        raise ShardError(f"{path} was changed after it was written: its fingerprint does not fit its content")
    return manifest


def read_group(
    shards: ShardSet, file: Path, group: int, levels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """One row group: `row` (n,), `label` (n,) and the stored integers (n, C, K, h, w) of `levels`. Raises ShardError."""
    columns = ["row", "label", *(f"level{level}" for level in levels)]
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read_row_group(group, columns=columns, use_threads=False)
        row, label = (table.column(name).to_numpy() for name in ("row", "label"))
        return row, label, shards.layout.decode(table, levels)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ShardError(f"{file} is damaged (row group {group}): {' '.join(str(error).split())}") from None


def verify(shards: ShardSet) -> None:
    """Compare every file with its checksum in the manifest. Raises ShardError naming the first that differs."""
    for entry in shards._entries():
        file = shards.path / entry["name"]
        if file_entry(file)["sha256"] != entry["sha256"]:
            raise ShardError(f"{file} is damaged: its SHA-256 is not the manifest's")
