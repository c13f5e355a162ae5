"""Folder trees of images: a plan by the names of folders."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SettingError
from pipeline.images.inputs import Paths, SourceInputs
from pipeline.images.names import are_parts, class_name, is_date
from pipeline.images.plan import (
    NO_LABELS,
    NO_SPLIT,
    TRAIN,
    UNIQUE_FROM,
    VAL,
    ImagePlan,
    Origin,
    PlanOptions,
    check_classes,
    make_plan,
    some_of,
)
from pipeline.images.tree_layout import Tree, TreeLayout, find_layout, inner, inside, join
from pipeline.storage.folder import Folder


class _Split:
    """One split of a tree: its images and its classes.

    A split is labelled if every image is in a folder of the split and there are at least two of these: the folders at the
    first level are the classes, whatever is nested in them.
    """

    def __init__(self, tree: Tree, folders: list[str], above: str | None = None) -> None:
        """Of the images in `folders`; the classes are the folders in these, or else those in `above`, which holds them."""
        self.shown = _shown(folders)
        self.paths, self.classes, self.candidates = Paths(), set[str](), set[str]()
        self.hint = ""  # why the folders are not classes
        self.no_classes = False  # by their names or their images
        self._counts, self._folders = list[int](), list[str]()  # of each folder with images: their number, its class
        self.roots = [inner(tree, folder) for folder in folders]
        unsorted: list[str] = []
        deep = False
        for root in self.roots:
            for below in sorted(below for below in tree.images if inside(below, root)):
                inner_path = below[len(root if above is None else above) :].lstrip("/")
                images = [join(below, name) for name in tree.images[below]]
                self.paths.add(images)
                self._counts.append(len(images))
                self._folders.append(class_name(inner_path.partition("/")[0]))
                deep |= "/" in inner_path
                unsorted += images[:] if not inner_path else []
        found = set(self._folders)
        if found and "" not in found:
            self.hint = _why_no_classes(found, deep)
            self.no_classes = bool(self.hint)
            self.candidates = set() if self.hint else found
        elif len(found) > 2:
            count = "1 image is" if len(unsorted) == 1 else f"{len(unsorted)} images are"
            self.hint = f" ({count} outside the class folders, such as {min(unsorted)})"
        self.classes = self.candidates if len(self.candidates) > 1 and not self.no_classes else set()

    def labels(self, index: dict[str, int]) -> np.ndarray:
        """Class indices (n,), int32, of the images, given those of the class names; -1 for other folders."""
        codes = np.array([index.get(name, -1) for name in self._folders], np.int32)
        return np.repeat(codes, self._counts)

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(self._counts)


def _without_singles(splits: dict[str, _Split]) -> None:
    """Folders of one image each are no classes, unless another split has them too."""
    for split in splits.values():
        elsewhere = {name for other in splits.values() if other is not split for name in other.candidates}
        if len(split.candidates) == split.count >= UNIQUE_FROM and not split.candidates & elsewhere:
            split.hint = f" (each of {split.count:,} folders holds one image: no classes)"
            split.no_classes, split.classes, split.candidates = True, set(), set()


def _why_no_classes(found: set[str], deep: bool) -> str:
    """Why folders are not classes by their names; empty if they may be."""
    if deep and all(map(is_date, found)):
        return " (folders named by dates are no classes)"
    if len(found) > 1 and are_parts(found):
        return f" ({some_of(sorted(found))} are parts of one set by their names, not classes)"
    return ""


def plan_tree(tree: Tree, options: PlanOptions, *, note: str = "") -> ImagePlan:
    """Plan a folder tree; the result depends only on the names in it and on `options`.

    Splits are recognised by the names of folders, see `pipeline.images.tree_layout`; everything outside of them is left
    out. Without a folder for train, the tree is one set, of which a share is held out for val. Without
    `options.val_share` there are no splits.

    Args:
        tree: The tree; it loses what is left out.
        options: Options of the plan.
        note: Added to the description of the plan.

    Raises:
        SettingError: There are no images, or train and val differ in their classes.
    """
    folder = tree.folder
    layout = find_layout(tree, whole=options.val_share is None)
    if options.val_share is None:
        return _plan_whole_tree(tree, layout, options)
    tree.drop(layout.not_classes)
    folders = {"train": layout.splits.get("train", [layout.base])} | {
        split: found for split, found in layout.splits.items() if split == "val"
    }
    splits = {name: _Split(tree, found, layout.base if layout.above else None) for name, found in folders.items()}
    _without_singles(splits)
    if not splits["train"].count:
        raise no_images(folder, folders["train"][0], tree.others)
    notes = []
    if "val" in splits and not splits["val"].count:
        notes.append(f"no image in {splits.pop('val').shown}: val is held out of train")
        del folders["val"]
    asked = options.label_column != NO_LABELS
    val_labels = _labels_of_annotations(tree, splits) if asked else None
    test = splits.get("val") if asked and layout.val_is_test and val_labels is None else None
    if test and splits["train"].classes and not test.candidates:
        tree.drop(dict.fromkeys(folders.pop("val"), f"images in {splits.pop('val').shown} (a split without labels)"))
    _drop_outside(tree, layout, folders)
    names = _tree_classes(folder, splits, bool(val_labels)) if asked else []
    index = {name: number for number, name in enumerate(names)}
    inputs = _inputs(tree, splits, index)
    if val_labels is not None and names:
        inputs.label[splits["train"].count :] = _codes_of_annotations(splits["val"], val_labels, index)
    origin = Origin("files", folder.url)
    shown = _described(layout, splits) + note
    plan = make_plan(inputs, names or None, origin, shown, options, ignored=tree.left_out)
    notes += _empty_classes(tree, splits, names)
    hint = next((split.hint for split in splits.values() if split.hint), "")
    return replace(plan, layout=plan.layout + hint, notes=(*notes, *plan.notes))


def no_images(folder: Folder, below: str, others: list[str]) -> SettingError:
    """The error for a folder without images: `below` is where they were looked for, `others` what was found instead."""
    found = f"; other files are there, such as {others[0]}" if others else ""
    return SettingError(
        f"images={folder}: no image in '{folder.shown(below)}' or its subfolders "
        f"(suffixes: .jpg, .png, .webp, …){found}"
    )


def _shown(folders: list[str]) -> str:
    shown = " + ".join(f"{folder}/" for folder in folders[:3])
    return f"{shown} + {len(folders) - 3} more like it" if len(folders) > 3 else shown


def _bare(split: _Split) -> str:
    return split.shown.removesuffix("/")


def _described(layout: TreeLayout, splits: dict[str, _Split]) -> str:
    if not layout.splits:
        return f"one folder ({layout.base}/), val held out" if layout.base else "one folder, val held out"
    shown = " and ".join(split.shown for split in splits.values())
    return shown if "val" in splits else f"{shown}, val held out"


def _inputs(tree: Tree, splits: dict[str, _Split], index: dict[str, int]) -> SourceInputs:
    codes = {"train": TRAIN, "val": VAL}
    return SourceInputs(
        path=pa.chunked_array([c for s in splits.values() for c in s.paths.column().chunks], pa.large_string()),
        label=np.concatenate([split.labels(index) for split in splits.values()]),
        split=np.concatenate([np.full(split.count, codes[name], np.int8) for name, split in splits.items()]),
        rejects=list(tree.rejects),
    )


def _drop_outside(tree: Tree, layout: TreeLayout, folders: dict[str, list[str]]) -> None:
    """Leave out images outside the splits, with the folder that they are in."""
    if not layout.splits:
        return
    kept = [folder for found in folders.values() for folder in found]
    kinds = {}
    for below in tree.images:
        if not any(inside(below, folder) for folder in kept):
            place = layout.base
            for name in below[len(layout.base) :].lstrip("/").split("/"):  # down to where no split is
                place = join(place, name)
                if not any(inside(folder, place) for folder in kept):
                    break
            kinds[below] = f"images in {place}/ (outside of the splits)" if place else "images outside of the splits"
    top = len(tree.images.pop("", ()))
    if top:
        tree.left_out["images outside of the splits"] += top
    tree.drop(kinds)


def _plan_whole_tree(tree: Tree, layout: TreeLayout, options: PlanOptions) -> ImagePlan:
    """Every image of a tree, ordered by path; labelled where the tree, or each folder of a split, has class folders."""
    rest = Paths()
    for below in [below for below in tree.images if any(inside(below, folder) for folder in layout.not_classes)]:
        rest.add(join(below, name) for name in tree.take(below))
    groups = [[folder] for found in layout.splits.values() for folder in found] or [[layout.base]]
    if layout.above:
        groups = [[folder for group in groups for folder in group]]
    above = layout.base if layout.above else None
    splits = {str(number): _Split(tree, group, above) for number, group in enumerate(groups)}
    _without_singles(splits)
    classes = sorted({name for split in splits.values() for name in split.classes})
    index = {name: number for number, name in enumerate(classes)} if options.label_column != NO_LABELS else {}
    parts = [(split.paths.column(), split.labels(index)) for split in splits.values()]
    kept = [folder for group in groups for folder in group]
    for below in [below for below in tree.images if not any(inside(below, folder) for folder in kept)]:
        rest.add(join(below, name) for name in tree.images[below])
    others = rest.column()
    parts.append((others, np.full(len(others), -1, np.int32)))
    path = pa.chunked_array([chunk for column, _ in parts for chunk in column.chunks], pa.large_string())
    label = np.concatenate([codes for _, codes in parts])
    order = pc.sort_indices(path).to_numpy()
    inputs = SourceInputs(path.take(order), label[order], np.full(len(path), NO_SPLIT, np.int8))
    inputs.rejects += tree.rejects
    origin = Origin("files", tree.folder.url)
    return make_plan(inputs, classes if index else None, origin, "a folder", options, ignored=tree.left_out)


def _tree_classes(folder: Folder, splits: dict[str, _Split], val_labelled: bool) -> list[str]:
    """Class names of train, which val has to share; empty if unlabelled. A val with one class of train is labelled."""
    train = splits["train"]
    val = splits.get("val", train)
    if val_labelled:
        return sorted(train.classes)
    if train.no_classes:
        val.classes = set()
    if train.classes and val.candidates <= train.classes:
        val.classes = val.candidates
    if bool(train.classes) != bool(val.classes):
        labelled, flat = (val, train) if val.classes else (train, val)
        raise SettingError(
            f"images={folder}: '{_bare(labelled)}' has a folder for each class and '{_bare(flat)}' does "
            f"not{flat.hint}; use class folders in both or in neither, or set data.label_column={NO_LABELS}"
        )
    check_classes(train.classes, val.classes, (_bare(train), _bare(val)), str(folder))
    return sorted(train.classes)


def _empty_classes(tree: Tree, splits: dict[str, _Split], names: list[str]) -> list[str]:
    """A note on folders beside the classes that hold no image."""
    if not names or tree.folder.local is None:
        return []
    empty = set()
    for split in splits.values():
        for root in split.roots:
            with os.scandir(tree.folder.local / root if root else tree.folder.local) as entries:
                folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
            empty |= {join(root, name) for name in folders - set(tree.children(root)) if class_name(name) not in names}
    empty -= {folder for folder in empty if tree.dropped(folder)}
    return [f"no image in {some_of(sorted(empty))}: not among the classes"] if empty else []


def _labels_of_annotations(tree: Tree, splits: dict[str, _Split]) -> dict[str, str] | None:
    """Class names of val by file name, from a list beside its images as Tiny ImageNet has it (val_annotations.txt)."""
    train, val = splits["train"], splits.get("val")
    if val is None or not train.classes or val.candidates & train.classes:
        return None
    for below, names in tree.files.items():
        if not any(inside(root, below) for root in val.roots) or not below:
            continue
        for name in names:
            lines = tree.folder.read(join(below, name)).decode("utf-8", "replace").splitlines()
            fields = [line.split("\t") for line in lines if line.strip()]
            found = {os.path.basename(field[0]): class_name(field[1].strip()) for field in fields if len(field) > 1}
            if found and set(found.values()) <= train.classes:
                return found
    return None


def _codes_of_annotations(val: _Split, labels: dict[str, str], index: dict[str, int]) -> np.ndarray:
    names = (os.path.basename(path) for path in val.paths.column().to_pylist())
    return np.array([index.get(labels.get(name, ""), -1) for name in names], np.int32)
