"""Parquet files that hold encoded images, the format of data sets on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SettingError
from pipeline.images.columns import LABEL_NAMES, column_named, folded, labels_of, splits_of
from pipeline.images.files import IN_FLIGHT, LARGEST, container_of, too_large
from pipeline.images.inputs import Paths, SourceInputs
from pipeline.images.plan import (
    NO_LABELS,
    ImagePlan,
    Origin,
    PlanOptions,
    make_plan,
    split_codes,
    split_of_name,
    without_unlabelled_test,
)
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError, is_remote, reaching

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes", "image_bytes", "data")
_THREADS = {False: 2, True: 12}  # that read labels and footers: local, remote
_BATCH = 16  # rows decoded at a time
_BUFFER = {False: 1 << 20, True: 8 << 20}  # bytes of one read: local, remote
_NOT_EMBEDDED = "the image is not embedded, only its path"
_DAMAGE = re.compile(r"thrift|end of stream|parquet|corrupt|decompress|magic|page|dictionary|invalid", re.IGNORECASE)


@dataclass(frozen=True)
class _File:
    """What a plan needs to know of one file."""

    groups: list[int]  # number of rows of each row group
    labels: pa.ChunkedArray | None
    names: list[str] | None  # class names
    splits: pa.ChunkedArray | None = None


@contextlib.contextmanager
def opened_parquet(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for planning.

    Raises:
        SettingError: It does not exist, or is not a complete Parquet file.
        StorageError: The object store does not answer.
    """
    shown = folder.shown(name)
    remote = is_remote(folder.url)
    try:
        with folder.open(name) as source:
            yield pq.ParquetFile(source, buffer_size=_BUFFER[remote], pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        if is_damage(error, remote):
            raise SettingError(
                f"images={shown}: not a complete Parquet file ({' '.join(str(error).split())})"
            ) from None
        if isinstance(error, FileNotFoundError | PermissionError):
            raise SettingError(f"images={shown}: {error.strerror or 'no such file'}") from None
        with reaching(shown):
            raise


def holds_images(folder: Folder, name: str, image_column: str | None) -> bool:
    """Whether a Parquet file holds encoded images; otherwise it may be a list of paths. Raises SettingError."""
    with opened_parquet(folder, name) as parquet:
        schema = parquet.schema_arrow
    shown = folder.shown(name)
    if image_column and (asked := column_named(schema.names, image_column, shown)) is not None:
        return _kind(schema.field(asked).type) is not None
    held = [entry for entry in schema if _kind(entry.type) is not None]
    if any(folded(entry.name) in IMAGE_NAMES or _kind(entry.type) == "struct" for entry in held):
        return True
    return column_named(schema.names, "path", shown) is None


def plan_parquet(folder: Folder, names: list[str], options: PlanOptions) -> ImagePlan:
    """Plan Parquet files that hold images. Row groups stay together in the order, so that a task reads few of them.

    Args:
        folder: The folder that holds the files.
        names: Paths of the files in it, in their order.
        options: Options of the plan; the two columns are searched for where they are not set.

    Raises:
        SettingError: A file is damaged, a column is missing or ambiguous, or labels differ in type or classes.
    """
    shown = options.shown
    split_of_file, splits_shown = split_codes([split_of_name(name) for name in names])
    with opened_parquet(folder, names[0]) as parquet:
        schema = parquet.schema_arrow
    image = _image_column(schema, options.image_column, shown)
    label = _label_column(schema, options.label_column, image, shown)
    split = None if options.val_share is None else column_named(schema.names, "split", shown)
    with ThreadPoolExecutor(_THREADS[is_remote(folder.url)]) as pool:
        files = list(pool.map(lambda name: _read(folder, name, image, label, split), names))
    counts = [sum(file.groups) for file in files]
    if not sum(counts):
        raise SettingError(f"images={shown}: no rows")
    rows_of_groups = np.array([rows for file in files for rows in file.groups], np.int64)
    number = np.concatenate([np.arange(len(file.groups)) for file in files])
    starts = np.cumsum(rows_of_groups) - rows_of_groups
    codes, classes, notes = _labels(files, label, shown, options.label_column)
    split_codes_of_rows = np.repeat(np.array(split_of_file, np.int8), counts)
    if split is not None:
        try:
            split_codes_of_rows, splits_shown = splits_of(_joined([file.splits for file in files], "split"), shown)
            splits_shown += " by the column 'split'"
        except SettingError as error:
            notes += (f"column '{split}' is not used ({str(error).removeprefix(f'images={shown}: ')})",)
    inputs = SourceInputs(
        path=_paths(names, counts),
        label=codes,
        split=split_codes_of_rows,
        container=np.repeat(np.arange(len(names), dtype=np.int32), counts),
        first=np.repeat(number, rows_of_groups),
        second=np.arange(sum(counts)) - np.repeat(starts, rows_of_groups),
    )
    splits_shown = without_unlabelled_test(inputs, splits_shown)
    groups = np.repeat(np.arange(len(rows_of_groups)), rows_of_groups)
    files_shown = f"{len(names)} Parquet files" if len(names) > 1 else "a Parquet file"
    origin = Origin("parquet", folder.url, tuple(names), image)
    layout = f"{files_shown}, images in '{image}', {splits_shown}"
    plan = make_plan(inputs, classes, origin, layout, options, groups=groups)
    return replace(plan, notes=(*notes, *plan.notes))


def _paths(names: list[str], counts: list[int]) -> pa.ChunkedArray:
    paths = Paths()
    for name, count in zip(names, counts, strict=True):
        paths.add(f"{name}#{row}" for row in range(count))
    return paths.column()


def _read(folder: Folder, name: str, image: str, label: str | None, split: str | None) -> _File:
    with opened_parquet(folder, name) as parquet:
        schema = parquet.schema_arrow
        for column in (image, label):
            if column is not None and column_named(schema.names, column, folder.shown(name)) != column:
                raise SettingError(
                    f"images={folder.shown(name)}: no column '{column}', which other files have; "
                    f"the columns are {', '.join(schema.names)}"
                )
        about = parquet.metadata
        groups = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        columns = {column: parquet.read([column]).column(0) for column in (label, split) if column in schema.names}
        names = None if label is None else _class_names(schema, label)
        return _File(groups, columns.get(label or ""), names, columns.get(split or ""))


def _labels(
    files: list[_File], label: str | None, shown: str, asked: str | None
) -> tuple[np.ndarray, list[str] | None, tuple[str, ...]]:
    if label is None:
        return np.full(sum(sum(file.groups) for file in files), -1, np.int32), None, ()
    if any(file.names != files[0].names for file in files):
        raise SettingError(
            f"images={shown}: the files differ in the class names of column '{label}'; make them the same"
        )
    try:
        raw = _joined([file.labels for file in files], label)
    except SettingError as error:
        raise SettingError(f"images={shown}: {error}") from None
    return labels_of(raw, files[0].names, f"column '{label}'", shown, asked)


def _joined(columns: list[pa.ChunkedArray | None], name: str) -> pa.ChunkedArray:
    """A column of all files. Raises SettingError if some lack it, or its types differ."""
    if any(column is None for column in columns):
        raise SettingError(f"column '{name}' is missing in some files")
    try:
        tables = [pa.table({name: column}) for column in columns]
        return pa.concat_tables(tables, promote_options="permissive").column(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        raise SettingError(f"column '{name}' differs in type between files; make it the same") from None


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names of integer labels, if the file has them in the metadata of Hugging Face's ``datasets``."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        names = about["names"] if about.get("_type") == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if isinstance(names, dict):  # older versions: {"0": name, …}
        names = [names[key] for key in sorted(names, key=int)]
    return [str(name) for name in names] if names else None


def _kind(kind: pa.DataType) -> str | None:
    """How a column of this type can hold images: "struct" (with bytes), "binary", or None."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return "struct" if index >= 0 and _kind(kind.field(index).type) == "binary" else None
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return "binary" if binary else None


def _image_column(schema: pa.Schema, asked: str | None, shown: str) -> str:
    if asked is not None:
        asked = _asked_column(schema, asked, "image_column", shown)
        if _kind(schema.field(asked).type) is None:
            raise SettingError(
                f"images={shown}: image_column={asked} holds {schema.field(asked).type}; "
                "allowed are binary, or struct with a field bytes"
            )
        return asked
    for kind in ("struct", "binary"):
        found = [entry.name for entry in schema if _kind(entry.type) == kind]
        named = [name for wanted in IMAGE_NAMES for name in found if folded(name) == wanted]
        if named or len(found) == 1:
            column_named(schema.names, (named or found)[0], shown)
            return (named or found)[0]
        if found:
            raise SettingError(f"images={shown}: several columns may hold the images; set image_column to one of "
                               f"{', '.join(found)}")  # fmt: skip
    raise SettingError(
        f"images={shown}: neither a column of images (binary, or struct with a field bytes) nor a column path; it has "
        f"{', '.join(f'{entry.name} ({entry.type})' for entry in schema)[:300]}"
    )


def _label_column(schema: pa.Schema, asked: str | None, image: str, shown: str) -> str | None:
    if asked == NO_LABELS:
        return None
    if asked is not None:
        return _asked_column(schema, asked, "label_column", shown)
    found = [name for name in LABEL_NAMES if name != folded(image) and column_named(schema.names, name, shown)]
    return column_named(schema.names, found[0], shown) if found else None


def _asked_column(schema: pa.Schema, name: str, setting: str, shown: str) -> str:
    found = column_named(schema.names, name, shown)
    if found is None:
        near = difflib.get_close_matches(name, schema.names, n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else f"; the columns are {', '.join(schema.names)}"
        raise SettingError(f"images={shown}: no column {setting}={name}{hint}")
    return found


# Reading images


def fetch_parquet(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Yield (index into `rows`, encoded image or the reason why there is none), shuffled.

    Files are read in their order through a shuffle buffer, whose seed is a function of `rows`.
    """
    generator = np.random.default_rng([len(rows), *rows.column("row").slice(0, 1).to_pylist()])
    buffer: list[tuple[int, bytes | str]] = []
    held = 0
    for index, content in _parquet_cells(origin, rows):
        buffer.append((index, content))
        held += len(content)
        while held > IN_FLIGHT:
            index, content = _drawn(buffer, generator)
            held -= len(content)
            yield index, content
    while buffer:
        yield _drawn(buffer, generator)


def _drawn(buffer: list[tuple[int, bytes | str]], generator: np.random.Generator) -> tuple[int, bytes | str]:
    place = int(generator.integers(len(buffer)))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _parquet_cells(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    container, group, place = (rows.column(name).to_numpy() for name in ("container", "first", "second"))
    order = np.lexsort((place, group, container))
    root = Folder.at(origin.root)
    start = 0
    while start < len(order):
        file = container[order[start]]
        stop = start + int(np.searchsorted(container[order[start:]], file, side="right"))
        yield from _cells_of_file(origin, root, origin.containers[file], order[start:stop], group, place)
        start = stop


def _cells_of_file(
    origin: Origin, root: Folder, name: str, order: np.ndarray, group: np.ndarray, place: np.ndarray
) -> Iterator[tuple[int, bytes | str]]:
    remote = root.local is None
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    with container_of(root, name), root.open(name) as source:
        try:
            parquet = pq.ParquetFile(source, buffer_size=_BUFFER[remote], pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error, remote):
                raise
            yield from ((int(index), _damaged(error)) for index in order)
            return
        for wanted in groups:
            done = 0
            try:
                for index, content in _cells_of_group(parquet, origin, int(group[wanted[0]]), wanted, place):
                    done += 1
                    yield index, content
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error, remote):
                    raise
                yield from ((int(index), _damaged(error)) for index in wanted[done:])


def _damaged(error: Exception) -> str:
    return f"the Parquet file is damaged ({' '.join(str(error).split())[:120]})"


def is_damage(error: Exception, remote: bool) -> bool:
    """Whether an error while reading a Parquet file is about its content, rather than about reaching it."""
    if isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError | pa.ArrowSerializationError):
        return True
    text = str(error)
    if not isinstance(error, OSError) or isinstance(error, StorageError) or error.errno is not None or "AWS E" in text:
        return False
    return not remote or _DAMAGE.search(text) is not None


def _cells_of_group(
    parquet: pq.ParquetFile, origin: Origin, number: int, wanted: np.ndarray, place: np.ndarray
) -> Iterator[tuple[int, bytes | str]]:
    column = origin.column or ""
    kind = parquet.schema_arrow.field(column).type
    leaves = [column]
    if pa.types.is_struct(kind):
        leaves = [f"{column}.{name}" for name in ("bytes", "path") if kind.get_field_index(name) >= 0]
    start = done = 0
    for batch in parquet.iter_batches(_BATCH, row_groups=[number], columns=leaves, use_threads=False):
        cells, paths = batch.column(0), None
        if pa.types.is_struct(cells.type):
            parts = dict(zip((field.name for field in cells.type), cells.flatten(), strict=True))
            cells, paths = parts["bytes"], parts.get("path")  # flatten passes on nulls of the struct
        while done < len(wanted) and place[wanted[done]] < start + len(cells):
            row = int(place[wanted[done]]) - start
            cell = cells[row].as_py()
            named = cell is None and paths is not None and bool(paths[row].as_py())
            yield int(wanted[done]), _NOT_EMBEDDED if named else _checked_cell(cell)
            done += 1
        start += len(cells)
        if done == len(wanted):
            return
    raise pa.ArrowInvalid("fewer rows than the plan has")


def _checked_cell(cell: bytes | None) -> bytes | str:
    if cell is None:
        return "the image is null"
    if len(cell) > LARGEST:
        return too_large(len(cell))
    return bytes(cell) or "empty file"
