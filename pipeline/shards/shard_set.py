"""The shard format: images stored once, as quantised wavelet pyramids in Parquet files. No Ray in here.

FORMAT.md beside this file describes it for readers in other languages. A *shard set* is a folder, local or in an object
store, with ``train-00000.parquet`` …, ``val-00000.parquet`` …, ``rejected.parquet`` (path and reason of every input that
could not be stored) and ``manifest.json``, written last: a folder without one is no shard set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.layout import Layout, ShardError
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError, reaching
from wavemim.wavelets import bands_of

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
SPLITS = ("train", "val")


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

    folder: Folder
    manifest: dict[str, Any]
    layout: Layout

    @classmethod
    def open(cls, where: str | Path, *, check_files: bool = True) -> ShardSet:
        """Read the manifest of the shard set at a path or URL and see that its files are there. Raises ShardError."""
        folder = Folder.at(where)
        manifest = _read_manifest(folder)
        try:
            steps = {int(level): float(entry["step"]) for level, entry in manifest["levels"].items()}
            layout = Layout(manifest["image_size"], manifest["channels"], steps, manifest["wavelet"])
            for level, entry in manifest["levels"].items():
                stored = (tuple(entry["shape"]), entry["dtype"])
                assert stored == (layout.shape(int(level)), layout.dtype(int(level)).name), (level, stored)
            shards = cls(folder, manifest, layout)
            expected = {entry["name"]: entry["bytes"] for entry in shards.entries()}
        except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
            raise ShardError(f"{folder.shown(MANIFEST)} is not a manifest of a shard set ({error!r})") from None
        found = folder.sizes() if check_files else expected
        for name, size in expected.items():
            if found.get(name) != size:
                state = f"has {found[name]} bytes, the manifest says {size}" if name in found else "is missing"
                raise ShardError(
                    f"{folder.shown(name)} {state}; copy the shard set again or prepare it with restart=true"
                )
        return shards

    @property
    def url(self) -> str:
        """Where the shard set is, for messages and records: without credentials."""
        return str(self.folder)

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
        """``statistics[level][band]["mean" or "std"]``: a number per channel, in units of coefficients."""
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

    @cached_property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every shard, by name."""
        return {entry["name"]: entry["sha256"] for entry in self.entries()}

    def files(self, split: str) -> list[tuple[str, int]]:
        """(name, rows) of a split's shards, in their order."""
        assert split in SPLITS, split
        return [(entry["name"], entry["rows"]) for entry in self.manifest["splits"][split]["files"]]

    def entries(self) -> list[dict[str, Any]]:
        """{"name", "rows", "bytes", "sha256"} of every shard of all splits."""
        return [entry for split in SPLITS for entry in self.manifest["splits"][split]["files"]]


def _read_manifest(folder: Folder) -> dict[str, Any]:
    path = folder.shown(MANIFEST)
    if folder.size(MANIFEST) is None:
        unfinished = folder.size("settings.json") is not None
        hint = "prepare was not finished there; call it again" if unfinished else "wavemim prepare writes one"
        raise ShardError(f"{folder} is not a shard set, it has no {MANIFEST}: {hint}")
    try:
        manifest = json.loads(folder.read(MANIFEST))
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ShardError(f"{path} is not a manifest of a shard set: it names no format version")
    if version != FORMAT_VERSION:
        advice = "update wavemim" if version > FORMAT_VERSION else "prepare the images again"
        raise ShardError(f"{path} has format version {version}, this wavemim reads version {FORMAT_VERSION}; {advice}")
    if manifest.get("fingerprint") != manifest_fingerprint(manifest):
        raise ShardError(f"{path} was changed after it was written: its fingerprint does not fit its content")
    return manifest


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


PAUSES = (1.0, 4.0, 15.0)  # seconds before rows are read again

_log = logging.getLogger(__name__)
_warned: set[str] = set()  # files


class UnreadableError(ShardError):
    """Rows that could not be read, again and again: one line."""

    def __init__(self, message: str, name: str, group: int, levels: Sequence[int]) -> None:
        super().__init__(message, name, group, levels)  # so that it can be pickled
        self.message = message
        self.place = {"name": name, "group": group, "levels": list(levels)}

    def __str__(self) -> str:
        return self.message


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
