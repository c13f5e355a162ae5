"""Fetching the encoded bytes of inputs, local or remote: several at a time, with a bound on memory."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from pipeline.config.places import local_place
from pipeline.images.plan import Origin
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, StorageError, is_remote, masked, reaching

LARGEST = 1 << 30  # bytes of one encoded image
IN_FLIGHT = 256_000_000  # bytes fetched ahead, or in the shuffle buffer
THREADS, AHEAD = 12, 48  # for object stores: concurrent requests, and inputs requested before they are needed
# Errors of the connection to the file rather than of the file.
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
    """The reason for rejecting a file above the size limit."""
    return f"file too large ({size} bytes)"


# Single files


def fetch_files(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Yield (index into `rows`, encoded image or the reason why there is none), in the order of `rows`."""
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
    """The full path or URL of an input. Paths are relative to `root`; URLs without options take those of `root`."""
    if is_remote(path):
        address = Address.of(path)
        if not address.options and is_remote(root.url):
            base = Address.of(root.url)
            if base.scheme == address.scheme:
                address = Address(address.scheme, address.user or base.user, address.path, base.options)
        return address.at(address.path)
    path = local_place(path)
    return path if path.startswith("/") else root.place(path)


def _local_file(place: str, root: Folder) -> bytes | str:
    try:
        # Without O_NONBLOCK, opening a named pipe would block.
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
                raise StorageError(f"{root} no longer exists") from None
            return "no such file"
        if isinstance(error, PermissionError):
            return "permission denied"
        if error.errno in (errno.EISDIR, errno.ENXIO, errno.ENODEV):
            return "not a regular file"
        return f"cannot be read ({error.strerror})"
    except ValueError:  # a NUL character in the path
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
        raise StorageError(f"{masked(url)}: only {len(content)} of {size} bytes were received")
    return content or "empty file"


# Fetching ahead


class _Room:
    """A bound on the bytes that are fetched and not yet consumed."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._head = limit, 0, 0
        self._sizes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._ended = False

    def take(self, index: int, size: int) -> None:
        """Wait until `size` bytes fit. The input that the consumer waits for always fits: later ones could block it."""
        with self._changed:
            while not (self._ended or index == self._head or self._used + size <= self._limit):
                self._changed.wait()
            self._used += size
            self._sizes[index] = self._sizes.get(index, 0) + size

    def given_out(self, index: int) -> None:
        """Release the bytes of `index`; the consumer now waits for the next input."""
        with self._changed:
            self._used -= self._sizes.pop(index, 0)
            self._head = index + 1
            self._changed.notify_all()

    def end(self) -> None:
        """Release all waiting threads."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def fetch_ahead(
    one: Callable[[int, Callable[[int], None]], bytes | str], count: int
) -> Iterator[tuple[int, bytes | str]]:
    """Call `one` for 0 … count - 1 in several threads, and yield the results in order.

    Args:
        one: Called with an index and a function that it has to call with the number of bytes before it reads them.
        count: Number of calls.
    """
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


# Tar and Parquet files


@contextlib.contextmanager
def container_of(root: Folder, name: str) -> Iterator[None]:
    """Raise StorageError if a tar or Parquet file cannot be reached: this affects all its inputs, not one image."""
    try:
        with reaching(root.shown(name)):
            yield
    except FileNotFoundError:
        raise StorageError(f"{root.shown(name)}: no such file; it existed when the images were listed") from None
    except PermissionError:
        raise StorageError(f"{root.shown(name)}: permission denied") from None
    except OSError as error:
        if is_remote(root.url) or isinstance(error, StorageError):
            raise
        raise StorageError(f"{root.shown(name)} cannot be read: {error}") from None
