"""What `images=` is: recognising, planning and fetching the four kinds of source.

A source is a folder tree of images (`pipeline.images.folders`), a list of paths (`pipeline.images.lists`), or one or
more files that hold the images: Parquet (`pipeline.images.parquet`) or tar (`pipeline.images.tar`), given as a file, a
folder or a pattern. All of them can be local or in an object store. Names that begin with a dot are ignored.
"""

from __future__ import annotations

import difflib
import functools
import glob
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pyarrow as pa

from pipeline.errors import SettingError
from pipeline.images.decode import SUFFIXES
from pipeline.images.files import fetch_files
from pipeline.images.folders import no_images, plan_tree
from pipeline.images.lists import plan_list
from pipeline.images.parquet import fetch_parquet, holds_images, plan_parquet
from pipeline.images.plan import NO_LABELS, ImagePlan, Origin, PlanOptions
from pipeline.images.tar import COMPRESSED, fetch_tar, plan_tar
from pipeline.images.tree_layout import Tree
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, StorageError, is_remote, masked

_LISTS, _CONTAINERS = (".csv", ".tsv"), (".parquet", ".tar")
_ALLOWED = "a folder of images, a list (.csv, .tsv, .parquet), or .parquet and .tar files that hold images"
_MOST_CHECKED = 10_000  # files of a local folder that the quick check looks at


def fetch(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Fetch the encoded images of a plan.

    Args:
        origin: Where the images are stored.
        rows: Rows of a split of the plan.

    Yields:
        Every index into `rows` once, with the encoded image, or the reason why there is none. The order depends only on
        `rows`: it is theirs, except for Parquet files, which are often sorted by class and therefore shuffled.

    Raises:
        StorageError: The object store, or the whole source, cannot be reached.
    """
    from_source = {"files": fetch_files, "tar": fetch_tar, "parquet": fetch_parquet}[origin.kind]
    try:
        yield from from_source(origin, rows)
    except SettingError as error:  # access denied, no such bucket: not a mistake any more once the work has begun
        raise StorageError(str(error)) from None


def check_source(images: str | None) -> None:
    """Check quickly that a source exists and is of a known kind.

    Raises:
        SettingError: It is not, with what is allowed.
        StorageError: An object store does not answer.
    """
    if not images:
        raise SettingError(f"images is not set; give {_ALLOWED}")
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
    """Plan which split, label and position every image of a source gets.

    The result depends only on the arguments and on the names in the source (for lists, tar and Parquet files also on
    their labels and headers).

    Args:
        images: A folder, list, file or pattern, local or a URL.
        val_share: Share of the images held out for val where the source names no val split. None: no splits, all images
            are train whatever their names, with or without a label; a folder is ordered by path, anything else as it
            is.
        seed: Decides which images are held out, and the order.
        image_column: Column of a list or of Parquet files, or extension of a sample's members in tar files.
        label_column: Likewise for the label.

    Raises:
        SettingError: The source does not exist, or is not understood.
        StorageError: An object store does not answer.
    """
    if not images:
        check_source(images)
    if label_column and label_column.casefold() == NO_LABELS:  # None, as in Python
        label_column = NO_LABELS
    options = PlanOptions(masked(images), val_share, seed, image_column, label_column)
    if _is_glob(images):
        return _plan_containers(*_matches(images), options)
    if _is_folder(images):
        folder = Folder.at(images)
        return _plan_folder(folder, replace(options, shown=str(folder)))
    _check_file(images)
    folder, name = _parent(images)
    options = replace(options, shown=folder.shown(name))
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _LISTS or (suffix == ".parquet" and not holds_images(folder, name, image_column)):
        return plan_list(folder, name, options)
    return _plan_containers(folder, [name], options)


def _plan_containers(folder: Folder, names: list[str], options: PlanOptions) -> ImagePlan:
    suffixes = {PurePosixPath(name).suffix.lower() for name in names}
    if len(suffixes) > 1:
        raise SettingError(
            f"images={options.shown}: both Parquet and tar files; name one kind, for example images=FOLDER/*.tar"
        )
    plan = plan_tar if suffixes == {".tar"} else plan_parquet
    return plan(folder, names, options)


def _plan_folder(folder: Folder, options: PlanOptions) -> ImagePlan:
    """Plan the images or the tar or Parquet files in a folder, whichever are more."""
    tree = Tree(folder, _CONTAINERS)
    images, containers = tree.count, tree.containers
    if containers and images <= len(containers):
        del tree
        plan = _plan_containers(folder, sorted(containers), options)
        return plan if not images else replace(plan, layout=f"{plan.layout}; {images} single images in it skipped")
    if not images and any(path.lower().endswith(COMPRESSED) for path in tree.others):
        raise SettingError(
            f"images={folder}: compressed tar files; decompress them to .tar, or unpack them to a folder"
        )
    note = f", without the {len(containers)} Parquet or tar files in it" if containers else ""
    return plan_tree(tree, options, note=note)


# Paths, URLs and patterns


def _is_folder(images: str) -> bool:
    """Whether `images` is a folder. Raises SettingError if it does not exist."""
    folder = Folder.at(images)
    kind = folder.kind()
    if kind is not None:
        return kind == "folder"
    if folder.local is None:
        folder.names()  # has a message of its own for a missing bucket
        raise SettingError(f"images={folder}: no such file or folder")
    what = "folder" if not folder.local.suffix else "file or folder"
    raise SettingError(f"images={images}: no such {what}{_nearest(folder.local)}")


def _nearest(path: Path) -> str:
    """A hint for a missing path: a similar name, or the first part of it that does not exist."""
    for parent in path.parents:
        if parent.is_dir():
            missing = path.relative_to(parent).parts[0]
            try:
                names = [name for name in sorted(os.listdir(parent)) if not name.startswith(".")]
            except OSError as error:
                return f"; '{parent}' cannot be read: {error.strerror}"
            if missing in names and not (parent / missing).is_symlink():
                return f"; '{parent / missing}' is a file, not a folder"
            if missing in names:
                return f"; '{parent / missing}' is a link to '{os.readlink(parent / missing)}', which does not exist"
            near = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
            if near and unicodedata.normalize("NFC", near[0]) == unicodedata.normalize("NFC", missing):
                return f"; '{missing}' is there in another Unicode form, as {near[0]!a}; copy the name as it is there"
            return f"; did you mean '{parent / near[0]}'?" if near else f"; there is no '{missing}' in '{parent}'"
    return ""


def _check_file(images: str) -> None:
    _, name = _parent(images)
    if name.lower().endswith(COMPRESSED):
        raise SettingError(f"images={masked(images)}: a compressed tar file; decompress it to .tar")
    if PurePosixPath(name).suffix.lower() not in (*_LISTS, *_CONTAINERS):
        raise SettingError(f"images={masked(images)}: not a known kind of file; give {_ALLOWED}")


def _check_local_folder(folder: Folder) -> None:
    try:
        paths = list(itertools.islice(folder.walk(), _MOST_CHECKED))
    except OSError as error:
        raise SettingError(f"images: '{error.filename}' cannot be read: {error.strerror}") from None
    known = (*SUFFIXES, *_CONTAINERS, *COMPRESSED)  # the last has a message of its own
    if len(paths) < _MOST_CHECKED and not any(path.lower().endswith(known) for path in paths):
        raise no_images(folder, "", paths)


def _parent(images: str) -> tuple[Folder, str]:
    """The folder of a file, and the file's name."""
    folder = Folder.at(images)
    if folder.local is not None:
        return Folder.at(folder.local.parent), folder.local.name
    address = Address.of(folder.url)
    above, _, name = address.path.rpartition("/")
    return Folder(address.at(above)), name


def _is_glob(images: str) -> bool:
    return _first_magic(images) is not None


def _first_magic(images: str) -> int | None:
    """Index of the first part of the path that is a pattern and not the literal name of something. None without one."""
    address = Address.of(images) if is_remote(images) else None
    path = address.path if address else images
    if not glob.has_magic(path):
        return None
    parts = (path if address else Folder.at(images).url).split("/")
    for number, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        literal = "/".join(parts[: number + 1])
        exists = number > 0 and Folder(address.at(literal)).kind() if address else os.path.lexists(literal)
        if not exists:
            return number
    return None


def _matches(images: str) -> tuple[Folder, list[str]]:
    """Folder and names of the Parquet or tar files that a pattern matches. Raises SettingError if there are none."""
    address = Address.of(images) if is_remote(images) else None
    path = address.path if address else Folder.at(images).url
    parts = path.split("/")
    fixed = _first_magic(images)
    above, pattern = "/".join(parts[:fixed]), "/".join(parts[fixed:])
    if address and not above:
        raise SettingError(f"images={masked(images)}: the name of the bucket cannot be a pattern")
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
            raise SettingError(f"images={masked(images)}: {name} is compressed; decompress it to .tar")
        if PurePosixPath(name).suffix.lower() not in _CONTAINERS:
            raise SettingError(
                f"images={masked(images)}: matches {name}; a pattern may only match .parquet and .tar files"
            )
    return folder, sorted(found)


@functools.lru_cache(maxsize=8)
def _pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of Python's `glob` as a regular expression: ``**`` is any number of folders, ``*`` stays within one."""
    parts = ["(?:[^/]+/)*" if part == "**" else _part_pattern(part) + "/" for part in pattern.split("/")]
    return re.compile("".join(parts).removesuffix("/"))


def _part_pattern(part: str) -> str:
    special = {"*": "[^/]*", "?": "[^/]"}
    pieces = re.findall(r"\[!?\]?[^]]*\]|.", part)
    return "".join(
        special.get(piece)
        or (f"[{'^' if piece[1] == '!' else ''}{piece[1:-1].lstrip('!')}]" if len(piece) > 1 else re.escape(piece))
        for piece in pieces
    )
