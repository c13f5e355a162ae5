"""Columns of lists and Parquet files: finding one by name, labels as class indices, and splits."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SettingError
from pipeline.images.names import split_of
from pipeline.images.plan import IGNORED, NO_LABELS, NO_SPLIT, SPLIT_NAMES, TRAIN, UNIQUE_FROM, VAL, VAL_NAMES

PATH_NAMES = ("path", "file_name", "filename", "file_path", "filepath", "image_path", "image", "file")  # in lists
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls")
_MOST_SHOWN = 40  # characters of a value in a message
_MISSING = ("", "nan", "<na>")  # as pandas writes it
_UNIQUE_SHARE = 0.9  # of classes that have one image: above it they are identifiers or captions
_SEPARATORS = ("|", ";", ",", " ")  # of several labels in one text
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", re.IGNORECASE)


class UnusableLabels(SettingError):
    """A column holds something else than classes; `reason` says what, without the column."""

    def __init__(self, what: str, reason: str):
        super().__init__(f"{what} {reason}; allowed are integers and strings, each of them for several images")
        self.reason = reason


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


def labels_of(
    raw: pa.ChunkedArray, names: list[str] | None, column: str, shown: str, asked: str | None
) -> tuple[np.ndarray, list[str] | None, tuple[str, ...]]:
    """Class indices and names as `encode_labels` finds them; without any where a column that nobody asked for has none.

    Args:
        raw: The labels (n,).
        names: Class names of integer labels, if the source has them.
        column: The column for messages, such as "column 'label'".
        shown: The source for messages.
        asked: The column that the user named, if any.

    Returns:
        The class indices (n,), the class names, and a note if the column is not used.

    Raises:
        SettingError: The column that the user named holds something else than classes.
    """
    try:
        return *encode_labels(raw, names, f"images={shown}: {column}"), ()
    except UnusableLabels as error:
        if asked is not None:
            raise
        note = (
            f"{column} {error.reason}, so the images are unlabelled: classes are integers or strings that several images "
            f"have; data.label_column names another column, or {NO_LABELS}"
        )
        return np.full(len(raw), -1, np.int32), None, (note,)


def splits_of(column: pa.ChunkedArray, shown: str) -> tuple[np.ndarray, str]:
    """Codes (n,), int8, of a column of splits, and a description.

    Raises:
        SettingError: It does not hold names of splits, or never train.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return np.full(len(column), NO_SPLIT, np.int8), "val held out"
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SettingError(f"images={shown}: column 'split' holds {column.type}; allowed are {', '.join(SPLIT_NAMES)}")
    names = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(column, "")))
    distinct = pc.unique(names).to_pylist()
    if distinct == [""]:
        return np.full(len(names), NO_SPLIT, np.int8), "val held out"
    known = {name: name if name in SPLIT_NAMES else split_of(name) for name in distinct}  # also training, dev, …
    for name, split in known.items():
        if split is None:
            row = pc.index(names, name).as_py() + 1
            raise SettingError(
                f"images={shown}: row {row} has the split '{name[:_MOST_SHOWN]}'; allowed are {', '.join(SPLIT_NAMES)}"
            )
    if "train" not in known.values():
        raise SettingError(f"images={shown}: no row has the split train")
    val = next((name for name in VAL_NAMES if name in known.values()), None)
    codes = [TRAIN if known[name] == "train" else VAL if known[name] == val else IGNORED for name in distinct]
    index = pc.index_in(names, pa.array(distinct, names.type)).to_numpy()
    return np.array(codes, np.int8)[index], f"train and {val}" if val else "train, val held out"


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
        UnusableLabels: The column holds something else, or another label for each image.
        SettingError: An index has no class name.
    """
    if pa.types.is_dictionary(raw.type):
        raw = raw.cast(raw.type.value_type)
    if pa.types.is_floating(raw.type) or pa.types.is_decimal(
        raw.type
    ):  # integers with missing values, or of a data base
        try:
            raw = raw.cast(pa.int64()) if pa.types.is_decimal(raw.type) else _whole(raw)
        except pa.ArrowInvalid:
            raise UnusableLabels(what, "holds fractions") from None
    if pa.types.is_integer(raw.type) or pa.types.is_boolean(raw.type):
        numbers = raw.cast(pa.int64())
        if names is not None:
            return _named(numbers, names, what), names if len(names) > 1 else None
        distinct = sorted(value for value in pc.unique(numbers).to_pylist() if value is not None)
        codes = _codes(numbers, pa.array(distinct, pa.int64()))
        _check_several(codes, distinct, what)
        return codes, [str(value) for value in distinct] if len(distinct) > 1 else None
    if not (pa.types.is_string(raw.type) or pa.types.is_large_string(raw.type) or pa.types.is_null(raw.type)):
        raise UnusableLabels(what, f"holds {raw.type}")
    encoded = pc.dictionary_encode(raw.cast(pa.large_string())).combine_chunks()  # one text a class, not one an image
    index = pc.fill_null(encoded.indices, -1).to_numpy()
    # The same name is stored in several forms of Unicode by different systems.
    texts = _composed(pc.utf8_trim_whitespace(encoded.dictionary))
    texts = pc.if_else(pc.is_in(pc.utf8_lower(texts), pa.array(_MISSING, pa.large_string())), None, texts)
    found = [value for value in pc.unique(texts).to_pylist() if value is not None]
    if found and all(_NUMBER.fullmatch(value) for value in found) and not all(map(str.isdigit, found)):
        # 1.0 is 1, as in Parquet files
        return encode_labels(pa.chunked_array([texts.cast(pa.float64()).take(encoded.indices)]), None, what)
    _check_single(found, what)
    if all(re.fullmatch(r"-?\d{1,18}", value) for value in found):
        found.sort(key=lambda value: (int(value), value))
    else:
        found.sort()
    codes = np.append(_codes(texts, pa.array(found, pa.large_string())), np.int32(-1))[index]
    _check_several(codes, found, what)
    return codes, found if len(found) > 1 else None


def _composed(texts: pa.Array) -> pa.Array:
    """Texts in Unicode's form NFC. PyArrow's utf8_normalize gives NFD when it is asked for NFC."""
    plain = pc.string_is_ascii(texts)
    if pc.all(plain).as_py() is not False:
        return texts
    others = [unicodedata.normalize("NFC", text) for text in texts.filter(pc.invert(plain)).to_pylist()]
    return pc.replace_with_mask(texts, pc.invert(plain), pa.array(others, texts.type))


def _whole(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.is_nan(numbers), None, numbers).cast(pa.int64())


def _check_single(texts: list[str], what: str) -> None:
    """Raise UnusableLabels if the distinct texts are lists, or several labels in one: cat|dog, cat, dog|fish."""
    if texts and all(value.startswith(("[", "{")) for value in texts):
        raise UnusableLabels(what, "holds lists")
    if texts and all(re.fullmatch(r"[-+\d.]+(,[-+\d.]+)+", value) for value in texts):
        raise UnusableLabels(what, "holds lists, or fractions with a comma")
    for sign in _SEPARATORS:
        parts = {part.strip() for value in texts for part in value.split(sign)}
        # Words recur in the names of classes too (black bear, brown bear), but not that often, nor in any number.
        most = len(texts) / 2 if sign == " " else len(texts) - 1
        if sign == " " and len({value.count(sign) for value in texts}) < 3:
            continue
        if len(parts) <= most and len(texts) > 2:
            raise UnusableLabels(
                what, f"holds several labels in one text ('{next(v for v in texts if sign in v)[:_MOST_SHOWN]}')"
            )


def _check_several(codes: np.ndarray, distinct: list[Any], what: str) -> None:
    """Raise UnusableLabels if nearly every image has a label of its own, as an identifier has."""
    if len(distinct) < UNIQUE_FROM:
        return
    counts = np.bincount(codes[codes >= 0])
    if (counts == 1).mean() > _UNIQUE_SHARE:
        nearly = "" if counts.max() == 1 else "nearly "
        raise UnusableLabels(what, f"holds another value for {nearly}each image")


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
