"""The plan of a shard set: inputs of any source, with names, labels and splits, in their final order.

Inputs stay in Arrow and NumPy arrays throughout, since there may be many millions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.errors import SettingError
from pipeline.images.inputs import CHUNK, SourceInputs, SplitRows, digests

# Names of splits. The first of VAL_NAMES that a source has becomes val.
VAL_NAMES = ("validation", "valid", "val", "test")
SPLIT_NAMES = ("train", *VAL_NAMES)
NO_LABELS = "none"  # as label_column
UNIQUE_FROM = 4  # images: a label for each of fewer may be a small data set
NO_SPLIT, TRAIN, VAL, IGNORED = -1, 0, 1, 2  # codes in SourceInputs.split


@dataclass(frozen=True)
class Origin:
    """Where the inputs of a plan are stored. Small, and can be pickled.

    In the tables of a plan, `container` is an index into `containers` (-1 for single files). `first` and `second` are
    the offset and length of an image in bytes in a tar file, its row group and the row in it in a Parquet file.

    Attributes:
        kind: "files", "tar" or "parquet".
        root: The folder that names are relative to: a path, or a URL, which may contain credentials.
        containers: Names of the tar or Parquet files.
        column: The image column of Parquet files.
    """

    kind: str
    root: str
    containers: tuple[str, ...] = ()
    column: str | None = None


@dataclass(frozen=True)
class ImagePlan:
    """Which split every input of a source belongs to, decided before anything is decoded.

    Attributes:
        layout: A description of the source in one line.
        classes: Class names in the order of the labels; None if unlabelled.
        origin: Where the inputs are stored.
        splits: The rows of "train" and "val". `row` is the position in the split, `path` a unique name, `label`
            the class index (-1 for none); `container`, `first` and `second` locate the input, see Origin.
        rejects: (path, reason) of the inputs that the plan already knows cannot be stored.
        ignored: Number of files, rows or samples that were left out: outside the two splits, or no images.
        left_out: The same by kind.
        notes: What the user should know, a sentence each.
    """

    layout: str
    classes: list[str] | None
    origin: Origin
    splits: dict[str, SplitRows]
    rejects: list[tuple[str, str]]
    ignored: int
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> int:
        """Number of inputs, including those already rejected."""
        return sum(len(split) for split in self.splits.values()) + len(self.rejects)


def split_of_name(path: str) -> str | None:
    """The split that the path of a tar or Parquet file names: ``train/0.tar``, ``data/train-00000-of-2.parquet``.

    The innermost folder takes precedence over the file name, in which the split has to be a word of its own. None if
    the path names no split.
    """
    *folders, name = path.lower().split("/")
    for folder in reversed(folders):
        if folder in SPLIT_NAMES:
            return folder
    found = re.search(r"(?:^|[-_.])(train|validation|valid|val|test)(?=[-_.0-9])", name)
    return found[1] if found else None


def split_codes(named: list[str | None]) -> tuple[list[int], str]:
    """Codes of named splits, and a description. Unnamed files are ignored, unless no file is named train."""
    if "train" not in named:
        return [NO_SPLIT] * len(named), "val held out"
    val = next((name for name in VAL_NAMES if name in named), None)
    codes = {"train": TRAIN, **({val: VAL} if val else {})}
    return [codes.get(name or "", IGNORED) for name in named], f"train and {val}" if val else "train, val held out"


def without_unlabelled_test(inputs: SourceInputs, splits: str) -> str:
    """Leave out a test split that serves as val, where it has no label and train has some, as test splits often are.

    Args:
        inputs: The inputs; `split` is modified.
        splits: The description of the splits.

    Returns:
        The description of the splits that remain.
    """
    val = inputs.split == VAL
    labelled = inputs.label >= 0
    if not splits.startswith("train and test") or labelled[val].any() or not labelled[inputs.split == TRAIN].any():
        return splits
    inputs.split[val] = IGNORED
    return splits.replace("train and test", "train, val held out, test has no labels", 1)


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan, for every kind of source.

    Attributes:
        shown: The source in error messages, without credentials.
        val_share: Share of the inputs held out for val where the source names no val split; None for no splits at all.
        seed: Decides which inputs are held out, and the order.
        image_column: Column of a list or of Parquet files, or extension of members in tar files; None to find it.
        label_column: Likewise for the label; NO_LABELS to take none.
    """

    shown: str
    val_share: float | None
    seed: int
    image_column: str | None = None
    label_column: str | None = None


def make_plan(
    inputs: SourceInputs,
    classes: list[str] | None,
    origin: Origin,
    layout: str,
    options: PlanOptions,
    *,
    groups: np.ndarray | None = None,
    ignored: Mapping[str, int] | None = None,
) -> ImagePlan:
    """Divide inputs into train and val, and put both in a pseudo-random order.

    Without `options.val_share` everything is train, in the order given.

    Args:
        inputs: The n inputs; `label` and `rejects` are modified.
        classes: Class names; None if unlabelled.
        origin: Where the inputs are stored.
        layout: Description of the source, to which the classes are added.
        options: Options of the plan.
        groups: A number (n,), int64, for each row group of each file, ascending; groups stay together in the order.
        ignored: Number of files that were left out before, by kind.

    Raises:
        SettingError: There is nothing for train, or train and val differ in their classes.
    """
    left_out = {kind: count for kind, count in (ignored or {}).items() if count}
    if options.val_share is None:
        every = _compact(np.arange(len(inputs)))
        splits = {"train": SplitRows(inputs.compact(), every), "val": SplitRows(inputs, every[:0])}
        return ImagePlan(layout, classes, origin, splits, sorted(inputs.rejects), sum(left_out.values()), left_out)
    kept = inputs.split != IGNORED
    if not kept.all():
        left_out["images of other splits"] = int((~kept).sum())
    groups = groups[kept] if groups is not None else None
    inputs = inputs.where(kept)
    val_given = bool((inputs.split == VAL).any())
    classes, inputs, groups = _labels(inputs, classes, val_given, options.shown, groups)
    if not (inputs.split != VAL).any():
        first = "; the first reject: {}: {}".format(*inputs.rejects[0]) if inputs.rejects else ""
        if left_out:
            first += f"; left out: {', '.join(f'{count:,} {kind}' for kind, count in list(left_out.items())[:3])}"
        raise SettingError(f"images={options.shown}: no image for train{first}")
    seed, inputs = options.seed, inputs.compact()
    val = inputs.split == VAL if val_given else _hold_out(inputs, options.val_share, seed)
    order = digests(inputs.path, f"order {seed}") if groups is None else _group_digests(inputs.path, groups, seed)
    splits = {}
    for name, chosen in (("train", ~val), ("val", val)):
        rows = _compact(np.flatnonzero(chosen))
        splits[name] = SplitRows(inputs, rows[_sorted(order[rows], rows, inputs.path, groups)])
    labelled = f"{len(classes)} classes" if classes else "unlabelled"
    shown, total = f"{layout}; {labelled}", sum(left_out.values())
    return ImagePlan(shown, classes, origin, splits, sorted(inputs.rejects), total, left_out)


def _labels(
    inputs: SourceInputs, classes: list[str] | None, val_given: bool, shown: str, groups: np.ndarray | None
) -> tuple[list[str] | None, SourceInputs, np.ndarray | None]:
    """Reject inputs without a label if others have one, and compare the classes of train and val if both are given."""
    if classes is None or (inputs.label < 0).all():
        inputs.label = np.full(len(inputs), -1, np.int32)
        return None, inputs, groups
    if val_given:
        has = {split: bool((inputs.label[inputs.split == split] >= 0).any()) for split in (TRAIN, VAL)}
        if has[TRAIN] != has[VAL]:
            labelled, unlabelled = ("train", "val") if has[TRAIN] else ("val", "train")
            raise SettingError(
                f"images={shown}: {labelled} has labels and {unlabelled} has none; label both or neither"
            )
        found = [
            {classes[i] for i in np.unique(inputs.label[inputs.split == split]) if i >= 0} for split in (TRAIN, VAL)
        ]
        check_classes(found[0], found[1], ("train", "val"), shown)
    unlabelled_rows = inputs.label < 0
    groups = groups[~unlabelled_rows] if groups is not None else None
    return classes, inputs.reject(unlabelled_rows, "no label"), groups


def check_classes(train: set[str], val: set[str], names: tuple[str, str], shown: str) -> None:
    """Raise SettingError if val has classes that train does not have; `names` are those of the two splits."""
    unknown = sorted(val - train)
    if unknown:
        some = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        count = "a class" if len(unknown) == 1 else f"{len(unknown)} classes"
        raise SettingError(
            f"images={shown}: '{names[1]}' has {count} that '{names[0]}' does not have ({some}); "
            "both need the same classes"
        )


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _group_digests(paths: pa.ChunkedArray, groups: np.ndarray, seed: int) -> np.ndarray:
    """As `digests`, but one number for a whole group: that of its first input. Inputs of a group are contiguous."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    firsts = digests(pa.chunked_array([paths.take(pa.array(starts))]), f"order {seed}")
    return np.repeat(firsts, np.diff(starts, append=len(groups)))


def _sorted(
    keys: np.ndarray, rows: Sequence[int] | np.ndarray, paths: pa.ChunkedArray, groups: np.ndarray | None
) -> np.ndarray:
    """Indices that sort by key, then by name; groups keep their inner order."""
    order = _compact(np.argsort(keys, kind="stable"))
    if groups is None and any((np.diff(keys[part]) == 0).any() for part in _overlapping(order)):
        # two equal keys: one in many millions
        order = np.array(sorted(order, key=lambda i: (keys[i], paths[int(rows[i])].as_py())))
    return order


def _overlapping(order: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of an array, each with the first entry of the next one."""
    return (order[start : start + CHUNK + 1] for start in range(0, len(order), CHUNK))


def _compact(index: np.ndarray) -> np.ndarray:
    """Indices in 4 bytes each where they fit."""
    return index.astype(np.uint32) if index.max(initial=0) < 2**32 else index


def _hold_out(inputs: SourceInputs, share: float, seed: int) -> np.ndarray:
    """Which inputs (n,), bool, are held out for val, stratified by class.

    Val gets its share of all images and of each class, to within one image. If there are two images and the share is
    above 0, at least one is held out; every class keeps one for train.
    """
    order = _sorted(digests(inputs.path, f"val {seed}"), range(len(inputs)), inputs.path, None)
    by_class = order[np.argsort(inputs.label[order], kind="stable")]
    val = np.zeros(len(inputs), bool)
    seen = held = 0
    for size in np.unique(inputs.label, return_counts=True)[1].tolist():
        count = min(max(int(share * (seen + size) + 0.5) - held, 0), size - 1)
        val[by_class[seen : seen + count]] = True
        seen, held = seen + size, held + count
    if not held and share > 0 and len(inputs) > 1:
        val[order[0]] = True
    return val
