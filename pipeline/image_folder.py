"""A folder of images → the plan of a shard set: which input goes into which split, with which label and row.

Three layouts are understood (files and folders whose name begins with a dot are never looked at):

- ``train/…`` with or without one of ``val/…``, ``valid/…``, ``validation/…``, ``test/…`` (the first that is there):
  the splits as given; what lies beside them is ignored;
- otherwise everything is one set, of which a share is held out for val;
- inside a split, ``CLASS/image`` or ``CLASS/images/image`` with at least two classes and no image directly in the split
  are labelled; every other tree (flat, or nested in some other way) is unlabelled.

Every other file in a split is an input too, and is rejected if it is no image.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import SettingError
from pipeline.image_decoding import SUFFIXES

VAL_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Input:
    """An image that will be decoded. `row` is its place in the order of its split."""

    row: int
    path: str  # relative to the folder of images, with /
    label: int  # -1 for none


@dataclass(frozen=True)
class Plan:
    """What becomes of every file of a folder, fixed before anything is decoded."""

    layout: str  # in words
    classes: list[str] | None
    splits: dict[str, list[Input]]
    rejects: list[tuple[str, str]]  # inputs that are no images by their name: (path, reason)
    ignored: int  # files beside the splits

    @property
    def inputs(self) -> int:
        """Number of inputs, those rejected already among them."""
        return sum(len(split) for split in self.splits.values()) + len(self.rejects)


def check_folder(images: str | None) -> Path:
    """The folder that `images` names. Raises SettingError."""
    if not images:
        raise SettingError("images=… is needed: folder of images")
    path = Path(images)
    if path.is_dir():
        return path
    if path.exists():
        raise SettingError(f"images={images}: a file, not a folder; give the folder of images")
    raise SettingError(f"images={images}: no such folder{_nearest(path)}")


def _nearest(path: Path) -> str:
    for parent in path.absolute().parents:
        if parent.is_dir():
            missing = path.absolute().relative_to(parent).parts[0]
            folders = [entry.name for entry in _entries(parent) if entry.is_dir()]
            near = difflib.get_close_matches(missing, folders, n=1, cutoff=0.5)
            return f"; did you mean '{parent / near[0]}'?" if near else f"; '{parent}' has no folder '{missing}'"
    return ""


def plan_folder(folder: Path, *, val_share: float, seed: int) -> Plan:
    """The plan of a folder of images: a pure function of the names in it, `val_share` and `seed`. Raises SettingError."""
    given = {entry.name for entry in _entries(folder) if entry.is_dir()}
    rejects: list[tuple[str, str]] = []
    ignored = 0
    if "train" in given:
        val = next((name for name in VAL_NAMES if name in given), None)
        roots = {"train": "train"} | ({"val": val} if val else {})
        named = set(roots.values())
        beside = [entry for entry in _entries(folder) if entry.name not in named]
        ignored = sum(sum(1 for _ in _walk(folder, e.name)) if e.is_dir() else 1 for e in beside)
    else:
        roots = {"train": ""}
    images = {split: _images(folder, root, rejects) for split, root in roots.items()}
    if not images["train"]:
        looked = folder / roots["train"] if roots["train"] else folder
        found = f"; the first of {len(rejects)} other files: {rejects[0][0]}" if rejects else ""
        raise SettingError(
            f"images={folder}: no image in '{looked}' or below it (by suffix: .jpg, .png, .webp, …){found}"
        )
    classes = {split: _classes(paths, roots[split]) for split, paths in images.items()}
    names = _checked_classes(folder, classes, roots)
    labels = {path: -1 for paths in images.values() for path in paths}
    if names is not None:
        index = {name: number for number, name in enumerate(names)}
        for split, paths in images.items():
            labels |= {path: index[_class_of(path, roots[split])] for path in paths}
    if "val" not in images:
        images = _hold_out(images["train"], labels, val_share, seed)
    splits = {
        split: [Input(row, path, labels[path]) for row, path in enumerate(_shuffled(paths, f"order {seed}"))]
        for split, paths in images.items()
    }
    return Plan(_in_words(roots, names), names, splits, sorted(rejects), ignored)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise SettingError(f"images: '{folder}' cannot be read: {error.strerror}") from None


def _walk(folder: Path, below: str, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths, relative to `folder`, of all files below `below`. Links to folders are followed, but not in circles."""
    real = os.path.realpath(folder / below)
    if real in seen:
        return
    for entry in _entries(folder / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _walk(folder, path, seen | {real})
        else:
            yield path


def _images(folder: Path, root: str, rejects: list[tuple[str, str]]) -> list[str]:
    """Paths that are images by their suffix; the others are added to `rejects`."""
    images = []
    for path in _walk(folder, root):
        suffix = os.path.splitext(path)[1].lower()
        try:
            path.encode()
        except UnicodeEncodeError:
            rejects.append((os.fsencode(path).decode("utf-8", "backslashreplace"), "file name is not valid UTF-8"))
            continue
        if suffix in SUFFIXES:
            images.append(path)
        else:
            rejects.append((path, f"not an image ({f'suffix {suffix}' if suffix else 'no suffix'})"))
    return images


def _class_of(path: str, root: str) -> str:
    return path.removeprefix(f"{root}/" if root else "").partition("/")[0]


def _classes(paths: Iterable[str], root: str) -> set[str] | None:
    """Class names if the paths below `root` are all CLASS/image or CLASS/images/image, of at least two classes."""
    names = set()
    for path in paths:
        parts = path.removeprefix(f"{root}/" if root else "").split("/")
        if len(parts) != 2 and not (len(parts) == 3 and parts[1] == "images"):
            return None
        names.add(parts[0])
    return names if len(names) > 1 else None


def _checked_classes(folder: Path, classes: dict[str, set[str] | None], roots: dict[str, str]) -> list[str] | None:
    train = classes["train"]
    val = classes.get("val", train)
    if (train is None) != (val is None):
        labelled, flat = (roots["train"], roots["val"]) if val is None else (roots["val"], roots["train"])
        raise SettingError(
            f"images={folder}: '{labelled}' has a folder for each class and '{flat}' has not; make them alike"
        )
    if train is None or val is None:
        return None
    unknown = sorted(val - train)
    if unknown:
        shown = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise SettingError(
            f"images={folder}: '{roots['val']}' has {len(unknown)} classes that '{roots['train']}' has not ({shown}); "
            "both have to name the same classes"
        )
    return sorted(train)


def _shuffled(paths: Iterable[str], salt: str) -> list[str]:
    """Paths in an order that depends on nothing but their names and `salt`."""

    def key(path: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{salt}:{path}".encode(), digest_size=8).digest(), path

    return sorted(paths, key=key)


def _hold_out(paths: list[str], labels: dict[str, int], share: float, seed: int) -> dict[str, list[str]]:
    """Split into train and val, class by class, such that val has its share of all and of each class within one image.

    At least one image is held out if there are two and the share is above 0, and every class keeps one for train.
    """
    by_class: dict[int, list[str]] = {}
    for path in _shuffled(paths, f"val {seed}"):
        by_class.setdefault(labels[path], []).append(path)
    train: list[str] = []
    val: list[str] = []
    seen = 0
    for label in sorted(by_class):
        members = by_class[label]
        seen += len(members)
        count = min(max(int(share * seen + 0.5) - len(val), 0), len(members) - 1)
        val += members[:count]
        train += members[count:]
    if not val and share > 0 and len(paths) > 1:
        val = [_shuffled(paths, f"val {seed}")[0]]
        train = [path for path in train if path != val[0]]
    return {"train": train, "val": val}


def _in_words(roots: dict[str, str], classes: list[str] | None) -> str:
    splits = " and ".join(f"{root}/" for root in roots.values()) if roots["train"] else "one folder, val held out"
    if roots["train"] and "val" not in roots:
        splits += ", val held out"
    return f"{splits}; {f'{len(classes)} classes' if classes else 'unlabelled'}"
