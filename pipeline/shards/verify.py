"""Verifying a shard set against its manifest: sizes, checksums, contents and labels."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.errors import SettingError
from pipeline.shards.errors import ShardError
from pipeline.shards.shard_set import MANIFEST, REJECTED, SPLITS, ShardSet
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import reaching


def opened(where: str, *, check_files: bool) -> ShardSet:
    """Open a shard set that a user named.

    Args:
        where: Path or URL of the folder.
        check_files: As for `ShardSet.open`.

    Raises:
        SettingError: There is no such folder.
        ShardError: The folder is not a shard set.
    """
    existing_folder(where)
    return ShardSet.open(where, check_files=check_files)


def existing_folder(where: str) -> Folder:
    """The folder that a user named. Raises SettingError where there is none."""
    folder = Folder.at(where)
    if (kind := folder.kind()) != "folder":
        what = "this is a file; give the folder of the shard set" if kind else "no such folder"
        raise SettingError(f"{folder}: {what}")
    return folder


def check(where: str, *, progress: bool = True, say: Callable[[str], None] = tqdm.write) -> bool:
    """Verify all files of a shard set, and report a line for each problem and a summary.

    Args:
        where: Path or URL of the folder.
        progress: Whether to show a progress bar.
        say: Called with each line.

    Returns:
        Whether all files are as the manifest says.

    Raises:
        SettingError: There is no such folder.
        ShardError: The folder is not a shard set.
    """
    shards = opened(where, check_files=False)
    damaged = set()
    size = sum(entry["bytes"] for entry in shards.entries())
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
        for name, problem in _problems(shards, bar):
            damaged.add(name)
            say(f"{name}: {problem}")
    files, rows = len(shards.entries()) + 2, sum(shards.rows.values())  # with rejected.parquet and the manifest
    say(f"{files:,} files, {rows:,} rows: {f'{len(damaged):,} damaged' if damaged else 'intact'}")
    return not damaged


def _problems(shards: ShardSet, bar: tqdm[Any]) -> Iterator[tuple[str, str]]:
    """(name of the file or split, what is wrong with it)."""
    entries = {entry["name"]: (split, entry) for split in SPLITS for entry in shards.manifest["splits"][split]["files"]}
    numbers: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for name, problem in verify(shards):
        split, entry = entries[name]
        problem = problem or _content_problem(shards, entry, numbers[split])
        if problem:
            yield name, problem
        bar.update(entry["bytes"])
    yield from _set_problems(shards, numbers)


def _content_problem(shards: ShardSet, entry: dict[str, Any], numbers: list[np.ndarray]) -> str | None:
    """What is wrong with the content of a shard whose checksum is right, or None. Adds its row numbers to `numbers`."""
    try:
        footer, table = read_rows(shards, entry["name"], ["row", "label"])
    except ShardError as error:
        return str(error)
    if footer.num_rows != entry["rows"]:
        return f"has {footer.num_rows} rows, the manifest says {entry['rows']}"
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if any(rows != shards.rows_per_group for rows in groups[:-1]) or groups[-1] > shards.rows_per_group:
        return f"has row groups of sizes other than the manifest's {shards.rows_per_group}"
    if not footer.schema.to_arrow_schema().equals(shards.layout.schema()):
        return "its columns differ from the manifest"
    numbers.append(table.column("row").to_numpy())
    return label_problem(shards, table.column("label").to_numpy())


def label_problem(shards: ShardSet, labels: np.ndarray) -> str | None:
    """What is wrong with labels (n,), or None if nothing is."""
    classes = len(shards.classes or ())
    good = not labels.size or (labels.min() >= -1 and labels.max() < classes)
    return None if good else f"has labels from {labels.min()} to {labels.max()}, but there are {classes} classes"


def _set_problems(shards: ShardSet, numbers: dict[str, list[np.ndarray]]) -> Iterator[tuple[str, str]]:
    """What is wrong with the set as a whole: (name of the file or split, problem)."""
    for split, parts in numbers.items():
        rows = np.concatenate(parts) if parts else np.empty(0, np.int64)
        if repeated := len(rows) - len(np.unique(rows)):
            yield split, f"{repeated} row numbers are repeated"
    counts, stored = shards.manifest["counts"], sum(shards.rows.values())
    if not counts["kept"] == stored == sum(entry["rows"] for entry in shards.entries()):
        yield (
            MANIFEST,
            f"counts {counts['kept']} images kept and {stored} rows in its splits, which disagrees with its files",
        )
    if counts["inputs"] != counts["kept"] + counts["rejected"]:
        yield MANIFEST, "counts {inputs} inputs, but {kept} kept and {rejected} rejected".format(**counts)
    try:
        rejected = len(rejected_rows(shards.folder))
    except ShardError as error:
        yield REJECTED, str(error)
        return
    if rejected != counts["rejected"]:
        yield REJECTED, f"has {rejected} rows, but the manifest counts {counts['rejected']} rejected"


@contextlib.contextmanager
def _damage(shown: str) -> Iterator[None]:
    """Turn errors of reading a Parquet file into ShardError."""
    try:
        yield
    except FileNotFoundError:
        raise ShardError(f"{shown} is missing") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ShardError(f"{shown} cannot be read: {' '.join(str(error).split())}") from None


def read_rows(shards: ShardSet, name: str, columns: Sequence[str]) -> tuple[pq.FileMetaData, pa.Table]:
    """Read the footer and some columns of a whole shard, as `read_columns`. Raises ShardError."""
    folder, shown = shards.folder, shards.folder.shown(name)
    with _damage(shown), reaching(shown), folder.open(name) as source:
        parquet = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=folder.local is None)
        table = parquet.read(list(columns), use_threads=False).combine_chunks()
        return parquet.metadata, shards.numbered(name, table)


def rejected_rows(folder: Folder) -> pa.Table:
    """Read the path and reason of each rejected input of the shard set in a folder. Raises ShardError."""
    shown = folder.shown(REJECTED)
    with _damage(shown), reaching(shown), folder.open(REJECTED) as source:
        return pq.read_table(source).select(["path", "reason"])


def verify(shards: ShardSet) -> Iterator[tuple[str, str | None]]:
    """Compare the size and checksum of each shard with the manifest.

    Yields:
        The name of each shard, and what is wrong with it, or None.
    """
    sizes = shards.sizes()
    for entry in shards.entries():
        name = entry["name"]
        if name not in sizes:
            yield name, "is missing"
        elif sizes[name] != entry["bytes"]:
            yield name, f"has {sizes[name]} bytes, the manifest says {entry['bytes']}"
        else:
            try:
                same = _sha256(shards.folder, name) == entry["sha256"]
                yield name, None if same else "is damaged: its SHA-256 differs from the manifest"
            except OSError as error:
                yield name, f"cannot be read: {error}"


def _sha256(folder: Folder, name: str) -> str:
    digest = hashlib.sha256()
    with reaching(folder.shown(name)), folder.open(name) as source:
        while chunk := source.read(1 << 23):
            digest.update(chunk)
    return digest.hexdigest()
