"""Tar files of samples, as WebDataset reads them: ``KEY.jpg``, ``KEY.cls``; only their headers are read for a plan.

A sample is a run of members with the same key, the path up to the first dot of the base name. Members beside its image
and its label are left alone.
"""

from __future__ import annotations

import contextlib
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
# Also what WebDataset keeps for itself.
_HIDDEN = re.compile(r"(^|/)\.|(^|/)__[^/]*__$")
_BLOCK = tarfile.BLOCKSIZE
_WINDOW = {False: 1 << 12, True: 4 << 20}  # bytes read at a time: local, where data is jumped over, and remote
_THREADS = {False: 2, True: 12}
_LARGEST_EXTRA = 1 << 20  # bytes of a long name, or of a label
_DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_EXTRAS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_KINDS = {
    **dict.fromkeys((tarfile.LNKTYPE, tarfile.SYMTYPE), "a link inside the tar file"),
    tarfile.GNUTYPE_SPARSE: "a sparse file inside the tar file",
    **dict.fromkeys(_DEVICES, "not a regular file"),
}


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


class _Window:
    """Reads a file in large pieces, a small part of one at a time."""

    def __init__(self, file: pa.NativeFile, length: int) -> None:
        self.size = file.size()
        self._file, self._length = file, length
        self._start, self._held = 0, b""

    def at(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`; fewer at the end of the file."""
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._held):
            self._held = bytes(self._file.read_at(max(self._length, length), offset)) if offset < self.size else b""
            self._start, begin = offset, 0
        return self._held[begin : begin + length]


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
    with reaching(shown), _opened(folder, name) as file:
        window = _Window(file, _WINDOW[is_remote(folder.url)])
        sample: list[Member] = []
        for member in _members(window, name, shown, found.rejects):
            if member.extension == label and not member.problem and member.size <= _LARGEST_EXTRA:
                # At once: the window only moves on.
                content = window.at(member.offset, member.size)
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


def _members(window: _Window, tar: str, shown: str, rejects: list[tuple[str, str]]) -> Iterator[Member]:
    """The files of a tar file but for hidden ones; where it is cut off or damaged, a reject is the last of it."""
    if not window.size:
        rejects.append((tar, "empty file"))
        return
    place, extra = 0, dict[str, str]()
    while header := window.at(place, _BLOCK):
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not header.strip(b"\0") and len(header) == _BLOCK:
                return  # the mark of the end
            if place == 0:
                raise SettingError(f"images={shown}: {_no_tar(header)}") from None
            where = "is cut off" if len(header) < _BLOCK else f"is damaged ({error})"
            rejects.append((f"{tar}!(byte {place})", f"the tar file {where} here"))
            return
        data = place + _BLOCK
        size = _size(info, extra)
        if size is None:
            rejects.append((f"{tar}!(byte {place})", "the tar file is damaged here"))
            return
        has_data = info.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, *_DEVICES)
        place = data + (-(-size // _BLOCK) * _BLOCK if has_data else 0)
        if info.type in _EXTRAS:
            extra |= _extra(info.type, window.at(data, min(info.size, _LARGEST_EXTRA)))
            continue
        member = replace(_member(info, extra), offset=data, size=size)
        if has_data and data + size > window.size:
            yield replace(member, problem="the tar file ends inside it")
            return
        if info.type == tarfile.GNUTYPE_SPARSE:
            place += _sparse_blocks(window, header, data)
        extra = {}
        if info.type != tarfile.DIRTYPE and not _HIDDEN.search(member.name):
            yield member


def _size(info: tarfile.TarInfo, extra: dict[str, str]) -> int | None:
    """Bytes of the data after a header, None where that is no number from 0 on: the next header is then nowhere."""
    text = str(info.size) if info.type in _EXTRAS else extra.get("size", str(info.size))
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text) else None


def _member(info: tarfile.TarInfo, extra: dict[str, str]) -> Member:
    problem = _KINDS.get(info.type, "")
    if any(key.startswith("GNU.sparse.") for key in extra):
        problem = _KINDS[tarfile.GNUTYPE_SPARSE]
    name = extra.get("GNU.sparse.name") or extra.get("path") or info.name
    return Member(re.sub(r"^(\./)+", "", name), 0, 0, problem)


def _extra(kind: bytes, content: bytes) -> dict[str, str]:
    """What comes before a header that has no room for it: a long name, or records of the POSIX format."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    records: dict[str, str] = {}
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and (found := re.match(rb"(\d{1,9}) ([^=]+)=", content)):
        length = int(found[1])
        value = content[found.end() : length - 1]
        records[found[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        if not length:
            break
        content = content[length:]
    return records


def _sparse_blocks(window: _Window, header: bytes, place: int) -> int:
    """Bytes of the further headers of a sparse file in the old format, which come before its data."""
    more, start = header[482:483] not in (b"", b"\0"), place
    while more:
        block = window.at(place, _BLOCK)
        more = len(block) == _BLOCK and block[504:505] != b"\0"
        place += _BLOCK
    return place - start


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
