"""The plan of a shard set: inputs of any source, with names, labels and splits, in their final order.

Inputs stay in Arrow and NumPy arrays throughout, since there may be many millions.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SettingError

# Names of splits. The first of VAL_NAMES that a source has becomes val.
VAL_NAMES = ("validation", "valid", "val", "test")
SPLIT_NAMES = ("train", *VAL_NAMES)
NO_LABELS = "none"  # as label_column
UNIQUE_FROM = 4  # images: a label for each of fewer may be a small data set
NO_SPLIT, TRAIN, VAL, IGNORED = -1, 0, 1, 2  # codes in SourceInputs.split
_CHUNK = 1 << 18  # rows: parts of a column stay far below the 2 GiB of an Arrow string array
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "path": pa.string(),
        "label": pa.int32(),
        "container": pa.int32(),
        "first": pa.int64(),
        "second": pa.int64(),
    }
)


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


@dataclass
class SourceInputs:
    """The inputs of a source as n-element columns, in any order. The last three are None for single files."""

    path: pa.ChunkedArray  # large_string
    label: np.ndarray  # int32; -1 for none
    split: np.ndarray  # int8, one of the codes above
    container: np.ndarray | None = None  # int32
    first: np.ndarray | None = None  # int64
    second: np.ndarray | None = None  # int64
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.path)

    def where(self, kept: np.ndarray) -> SourceInputs:
        """Return the rows where `kept` (n,), bool, is true."""
        if kept.all():
            return self
        path = self.path.filter(pa.array(kept))
        container, first, second = (
            column if column is None else column[kept] for column in (self.container, self.first, self.second)
        )
        return SourceInputs(path, self.label[kept], self.split[kept], container, first, second, self.rejects)

    def compact(self) -> SourceInputs:
        """Put all names into one array, from which rows can be taken quickly; returns itself."""
        if self.path.num_chunks != 1:
            self.path = pa.chunked_array([self.path.combine_chunks()], self.path.type)
        return self

    def reject(self, rejected: np.ndarray, reason: str) -> SourceInputs:
        """Add the rows where `rejected` (n,), bool, is true to the rejects, and return the others."""
        if rejected.any():
            self.rejects += [(path, reason) for path in self.path.filter(pa.array(rejected)).to_pylist()]
        return self.where(~rejected)


class Paths:
    """Collects names in Arrow memory: a Python string for each would take several times as much."""

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []
        self._text, self._lengths = bytearray(), list[np.ndarray]()  # of the next chunk, which grows in place
        self._open: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        """Append names. Raises UnicodeEncodeError if one is not valid UTF-8."""
        self._open += names
        if len(self._open) >= _CHUNK:
            self._encode()

    def _encode(self) -> None:
        encoded = [name.encode() for name in self._open]
        self._text += b"".join(encoded)
        self._lengths.append(np.fromiter(map(len, encoded), np.int32, len(encoded)))
        self._open = []

    def column(self) -> pa.ChunkedArray:
        """All names, in the order in which they were added."""
        self._encode()
        if count := sum(map(len, self._lengths)):
            ends = np.zeros(count + 1, np.int64)
            np.cumsum(np.concatenate(self._lengths), out=ends[1:])
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(self._text)]
            self._chunks.append(pa.Array.from_buffers(pa.large_string(), count, buffers))
            self._text, self._lengths = bytearray(), []
        return pa.chunked_array(self._chunks, pa.large_string())


class SplitRows:
    """The rows of a split, in their order, as a table with `SCHEMA` of which only what is asked for is made.

    A whole table of 10 million inputs would double the memory of a plan.
    """

    def __init__(self, inputs: SourceInputs, order: np.ndarray) -> None:
        """
        Args:
            inputs: The inputs of all splits.
            order: Indices (n,) of those of this split.
        """
        self._inputs, self._order = inputs, order

    def __len__(self) -> int:
        return len(self._order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SplitRows) and bool(self.slice().equals(other.slice()))

    __hash__ = None  # type: ignore[assignment]  # may hold millions of rows

    def __getitem__(self, column: str) -> pa.ChunkedArray:
        """A column, by its name."""
        parts = [self._column(column, start, start + _CHUNK) for start in range(0, len(self), _CHUNK)]
        return pa.chunked_array(parts, SCHEMA.field(column).type)

    def slice(self, start: int = 0, count: int | None = None) -> pa.Table:
        """`count` rows from `start` on; by default all that follow."""
        end = len(self) if count is None else min(start + count, len(self))
        return pa.table([self._column(name, start, end) for name in SCHEMA.names], schema=SCHEMA)

    def _column(self, name: str, start: int, end: int) -> pa.Array:
        part, kind = self._order[start:end], SCHEMA.field(name).type
        if name == "row":
            return pa.array(np.arange(start, start + len(part)), kind)
        column = getattr(self._inputs, name)
        if name == "path":
            return column.chunk(0).take(pa.array(part)).cast(kind) if len(part) else pa.array([], kind)
        return pa.array(np.full(len(part), -1) if column is None else column[part], kind)


def without_duplicates(inputs: SourceInputs, reason: str) -> SourceInputs:
    """Reject every repeated name, as "name (2)" and so on: names of rejects have to be unique too."""
    hashes = np.fromiter((hash(path) for part in parts_of(inputs.path) for path in part.to_pylist()), np.int64)
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return inputs
    codes = pc.dictionary_encode(inputs.path.combine_chunks()).indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    repeated = np.ones(len(codes), bool)
    repeated[first] = False
    seen: Counter[str] = Counter()
    for path in inputs.path.filter(pa.array(repeated)).to_pylist():
        seen[path] += 1
        inputs.rejects.append((f"{path} ({seen[path] + 1})", reason))
    return inputs.where(~repeated)


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


def digests(paths: pa.ChunkedArray, salt: str) -> np.ndarray:
    """A pseudo-random number (n,), uint64, for each name; it depends on the name and `salt` only."""
    found = np.empty(len(paths), np.uint64)
    start = f"{salt}:".encode()
    place = 0
    for part in parts_of(paths):
        texts = part.to_pylist()
        joined = b"".join(hashlib.blake2b(start + text.encode(), digest_size=8).digest() for text in texts)
        found[place : place + len(texts)] = np.frombuffer(joined, ">u8")
        place += len(texts)
    return found


def parts_of(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """A column in parts of some hundred thousand rows."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), _CHUNK):
            yield chunk.slice(start, _CHUNK)


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
    return (order[start : start + _CHUNK + 1] for start in range(0, len(order), _CHUNK))


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
