"""Sources of single files: a folder tree of images, and a list of paths in CSV or Parquet."""

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
    Inputs,
    Origin,
    Paths,
    check_classes,
    finish,
)
from pipeline.storage.folder import Folder

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


def plan_tree(tree: Tree, *, val_share: float | None, seed: int, more: str = "") -> ImagePlan:
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


def _plan_whole_tree(tree: Tree) -> ImagePlan:
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
