"""How a task gets at the encoded bytes of its inputs, wherever they lie: several at a time, never many in memory."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from pipeline.images.plan import Origin
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, StorageError, is_remote, masked, reaching

LARGEST = 1 << 30  # bytes of one encoded image
IN_FLIGHT = 256_000_000  # bytes fetched ahead, or in the shuffle buffer
THREADS, AHEAD = 12, 48  # of fetching from a store: requests at a time, inputs begun before they are needed
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


def too_large(size: int) -> str:
    """The reason for files above the limit."""
    return f"file too large ({size} bytes)"


# Single files


def fetch_files(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Yield (row number, bytes or the reason why not) for rows that name files."""
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

    yield from fetch_ahead(one, len(places))


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


def fetch_ahead(
    one: Callable[[int, Callable[[int], None]], bytes | str], count: int
) -> Iterator[tuple[int, bytes | str]]:
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
