"""How a task gets at the encoded bytes of its inputs, wherever they lie: several at a time, never many in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SettingError
from pipeline.storage import Folder, StorageError, is_remote, masked, reaching
from pipeline.stores import Address

LARGEST = 1 << 30  # bytes of one encoded image
IN_FLIGHT = 256_000_000  # bytes fetched ahead, or in the shuffle buffer
THREADS, AHEAD = 12, 48  # of fetching from a store: requests at a time, inputs begun before they are needed
PARQUET_BATCH = 16  # rows decoded at a time
PARQUET_BUFFER = {False: 1 << 20, True: 8 << 20}  # bytes of one read: local, remote
# Errors that say something about the way to the file rather than about the file.
_LOST = {
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}
_NOT_EMBEDDED = "the image is not embedded, only its path is"
_DAMAGE = re.compile(r"thrift|end of stream|parquet|corrupt|decompress|magic|page|dictionary|invalid", re.IGNORECASE)


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

    def fetch(self, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
        """Every index into `rows` once, with the encoded image, or with the reason in words why there is none.

        The order depends on `rows` alone; for Parquet, which often comes sorted by class, it is a shuffled one. Raises
        StorageError where the store, or the whole source, cannot be reached: that is no fault of an image.
        """
        fetch = {"files": _fetch_files, "tar": _fetch_tar, "parquet": _fetch_parquet}[self.kind]
        try:
            yield from fetch(self, rows)
        except SettingError as error:  # no access, no such bucket: in the middle of the work
            raise StorageError(str(error)) from None


def too_large(size: int) -> str:
    """The reason for files above the limit."""
    return f"file too large ({size} bytes)"


# Single files


def _fetch_files(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    root = Folder.at(origin.root)
    places = [_place(root, path) for path in rows.column("path").to_pylist()]
    if not any(is_remote(place) for place in places):
        for index, place in enumerate(places):
            yield index, _local_file(place, root)
        return

    def one(index: int, room: Callable[[int], None]) -> bytes | str:
        place = places[index]
        if not is_remote(place):
            return _local_file(place, root)
        return _remote_file(place, room)

    yield from _ahead(one, len(places))


def _place(root: Folder, path: str) -> str:
    """Where a path of a list or folder leads: paths are relative to `root`, and a URL takes over its options."""
    if is_remote(path):
        address = Address.of(path)
        if not address.options and is_remote(root.url):
            base = Address.of(root.url)
            if base.scheme == address.scheme:
                address = Address(address.scheme, address.user or base.user, address.path, base.options)
        return address.at(address.path)
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return path if path.startswith("/") else root.place(path)


def _local_file(place: str, root: Folder) -> bytes | str:
    try:
        # A named pipe would be waited for without O_NONBLOCK.
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                return "not a regular file"
            if about.st_size > LARGEST:
                return too_large(about.st_size)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read() or "empty file"
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _LOST:
            raise StorageError(f"{place} cannot be read: {error.strerror}") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if root.local is not None and not root.local.is_dir():
                raise StorageError(f"{root} is gone") from None
            return "no such file"
        if isinstance(error, PermissionError):
            return "no permission to read it"
        if error.errno in (errno.EISDIR, errno.ENXIO, errno.ENODEV):
            return "not a regular file"
        return f"cannot be read ({error.strerror})"
    except ValueError:  # a NUL in a list's path
        return "no such file"


def _remote_file(url: str, room: Callable[[int], None]) -> bytes | str:
    address = Address.of(url)
    parent, _, name = address.path.rpartition("/")
    folder = Folder(address.at(parent))
    try:
        with reaching(masked(url)), folder.open(name) as file:
            size = file.size()
            if size > LARGEST:
                return too_large(size)
            room(size)
            content = bytes(file.read())
    except FileNotFoundError:
        return "no such file"
    except IsADirectoryError:
        return "not a regular file"
    if len(content) != size:
        raise StorageError(f"{masked(url)}: {len(content)} of {size} bytes arrived")
    return content or "empty file"


# Members of tar files


def _fetch_tar(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    containers, offsets, sizes = (rows.column(name).to_pylist() for name in ("container", "first", "second"))
    root = Folder.at(origin.root)
    with contextlib.ExitStack() as stack:
        opened = _Opened(origin, root, stack)

        def one(index: int, room: Callable[[int], None]) -> bytes | str:
            if sizes[index] > LARGEST:
                return too_large(sizes[index])
            if not sizes[index]:
                return "empty file"
            name = origin.containers[containers[index]]
            file = opened.file(containers[index])
            room(sizes[index])
            with _container(root, name):
                content = bytes(file.read_at(sizes[index], offsets[index]))
            return content if len(content) == sizes[index] else "the tar file ends inside it"

        if root.local is None:
            yield from _ahead(one, len(rows))
        else:
            for index in range(len(rows)):
                yield index, one(index, lambda size: None)


class _Opened:
    """The tar files of a task, each opened once, when it is first needed."""

    def __init__(self, origin: Origin, root: Folder, stack: contextlib.ExitStack) -> None:
        self._origin, self._root, self._stack = origin, root, stack
        self._files: dict[int, pa.NativeFile] = {}
        self._order: deque[int] = deque()
        self._lock = threading.Lock()

    def file(self, container: int) -> pa.NativeFile:
        """The file; reads of several threads do not disturb each other."""
        with self._lock:
            found = self._files.get(container)
        if found is not None:
            return found
        name = self._origin.containers[container]
        with _container(self._root, name):
            found = self._root.open(name)
        with self._lock:
            kept = self._files.setdefault(container, found)
            if kept is found and self._root.local is None:
                self._stack.callback(found.close)
            elif kept is found:  # a process may have a thousand files open, a source more
                self._order.append(container)
                if len(self._order) > 64:
                    self._files.pop(self._order.popleft()).close()
        return kept


@contextlib.contextmanager
def _container(root: Folder, name: str) -> Iterator[None]:
    """A tar or Parquet file that is gone concerns all its inputs: no reject."""
    try:
        with reaching(root.shown(name)):
            yield
    except FileNotFoundError:
        raise StorageError(f"{root.shown(name)}: no such file; it was there when the call began") from None
    except PermissionError:
        raise StorageError(f"{root.shown(name)}: no permission to read it") from None
    except OSError as error:
        if is_remote(root.url) or isinstance(error, StorageError):
            raise
        raise StorageError(f"{root.shown(name)} cannot be read: {error}") from None


# Fetching ahead


class _Room:
    """Bounds the bytes that are fetched and not yet given out."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._head = limit, 0, 0
        self._sizes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._ended = False

    def take(self, index: int, size: int) -> None:
        """Wait for room. The input that is waited for always gets it: otherwise later ones could lock it out."""
        with self._changed:
            while not (self._ended or index == self._head or self._used + size <= self._limit):
                self._changed.wait()
            self._used += size
            self._sizes[index] = self._sizes.get(index, 0) + size

    def given_out(self, index: int) -> None:
        """The bytes of `index` are no longer held here; the next one is waited for."""
        with self._changed:
            self._used -= self._sizes.pop(index, 0)
            self._head = index + 1
            self._changed.notify_all()

    def end(self) -> None:
        """Let everyone go."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _ahead(one: Callable[[int, Callable[[int], None]], bytes | str], count: int) -> Iterator[tuple[int, bytes | str]]:
    """The results of `one` in their order, fetched by several threads; `one` asks for room before it reads."""
    room = _Room(IN_FLIGHT)
    waiting: deque[Future[bytes | str]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:
        try:
            begun = 0
            for index in range(count):
                while begun < min(count, index + AHEAD):
                    waiting.append(pool.submit(_with_room, one, begun, room))
                    begun += 1
                content = waiting.popleft().result()
                room.given_out(index)
                yield index, content
        finally:
            room.end()
            for future in waiting:
                future.cancel()


def _with_room(one: Callable[[int, Callable[[int], None]], bytes | str], index: int, room: _Room) -> bytes | str:
    return one(index, lambda size: room.take(index, size))


# Rows of Parquet files


def _fetch_parquet(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """In the order of the files through a shuffle buffer, whose random numbers come from the rows."""
    generator = np.random.default_rng([len(rows), *rows.column("row").slice(0, 1).to_pylist()])
    buffer: list[tuple[int, bytes | str]] = []
    held = 0
    for index, content in _parquet_cells(origin, rows):
        buffer.append((index, content))
        held += len(content)
        while held > IN_FLIGHT:
            index, content = _drawn(buffer, generator)
            held -= len(content)
            yield index, content
    while buffer:
        yield _drawn(buffer, generator)


def _drawn(buffer: list[tuple[int, bytes | str]], generator: np.random.Generator) -> tuple[int, bytes | str]:
    place = int(generator.integers(len(buffer)))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _parquet_cells(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    container, group, place = (rows.column(name).to_numpy() for name in ("container", "first", "second"))
    order = np.lexsort((place, group, container))
    root = Folder.at(origin.root)
    start = 0
    while start < len(order):
        file = container[order[start]]
        stop = start + int(np.searchsorted(container[order[start:]], file, side="right"))
        yield from _cells_of_file(origin, root, origin.containers[file], order[start:stop], group, place)
        start = stop


def _cells_of_file(
    origin: Origin, root: Folder, name: str, order: np.ndarray, group: np.ndarray, place: np.ndarray
) -> Iterator[tuple[int, bytes | str]]:
    remote = root.local is None
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    with _container(root, name), root.open(name) as source:
        try:
            parquet = pq.ParquetFile(source, buffer_size=PARQUET_BUFFER[remote], pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error, remote):
                raise
            yield from ((int(index), _damaged(error)) for index in order)
            return
        for wanted in groups:
            done = 0
            try:
                for index, content in _cells_of_group(parquet, origin, int(group[wanted[0]]), wanted, place):
                    done += 1
                    yield index, content
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error, remote):
                    raise
                yield from ((int(index), _damaged(error)) for index in wanted[done:])


def _damaged(error: Exception) -> str:
    return f"the Parquet file is damaged ({' '.join(str(error).split())[:120]})"


def is_damage(error: Exception, remote: bool) -> bool:
    """Whether an error of reading a Parquet file is about its content, and not about the way to it."""
    if isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError | pa.ArrowSerializationError):
        return True
    text = str(error)
    if not isinstance(error, OSError) or isinstance(error, StorageError) or error.errno is not None or "AWS E" in text:
        return False
    return not remote or _DAMAGE.search(text) is not None


def _cells_of_group(
    parquet: pq.ParquetFile, origin: Origin, number: int, wanted: np.ndarray, place: np.ndarray
) -> Iterator[tuple[int, bytes | str]]:
    column = origin.column or ""
    kind = parquet.schema_arrow.field(column).type
    leaves = [column]
    if pa.types.is_struct(kind):
        leaves = [f"{column}.{name}" for name in ("bytes", "path") if kind.get_field_index(name) >= 0]
    start = done = 0
    for batch in parquet.iter_batches(PARQUET_BATCH, row_groups=[number], columns=leaves, use_threads=False):
        cells, paths = batch.column(0), None
        if pa.types.is_struct(cells.type):
            parts = dict(zip((field.name for field in cells.type), cells.flatten(), strict=True))
            cells, paths = parts["bytes"], parts.get("path")  # with the nulls of the struct itself
        while done < len(wanted) and place[wanted[done]] < start + len(cells):
            row = int(place[wanted[done]]) - start
            cell = cells[row].as_py()
            named = cell is None and paths is not None and bool(paths[row].as_py())
            yield int(wanted[done]), _NOT_EMBEDDED if named else _checked_cell(cell)
            done += 1
        start += len(cells)
        if done == len(wanted):
            return
    raise pa.ArrowInvalid("fewer rows than there were")


def _checked_cell(cell: bytes | None) -> bytes | str:
    if cell is None:
        return "the Parquet cell is null"
    if len(cell) > LARGEST:
        return too_large(len(cell))
    return bytes(cell) or "empty file"
