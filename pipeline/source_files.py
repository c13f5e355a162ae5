"""Sources of single files: a folder tree of images, and a list of paths in CSV or Parquet."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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
    column_named,
    encode_labels,
    finish,
    without_doubles,
)
from pipeline.storage import Folder, reaching

# The first of each that is there, in any case, in a folder tree.
TRAIN_FOLDERS = ("train", "training")
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
        bare: list[str] = []
        for below, names in listing:
            if root and below != root and not below.startswith(f"{root}/"):
                continue
            inner = below[len(root) :].lstrip("/")
            images = self._images(below, names)
            if images:
                paths.add(images)
                counts.append(len(images))
                classes.append(_class_of(inner))
                bare = images if not inner else bare
        self.paths = paths.column()
        # Folders that images lie in, if all of them are such that may be classes.
        self.candidates = {name for name in classes if name is not None}
        self.beside = ""  # what alone keeps them from being classes, in words
        if None in classes:
            if len(self.candidates) >= 2 and classes.count(None) == 1 and bare:
                lie = "1 image lies" if len(bare) == 1 else f"{len(bare)} images lie"
                self.beside = f" ({lie} beside the folders, such as {min(bare)})"
            self.candidates = set()
        self.classes = self.candidates if len(self.candidates) > 1 else set()
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


def plan_tree(tree: Tree, *, val_share: float | None, seed: int, more: str = "") -> Plan:
    """The plan of a folder tree, a pure function of its names, `val_share` and `seed`. Raises SettingError.

    Without a `val_share` it is all of the tree. Otherwise ``train/…`` or ``training/…``, with or without one of ``val/…``, ``valid/…``, ``validation/…``, ``test/…`` (the
    first that is there, in any case), are the splits as given, and what lies beside them is ignored. Otherwise everything is one set, of which a share is
    held out for val.
    """
    if val_share is None:
        return _plan_whole_tree(tree)
    folder, listing = tree.folder, tree.listing
    given = {below.partition("/")[0] for below, _ in listing}
    if folder.local is not None:  # a folder without files counts too
        given |= {entry.name for entry in os.scandir(folder.local) if entry.is_dir()}
    roots, ignored = {"train": ""}, 0
    if train := _first_of(TRAIN_FOLDERS, given):
        val = _first_of(VAL_FOLDERS, given)
        roots = {"train": train, **({"val": val} if val else {})}
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
    plan = finish(
        inputs,
        names or None,
        Origin("files", folder.url),
        words + more,
        shown=str(folder),
        val_share=val_share,
        seed=seed,
        ignored=ignored,
        given="val" in roots or None,
    )
    beside = next((split.beside for split in splits.values() if split.beside), "")
    return replace(plan, layout=plan.layout + beside)


def _plan_whole_tree(tree: Tree) -> Plan:
    """Every image of a tree, by path; labels are classes where the tree, or each part for a split, has folders of them."""
    parts: dict[str, list[tuple[str, list[str]]]] = {}
    for below, names in tree.listing:
        first = below.partition("/")[0]
        parts.setdefault(first if first.casefold() in (*TRAIN_FOLDERS, *VAL_FOLDERS) else "", []).append((below, names))
    splits = [_Split(root, listing) for root, listing in parts.items()]
    classes = sorted({name for split in splits for name in split.classes})
    index = {name: number for number, name in enumerate(classes)}
    path = pa.chunked_array([chunk for split in splits for chunk in split.paths.chunks], pa.large_string())
    label = np.concatenate([split.labels(index) for split in splits]) if splits else np.empty(0, np.int32)
    order = pc.sort_indices(path).to_numpy()
    inputs = Inputs(path.take(order), label[order], np.full(len(path), NO_SPLIT, np.int8))
    inputs.rejects += [reject for split in splits for reject in split.rejects]
    return finish(
        inputs,
        classes or None,
        Origin("files", tree.folder.url),
        "a folder",
        shown=str(tree.folder),
        val_share=None,
        seed=0,
    )


def _first_of(names: tuple[str, ...], given: set[str]) -> str | None:
    """The first of `names` that is there, as it is written there; lower case before others."""
    found = {name.casefold(): name for name in sorted(given)}  # capitals sort first
    return next((found[name] for name in names if name in found), None)


def _tree_classes(folder: Folder, splits: dict[str, _Split]) -> list[str]:
    train = splits["train"]
    val = splits.get("val", train)
    if train.classes and val.candidates <= train.classes:
        val.classes = val.candidates
    if bool(train.classes) != bool(val.classes):
        labelled, flat = (val, train) if val.classes else (train, val)
        raise SettingError(
            f"images={folder}: '{labelled.root}' has a folder for each class and '{flat.root}' has not{flat.beside}; "
            "make them alike"
        )
    check_classes(train.classes, val.classes, (train.root, val.root), str(folder))
    return sorted(train.classes)


# Lists


def plan_list(
    folder: Folder, name: str, *, val_share: float | None, seed: int, image_column: str | None, label_column: str | None
) -> Plan:
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
