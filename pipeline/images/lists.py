"""Lists of images in CSV, TSV or Parquet: a path in each row, with an optional label and split."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.config.places import local_place
from pipeline.errors import SettingError
from pipeline.images.columns import LABEL_NAMES, PATH_NAMES, column_named, labels_of, splits_of
from pipeline.images.inputs import SourceInputs, parts_of, without_duplicates
from pipeline.images.parquet import opened_parquet
from pipeline.images.plan import NO_LABELS, NO_SPLIT, ImagePlan, Origin, PlanOptions, make_plan, without_unlabelled_test
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import check_scheme, is_remote, reaching


def plan_list(folder: Folder, name: str, options: PlanOptions) -> ImagePlan:
    """Plan a list with a column ``path``, and optionally ``label`` and ``split``, or with other usual names of these.

    Paths are relative to the list's folder, absolute, or URLs. With a column ``split``, every row has to name a split.

    Args:
        folder: The folder that holds the list.
        name: File name of the list; its suffix decides the format.
        options: Options of the plan; `image_column` and `label_column` replace the names of the first two columns.

    Raises:
        SettingError: The list cannot be read, lacks a column, or has unknown splits or labels.
    """
    shown = options.shown
    wanted: dict[str, tuple[str, ...]] = {
        "path": (options.image_column,) if options.image_column else PATH_NAMES,
        "label": (options.label_column,) if options.label_column else LABEL_NAMES,
        "split": ("split",),
    }
    if options.label_column == NO_LABELS:
        del wanted["label"]
    needed = {"path", "label"} if options.label_column and "label" in wanted else {"path"}
    suffix = PurePosixPath(name).suffix.lower()
    read, separator = {".parquet": (_read_parquet, ""), ".tsv": (_read_csv, "tabs")}.get(suffix, (_read_csv, "commas"))
    taken: dict[str, str] = {}

    def choose(columns: list[str]) -> dict[str, str]:
        taken.update(_list_columns(columns, wanted, needed, separator, shown))
        return taken

    table = read(folder, name, choose)
    if not len(table):
        raise SettingError(f"images={shown}: the list has no rows")
    labels, classes = np.full(len(table), -1, np.int32), None
    notes: tuple[str, ...] = ()
    if "label" in table.column_names:
        column = f"column '{taken['label']}'"
        labels, classes, notes = labels_of(table.column("label"), None, column, shown, options.label_column)
    split, splits_shown = np.full(len(table), NO_SPLIT, np.int8), "val held out"
    if options.val_share is not None and "split" in table.column_names:
        split, splits_shown = splits_of(table.column("split"), shown)
    inputs = SourceInputs(_list_paths(table.column("path"), folder, shown), labels, split)
    del table
    empty = pc.equal(inputs.path, "").to_numpy()
    rejects = [(f"{name}#{row}", "no path in the list") for row in np.flatnonzero(empty).tolist()]
    inputs.rejects += rejects
    inputs = without_duplicates(inputs.where(~empty), "listed twice")
    splits_shown = without_unlabelled_test(inputs, splits_shown)
    plan = make_plan(inputs, classes, Origin("files", folder.url), f"a list, {splits_shown}", options)
    return replace(plan, notes=(*notes, *plan.notes))


def _list_columns(
    columns: list[str], wanted: dict[str, tuple[str, ...]], needed: set[str], separator: str, shown: str
) -> dict[str, str]:
    """Which of path, label and split a list has, and the name of its column for each, the first of those wanted.

    Raises:
        SettingError: A needed one is missing, or there is a name twice.
    """
    found = {
        key: next((column for name in names if (column := column_named(columns, name, shown)) is not None), None)
        for key, names in wanted.items()
    }
    missing = [wanted[key][0] for key, column in found.items() if column is None and key in needed]
    for sign, name in ((";", "semicolons"), ("\t", "tabs (as in .tsv files)"), (",", "commas (as in .csv files)")):
        if found["path"] is None and separator and len(columns) == 1 and sign in columns[0]:
            raise SettingError(
                f"images={shown}: no column '{missing[0]}'; the columns seem to be separated by {name}; use {separator}"
            )
    if missing:
        raise SettingError(
            f"images={shown}: no column '{missing[0]}'; the list has {', '.join(columns) or 'none'}. A list needs a "
            "column path (or file_name, filename, …), and may have label and split; image_column and label_column set other "
            "names"
        )
    return {key: column for key, column in found.items() if column is not None}


def _list_paths(column: pa.ChunkedArray, folder: Folder, shown: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SettingError(f"images={shown}: the column of paths holds {column.type}; it has to hold strings")
    # A part at a time: for a whole column of many millions, each of these steps needs as much memory as the paths.
    parts = [_usual_paths(part, folder, shown) for part in parts_of(column)]
    return pa.chunked_array(parts, pa.large_string())


def _usual_paths(column: pa.Array, folder: Folder, shown: str) -> pa.Array:
    """Paths as they are written here: with slashes, without spaces around them, each in one spelling."""
    column = pc.fill_null(column.cast(pa.large_string()), "")
    # Written on Windows, or with spaces around the commas, unless there are files of such names.
    for unusual, usual in (
        (pc.match_substring(column, "\\"), pc.replace_substring(column, "\\", "/")),
        (pc.match_substring_regex(column, r"^\s|\s$"), pc.utf8_trim_whitespace(column)),
    ):
        if pc.any(unusual).as_py():
            column = pc.if_else(pc.and_(unusual, _missing(column, unusual, folder)), usual, column)
    if pc.any(drives := pc.match_substring_regex(column, "^[A-Za-z]:/")).as_py():
        first = column.filter(drives)[0].as_py()
        raise SettingError(
            f"images={shown}: the list has paths of Windows, such as '{first}'; write paths relative to the list's folder"
        )
    _check_urls(column, shown)
    unusual = pc.match_substring_regex(column, r"(^|/)\.{1,2}(/|$)|//")
    if not pc.any(unusual).as_py():
        return column
    # Different spellings of a path are the same input.
    return pa.array([_normal(path) for path in column.to_pylist()], pa.large_string())


def _check_urls(column: pa.Array, shown: str) -> None:
    """Raise SettingError where a list has URLs of another machine's files, or of stores that cannot be used."""
    urls = column.filter(pc.match_substring(column, "://"))
    stores = pc.unique(pc.replace_substring_regex(urls, r"^([A-Za-z][A-Za-z0-9+.-]+://[^/]*).*$", r"\1"))
    for store in stores.to_pylist():
        try:
            if is_remote(store):
                check_scheme(store)
            else:
                local_place(f"{store}/")
        except SettingError as error:
            raise SettingError(f"images={shown}: {error}") from None


def _missing(column: pa.Array, asked: pa.Array, folder: Folder) -> pa.Array:
    """Which of the paths with a backslash name no local file."""
    local = folder.local
    return pa.array(
        local is None or (bool(one) and not os.path.lexists(os.path.join(local, path)))
        for path, one in zip(column.to_pylist(), asked.to_pylist(), strict=True)
    )


def _normal(path: str) -> str:
    return os.path.normpath(path) if path and "://" not in path else path


def _read_csv(folder: Folder, name: str, choose: Callable[[list[str]], dict[str, str]]) -> pa.Table:
    shown = folder.shown(name)
    delimiter = "\t" if PurePosixPath(name).suffix.lower() == ".tsv" else ","
    # Only the header is wanted: rows with the wrong number of fields do not matter yet.
    lenient = pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=lambda row: "skip")
    try:
        with reaching(shown), folder.open(name) as source:
            found = choose(pacsv.open_csv(source, parse_options=lenient).schema.names)
        columns = list(dict.fromkeys(found.values()))
        convert = pacsv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        with reaching(shown), folder.open(name) as source:
            parse = pacsv.ParseOptions(delimiter=delimiter)
            table = pacsv.read_csv(source, parse_options=parse, convert_options=convert)
    except SettingError:  # from `choose`; it is a ValueError too
        raise
    except (ValueError, pa.ArrowException) as error:  # including UnicodeDecodeError
        raise SettingError(f"images={shown}: {_csv_mistake(str(error))}") from None
    return pa.table({key: table.column(column) for key, column in found.items()})


def _csv_mistake(text: str) -> str:
    text = " ".join(text.split())
    if re.search("utf-?8", text, re.IGNORECASE):
        return "not UTF-8; save the list in this encoding"
    if "Empty CSV" in text:
        return "the list is empty"
    return f"the list cannot be parsed ({re.sub('CSV parse error: ', '', text)[:160]})"


def _read_parquet(folder: Folder, name: str, choose: Callable[[list[str]], dict[str, str]]) -> pa.Table:
    with opened_parquet(folder, name) as parquet:
        found = choose(parquet.schema_arrow.names)
        table = parquet.read(list(dict.fromkeys(found.values())))
    return pa.table({key: table.column(column) for key, column in found.items()})
