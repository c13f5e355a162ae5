"""Columns of lists and Parquet files: finding one by name, and labels as class indices."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SettingError


def column_named(columns: list[str], wanted: str, shown: str) -> str | None:
    """Find a column by name, ignoring case and surrounding spaces.

    Args:
        columns: Names of all columns.
        wanted: The name to find.
        shown: The source, for the error message.

    Returns:
        The name as the source spells it; None if there is no such column.

    Raises:
        SettingError: Several columns have this name.
    """
    found = [column for column in columns if folded(column) == folded(wanted)]
    if len(found) > 1:
        several = ", ".join(f"'{column}'" for column in found)
        raise SettingError(f"images={shown}: {len(found)} columns are named '{wanted}' ({several}); keep one of them")
    return found[0] if found else None


def folded(name: str) -> str:
    """A column name normalised for comparison."""
    return name.strip().casefold()


def encode_labels(raw: pa.ChunkedArray, names: list[str] | None, what: str) -> tuple[np.ndarray, list[str] | None]:
    """Turn a column of labels into class indices.

    Args:
        raw: Labels (n,): integers, whole floats, booleans or strings; null, NaN or empty for none.
        names: Class names of integer labels, if the source has them. Otherwise the classes are the distinct labels,
            numbers in numerical and strings in alphabetical order.
        what: The column, for error messages.

    Returns:
        The class indices (n,), int32, -1 for none, and the class names, None if there are fewer than two.

    Raises:
        SettingError: The column holds something else, or an index without a class name.
    """
    if pa.types.is_dictionary(raw.type):
        raw = raw.cast(raw.type.value_type)
    if pa.types.is_floating(raw.type):  # how pandas writes integers with missing values
        try:
            raw = pc.if_else(pc.is_nan(raw), None, raw).cast(pa.int64())
        except pa.ArrowInvalid:
            raise SettingError(f"{what} holds fractions; allowed are integers and strings") from None
    if pa.types.is_integer(raw.type) or pa.types.is_boolean(raw.type):
        numbers = raw.cast(pa.int64())
        if names is not None:
            return _named(numbers, names, what), names if len(names) > 1 else None
        distinct = sorted(value for value in pc.unique(numbers).to_pylist() if value is not None)
        table, classes = pa.array(distinct, pa.int64()), [str(value) for value in distinct]
        return _codes(numbers, table), classes if len(classes) > 1 else None
    if not (pa.types.is_string(raw.type) or pa.types.is_large_string(raw.type) or pa.types.is_null(raw.type)):
        raise SettingError(f"{what} holds {raw.type}; allowed are integers and strings")
    texts = pc.utf8_trim_whitespace(raw.cast(pa.large_string()))
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    found = [value for value in pc.unique(texts).to_pylist() if value is not None]
    if all(re.fullmatch(r"-?\d{1,18}", value) for value in found):
        found.sort(key=lambda value: (int(value), value))
    else:
        found.sort()
    return _codes(texts, pa.array(found, pa.large_string())), found if len(found) > 1 else None


def _codes(values: pa.ChunkedArray, table: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.index_in(values, value_set=table, skip_nulls=True), -1).to_numpy().astype(np.int32)


def _named(numbers: pa.ChunkedArray, names: list[str], what: str) -> np.ndarray:
    codes = pc.fill_null(numbers, -1).to_numpy()
    wrong = codes[(codes < -1) | (codes >= len(names))]
    if len(wrong):
        raise SettingError(
            f"{what} holds the label {wrong[0]}, but there are names for {len(names)} classes; "
            f"allowed are 0 to {len(names) - 1}"
        )
    return codes.astype(np.int32)
