"""Tar files of samples in the WebDataset format: ``KEY.jpg``, ``KEY.cls``. A plan reads only headers and labels.

A sample is a run of members with the same key: the path up to the first dot of the base name. Its label is a member
``.cls``, or a value in its JSON member. Other members are ignored.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from pipeline.errors import SettingError
from pipeline.images.columns import labels_of
from pipeline.images.files import LARGEST, container_of, fetch_ahead, too_large
from pipeline.images.inputs import Paths, SourceInputs, without_duplicates
from pipeline.images.names import NOT_UTF8, TRAIN, split_of
from pipeline.images.plan import (
    NO_LABELS,
    ImagePlan,
    Origin,
    PlanOptions,
    make_plan,
    split_codes,
    split_of_name,
    without_unlabelled_test,
)
from pipeline.images.tar_samples import DOTS, Member, another, choose_image, json_label, shown_name
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import is_remote, reaching

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
LABEL_SUFFIX, JSON_SUFFIX = "cls", "json"
_MOST_FOLDERS = 1000  # inside of a tar file that are looked at
# Hidden files, and the names that WebDataset reserves.
_HIDDEN = re.compile(r"(^|/)\.|(^|/)__[^/]*__$")
_BLOCK = tarfile.BLOCKSIZE
_BUFFER = {False: 1 << 12, True: 4 << 20}  # bytes of one read: local, where the images are skipped, and remote
_THREADS = {False: 2, True: 12}  # that list tar files: local, remote
_LARGEST_EXTRA = 1 << 20  # bytes of an extended header, or of a label
_THIS_TAR = "the tar file "  # how the reasons begin that are about the file from there on
_DAMAGED = f"{_THIS_TAR}is damaged here"
_ENDS = f"{_THIS_TAR}ends inside it"
_DAMAGE = (tarfile.TarError, ValueError, IndexError, RecursionError)  # what `tarfile` raises on damaged headers


@dataclass
class _Index:
    """The samples of one tar file, as columns."""

    paths: Paths = field(default_factory=Paths)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    jsons: list[str | None] = field(default_factory=list)  # JSON members of the samples
    rejects: list[tuple[str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # members, by kind
    folders: set[str] = field(default_factory=set)  # that the images are in; only the first ones
    stray: int = 0  # labels without an image beside them


class _Reader(io.BufferedReader):
    """A buffered reader for `tarfile` that refuses extended headers of huge size, which may be damage."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes. Raises tarfile.HeaderError if that is above the limit, or not a number of bytes."""
        if size is None or not 0 <= size <= _LARGEST_EXTRA:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer at the end of the file."""
        self.seek(offset)
        return self.read(size)


def plan_tar(folder: Folder, names: list[str], options: PlanOptions) -> ImagePlan:
    """Plan tar files of samples.

    Args:
        folder: The folder that holds the files.
        names: Paths of the files in it, in their order.
        options: Options of the plan; the two columns are extensions of members, for the label "cls" by default.

    Raises:
        SettingError: A file cannot be read or is not a tar file, or no sample has the label that is asked for.
    """
    split_of_file, splits_shown = split_codes([split_of_name(name) for name in names])
    image = options.image_column.lower().lstrip(".") if options.image_column else None
    label = (options.label_column or LABEL_SUFFIX).lower()
    with ThreadPoolExecutor(_THREADS[is_remote(folder.url)]) as pool:
        found = list(pool.map(lambda name: _index(folder, name, image, label), names))
    columns = [index.paths.column() for index in found]
    counts = [len(column) for column in columns]
    labels, what = _labels(found, label, options)
    codes, classes, notes = labels_of(labels, None, what, options.shown, options.label_column)
    inputs = SourceInputs(
        path=pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string()),
        label=codes,
        split=np.repeat(np.array(split_of_file, np.int8), counts),
        container=np.repeat(np.arange(len(names), dtype=np.int32), counts),
        first=np.array([offset for index in found for offset in index.offsets], np.int64),
        second=np.array([size for index in found for size in index.sizes], np.int64),
        rejects=[reject for index in found for reject in index.rejects],
    )
    files_shown = f"{len(names)} tar files" if len(names) > 1 else "a tar file"
    inputs = without_duplicates(inputs, "a second time in the tar file")
    folders = set[str]().union(*(index.folders for index in found))
    if options.val_share is not None and splits_shown == "val held out":
        _check_folders(folders, options.shown)
    splits_shown = without_unlabelled_test(inputs, splits_shown)
    origin = Origin("tar", folder.url, tuple(names))
    left_out = sum((index.left_out for index in found), Counter[str]())
    plan = make_plan(inputs, classes, origin, f"{files_shown}, {splits_shown}", options, ignored=left_out)
    if classes is None and not notes and len(folders) > 1 and options.label_column is None:
        notes += ("folders inside of tar files are no classes: unpack them, or add a member .cls to each image",)
    if (stray := sum(index.stray for index in found)) and (codes < 0).any():
        notes += (f"{stray} labels have no image beside them: the members of a sample have to follow each other, "
                  "as in a tar file sorted by name",)  # fmt: skip
    dotted = [f"{path}: {reason}" for path, reason in inputs.rejects if DOTS in reason]
    if dotted:
        notes += (f"{len(dotted)} images share their key with another one, such as {dotted[0]}",)
    return replace(plan, notes=(*notes, *plan.notes))


def _check_folders(folders: set[str], shown: str) -> None:
    """Raise SettingError where folders inside of tar files are splits: all of their images would be trained on."""
    of = {split: folder for folder in sorted(folders) for part in folder.split("/") if (split := split_of(part))}
    if TRAIN in of and len(of) > 1:
        raise SettingError(
            f"images={shown}: folders for {' and '.join(sorted(of))} inside ({', '.join(sorted(of.values()))}); unpack it and "
            "name the folder, or pack a tar file for each split, with the split in its name"
        )


def _labels(found: list[_Index], label: str, options: PlanOptions) -> tuple[pa.ChunkedArray, str]:
    """The labels of all samples, and a word for where they are from: members of their own, or a value in JSON members."""
    texts, what = [index.labels for index in found], f"the label '.{label}'"
    if options.label_column == NO_LABELS:
        texts = [[None] * len(one) for one in texts]
    elif not any(text is not None for one in texts for text in one):
        key = options.label_column.strip() if options.label_column else None
        texts = [[None if text is None else json_label(text, key) for text in index.jsons] for index in found]
        what = "the label in the JSON members"
        if key and not any(text is not None for one in texts for text in one):
            raise SettingError(
                f"images={options.shown}: no sample has a member .{label} (label_column={key}), nor {key} in its .json"
            )
    return pa.chunked_array([pa.array(one, pa.large_string()) for one in texts], pa.large_string()), what


def _index(folder: Folder, name: str, image: str | None, label: str) -> _Index:
    found = _Index()
    shown = folder.shown(name)
    with reaching(shown), _opened(folder, name) as source, _Reader(source, _BUFFER[is_remote(folder.url)]) as file:
        sample: list[Member] = []
        for member in _members(file, source.size(), name, shown, found.rejects):
            wanted = member.extension in (label, JSON_SUFFIX)
            if wanted and not member.problem and member.size <= _LARGEST_EXTRA:
                content = file.at(member.offset, member.size)  # now, since it is probably still in the buffer
                member = replace(member, text=content.decode("utf-8", "replace").strip())
            if sample and member.key != sample[0].key:
                _add(found, name, sample, image, label)
                sample = []
            sample.append(member)
        if sample:
            _add(found, name, sample, image, label)
    return found


def _add(found: _Index, tar: str, sample: list[Member], image: str | None, label: str) -> None:
    """Add the image of one sample to the inputs, or to the rejects, and count what is left out."""
    chosen, masks, others = choose_image(sample, image)
    texts = {
        extension: next((m.text for m in sample if m.extension == extension and m.text is not None), None)
        for extension in (label, JSON_SUFFIX)
    }
    if chosen is None and image is None:
        found.left_out.update(member.kind for member in sample)
        found.stray += texts[label] is not None
    elif chosen is None:
        found.rejects.append((f"{tar}!{shown_name(sample[0].name)}", f"no .{image} in this sample"))
    found.left_out["masks beside images"] += len(masks)
    found.rejects += [(f"{tar}!{shown_name(other.name)}", another(other)) for other in others]
    if chosen is None:
        return
    path = f"{tar}!{shown_name(chosen.name)}"
    if chosen.problem:
        found.rejects.append((path, chosen.problem))
    elif path != f"{tar}!{chosen.name}":
        found.rejects.append((path, NOT_UTF8))
    else:
        found.paths.add([path])
        found.offsets.append(chosen.offset)
        found.sizes.append(chosen.size)
        found.labels.append(texts[label])
        found.jsons.append(texts[JSON_SUFFIX])
        if len(found.folders) < _MOST_FOLDERS and "/" in chosen.name:
            found.folders.add(chosen.name.rpartition("/")[0])


def _opened(folder: Folder, name: str) -> pa.NativeFile:
    try:
        return folder.open(name)
    except OSError as error:
        raise SettingError(f"images={folder.shown(name)}: cannot be read ({error.strerror or error})") from None


# Headers


def _members(file: _Reader, length: int, tar: str, shown: str, rejects: list[tuple[str, str]]) -> Iterator[Member]:
    """Files in a tar file of `length` bytes, except hidden ones; then a reject if it is truncated or damaged."""
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
    start = 0  # where the entry begins, with its extended headers
    while (info := _next(archive)) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
        declared = info.pax_headers.get("size", "0")  # what is not a number tarfile reads as 0
        if info.size < 0 or archive.offset <= start or not re.fullmatch("[0-9]{1,30}", declared):
            rejects.append((f"{tar}!(byte {start})", _DAMAGED))
            return
        member = Member(re.sub(r"^(\./)+", "", info.name), info.offset_data, info.size, _problem(info))
        has_data = not (info.isdir() or info.islnk() or info.issym() or info.isdev())
        if has_data and not info.issparse() and info.offset_data + info.size > length:
            yield replace(member, problem=_ENDS)
            return
        start = archive.offset
        if not info.isdir() and not _HIDDEN.search(member.name):
            yield member
    if damage := _damage_at(file, start):
        rejects.append((f"{tar}!(byte {start})", damage))


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; None at the end and at unreadable headers, which `tarfile` itself does not always tell apart."""
    try:
        return archive.next()
    except _DAMAGE:
        return None


def _damage_at(file: _Reader, start: int) -> str | None:
    """What is wrong at the place where reading members stopped; None at the end marker or the end of the file."""
    header = file.at(start, _BLOCK)
    if not header or header == tarfile.NUL * _BLOCK:
        return None
    if len(header) < _BLOCK:
        return f"{_THIS_TAR}is cut off here"
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"{_THIS_TAR}is damaged ({error}) here"
    return _DAMAGED  # an intact header, but what belongs to it is damaged


def incomplete(rejects: Iterable[tuple[str, str]]) -> list[str]:
    """Notes on tar files of which the rest could not be read: nobody knows how many images it held."""
    return [f"{path}: {reason}; what follows is missing" for path, reason in rejects if reason.startswith(_THIS_TAR)]


def _problem(info: tarfile.TarInfo) -> str:
    """Why a member cannot be read as an image; empty if it may be one."""
    if info.issparse():
        return "a sparse file inside the tar file"
    if info.islnk() or info.issym():
        return "a link inside the tar file"
    return "not a regular file" if info.isdev() else ""


def _no_tar(header: bytes) -> str:
    if header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed tar file, whose images cannot be read individually; decompress it to .tar"
    return "not a tar file"


# Reading images


def fetch_tar(origin: Origin, rows: pa.Table) -> Iterator[tuple[int, bytes | str]]:
    """Yield (index into `rows`, encoded image or the reason why there is none), in the order of `rows`."""
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
            return content if len(content) == sizes[index] else _ENDS

        if root.local is None:
            yield from fetch_ahead(one, len(rows))
        else:
            for index in range(len(rows)):
                yield index, one(index, lambda size: None)


class _Opened:
    """The tar files of a task, each opened when it is first needed. At most 64 local ones stay open."""

    def __init__(self, origin: Origin, root: Folder, stack: contextlib.ExitStack) -> None:
        self._origin, self._root, self._stack = origin, root, stack
        self._files: dict[int, pa.NativeFile] = {}
        self._order: deque[int] = deque()
        self._lock = threading.Lock()

    def file(self, container: int) -> pa.NativeFile:
        """An open file, for `read_at` from several threads."""
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
            elif kept is found:  # the number of open files of a process is limited
                self._order.append(container)
                if len(self._order) > 64:
                    self._files.pop(self._order.popleft()).close()
        return kept
