"""The layout of a folder tree: which files are images to train on, and which folders are splits.

Files of other kinds, masks and annotations are left out and counted by kind: they are no damaged inputs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.errors import SettingError
from pipeline.images.decode import SUFFIXES
from pipeline.images.names import (
    MASK_SUFFIXES,
    NOT_UTF8,
    PHOTO_SUFFIXES,
    TEST,
    TRAIN,
    TRAIN_FOLDERS,
    VAL,
    VAL_FOLDERS,
    are_parts,
    holds_images,
    is_annotation,
    is_fold,
    is_opposite,
    is_system,
    masks_beside,
    split_by_beginning,
    split_of,
    words_of,
)
from pipeline.storage.folder import Folder

_DEEPEST_WRAPPER = 16  # folders that only hold one folder


class _Names:
    """The names of a folder's images, as one text: strings of their own would take five times the memory."""

    def __init__(self, names: list[str]) -> None:
        self._text, self._count = "\0".join(names).encode(), len(names)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return iter(self._text.decode().split("\0") if self._count else [])


class Tree:
    """The images of a folder tree, folder by folder, and what else is in it. Raises SettingError if it is unreadable.

    Attributes:
        images: Names of the images in each folder that has any, by the folder's path.
        others: Paths of files that are no images by their suffix; only the first ones.
        containers: Paths of Parquet and tar files, which count among the others.
        left_out: Number of files left out, by kind.
        rejects: (path, reason) of files whose names cannot be stored.
    """

    def __init__(self, folder: Folder, containers: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.images: dict[str, _Names] = {}
        self.others: list[str] = []
        self.containers: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.rejects: list[tuple[str, str]] = []
        self.files: dict[str, list[str]] = {}  # text files that may hold labels, by folder
        self._children: dict[str, list[str]] | None = None
        self._dropped: set[str] = set()
        try:
            for below, names in folder.tree():
                self._add(below, names, containers)
        except OSError as error:
            raise SettingError(f"images: '{error.filename}' cannot be read: {error.strerror}") from None

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(map(len, self.images.values()))

    def _add(self, below: str, names: list[str], containers: tuple[str, ...]) -> None:
        if below and any(is_system(part) for part in below.split("/")):
            self.left_out["files of the system"] += len(names)
            return
        images: dict[str, tuple[str, str]] = {}
        for name in names:
            path = f"{below}/{name}" if below else name
            if is_system(name):
                self.left_out["files of the system"] += 1
                continue
            try:
                path.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(path).decode("utf-8", "backslashreplace")
                self.rejects.append((shown, NOT_UTF8))
                continue
            stem, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if suffix in SUFFIXES:
                images[name] = stem, suffix
                continue
            if suffix in containers:
                self.containers.append(path)
            if suffix == ".txt" and "annotation" in name:
                self.files.setdefault(below, []).append(name)
            if len(self.others) < 10:
                self.others.append(path)
            self.left_out[f"{suffix} files" if suffix else "files without a suffix"] += 1
        if kept := self._without_masks(images):
            self.images[below] = _Names(kept)

    def _without_masks(self, stems: Mapping[str, tuple[str, str]]) -> list[str]:
        """Leave out masks and second copies of the images in one folder: x_mask.png and x.png beside x.jpg.

        Args:
            stems: (stem, suffix in lower case) of each name.
        """
        masks = masks_beside([stem for stem, _ in stems.values()])
        photos = {stem for stem, suffix in stems.values() if suffix in PHOTO_SUFFIXES}
        same = [name for name, (stem, suffix) in stems.items() if suffix in MASK_SUFFIXES and stem in photos]
        lossless = sum(suffix in MASK_SUFFIXES and stem not in masks for stem, suffix in stems.values())
        second = set(same) if len(same) == lossless > 1 else set()
        kept = [name for name, (stem, _) in stems.items() if stem not in masks and name not in second]
        if len(kept) < len(stems):
            self.left_out["masks beside images"] += len(stems) - len(kept)
        return kept

    def drop(self, kinds: Mapping[str, str]) -> None:
        """Leave out the images in folders and below them: {folder: kind}."""
        for below in list(self.images):
            parts = below.split("/")
            kind = next((kinds[path] for n in range(len(parts)) if (path := "/".join(parts[: n + 1])) in kinds), None)
            if kind is not None:
                self.left_out[kind] += len(self.images.pop(below))
                self._dropped.add(below)
        self._children = None

    def take(self, below: str) -> _Names:
        """Take the images of a folder out of the tree without counting them as left out."""
        self._children = None
        return self.images.pop(below)

    def dropped(self, folder: str) -> bool:
        """Whether images in a folder, or files of the system, were left out."""
        return is_system(os.path.basename(folder)) or any(inside(below, folder) for below in self._dropped)

    def children(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder that hold images, also further down, sorted."""
        if self._children is None:
            found: dict[str, set[str]] = {}
            for below in self.images:
                while below:
                    above, _, name = below.rpartition("/")
                    found.setdefault(above, set()).add(name)
                    below = above
            self._children = {above: sorted(names) for above, names in found.items()}
        return self._children.get(folder, [])


@dataclass
class TreeLayout:
    """Where the splits of a tree are.

    Attributes:
        base: The folder with the data set in it: "" or what wraps it.
        splits: Folders of train, of val if it is given, and of a third split; none for a tree without splits.
        val_is_test: Whether val is a folder named test, which may have no labels.
        not_classes: Folders beside class folders that are splits by their names, and how they are counted.
        above: Whether the classes are the folders above the splits: cat/train, cat/test, dog/train, …
    """

    base: str
    splits: dict[str, list[str]] = field(default_factory=dict)
    val_is_test: bool = False
    not_classes: dict[str, str] = field(default_factory=dict)
    above: bool = False


def inside(below: str, folder: str) -> bool:
    """Whether a folder is another one or lies in it."""
    return not folder or below == folder or below.startswith(f"{folder}/")


def join(folder: str, name: str) -> str:
    """The path of `name` in a folder of a tree."""
    return f"{folder}/{name}" if folder else name


def find_layout(tree: Tree, *, whole: bool = False) -> TreeLayout:
    """Leave out annotations, and find the folder of each split; `tree` loses what is left out.

    Args:
        tree: The tree.
        whole: Whether all images are wanted, so that nothing depends on which split is for train.

    Raises:
        SettingError: There are folders for val and test and nothing for train, or several divisions into splits.
    """
    _drop_annotations(tree)
    base = ""
    for _ in range(_DEEPEST_WRAPPER):
        names = tree.children(base)
        if base in tree.images or len(names) != 1 or (split_of(names[0], names) == TRAIN) or _empty_splits(tree, base):
            break
        base = join(base, names[0])
    return _find_splits(tree, base, whole)


def inner(tree: Tree, root: str) -> str:
    """The folder in a split that holds its images or classes: train/images for train."""
    for _ in range(_DEEPEST_WRAPPER):
        names = tree.children(root)
        if root in tree.images or len(names) != 1 or not (holds_images(names[0]) or names[0] == os.path.basename(root)):
            break
        root = join(root, names[0])
    return root


def _empty_splits(tree: Tree, base: str) -> bool:
    """Whether a split's folder without images lies here: then its sibling is no wrapper."""
    return any(name.casefold() in TRAIN_FOLDERS for name in _folders(tree, base))


def _folders(tree: Tree, base: str) -> list[str]:
    """Names of all folders in `base`, those without files too where the tree is local."""
    place = tree.folder.local
    if place is None:
        return tree.children(base)
    with os.scandir(place / base if base else place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _drop_annotations(tree: Tree) -> None:
    """Leave out folders of masks and other annotations that lie beside the images that they belong to."""
    pending, dropped = [""], dict[str, str]()
    while pending:
        folder = pending.pop()
        names = tree.children(folder)
        for name in names:
            if is_annotation(name, names) and _belongs(tree, folder, name, names):
                dropped[join(folder, name)] = f"images in {name}/ (masks or other annotations)"
            else:
                pending.append(join(folder, name))
    if dropped:
        tree.drop(dropped)


def _belongs(tree: Tree, folder: str, name: str, names: list[str]) -> bool:
    """Whether a folder with the name of annotations is beside images: by a name beside it, or by the names of files."""
    others = [other for other in names if other != name and not is_annotation(other, names)]
    if folder in tree.images or any(holds_images(other) or split_of(other, names) for other in others):
        return True
    if any(set(words_of(other)) <= set(words_of(name)) for other in others):
        return True
    own = _files(tree, join(folder, name))
    if not own or len(others) != 1 or {os.path.splitext(file)[1].lower() for file in own} - MASK_SUFFIXES:
        return False
    stems, beside = (
        {os.path.splitext(file)[0] for file in files} for files in (own, _files(tree, join(folder, others[0])))
    )
    return 2 * len(stems & beside) >= len(stems)


def _files(tree: Tree, folder: str) -> list[str]:
    return [name for below, names in tree.images.items() if inside(below, folder) for name in names]


def _find_splits(tree: Tree, base: str, whole: bool) -> TreeLayout:
    names = tree.children(base)
    present = sorted({*names, *_folders(tree, base)})
    of = {name: split_of(name, present, annotations=True) for name in present}
    begin = {name: split_by_beginning(name) for name in names}
    if not any(of.values()) and None not in begin.values() and 1 < len(set(begin.values())) == len(names):
        of |= begin
    exact_train, exact_val = _first_of(TRAIN_FOLDERS, present), _first_of(VAL_FOLDERS, present)
    train = [exact_train] if exact_train else [name for name in names if of[name] == TRAIN]
    val = [exact_val] if exact_val else [name for name in names if of[name] == VAL]
    val = val or [name for name in names if of[name] == TEST]
    plain = [name for name in names if of[name] is None]
    if train and not val and len(plain) > 1 and not any(tree.children(join(base, name)) for name in train):
        return TreeLayout(base)  # airplane, bus, train: the name of a class
    if not train:
        if not val:
            return _splits_below(tree, base, whole)
        if base in tree.images or any(is_opposite(name, split) for name in plain for split in val):
            return TreeLayout(base)  # valid and invalid: classes
        if not plain and whole:
            return TreeLayout(base, {name: [join(base, name)] for name in names})
        if not plain:
            raise SettingError(
                f"images={tree.folder}: folders for {' and '.join(sorted(filter(None, set(of.values()))))} "
                f"({', '.join(name for name in names if of[name])}) and none for train; name the folder to train on, "
                f"as in images={tree.folder.shown(join(base, names[0]))}"
            )
        if len(plain) > 1:
            not_classes = {
                join(base, name): f"images in {name}/ (a split, not a class)" for name in names if of[name] is not None
            }
            return TreeLayout(base, not_classes=not_classes)
        train = plain
    third = [name for name in names if of[name] is not None and name not in train and name not in val]
    found = {"train": train, **({"val": val} if val else {}), **({"third": third} if third else {})}
    splits = {split: [join(base, name) for name in folders] for split, folders in found.items()}
    return TreeLayout(base, splits, val_is_test=bool(val) and of[val[0]] == TEST)


def _splits_below(tree: Tree, base: str, whole: bool) -> TreeLayout:
    """The splits in each of several folders: cat/train, cat/test, dog/train, …; a layout without splits if none has any."""
    names = tree.children(base)
    if base in tree.images or len(names) < 2:
        return TreeLayout(base)
    found = {name: _exact_splits(tree, join(base, name)) for name in names}
    divided = [name for name in names if found[name]]
    if not divided:
        return TreeLayout(base)
    if not whole and (len(divided) < len(names) or any(map(is_fold, names))):
        first = join(base, divided[0])
        raise SettingError(
            f"images={tree.folder}: {', '.join(divided[:3])}{', …' if len(divided) > 3 else ''} "
            f"{'have' if len(divided) > 1 else 'has'} folders for train and val inside; name the folder to use, as in "
            f"images={tree.folder.shown(first)}"
        )
    splits: dict[str, list[str]] = {}
    for folders in found.values():
        for split, folder in folders.items():
            splits.setdefault(split, []).append(folder)
    inner_classes = {name for folder in splits["train"] for name in tree.children(inner(tree, folder))}
    return TreeLayout(
        base,
        splits,
        all(split_of(os.path.basename(one)) == TEST for one in splits["val"]),
        above=len(inner_classes) < 2 and not are_parts(names),
    )


def _exact_splits(tree: Tree, folder: str) -> dict[str, str]:
    """The folders of train and val, and of a third split, in a folder; empty if it has not both of the first two."""
    place = inner(tree, folder)
    names = tree.children(place)
    train, val = _first_of(TRAIN_FOLDERS, names), _first_of(VAL_FOLDERS, names)
    if train is None or val is None or place in tree.images:
        return {}
    third = _first_of(tuple(name for name in VAL_FOLDERS if name != val.casefold()), names)
    found = {"train": train, "val": val, **({"third": third} if third else {})}
    return {split: join(place, name) for split, name in found.items()}


def _first_of(names: tuple[str, ...], given: list[str]) -> str | None:
    """The first of `names` that is in `given` in any case, as it is spelt there; lower case is preferred."""
    found = {name.casefold(): name for name in sorted(given)}  # capitals sort first
    return next((found[name] for name in names if name in found), None)
