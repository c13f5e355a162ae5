"""What every kind of source ends in: inputs with names, labels and splits → the plan of a shard set.

Inputs stay in Arrow and numpy throughout: there may be many millions.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SettingError

# Names of splits, and where val comes from: the first of these that is there.
VAL_NAMES = ("validation", "valid", "val", "test")
SPLIT_NAMES = ("train", *VAL_NAMES)
NO_SPLIT, TRAIN, VAL, IGNORED = -1, 0, 1, 2  # codes in Inputs.split
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
class ImagePlan:
    """What becomes of every input of a source, fixed before anything is decoded."""

    layout: str  # in words
    classes: list[str] | None
    origin: Origin
    # "train" and "val": `row` is the place in the order of the split, `path` a unique name, `label` -1 for none, and the
    # last three say where it is, see Origin.
    splits: dict[str, pa.Table]
    rejects: list[tuple[str, str]]  # inputs that cannot be stored, as far as the plan knows: (path, reason)
    ignored: int  # files, rows or samples outside of the two splits

    @property
    def inputs(self) -> int:
        """Number of inputs, those rejected already among them."""
        return sum(len(split) for split in self.splits.values()) + len(self.rejects)


@dataclass
class Inputs:
    """Columns of equal length, in any order."""

    path: pa.ChunkedArray  # large_string
    label: np.ndarray  # int32; -1 for none
    split: np.ndarray  # int8, one of the codes above
    container: np.ndarray | None = None  # int32; None for single files
    first: np.ndarray | None = None  # int64
    second: np.ndarray | None = None
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.path)

    def where(self, kept: np.ndarray) -> Inputs:
        """Those rows for which `kept` is true."""
        if kept.all():
            return self
        path = self.path.filter(pa.array(kept))
        container, first, second = (
            column if column is None else column[kept] for column in (self.container, self.first, self.second)
        )
        return Inputs(path, self.label[kept], self.split[kept], container, first, second, self.rejects)

    def reject(self, rejected: np.ndarray, reason: str) -> Inputs:
        """The other rows, and these among the rejects."""
        if rejected.any():
            self.rejects += [(path, reason) for path in self.path.filter(pa.array(rejected)).to_pylist()]
        return self.where(~rejected)


def column_named(columns: list[str], wanted: str, shown: str) -> str | None:
    """The column of that name, but for case and for spaces around it. Raises SettingError where there are several."""
    found = [column for column in columns if folded(column) == folded(wanted)]
    if len(found) > 1:
        several = ", ".join(f"'{column}'" for column in found)
        raise SettingError(f"images={shown}: column '{wanted}' is there {len(found)} times ({several}); give it once")
    return found[0] if found else None


def folded(name: str) -> str:
    """A name of a column as it is compared."""
    return name.strip().casefold()


class Paths:
    """Collects names without a Python object each."""

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []
        self._open: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        """Append names; UnicodeEncodeError where one is not valid UTF-8."""
        self._open += names
        if len(self._open) >= _CHUNK:
            self._close()

    def _close(self) -> None:
        self._chunks.append(pa.array(self._open, pa.large_string()))
        self._open = []

    def column(self) -> pa.ChunkedArray:
        """All of them."""
        self._close()
        return pa.chunked_array(self._chunks, pa.large_string())


def without_doubles(inputs: Inputs, reason: str) -> Inputs:
    """Reject every name that came before, as "name (2)" and so on: names stay unique among the rejects too."""
    codes = pc.dictionary_encode(inputs.path.combine_chunks()).indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    double = np.ones(len(codes), bool)
    double[first] = False
    seen: Counter[str] = Counter()
    for path in inputs.path.filter(pa.array(double)).to_pylist():
        seen[path] += 1
        inputs.rejects.append((f"{path} ({seen[path] + 1})", reason))
    return inputs.where(~double)


def encode_labels(raw: pa.ChunkedArray, names: list[str] | None, what: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels as (int32 codes with -1 for none, class names, None where there are fewer than two).

    `names` are those of integer labels, where the source has them; else the classes are the labels found: numbers in
    their order, texts in theirs. `what` names the column in errors. Raises SettingError.
    """
    if pa.types.is_dictionary(raw.type):
        raw = raw.cast(raw.type.value_type)
    if pa.types.is_floating(raw.type):  # integers with gaps, as pandas writes them
        try:
            raw = pc.if_else(pc.is_nan(raw), None, raw).cast(pa.int64())
        except pa.ArrowInvalid:
            raise SettingError(f"{what} holds fractions; allowed are whole numbers and texts") from None
    if pa.types.is_integer(raw.type) or pa.types.is_boolean(raw.type):
        numbers = raw.cast(pa.int64())
        if names is not None:
            return _named(numbers, names, what), names if len(names) > 1 else None
        distinct = sorted(value for value in pc.unique(numbers).to_pylist() if value is not None)
        table, classes = pa.array(distinct, pa.int64()), [str(value) for value in distinct]
        return _codes(numbers, table), classes if len(classes) > 1 else None
    if not (pa.types.is_string(raw.type) or pa.types.is_large_string(raw.type) or pa.types.is_null(raw.type)):
        raise SettingError(f"{what} holds {raw.type}; allowed are whole numbers and texts")
    texts = pc.utf8_trim_whitespace(raw.cast(pa.large_string()))
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    found = [value for value in pc.unique(texts).to_pylist() if value is not None]
    if all(re.fullmatch(r"-?\d{1,18}", value) for value in found):
        found.sort(key=lambda value: (int(value), value))
    else:
        found.sort()
    return _codes(texts, pa.array(found, pa.large_string())), found if len(found) > 1 else None


def _codes(values: pa.ChunkedArray, table: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.index_in(values, value_set=table, skip_nulls=True), -1).to_numpy().astype(np.int32)


def _named(numbers: pa.ChunkedArray, names: list[str], what: str) -> np.ndarray:
    codes = pc.fill_null(numbers, -1).to_numpy()
    wrong = codes[(codes < -1) | (codes >= len(names))]
    if len(wrong):
        raise SettingError(
            f"{what} holds {wrong[0]}, and names of {len(names)} classes; allowed are 0 to {len(names) - 1}"
        )
    return codes.astype(np.int32)


def split_of_name(path: str) -> str | None:
    """The split that a file of many images belongs to by its name: ``train/0.tar``, ``data/train-00000-of-2.parquet``.

    The nearest folder counts before the file's own name, in which the word has to stand by itself.
    """
    *folders, name = path.lower().split("/")
    for folder in reversed(folders):
        if folder in SPLIT_NAMES:
            return folder
    found = re.search(r"(?:^|[-_.])(train|validation|valid|val|test)(?=[-_.0-9])", name)
    return found[1] if found else None


def split_codes(named: list[str | None]) -> tuple[list[int], str]:
    """Codes of splits by name, and in words: without a train nothing is split, with one the rest has to be named."""
    if "train" not in named:
        return [NO_SPLIT] * len(named), "val held out"
    val = next((name for name in VAL_NAMES if name in named), None)
    codes = {"train": TRAIN, **({val: VAL} if val else {})}
    return [codes.get(name or "", IGNORED) for name in named], f"train and {val}" if val else "train, val held out"


def finish(
    inputs: Inputs,
    classes: list[str] | None,
    origin: Origin,
    words: str,
    *,
    shown: str,
    val_share: float | None,
    seed: int,
    groups: np.ndarray | None = None,
    ignored: int = 0,
    given: bool | None = None,
) -> ImagePlan:
    """The plan of these inputs; `groups` (int64, a number for each container and row group) stay together in the order.

    Without a `val_share` all of them are train, as they come. Raises SettingError, with `shown` as what `images` is.
    """
    if val_share is None:
        splits = {"train": _table(inputs, np.arange(len(inputs))), "val": SCHEMA.empty_table()}
        return ImagePlan(words, classes, origin, splits, sorted(inputs.rejects), ignored)
    kept = inputs.split != IGNORED
    groups = groups[kept] if groups is not None else None
    inputs = inputs.where(kept)
    if given is None:  # an empty val/ of a tree is given too
        given = bool((inputs.split == VAL).any())
    classes, inputs, groups = _labels(inputs, classes, given, shown, groups)
    if not (inputs.split != VAL).any():
        first = "; the first reject: {}: {}".format(*inputs.rejects[0]) if inputs.rejects else ""
        raise SettingError(f"images={shown}: no image for train{first}")
    if given:
        val = inputs.split == VAL
    else:
        val = _hold_out(inputs, val_share, seed)
    order = digests(inputs.path, f"order {seed}") if groups is None else _group_digests(inputs.path, groups, seed)
    splits = {}
    for name, rows in (("train", np.flatnonzero(~val)), ("val", np.flatnonzero(val))):
        splits[name] = _table(inputs, rows[_sorted(order[rows], rows, inputs.path, groups)])
    labelled = f"{len(classes)} classes" if classes else "unlabelled"
    return ImagePlan(
        f"{words}; {labelled}", classes, origin, splits, sorted(inputs.rejects), ignored + int((~kept).sum())
    )


def _labels(
    inputs: Inputs, classes: list[str] | None, given: bool, shown: str, groups: np.ndarray | None
) -> tuple[list[str] | None, Inputs, np.ndarray | None]:
    """Reject what has no label among what has one; no classes at all where train and val cannot both have them."""
    if classes is None or (inputs.label < 0).all():
        inputs.label = np.full(len(inputs), -1, np.int32)
        return None, inputs, groups
    if given:
        has = {split: bool((inputs.label[inputs.split == split] >= 0).any()) for split in (TRAIN, VAL)}
        if has[TRAIN] != has[VAL]:
            labelled, bare = ("train", "val") if has[TRAIN] else ("val", "train")
            raise SettingError(f"images={shown}: {labelled} has labels and {bare} has none; make them alike")
        train = np.unique(inputs.label[inputs.split == TRAIN])
        check_classes(
            {classes[i] for i in train if i >= 0},
            {classes[i] for i in np.unique(inputs.label[inputs.split == VAL]) if i >= 0},
            ("train", "val"),
            shown,
        )
    bare_rows = inputs.label < 0
    return classes, inputs.reject(bare_rows, "no label"), groups[~bare_rows] if groups is not None else None


def check_classes(train: set[str], val: set[str], names: tuple[str, str], shown: str) -> None:
    """Raise SettingError where val has classes that train has not."""
    unknown = sorted(val - train)
    if unknown:
        some = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise SettingError(
            f"images={shown}: '{names[1]}' has {len(unknown)} classes that '{names[0]}' has not ({some}); "
            "both have to name the same classes"
        )


def digests(paths: pa.ChunkedArray, salt: str) -> np.ndarray:
    """A pseudo-random uint64 for each name, of nothing but the name and `salt`."""
    found = np.empty(len(paths), np.uint64)
    start = f"{salt}:".encode()
    place = 0
    for part in _parts(paths):
        texts = part.to_pylist()
        joined = b"".join(hashlib.blake2b(start + text.encode(), digest_size=8).digest() for text in texts)
        found[place : place + len(texts)] = np.frombuffer(joined, ">u8")
        place += len(texts)
    return found


def _parts(paths: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in paths.chunks:
        for start in range(0, len(chunk), _CHUNK):
            yield chunk.slice(start, _CHUNK)


def _group_digests(paths: pa.ChunkedArray, groups: np.ndarray, seed: int) -> np.ndarray:
    """That of the first input of each group, for all of it. A group's inputs are next to each other."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    firsts = digests(pa.chunked_array([paths.take(pa.array(starts))]), f"order {seed}")
    return np.repeat(firsts, np.diff(starts, append=len(groups)))


def _sorted(keys: np.ndarray, rows: np.ndarray, paths: pa.ChunkedArray, groups: np.ndarray | None) -> np.ndarray:
    """The order by key, then by name; within a group as they came."""
    order = np.argsort(keys, kind="stable")
    if groups is None and (keys[order][1:] == keys[order][:-1]).any():  # one in many millions
        order = np.array(sorted(order, key=lambda i: (keys[i], paths[int(rows[i])].as_py())))
    return order


def _hold_out(inputs: Inputs, share: float, seed: int) -> np.ndarray:
    """Which inputs are val: class by class, such that val has its share of all and of each class within one image.

    At least one image is held out if there are two and the share is above 0, and every class keeps one for train.
    """
    everything = np.arange(len(inputs))
    order = _sorted(digests(inputs.path, f"val {seed}"), everything, inputs.path, None)
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


def _table(inputs: Inputs, order: np.ndarray) -> pa.Table:
    paths = inputs.path.combine_chunks() if inputs.path.num_chunks != 1 else inputs.path.chunk(0)
    parts = [
        paths.take(pa.array(order[start : start + _CHUNK])).cast(pa.string()) for start in range(0, len(order), _CHUNK)
    ]
    places = {"container": inputs.container, "first": inputs.first, "second": inputs.second}
    bare = np.full(len(order), -1)
    columns = {
        "row": np.arange(len(order)),
        "path": pa.chunked_array(parts, pa.string()),
        "label": inputs.label[order],
        **{name: bare if column is None else column[order] for name, column in places.items()},
    }
    return pa.table(columns).cast(SCHEMA)


@dataclass(frozen=True)
class Origin:
    """Where the inputs of a plan are. Small, and can be pickled.

    Of the columns of a plan, `container` is an index into `containers` (-1 for single files); `first` and `second` are,
    in a tar file, the offset and length of the image in bytes, and in a Parquet file its row group and the row in that.
    """

    kind: str  # "files", "tar" or "parquet"
    root: str  # folder that names are relative to: a path or URL, which may hold credentials
    containers: tuple[str, ...] = ()  # names of tar or Parquet files
    column: str | None = None  # of the image, in Parquet
