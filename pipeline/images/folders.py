"""Folder trees of images: splits and classes by the names of folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SettingError
from pipeline.images.decode import SUFFIXES
from pipeline.images.plan import (
    NO_SPLIT,
    TRAIN,
    VAL,
    ImagePlan,
    Origin,
    Paths,
    PlanOptions,
    SourceInputs,
    check_classes,
    make_plan,
)
from pipeline.storage.folder import Folder

NOT_UTF8 = "file name is not valid UTF-8"  # why a file is rejected
# Names of the folders of a split, in any case; the first that exists is taken.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test")


class Tree:
    """The listing of a folder tree: every folder that holds files, with their names. Raises SettingError."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        try:
            self.listing = list(folder.tree())
        except OSError as error:
            raise SettingError(f"images: '{error.filename}' cannot be read: {error.strerror}") from None

    def paths(self) -> Iterator[str]:
        """Paths of all files, relative to the folder."""
        for below, names in self.listing:
            yield from (f"{below}/{name}" if below else name for name in names)


class _Split:
    """One split of a tree: its images, its other files as rejects, and its classes.

    A split is labelled if every image is in ``CLASS/`` or ``CLASS/images/`` and there are at least two classes.
    """

    def __init__(self, root: str, listing: list[tuple[str, list[str]]]) -> None:
        self.root, self.rejects = root, list[tuple[str, str]]()
        paths, counts, classes = Paths(), list[int](), list[str | None]()
        unsorted: list[str] = []  # images in no folder of the split
        for below, names in listing:
            if root and below != root and not below.startswith(f"{root}/"):
                continue
            inner = below[len(root) :].lstrip("/")
            images = self._images(below, names)
            if images:
                paths.add(images)
                counts.append(len(images))
                classes.append(_class_of(inner))
                unsorted = images if not inner else unsorted
        self.paths = paths.column()
        # The folders that hold images, if every image is in one that may be a class.
        self.candidates = {name for name in classes if name is not None}
        self.hint = ""  # why the folders are not classes, if only a few images outside them are in the way
        if None in classes:
            if len(self.candidates) >= 2 and classes.count(None) == 1 and unsorted:
                count = "1 image is" if len(unsorted) == 1 else f"{len(unsorted)} images are"
                self.hint = f" ({count} outside the class folders, such as {min(unsorted)})"
            self.candidates = set()
        self.classes = self.candidates if len(self.candidates) > 1 else set()
        self._counts, self._folders = counts, classes

    def labels(self, index: dict[str, int]) -> np.ndarray:
        """Class indices (n,), int32, of the images, given those of the class names; -1 for other folders."""
        codes = np.array([index.get(name or "", -1) for name in self._folders], np.int32)
        return np.repeat(codes, self._counts)

    def _images(self, below: str, names: list[str]) -> list[str]:
        """Paths of the files with the suffix of an image; the others become rejects."""
        images = []
        for name in names:
            path = f"{below}/{name}" if below else name
            try:
                path.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(path).decode("utf-8", "backslashreplace")
                self.rejects.append((shown, NOT_UTF8))
                continue
            if (suffix := os.path.splitext(name)[1].lower()) in SUFFIXES:
                images.append(path)
            else:
                self.rejects.append((path, f"not an image ({f'suffix {suffix}' if suffix else 'no suffix'})"))
        return images


def _class_of(inner: str) -> str | None:
    parts = inner.split("/") if inner else []
    return parts[0] if len(parts) == 1 or (len(parts) == 2 and parts[1] == "images") else None


def plan_tree(tree: Tree, options: PlanOptions, *, note: str = "") -> ImagePlan:
    """Plan a folder tree; the result depends only on the names in it and on `options`.

    With a folder ``train/`` or ``training/``, the splits are this and the first that exists of ``val/``, ``valid/``,
    ``validation/`` and ``test/`` (in any case), and everything outside is ignored. Without one, the tree is one set, of
    which a share is held out for val. Without `options.val_share` there are no splits.

    Args:
        tree: The tree.
        options: Options of the plan.
        note: Added to the description of the plan.

    Raises:
        SettingError: There are no images, or train and val differ in their classes.
    """
    if options.val_share is None:
        return _plan_whole_tree(tree, options)
    folder, listing = tree.folder, tree.listing
    roots = _roots(tree)
    ignored = 0
    if roots["train"]:
        ignored = sum(len(names) for below, names in listing if below.partition("/")[0] not in roots.values())
    splits = {name: _Split(root, listing) for name, root in roots.items()}
    rejects = [reject for split in splits.values() for reject in split.rejects]
    if not len(splits["train"].paths):
        raise no_images(folder, roots["train"], [path for path, _ in rejects])
    names = _tree_classes(folder, splits)
    index = {name: number for number, name in enumerate(names)}
    inputs = SourceInputs(
        path=pa.chunked_array([c for s in splits.values() for c in s.paths.chunks], pa.large_string()),
        label=np.concatenate([split.labels(index) for split in splits.values()]),
        split=np.repeat(
            np.array([TRAIN, VAL], np.int8)[: len(splits)], [len(split.paths) for split in splits.values()]
        ),
        rejects=rejects,
    )
    layout = " and ".join(f"{root}/" for root in roots.values()) if roots["train"] else "one folder, val held out"
    if roots["train"] and "val" not in roots:
        layout += ", val held out"
    origin = Origin("files", folder.url)
    val_given = True if "val" in roots else None  # also without images: val/ exists
    plan = make_plan(inputs, names or None, origin, layout + note, options, ignored=ignored, val_given=val_given)
    hint = next((split.hint for split in splits.values() if split.hint), "")
    return replace(plan, layout=plan.layout + hint)


def no_images(folder: Folder, below: str, others: list[str]) -> SettingError:
    """The error for a folder without images: `below` is where they were looked for, `others` what was found instead."""
    found = f"; the first of {len(others)} other files: {others[0]}" if others else ""
    return SettingError(
        f"images={folder}: no image in '{folder.shown(below)}' or its subfolders "
        f"(suffixes: .jpg, .png, .webp, …){found}"
    )


def _roots(tree: Tree) -> dict[str, str]:
    """The folder of each split; "" for the whole tree as train."""
    present = {below.partition("/")[0] for below, _ in tree.listing}
    if tree.folder.local is not None:  # folders without files count too
        present |= {entry.name for entry in os.scandir(tree.folder.local) if entry.is_dir()}
    train, val = _first_of(TRAIN_FOLDERS, present), _first_of(VAL_FOLDERS, present)
    if train is None:
        return {"train": ""}
    return {"train": train, **({"val": val} if val else {})}


def _plan_whole_tree(tree: Tree, options: PlanOptions) -> ImagePlan:
    """Every image of a tree, ordered by path; labelled where the tree, or each folder of a split, has class folders."""
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
    inputs = SourceInputs(path.take(order), label[order], np.full(len(path), NO_SPLIT, np.int8))
    inputs.rejects += [reject for split in splits for reject in split.rejects]
    return make_plan(inputs, classes or None, Origin("files", tree.folder.url), "a folder", options)


def _first_of(names: tuple[str, ...], given: set[str]) -> str | None:
    """The first of `names` that is in `given` in any case, as it is spelt there; lower case is preferred."""
    found = {name.casefold(): name for name in sorted(given)}  # capitals sort first
    return next((found[name] for name in names if name in found), None)


def _tree_classes(folder: Folder, splits: dict[str, _Split]) -> list[str]:
    """Class names of train, which val has to share; empty if unlabelled. A val with one class of train is labelled."""
    train = splits["train"]
    val = splits.get("val", train)
    if train.classes and val.candidates <= train.classes:
        val.classes = val.candidates
    if bool(train.classes) != bool(val.classes):
        labelled, flat = (val, train) if val.classes else (train, val)
        raise SettingError(
            f"images={folder}: '{labelled.root}' has a folder for each class and '{flat.root}' does not{flat.hint}; "
            "use class folders in both or in neither"
        )
    check_classes(train.classes, val.classes, (train.root, val.root), str(folder))
    return sorted(train.classes)
