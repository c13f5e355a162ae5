"""Inputs of a source as columns in Arrow and NumPy arrays, since there may be many millions: names, rows, duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CHUNK = 1 << 18  # rows: parts of a column stay far below the 2 GiB of an Arrow string array
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
        if len(self._open) >= CHUNK:
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
        parts = [self._column(column, start, start + CHUNK) for start in range(0, len(self), CHUNK)]
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
        for start in range(0, len(chunk), CHUNK):
            yield chunk.slice(start, CHUNK)
