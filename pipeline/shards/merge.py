"""Merging shard sets: the sets in the folders of a folder become one, and no file of theirs is changed or copied.

Only the folder's own ``manifest.json`` and ``rejected.parquet`` are written. In the shards, row numbers and labels stay
those of the parts; the manifest says what they are in the whole set, and readers apply it (`ShardSet.numbered`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.config.places import check_text
from pipeline.errors import SettingError
from pipeline.shards.errors import ShardError
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import FAST, MANIFEST, PARALLEL, REJECTED, SMALL, SPLITS, ShardSet, make_manifest
from pipeline.shards.statistics import pooled
from pipeline.shards.verify import existing_folder, rejected_rows
from pipeline.shards.writer import REJECTS
from pipeline.storage.folder import Folder
from pipeline.storage.locks import owned

# Between the row numbers of two parts, whose own ones are smaller. A fixed number: the shards need not be read for it, and
# row 42 of the eighth part is 7000000000042.
ROWS_APART = 10**12


@dataclass(frozen=True)
class _Part:
    """What is needed of a part; its manifest may take gigabytes, with those of others."""

    name: str
    layout: Layout
    rows_per_group: int
    classes: list[str] | None
    compression: str
    statistics: dict[str, Any]
    counts: dict[str, int]
    rows: dict[str, int]
    files: dict[str, list[dict[str, Any]]]

    def settings(self) -> dict[str, object]:
        """What all parts have to agree in, as `prepare` names it."""
        return {
            "data.image_size": self.layout.image_size,
            "data.channels": self.layout.channels,
            "data.wavelet": self.layout.wavelet,
            "data.steps": f"[{', '.join(f'{step:g}' for step in self.layout.steps.values())}]",
            "data.rows_per_group": self.rows_per_group,
            "labels": "none" if self.classes is None else "some",
        }


def merge(where: str, *, progress: bool = True) -> ShardSet:
    """Make one shard set of those in the folders of a folder. A set that was merged there before is replaced.

    Args:
        where: Path or URL of the folder. Hidden folders in it are ignored.
        progress: Whether to show a progress bar.

    Returns:
        The merged set.

    Raises:
        SettingError: There is no such folder, it holds something else than finished sets, or they do not fit together.
        StageError: Another process works there, or a store does not answer.
    """
    folder = existing_folder(where)
    with owned(folder, "a merge"):
        _check_target(folder)
        names = folder.folders()
        if not names:
            raise SettingError(f"{folder}: there are no folders in it; each shard set to be merged has to be one")
        parts: list[_Part] = []
        with ThreadPoolExecutor(PARALLEL) as pool:
            read = pool.map(lambda name: _read(folder, name), names)
            for part in tqdm(read, total=len(names), unit="set", desc="merge", disable=not progress):
                parts.append(part)
                _check_alike(parts[0], part)
        manifest, rejected = _manifest(parts), _rejected(folder, names)
        folder.write(REJECTED, rejected)
        folder.write(MANIFEST, json.dumps(manifest).encode())
        return ShardSet(folder, manifest, parts[0].layout)


def _check_target(folder: Folder) -> None:
    """Raise SettingError where the folder holds a shard set, or the beginning of one, that merging did not make."""
    prepared = folder.size("settings.json") is not None
    if not prepared and folder.size(MANIFEST) is not None:
        try:
            prepared = not ShardSet.open(folder.url, check_files=False).parts
        except ShardError as error:
            raise SettingError(f"{error}; to merge the sets in {folder}, remove that file") from None
    if prepared:
        raise SettingError(
            f"{folder}: wavemim prepare has worked here; to merge shard sets, make a folder that holds nothing else"
        )


def _read(folder: Folder, name: str) -> _Part:
    check_text(f"{folder}/{name}", name)
    try:
        shards = ShardSet.open(folder.sub(name).url)
    except ShardError as error:
        raise SettingError(f"{error}. Every folder in {folder} has to be a finished shard set") from None
    if shards.parts:
        raise SettingError(f"{shards.url} is a merged set itself; put its parts into {folder} instead")
    manifest = shards.manifest
    files = {
        split: [{**entry, "name": f"{name}/{entry['name']}"} for entry in manifest["splits"][split]["files"]]
        for split in SPLITS
    }
    return _Part(
        name=name,
        layout=shards.layout,
        rows_per_group=shards.rows_per_group,
        classes=shards.classes,
        compression=manifest.get("compression", SMALL),
        statistics=manifest["statistics"],
        counts=manifest["counts"],
        rows=shards.rows,
        files=files,
    )


def _check_alike(first: _Part, part: _Part) -> None:
    wanted, found = first.settings(), part.settings()
    different = [key for key in wanted if wanted[key] != found[key]]
    if different:
        said = "; ".join(f"{key}: {wanted[key]} in {first.name}, {found[key]} in {part.name}" for key in different)
        raise SettingError(f"{said}; all sets to be merged need the same, prepare one of them again")


def _manifest(parts: Sequence[_Part]) -> dict[str, Any]:
    classes = _classes([part.classes for part in parts if part.classes is not None])
    return make_manifest(
        parts[0].layout,
        rows_per_group=parts[0].rows_per_group,
        classes=classes,
        splits={split: [entry for part in parts for entry in part.files[split]] for split in SPLITS},
        statistics=pooled([part.rows["train"] for part in parts], [part.statistics for part in parts]),
        counts={key: sum(part.counts[key] for part in parts) for key in parts[0].counts},
        compression=FAST if all(part.compression == FAST for part in parts) else SMALL,
        parts=[
            {
                "folder": part.name,
                "row_offset": number * ROWS_APART,
                "labels": None if classes is None else _labels(part.classes or [], classes),
            }
            for number, part in enumerate(parts)
        ],
    )


def _classes(lists: Sequence[list[str]]) -> list[str] | None:
    """All class names: in the order of the parts if they have the same, else sorted as `prepare` does."""
    if not lists:
        return None
    if all(names == lists[0] for names in lists):
        return lists[0]
    names = {name for names in lists for name in names}
    if all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _labels(own: list[str], classes: list[str]) -> list[int]:
    if own == classes:
        return list(range(len(classes)))
    number = {name: index for index, name in enumerate(classes)}
    return [number[name] for name in own]


def _rejected(folder: Folder, names: Sequence[str]) -> bytes:
    """The content of rejected.parquet: that of all parts."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECTS, compression="zstd") as writer:
        for name in names:
            if len(rows := rejected_rows(folder.sub(name))):
                writer.write_table(rows.cast(REJECTS))
    return bytes(sink.getvalue())
