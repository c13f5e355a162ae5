"""Sources of single files: a folder tree of images, and a list of paths in CSV or Parquet."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.config import SettingError
from pipeline.image_decoding import SUFFIXES
from pipeline.source_fetch import Origin
from pipeline.source_parquet import opened_parquet
from pipeline.source_plan import (
    IGNORED,
    NO_SPLIT,
    SPLIT_NAMES,
    TRAIN,
    VAL,
    VAL_NAMES,
    Inputs,
    Paths,
    Plan,
    check_classes,
    encode_labels,
    finish,
    without_doubles,
)
from pipeline.storage import Folder, reaching

# The first of these that is there, in a folder tree.
VAL_FOLDERS = ("val", "valid", "validation", "test")


# Folder trees


class Tree:
    """The folder of images `images`, listed once: every folder with files in it, and the names of those."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        try:
            self.listing = list(folder.tree())
        except OSError as error:
            raise SettingError(f"images: '{error.filename}' cannot be read: {error.strerror}") from None

    def paths(self) -> Iterator[str]:
        """All files, relative to the folder."""
        for below, names in self.listing:
            yield from (f"{below}/{name}" if below else name for name in names)


class _Split:
    """What a tree has for one split: images, what is no image, and whether its folders are classes.

    ``CLASS/image`` or ``CLASS/images/image``, with at least two classes and no image anywhere else, is labelled.
    """

    def __init__(self, root: str, listing: list[tuple[str, list[str]]]) -> None:
        self.root, self.rejects = root, list[tuple[str, str]]()
        paths, counts, classes = Paths(), list[int](), list[str | None]()
        for below, names in listing:
            if root and below != root and not below.startswith(f"{root}/"):
                continue
            inner = below[len(root) :].lstrip("/")
            images = self._images(below, names)
            if images:
                paths.add(images)
                counts.append(len(images))
                classes.append(_class_of(inner))
        self.paths = paths.column()
        self.classes = {name for name in classes if name is not None}
        if None in classes or len(self.classes) < 2:
            self.classes = set()
        self._counts, self._folders = counts, classes

    def labels(self, index: dict[str, int]) -> np.ndarray:
        """Labels by class name."""
        codes = np.array([index.get(name or "", -1) for name in self._folders], np.int32)
        return np.repeat(codes, self._counts)

    def _images(self, below: str, names: list[str]) -> list[str]:
        """Paths that are images by their suffix; the others are rejected."""
        images = []
        for name in names:
            path = f"{below}/{name}" if below else name
            try:
                path.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(path).decode("utf-8", "backslashreplace")
                self.rejects.append((shown, "file name is not valid UTF-8"))
                continue
            if (suffix := os.path.splitext(name)[1].lower()) in SUFFIXES:
                images.append(path)
            else:
                self.rejects.append((path, f"not an image ({f'suffix {suffix}' if suffix else 'no suffix'})"))
        return images


def _class_of(inner: str) -> str | None:
    parts = inner.split("/") if inner else []
    return parts[0] if len(parts) == 1 or (len(parts) == 2 and parts[1] == "images") else None


def plan_tree(tree: Tree, *, val_share: float, seed: int, more: str = "") -> Plan:
    """The plan of a folder tree, a pure function of its names, `val_share` and `seed`. Raises SettingError.

    ``train/…``, with or without one of ``val/…``, ``valid/…``, ``validation/…``, ``test/…`` (the first that is there),
    are the splits as given, and what lies beside them is ignored. Otherwise everything is one set, of which a share is
    held out for val.
    """
    folder, listing = tree.folder, tree.listing
    given = {below.partition("/")[0] for below, _ in listing}
    if folder.local is not None:  # a folder without files counts too
        given |= {entry.name for entry in os.scandir(folder.local) if entry.is_dir()}
    roots, ignored = {"train": ""}, 0
    if "train" in given:
        val = next((name for name in VAL_FOLDERS if name in given), None)
        roots = {"train": "train", **({"val": val} if val else {})}
        ignored = sum(len(names) for below, names in listing if below.partition("/")[0] not in roots.values())
    splits = {name: _Split(root, listing) for name, root in roots.items()}
    rejects = [reject for split in splits.values() for reject in split.rejects]
    if not len(splits["train"].paths):
        looked = folder.shown(roots["train"])
        found = f"; the first of {len(rejects)} other files: {rejects[0][0]}" if rejects else ""
        raise SettingError(
            f"images={folder}: no image in '{looked}' or below it (by suffix: .jpg, .png, .webp, …){found}"
        )
    names = _tree_classes(folder, splits)
    index = {name: number for number, name in enumerate(names)}
    inputs = Inputs(
        path=pa.chunked_array([c for s in splits.values() for c in s.paths.chunks], pa.large_string()),
        label=np.concatenate([split.labels(index) for split in splits.values()]),
        split=np.repeat(
            np.array([TRAIN, VAL], np.int8)[: len(splits)], [len(split.paths) for split in splits.values()]
        ),
        rejects=rejects,
    )
    words = " and ".join(f"{root}/" for root in roots.values()) if roots["train"] else "one folder, val held out"
    if roots["train"] and "val" not in roots:
        words += ", val held out"
    origin = Origin("files", folder.url)
    return finish(
        inputs,
        names or None,
        origin,
        words + more,
        shown=str(folder),
        val_share=val_share,
        seed=seed,
        ignored=ignored,
        given="val" in roots or None,
    )


def _tree_classes(folder: Folder, splits: dict[str, _Split]) -> list[str]:
    train = splits["train"]
    val = splits.get("val", train)
    if bool(train.classes) != bool(val.classes):
        labelled, flat = (val.root, train.root) if val.classes else (train.root, val.root)
        raise SettingError(
            f"images={folder}: '{labelled}' has a folder for each class and '{flat}' has not; make them alike"
        )
    check_classes(train.classes, val.classes, (train.root, val.root), str(folder))
    return sorted(train.classes)


# Lists


def plan_list(
    folder: Folder, name: str, *, val_share: float, seed: int, image_column: str | None, label_column: str | None
) -> Plan:
    """The plan of a list: column ``path``, and if they are there ``label`` and ``split``. Raises SettingError.

    Paths are relative to the list's folder, absolute, or URLs. With a column ``split``, every row has to name one.
    """
    shown = folder.shown(name)
    wanted = {"path": image_column or "path", "label": label_column or "label", "split": "split"}
    table = (
        _read_parquet(folder, name, wanted) if name.lower().endswith(".parquet") else _read_csv(folder, name, wanted)
    )
    if wanted["path"] not in table.column_names or (label_column and label_column not in table.column_names):
        missing = wanted["path"] if wanted["path"] not in table.column_names else label_column
        raise SettingError(
            f"images={shown}: no column '{missing}'; it has {', '.join(table.column_names) or 'none'}. A list has the "
            "columns path, and perhaps label and split; image_column and label_column name others"
        )
    if not len(table):
        raise SettingError(f"images={shown}: the list has no rows")
    labels, classes = np.full(len(table), -1, np.int32), None
    if wanted["label"] in table.column_names:
        column = table.column(wanted["label"])
        labels, classes = encode_labels(column, None, f"images={shown}: column '{wanted['label']}'")
    split, words = _list_splits(table, shown)
    inputs = Inputs(_list_paths(table.column(wanted["path"]), shown), labels, split)
    empty = pc.equal(inputs.path, "").to_numpy()
    rejects = [(f"{name}#{row}", "no path in the list") for row in np.flatnonzero(empty).tolist()]
    inputs.rejects += rejects
    inputs = without_doubles(inputs.where(~empty), "listed twice")
    return finish(
        inputs, classes, Origin("files", folder.url), f"a list, {words}", shown=shown, val_share=val_share, seed=seed
    )


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


def _read_csv(folder: Folder, name: str, wanted: dict[str, str]) -> pa.Table:
    shown = folder.shown(name)
    parse = pacsv.ParseOptions(delimiter="\t" if PurePosixPath(name).suffix.lower() == ".tsv" else ",")
    try:
        with reaching(shown), folder.open(name) as source:
            columns = pacsv.open_csv(source, parse_options=parse).schema.names
        present = [column for column in wanted.values() if column in columns]
        if wanted["path"] not in columns:
            return pa.table({column: pa.array([], pa.string()) for column in columns})
        convert = pacsv.ConvertOptions(
            include_columns=present, column_types={column: pa.string() for column in present}
        )
        with reaching(shown), folder.open(name) as source:
            return pacsv.read_csv(source, parse_options=parse, convert_options=convert)
    except (ValueError, pa.ArrowException) as error:  # UnicodeDecodeError among them
        raise SettingError(f"images={shown}: {_csv_mistake(str(error))}") from None


def _csv_mistake(text: str) -> str:
    text = " ".join(text.split())
    if re.search("utf-?8", text, re.IGNORECASE):
        return "not in UTF-8; save the list as UTF-8"
    if "Empty CSV" in text:
        return "the list is empty"
    return f"not a list that can be read ({re.sub('CSV parse error: ', '', text)[:160]})"


def _read_parquet(folder: Folder, name: str, wanted: dict[str, str]) -> pa.Table:
    with opened_parquet(folder, name) as parquet:
        columns = parquet.schema_arrow.names
        if wanted["path"] not in columns:
            return parquet.schema_arrow.empty_table()
        return parquet.read([column for column in wanted.values() if column in columns])
