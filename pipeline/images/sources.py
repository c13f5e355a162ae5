"""`images=` → the plan of a shard set: which input goes into which split, with which label and row.

A source is a folder tree of images (`pipeline.images.folders`), a list of paths in CSV, TSV or Parquet (`pipeline.images.lists`), Parquet
files that hold the images (`pipeline.images.parquet`), or tar files of samples (`pipeline.images.tar`); of the last two
there may be one, a folder or a glob. Each is local or in an object store. Names that begin with a dot are never looked at.
"""

from __future__ import annotations

import difflib
import functools
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.errors import SettingError
from pipeline.images.decode import SUFFIXES
from pipeline.images.files import fetch_files
from pipeline.images.folders import Tree, plan_tree
from pipeline.images.lists import plan_list
from pipeline.images.parquet import fetch_parquet, holds_images, plan_parquet
from pipeline.images.plan import ImagePlan, Origin
from pipeline.images.tar import COMPRESSED, fetch_tar, plan_tar
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, StorageError, is_remote, masked

_LISTS, _CONTAINERS = (".csv", ".tsv"), (".parquet", ".tar")
_ALLOWED = "a folder of images, a list (.csv, .tsv, .parquet), or .parquet and .tar files that hold images"
_LOOKED_AT = 10_000  # files of a local folder that the quick check looks at


def fetch(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Every index into `rows` once, with the encoded image, or with the reason in words why there is none.

    The order depends on `rows` alone; for Parquet, which often comes sorted by class, it is a shuffled one. Raises
    StorageError where the store, or the whole source, cannot be reached: that is no fault of an image.
    """
    from_source = {"files": fetch_files, "tar": fetch_tar, "parquet": fetch_parquet}[origin.kind]
    try:
        yield from from_source(origin, rows)
    except SettingError as error:  # no access, no such bucket: in the middle of the work
        raise StorageError(str(error)) from None


def check_source(images: str | None) -> None:
    """Find out what can be found out quickly: that `images` is there, and of a kind that is known.

    Raises SettingError, and StorageError where a store does not answer.
    """
    if not images:
        raise SettingError(f"images=… is needed: {_ALLOWED}")
    if _is_glob(images):
        _matches(images)
        return
    if _is_folder(images):
        folder = Folder.at(images)
        if folder.local is not None:
            _check_local_folder(folder)
        return
    _check_file(images)


def plan_source(
    images: str,
    *,
    val_share: float | None,
    seed: int,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImagePlan:
    """The plan of `images`, a pure function of the names (and of lists, labels and headers) in it and of the arguments.

    `val_share` of the inputs are held out for val where the source names none. With None there are no splits: every
    image is in train, whatever it is named, with or without a label; of a folder by path, otherwise as they come.
    `image_column` and `label_column` name columns of a list or of Parquet, or the extensions of a sample's members in
    tar. Raises SettingError, StorageError.
    """
    if not images:
        check_source(images)
    ways: dict[str, Any] = {"val_share": val_share, "seed": seed}
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    if _is_glob(images):
        folder, names = _matches(images)
        return _plan_containers(folder, names, columns, masked(images), val_share, seed)
    if _is_folder(images):
        return _plan_folder(Folder.at(images), columns, val_share, seed)
    _check_file(images)
    folder, name = _parent(images)
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _LISTS or (suffix == ".parquet" and not holds_images(folder, name, image_column)):
        return plan_list(folder, name, **ways, **columns)
    return _plan_containers(folder, [name], columns, folder.shown(name), val_share, seed)


def _plan_containers(
    folder: Folder, names: list[str], columns: dict[str, str | None], shown: str, val_share: float | None, seed: int
) -> ImagePlan:
    suffixes = {PurePosixPath(name).suffix.lower() for name in names}
    if len(suffixes) > 1:
        raise SettingError(f"images={shown}: both Parquet and tar files; name one kind, as in images=FOLDER/*.tar")
    plan = plan_tar if suffixes == {".tar"} else plan_parquet
    return plan(
        folder,
        names,
        val_share=val_share,
        seed=seed,
        image_column=columns["image_column"],
        label_column=columns["label_column"],
        shown=shown,
    )


def _plan_folder(folder: Folder, columns: dict[str, str | None], val_share: float | None, seed: int) -> ImagePlan:
    """Images or containers, whichever are more: a data set of tars may have a logo, a tree of images its archive."""
    tree = Tree(folder)
    kinds: Counter[str] = Counter()
    containers = []
    for path in tree.paths():
        suffix = os.path.splitext(path)[1].lower()
        kinds["image" if suffix in SUFFIXES else suffix] += 1
        if suffix in _CONTAINERS:
            containers.append(path)
    if containers and kinds["image"] <= len(containers):
        del tree
        plan = _plan_containers(folder, sorted(containers), columns, str(folder), val_share, seed)
        return (
            plan if not kinds["image"] else _with_words(plan, f"; {kinds['image']} single images beside them left out")
        )
    if not kinds["image"] and any(path.lower().endswith(COMPRESSED) for path in tree.paths()):
        raise SettingError(f"images={folder}: compressed tar files; unpack them to .tar, or into a folder of images")
    more = f", not the {len(containers)} Parquet or tar files among them" if containers else ""
    return plan_tree(tree, val_share=val_share, seed=seed, more=more)


def _with_words(plan: ImagePlan, words: str) -> ImagePlan:
    return ImagePlan(plan.layout + words, plan.classes, plan.origin, plan.splits, plan.rejects, plan.ignored)


# What images= names


def _is_folder(images: str) -> bool:
    """Whether it is a folder. Raises SettingError if there is nothing there."""
    folder = Folder.at(images)
    kind = folder.kind()
    if kind is not None:
        return kind == "folder"
    if folder.local is None:
        folder.names()  # has words for a bucket that is not there
        raise SettingError(f"images={folder}: nothing there")
    what = "folder" if not folder.local.suffix else "file or folder"
    raise SettingError(f"images={images}: no such {what}{_nearest(folder.local)}")


def _nearest(path: Path) -> str:
    for parent in path.parents:
        if parent.is_dir():
            missing = path.relative_to(parent).parts[0]
            try:
                names = [name for name in sorted(os.listdir(parent)) if not name.startswith(".")]
            except OSError as error:
                return f"; '{parent}' cannot be read: {error.strerror}"
            near = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
            return f"; did you mean '{parent / near[0]}'?" if near else f"; '{parent}' has no '{missing}'"
    return ""


def _check_file(images: str) -> None:
    _, name = _parent(images)
    if name.lower().endswith(COMPRESSED):
        raise SettingError(f"images={masked(images)}: a compressed tar file; unpack it to .tar")
    if PurePosixPath(name).suffix.lower() not in (*_LISTS, *_CONTAINERS):
        raise SettingError(f"images={masked(images)}: a file of a kind that is not known; give {_ALLOWED}")


def _check_local_folder(folder: Folder) -> None:
    try:
        paths = list(itertools.islice(folder.walk(), _LOOKED_AT))
    except OSError as error:
        raise SettingError(f"images: '{error.filename}' cannot be read: {error.strerror}") from None
    known = (*SUFFIXES, *_CONTAINERS, *COMPRESSED)  # the last has an error of its own
    if len(paths) < _LOOKED_AT and not any(path.lower().endswith(known) for path in paths):
        found = f"; the first of {len(paths)} other files: {paths[0]}" if paths else ""
        raise SettingError(
            f"images={folder}: no image in '{folder}' or below it (by suffix: .jpg, .png, .webp, …){found}"
        )


def _parent(images: str) -> tuple[Folder, str]:
    """The folder of a file, and its name."""
    folder = Folder.at(images)
    if folder.local is not None:
        return Folder.at(folder.local.parent), folder.local.name
    address = Address.of(folder.url)
    above, _, name = address.path.rpartition("/")
    return Folder(address.at(above)), name


def _is_glob(images: str) -> bool:
    return _first_magic(images) is not None


def _first_magic(images: str) -> int | None:
    """The number of the first part of the path that is a pattern, and no name of what is there. None without one."""
    address = Address.of(images) if is_remote(images) else None
    path = address.path if address else images
    if not glob.has_magic(path):
        return None
    parts = (path if address else Folder.at(images).url).split("/")
    for number, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        literal = "/".join(parts[: number + 1])
        there = number > 0 and Folder(address.at(literal)).kind() if address else os.path.lexists(literal)
        if not there:
            return number
    return None


def _matches(images: str) -> tuple[Folder, list[str]]:
    """Folder and names of what a glob matches: Parquet or tar files. Raises SettingError if there are none."""
    address = Address.of(images) if is_remote(images) else None
    path = address.path if address else Folder.at(images).url
    parts = path.split("/")
    fixed = _first_magic(images)
    above, pattern = "/".join(parts[:fixed]), "/".join(parts[fixed:])
    if address and not above:
        raise SettingError(f"images={masked(images)}: the bucket has to be named in full")
    folder = Folder(address.at(above)) if address else Folder.at(above or "/")
    if address:
        found = [name for name in folder.walk() if _pattern(pattern).fullmatch(name)]
    else:
        found = [
            name for name in glob.glob(pattern, root_dir=folder.url, recursive=True) if folder.kind(name) == "file"
        ]
    if not found:
        raise SettingError(f"images={masked(images)}: no file matches")
    for name in found:
        if name.lower().endswith(COMPRESSED):
            raise SettingError(f"images={masked(images)}: {name} is compressed; unpack it to .tar")
        if PurePosixPath(name).suffix.lower() not in _CONTAINERS:
            raise SettingError(
                f"images={masked(images)}: matches {name}; only .parquet and .tar files may be named by a pattern"
            )
    return folder, sorted(found)


@functools.lru_cache(maxsize=8)
def _pattern(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression, as Python's `glob` reads it: ``**`` is any folders, the rest stays within one."""
    parts = ["(?:[^/]+/)*" if part == "**" else _within(part) + "/" for part in pattern.split("/")]
    return re.compile("".join(parts).removesuffix("/"))


def _within(part: str) -> str:
    words = {"*": "[^/]*", "?": "[^/]"}
    pieces = re.findall(r"\[!?\]?[^]]*\]|.", part)
    return "".join(
        words.get(piece)
        or (f"[{'^' if piece[1] == '!' else ''}{piece[1:-1].lstrip('!')}]" if len(piece) > 1 else re.escape(piece))
        for piece in pieces
    )
