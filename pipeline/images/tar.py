"""Tar files of samples, as WebDataset reads them: ``KEY.jpg``, ``KEY.cls``; only their headers are read for a plan.

A sample is a run of members with the same key, the path up to the first dot of the base name. Members beside its image
and its label are left alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from pipeline.errors import SettingError
from pipeline.images.decode import SUFFIXES
from pipeline.images.files import LARGEST, fetch_ahead, too_large
from pipeline.images.plan import (
    ImagePlan,
    Inputs,
    Origin,
    Paths,
    encode_labels,
    finish,
    split_codes,
    split_of_name,
    without_doubles,
)
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError, is_remote, reaching

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
LABEL_SUFFIX = "cls"
# Hidden files, and the names that WebDataset reserves.
_HIDDEN = re.compile(r"(^|/)\.|(^|/)__[^/]*__$")
_BLOCK = tarfile.BLOCKSIZE
_BUFFER = {False: 1 << 12, True: 4 << 20}  # bytes of one read: local, where the images are skipped, and remote
_THREADS = {False: 2, True: 12}  # of listing tar files: local, remote
_LARGEST_EXTRA = 1 << 20  # bytes of an extended header, or of a label
_DAMAGED = "the tar file is damaged here"
_DAMAGE = (tarfile.TarError, ValueError, IndexError, RecursionError)  # what `tarfile` raises on damaged headers


@dataclass(frozen=True)
class Member:
    """A file in a tar file."""

    name: str
    offset: int  # of the data, bytes
    size: int
    problem: str = ""  # why it cannot be read
    text: str | None = None  # its content, of the label

    @property
    def key(self) -> str:
        """What the members of a sample have in common."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def extension(self) -> str:
        """The rest, lower case, without the first dot."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


@dataclass
class _Index:
    """The samples of one tar file."""

    paths: Paths = field(default_factory=Paths)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    rejects: list[tuple[str, str]] = field(default_factory=list)


class _Reader(io.BufferedReader):
    """A tar file as `tarfile` reads it: buffered, and no header is believed that claims to be huge."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As io.BufferedReader; tarfile.InvalidHeaderError above the limit, or for everything at once."""
        if size is None or not 0 <= size <= _LARGEST_EXTRA:
            raise tarfile.InvalidHeaderError(f"a header of {size} bytes")
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        """Bytes from `offset`; fewer at the end of the file."""
        self.seek(offset)
        return self.read(size)


def plan_tar(
    folder: Folder,
    names: list[str],
    *,
    val_share: float | None,
    seed: int,
    image_column: str | None,
    label_column: str | None,
    shown: str,
) -> ImagePlan:
    """The plan of tar files in `folder`; the columns are the extensions of image and label.

    Raises SettingError, with `shown` as what `images` is.
    """
    split_of_file, words = split_codes([split_of_name(name) for name in names])
    wanted = (image_column.lower().lstrip(".") if image_column else None, (label_column or LABEL_SUFFIX).lower())
    with ThreadPoolExecutor(_THREADS[is_remote(folder.url)]) as pool:
        found = list(pool.map(lambda name: _index(folder, name, *wanted), names))
    columns = [index.paths.column() for index in found]
    counts = [len(column) for column in columns]
    labels = pa.chunked_array([pa.array(index.labels, pa.large_string()) for index in found], pa.large_string())
    codes, classes = encode_labels(labels, None, f"images={shown}: the label '{wanted[1]}'")
    if label_column and not any(label is not None for index in found for label in index.labels):
        raise SettingError(f"images={shown}: no sample has a member .{wanted[1]} (label_column={label_column})")
    inputs = Inputs(
        path=pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string()),
        label=codes,
        split=np.repeat(np.array(split_of_file, np.int8), counts),
        container=np.repeat(np.arange(len(names), dtype=np.int32), counts),
        first=np.array([offset for index in found for offset in index.offsets], np.int64),
        second=np.array([size for index in found for size in index.sizes], np.int64),
        rejects=[reject for index in found for reject in index.rejects],
    )
    origin = Origin("tar", folder.url, tuple(names))
    files_in_words = f"{len(names)} tar files" if len(names) > 1 else "a tar file"
    return finish(
        without_doubles(inputs, "a second time in the tar file"),
        classes,
        origin,
        f"{files_in_words}, {words}",
        shown=shown,
        val_share=val_share,
        seed=seed,
    )


def _index(folder: Folder, name: str, image: str | None, label: str) -> _Index:
    found = _Index()
    shown = folder.shown(name)
    with reaching(shown), _opened(folder, name) as source, _Reader(source, _BUFFER[is_remote(folder.url)]) as file:
        sample: list[Member] = []
        for member in _members(file, source.size(), name, shown, found.rejects):
            if member.extension == label and not member.problem and member.size <= _LARGEST_EXTRA:
                content = file.at(member.offset, member.size)  # now, while it is in the buffer
                member = replace(member, text=content.decode("utf-8", "replace").strip())
            if sample and member.key != sample[0].key:
                _add(found, name, sample, image)
                sample = []
            sample.append(member)
        if sample:
            _add(found, name, sample, image)
    return found


def _opened(folder: Folder, name: str) -> pa.NativeFile:
    try:
        return folder.open(name)
    except OSError as error:
        raise SettingError(f"images={folder.shown(name)}: cannot be read ({error.strerror or error})") from None


def _add(found: _Index, tar: str, sample: list[Member], image: str | None) -> None:
    """One sample: its image among the inputs, or a reject."""
    images = [member for member in sample if _is_image(member, image)]
    plain = [member for member in images if "." not in member.extension]
    if not images:
        missing = f"no .{image} in this sample" if image else "no image in this sample"
        found.rejects.append((f"{tar}!{_shown(sample[0].name)}", missing))
        return
    chosen = (plain or images)[0]
    for other in images:
        path = f"{tar}!{_shown(other.name)}"
        if other is not chosen:
            found.rejects.append((path, "another image of the same sample; image_column names the extension to take"))
        elif other.problem:
            found.rejects.append((path, other.problem))
        elif path != f"{tar}!{other.name}":
            found.rejects.append((path, "file name is not valid UTF-8"))
        else:
            found.paths.add([path])
            found.offsets.append(other.offset)
            found.sizes.append(other.size)
            found.labels.append(next((member.text for member in sample if member.text is not None), None))


def _is_image(member: Member, image: str | None) -> bool:
    if image is not None:
        return member.extension == image
    return f".{member.extension.rpartition('.')[2]}" in SUFFIXES


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# Headers


def _members(file: _Reader, length: int, tar: str, shown: str, rejects: list[tuple[str, str]]) -> Iterator[Member]:
    """The files of a tar file of `length` bytes, without hidden ones. At a cut or damage they end, with a reject."""
    if not length:
        rejects.append((tar, "empty file"))
        return
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except _DAMAGE:  # of the first entry
        if (damage := _damage_at(file, 0)) != _DAMAGED:
            raise SettingError(f"images={shown}: {_no_tar(file.at(0, _BLOCK))}") from None
        rejects.append((f"{tar}!(byte 0)", damage))
        return
    start = 0  # of the entry, its extended headers first
    while (info := _next(archive)) is not None:
        archive.members.clear()  # it would keep every one of them
        declared = info.pax_headers.get("size", "0")  # which tarfile reads as 0 where it is no number
        if info.size < 0 or archive.offset <= start or not re.fullmatch("[0-9]{1,30}", declared):
            rejects.append((f"{tar}!(byte {start})", _DAMAGED))
            return
        member = Member(re.sub(r"^(\./)+", "", info.name), info.offset_data, info.size, _problem(info))
        has_data = not (info.isdir() or info.islnk() or info.issym() or info.isdev())
        if has_data and not info.issparse() and info.offset_data + info.size > length:
            yield replace(member, problem="the tar file ends inside it")
            return
        start = archive.offset
        if not info.isdir() and not _HIDDEN.search(member.name):
            yield member
    if damage := _damage_at(file, start):
        rejects.append((f"{tar}!(byte {start})", damage))


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; None at the end, and also at headers that cannot be read: `tarfile` tells some of them alike."""
    try:
        return archive.next()
    except _DAMAGE:
        return None


def _damage_at(file: _Reader, start: int) -> str | None:
    """Why a tar file ends at `start`, None if it is the mark of the end or the end of the file."""
    header = file.at(start, _BLOCK)
    try:
        if header:
            tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return None
    except tarfile.TruncatedHeaderError:
        return "the tar file is cut off here"
    except tarfile.HeaderError as error:
        return f"the tar file is damaged ({error}) here"
    return _DAMAGED if header else None  # a header by itself, but not with what follows it


def _problem(info: tarfile.TarInfo) -> str:
    """Why a member is no image that can be read, empty if it may be one."""
    if info.issparse():
        return "a sparse file inside the tar file"
    if info.islnk() or info.issym():
        return "a link inside the tar file"
    return "not a regular file" if info.isdev() else ""


def _no_tar(header: bytes) -> str:
    if header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed tar file; its images cannot be read one by one, unpack it to .tar"
    return "not a tar file"


# Members of tar files


def fetch_tar(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Yield (row number, bytes or the reason why not) for rows that name members of tar files."""
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
            with container_of(root, name):
                content = bytes(file.read_at(sizes[index], offsets[index]))
            return content if len(content) == sizes[index] else "the tar file ends inside it"

        if root.local is None:
            yield from fetch_ahead(one, len(rows))
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
        with container_of(self._root, name):
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
def container_of(root: Folder, name: str) -> Iterator[None]:
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
