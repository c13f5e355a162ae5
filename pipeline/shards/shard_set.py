"""Shard sets: images stored as quantised wavelet pyramids in Parquet files, and their manifest. No Ray in here.

A *shard set* is a folder, local or in an object store, with ``train-00000.parquet`` …, ``val-00000.parquet`` …,
``rejected.parquet`` (path and reason of every input that could not be stored) and ``manifest.json``. The manifest is
written last: a folder without one is not a shard set. FORMAT.md in this folder describes the format for other readers.

A *merged* set consists of parts, complete shard sets in folders of its own folder (`pipeline.shards.merge`). Its manifest
names their shards, as ``part-07/train-00000.parquet``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.shards.errors import NoShardSetError, ShardError
from pipeline.shards.layout import Layout
from pipeline.shards.parts import Part
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, is_remote
from wavemim.wavelets import bands_of

FORMAT_VERSION = 2
MERGED_VERSION = 3  # of sets with parts: readers of version 2 would take their labels for those of the whole set
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
SPLITS = ("train", "val")
SMALL, FAST = "small", "fast"  # compression of the levels
PARALLEL = 8  # parts that are looked at together: a store answers slowly


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a manifest, without the field `fingerprint`."""
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
    compression: str = SMALL,
    parts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Make the manifest of a shard set whose files are all written.

    It contains no times and no absolute paths, so that the same data give the same manifest.

    Args:
        layout: How the images are stored.
        rows_per_group: Rows of a row group.
        classes: Class names; None if unlabelled.
        splits: `name`, `rows`, `bytes` and `sha256` of the shards of each split, in order.
        statistics: Mean and standard deviation of levels and pixels, see `Moments.statistics`.
        counts: Numbers of inputs, kept, rejected and ignored.
        compression: SMALL, which is not recorded, or FAST.
        parts: `folder`, `row_offset` and `labels` of each part of a merged set.
    """
    manifest: dict[str, Any] = {
        "format": MERGED_VERSION if parts else FORMAT_VERSION,
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
    if compression != SMALL:
        manifest["compression"] = compression
    if parts:
        manifest["parts"] = [dict(part) for part in parts]
    manifest["fingerprint"] = manifest_fingerprint(manifest)
    return manifest


@dataclass(frozen=True)
class ShardSet:
    """A complete shard set.

    Attributes:
        folder: Where it is.
        manifest: The content of manifest.json.
        layout: How its images are stored.
    """

    folder: Folder
    manifest: dict[str, Any]
    layout: Layout

    @classmethod
    def open(cls, where: str | Path, *, check_files: bool = True) -> ShardSet:
        """Open a shard set.

        Args:
            where: Path or URL of the folder.
            check_files: Whether to check that all shards exist and have the right size.

        Raises:
            ShardError: It is not a shard set, is of another version, or a shard is missing or incomplete.
        """
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
            if parts := shards.parts:
                assert {name.rpartition("/")[0] for name in expected} <= parts.keys(), parts.keys()
        except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
            raise ShardError(f"{folder.shown(MANIFEST)} is not the manifest of a shard set ({error!r})") from None
        found = shards.sizes() if check_files else expected
        for name, size in expected.items():
            if found.get(name) != size:
                state = f"has {found[name]} bytes, the manifest says {size}" if name in found else "is missing"
                mend = f"run wavemim merge {folder} again" if shards.parts else "prepare it with restart=true"
                raise ShardError(f"{folder.shown(name)} {state}; copy the shard set again, or {mend}")
        return shards

    @property
    def url(self) -> str:
        """Path or URL of the shard set without credentials, for messages and records."""
        return str(self.folder)

    @property
    def image_size(self) -> int:
        """Side of the stored images in pixels."""
        return self.layout.image_size

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.layout.channels

    @property
    def levels(self) -> int:
        """Number of stored levels."""
        return self.layout.levels

    @property
    def steps(self) -> dict[int, float]:
        """Quantisation step of each level: coefficient ≈ stored integer · step."""
        return dict(self.layout.steps)

    @property
    def rows_per_group(self) -> int:
        """Rows of a row group; only the last of a file may have fewer."""
        return int(self.manifest["rows_per_group"])

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels; None if unlabelled."""
        names: list[str] | None = self.manifest["classes"]
        return names

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each split."""
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
        """SHA-256 of the manifest, which includes those of all shards."""
        return str(self.manifest["fingerprint"])

    @property
    def about(self) -> dict[str, Any]:
        """What a tracker shows of the set: its `name`, `digest`, `source`, `profile`, and `columns` with their types."""
        place = Path(Address.of(self.url).path if is_remote(self.url) else self.url)
        # "shards" is the usual name, and says nothing.
        name = place.parent.name if place.name == "shards" and place.parent.name else place.name
        columns = {
            f"level {level}": f"{entry['dtype']} {entry['shape']}" for level, entry in self.manifest["levels"].items()
        }
        labels = {} if self.classes is None else {"label": f"{len(self.classes)} classes"}
        return {
            "name": name,
            "digest": self.fingerprint,
            "source": self.url,
            "profile": {
                "num_rows": sum(self.rows.values()),
                **self.rows,
                "image_size": self.image_size,
                "channels": self.channels,
            },
            "columns": {**columns, **labels},
        }

    @cached_property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of each shard, by name."""
        return {entry["name"]: entry["sha256"] for entry in self.entries()}

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The parts of a merged set, by the names of their folders; empty for others."""
        entries = self.manifest["parts"] if self.manifest.get("format") == MERGED_VERSION else ()
        return {entry["folder"]: Part.of(entry, self.classes) for entry in entries}

    def sizes(self) -> dict[str, int]:
        """Bytes of the files in its folder, or in those of its parts, by name."""
        if not self.parts:
            return self.folder.sizes()
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = pool.map(lambda part: self.folder.sub(part).sizes(), self.parts)
            return {
                f"{part}/{name}": size for part, of in zip(self.parts, found, strict=True) for name, size in of.items()
            }

    def numbered(self, name: str, table: pa.Table) -> pa.Table:
        """Rows of a shard as rows of the set: in a merged one, `row` and `label` are stored as those of the part.

        Args:
            name: Name of the shard.
            table: n of its rows, with any columns, as they are stored.

        Returns:
            The same, with the `row` and `label` of the set where it has these columns.

        Raises:
            ShardError: There are labels that the part has no class for.
        """
        part = self.parts.get(name.rpartition("/")[0])
        return table if part is None else part.numbered(table, self.folder.shown(name))

    def files(self, split: str) -> list[tuple[str, int]]:
        """(name, number of rows) of the shards of a split, in order."""
        assert split in SPLITS, split
        return [(entry["name"], entry["rows"]) for entry in self.manifest["splits"][split]["files"]]

    def entries(self) -> list[dict[str, Any]]:
        """`name`, `rows`, `bytes` and `sha256` of the shards of all splits, in order."""
        return [entry for split in SPLITS for entry in self.manifest["splits"][split]["files"]]


def _read_manifest(folder: Folder) -> dict[str, Any]:
    path = folder.shown(MANIFEST)
    if folder.size(MANIFEST) is None:
        unfinished = folder.size("settings.json") is not None
        hint = "prepare was interrupted there; run it again" if unfinished else "wavemim prepare makes one"
        if folder.sub("shards").size(MANIFEST) is not None:  # an out folder
            hint = f"{folder.sub('shards')} is one"
        elif any(folder.size(f"{name}/{MANIFEST}") is not None for name in folder.folders()):
            hint = f"wavemim merge {folder} makes one of the sets in it"
        kind = ShardError if unfinished else NoShardSetError
        raise kind(f"{folder} is not a shard set, it has no {MANIFEST}: {hint}")
    try:
        manifest = json.loads(folder.read(MANIFEST))
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ShardError(f"{path} is not the manifest of a shard set: it has no format version")
    if version not in (FORMAT_VERSION, MERGED_VERSION):
        advice = "update wavemim" if version > FORMAT_VERSION else "prepare the images again"
        raise ShardError(
            f"{path} has format version {version}, this wavemim reads versions {FORMAT_VERSION} and {MERGED_VERSION}; {advice}"
        )
    if manifest.get("fingerprint") != manifest_fingerprint(manifest):
        raise ShardError(f"{path} was changed after it was written: its fingerprint does not match its content")
    return manifest
