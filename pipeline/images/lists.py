"""CSV, TSV and Parquet lists of images: which path, label and split each row names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.errors import SettingError
from pipeline.images.parquet import opened_parquet
from pipeline.images.plan import (
    IGNORED,
    NO_SPLIT,
    SPLIT_NAMES,
    TRAIN,
    VAL,
    VAL_NAMES,
    ImagePlan,
    Inputs,
    Origin,
    column_named,
    encode_labels,
    finish,
    without_doubles,
)
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import reaching

# Lists


def plan_list(
    folder: Folder, name: str, *, val_share: float | None, seed: int, image_column: str | None, label_column: str | None
) -> ImagePlan:
    """The plan of a list: column ``path``, and if they are there ``label`` and ``split``. Raises SettingError.

    Paths are relative to the list's folder, absolute, or URLs. With a column ``split``, every row has to name one.
    """
    shown = folder.shown(name)
    wanted = {"path": image_column or "path", "label": label_column or "label", "split": "split"}
    needed = {"path", "label"} if label_column else {"path"}
    suffix = PurePosixPath(name).suffix.lower()
    read, needs = {".parquet": (_read_parquet, ""), ".tsv": (_read_csv, "tabs")}.get(suffix, (_read_csv, "commas"))
    table = read(folder, name, lambda columns: _list_columns(columns, wanted, needed, needs, shown))
    if not len(table):
        raise SettingError(f"images={shown}: the list has no rows")
    labels, classes = np.full(len(table), -1, np.int32), None
    if "label" in table.column_names:
        labels, classes = encode_labels(table.column("label"), None, f"images={shown}: column '{wanted['label']}'")
    whole = np.full(len(table), NO_SPLIT, np.int8), "all of it"
    split, words = whole if val_share is None else _list_splits(table, shown)
    inputs = Inputs(_list_paths(table.column("path"), shown), labels, split)
    empty = pc.equal(inputs.path, "").to_numpy()
    rejects = [(f"{name}#{row}", "no path in the list") for row in np.flatnonzero(empty).tolist()]
    inputs.rejects += rejects
    inputs = without_doubles(inputs.where(~empty), "listed twice")
    return finish(
        inputs, classes, Origin("files", folder.url), f"a list, {words}", shown=shown, val_share=val_share, seed=seed
    )


def _list_columns(
    columns: list[str], wanted: dict[str, str], needed: set[str], needs: str, shown: str
) -> dict[str, str]:
    """What a list has of path, label and split → the column's own name. Raises SettingError."""
    found = {key: column_named(columns, name, shown) for key, name in wanted.items()}
    missing = [wanted[key] for key, column in found.items() if column is None and key in needed]
    if found["path"] is None and needs and any(";" in column for column in columns):
        raise SettingError(
            f"images={shown}: no column '{missing[0]}'; the list seems to be separated by semicolons, {needs} are needed"
        )
    if missing:
        raise SettingError(
            f"images={shown}: no column '{missing[0]}'; it has {', '.join(columns) or 'none'}. A list has the "
            "columns path, and perhaps label and split; image_column and label_column name others"
        )
    return {key: column for key, column in found.items() if column is not None}


def _list_paths(column: pa.ChunkedArray, shown: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SettingError(f"images={shown}: the column of paths holds {column.type}; allowed are texts")
    column = pc.fill_null(column.cast(pa.large_string()), "")
    unusual = pc.match_substring_regex(column, r"(^|/)\.{1,2}(/|$)|//")
    if not pc.any(unusual).as_py():
        return column
    # Two ways of writing one path are one input.
    chunks = [pa.array([_normal(path) for path in chunk.to_pylist()], pa.large_string()) for chunk in column.chunks]
    return pa.chunked_array(chunks, pa.large_string())


def _normal(path: str) -> str:
    return os.path.normpath(path) if path and "://" not in path else path


def _list_splits(table: pa.Table, shown: str) -> tuple[np.ndarray, str]:
    if "split" not in table.column_names:
        return np.full(len(table), NO_SPLIT, np.int8), "val held out"
    column = table.column("split")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SettingError(f"images={shown}: column 'split' holds {column.type}; allowed are {', '.join(SPLIT_NAMES)}")
    names = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(column, "")))
    index = pc.fill_null(pc.index_in(names, pa.array(SPLIT_NAMES, names.type)), -1).to_numpy()
    present = {SPLIT_NAMES[i] for i in np.unique(index) if i >= 0}
    if not present and pc.all(pc.equal(names, "")).as_py():
        return np.full(len(table), NO_SPLIT, np.int8), "val held out"
    if (index < 0).any():
        row = int(np.flatnonzero(index < 0)[0])
        raise SettingError(
            f"images={shown}: row {row + 1} has the split '{names[row].as_py()}'; allowed are {', '.join(SPLIT_NAMES)}"
        )
    if "train" not in present:
        raise SettingError(f"images={shown}: no row has the split train")
    val = next((name for name in VAL_NAMES if name in present), None)
    codes = np.array([TRAIN] + [VAL if name == val else IGNORED for name in VAL_NAMES], np.int8)
    return codes[index], f"train and {val}" if val else "train, val held out"


def _read_csv(folder: Folder, name: str, choose: Callable[[list[str]], dict[str, str]]) -> pa.Table:
    shown = folder.shown(name)
    delimiter = "\t" if PurePosixPath(name).suffix.lower() == ".tsv" else ","
    # For the header alone, rows of another length do not matter.
    lenient = pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=lambda row: "skip")
    try:
        with reaching(shown), folder.open(name) as source:
            found = choose(pacsv.open_csv(source, parse_options=lenient).schema.names)
        columns = list(dict.fromkeys(found.values()))
        convert = pacsv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        with reaching(shown), folder.open(name) as source:
            parse = pacsv.ParseOptions(delimiter=delimiter)
            table = pacsv.read_csv(source, parse_options=parse, convert_options=convert)
    except SettingError:  # of `choose`, and a ValueError too
        raise
    except (ValueError, pa.ArrowException) as error:  # UnicodeDecodeError among them
        raise SettingError(f"images={shown}: {_csv_mistake(str(error))}") from None
    return pa.table({key: table.column(column) for key, column in found.items()})


def _csv_mistake(text: str) -> str:
    text = " ".join(text.split())
    if re.search("utf-?8", text, re.IGNORECASE):
        return "not in UTF-8; save the list as UTF-8"
    if "Empty CSV" in text:
        return "the list is empty"
    return f"not a list that can be read ({re.sub('CSV parse error: ', '', text)[:160]})"


def _read_parquet(folder: Folder, name: str, choose: Callable[[list[str]], dict[str, str]]) -> pa.Table:
    with opened_parquet(folder, name) as parquet:
        found = choose(parquet.schema_arrow.names)
        table = parquet.read(list(dict.fromkeys(found.values())))
    return pa.table({key: table.column(column) for key, column in found.items()})
