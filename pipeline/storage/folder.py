"""One interface to local folders and object stores.

A folder is given by a local path or a URL: ``s3://BUCKET/FOLDER``, or any other scheme that pyarrow or an installed fsspec
package knows. A URL is taken literally, as by ``aws s3``: no percent-encoding; options come last, as in
``s3://photos/2024?endpoint_override=127.0.0.1:9000&scheme=http``. Credentials come from the environment (``AWS_*``), or
precede the bucket as ``s3://KEY:SECRET@BUCKET``; they are masked in every message.

Local errors are OSErrors. Errors of a store are SettingErrors if the user can correct them in the settings, and
StorageErrors if the store does not answer (within about half a minute) or fails.

What it adds to pyarrow's filesystems: writes that appear at once also locally, one-line errors, literal names, listings
without hidden files, local symbolic links followed but not in circles, and no waiting for minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config.places import local_place
from pipeline.storage.object_stores import Address, client, is_remote, masked, reaching
from wavemim.atomic import new_file

log = logging.getLogger(__name__)

OWNER = ".owner.json"  # in a remote folder: who owns it
_PARALLEL = 8  # deletions at a time
_PIECE = 64 << 20  # bytes that are downloaded at a time


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder, local or in an object store; it need not exist. Small, and can be pickled.

    Names are relative to it, and may lead further down ("a/b.json"). In another process the store is reached with that
    process's environment.
    """

    url: str  # an absolute local path, or scheme://…; may hold credentials: show str(folder) instead

    @classmethod
    def at(cls, where: str | Path) -> Folder:
        """The folder at a path or URL. Raises SettingError where the URL is malformed."""
        text = os.fspath(where)
        if is_remote(text):
            address = Address.of(text)
            return cls(address.at(address.path))
        return cls(os.path.abspath(os.path.expanduser(local_place(text))))

    def __str__(self) -> str:
        return masked(self.url)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    @property
    def local(self) -> Path | None:
        """The path; None for object stores."""
        return None if is_remote(self.url) else Path(self.url)

    def sub(self, name: str) -> Folder:
        """The folder `name` in it."""
        return Folder(self.place(name))

    def place(self, name: str) -> str:
        """URL or path of `name` in it; the URL may hold credentials."""
        if not is_remote(self.url):
            return os.path.join(self.url, name) if name else self.url
        address = Address.of(self.url)
        return address.at(f"{address.path}/{name}" if name else address.path)

    def shown(self, name: str) -> str:
        """`place` for messages: without credentials."""
        return masked(self.place(name))

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The local file cannot be read.
            StorageError: The store does not answer, or failed.
            SettingError: It denies access, or has no such bucket.
        """
        if self.local is not None:
            return Path(self.place(name)).read_bytes()
        with reaching(self.shown(name)), self._open(name) as file:
            return bytes(file.read())

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for random access, also from several threads. Put `reaching` around reads from it."""
        with reaching(self.shown(name)):
            return self._open(name)

    def _open(self, name: str) -> pa.NativeFile:
        files, path = self._reach(name)
        return files.open_input_file(path)

    def write(self, name: str, content: bytes) -> None:
        """Write a file; a reader sees either the old content or all of the new one."""
        if self.local is None:
            self._upload(name, pa.py_buffer(content))
            return
        with new_file(Path(self.place(name))) as partial, open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def put(self, file: Path, name: str) -> None:
        """Move a finished local file to `name` in the folder, which then has all of it or nothing."""
        if self.local is None:
            # In one piece: an error while the file is read must not leave an object with its first half.
            with pa.memory_map(str(file)) as source:
                self._upload(name, source.read_buffer())
            file.unlink()
            return
        target = Path(self.place(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_dev == target.parent.stat().st_dev:
            os.replace(file, target)
            return
        with new_file(target) as partial:
            shutil.copyfile(file, partial)
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        file.unlink()

    def get(self, name: str, target: Path) -> None:
        """Copy a file to a local path that does not exist, a piece at a time.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The local file cannot be written.
            StorageError: The store does not answer, or failed.
            SettingError: It denies access, or has no such bucket.
        """
        # Not by pyarrow's copy_files, which does not tell an error of the store from one of the local disk.
        with self.open(name) as source, open(target, "xb") as file:
            while True:
                with reaching(self.shown(name)):
                    piece = source.read(_PIECE)
                if not piece:
                    return
                file.write(piece)

    def _upload(self, name: str, content: pa.Buffer) -> None:
        files, path = self._reach(name)
        with reaching(self.shown(name)), files.open_output_stream(path) as stream:
            stream.write(content)

    def kind(self, name: str = "") -> str | None:
        """What `name` (by default the folder itself) is: "file", "folder", or None if it does not exist."""
        if self.local is not None:
            place = self.place(name)
            return "folder" if os.path.isdir(place) else "file" if os.path.exists(place) else None
        kind = self._info(name).type
        return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(kind)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        if self.local is not None:
            path = Path(self.place(name))
            return path.stat().st_size if path.is_file() else None
        info = self._info(name)
        return info.size if info.type == pafs.FileType.File else None

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds since 1970 by the clock of its store; None if that is not known."""
        info = self._info(name)
        return info.mtime.timestamp() if info.mtime is not None else None

    def _info(self, name: str) -> pafs.FileInfo:
        files, path = self._reach(name)
        with reaching(self.shown(name)):
            return files.get_file_info(path)

    def names(self) -> list[str]:
        """Names of the files directly in it, sorted, without hidden ones; none if it does not exist."""
        return self._children(folders=False)

    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted, without hidden ones; none if it does not exist."""
        return self._children(folders=True)

    def _children(self, *, folders: bool) -> list[str]:
        if self.local is None:
            kind = pafs.FileType.Directory if folders else pafs.FileType.File
            found = [info.base_name for info in self._list(recursive=False) if info.type == kind]
        elif self.local.is_dir():
            with os.scandir(self.url) as entries:
                found = [entry.name for entry in entries if (entry.is_dir() if folders else entry.is_file())]
        else:
            found = []
        return sorted(name for name in found if not name.startswith("."))

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly in it, by name, without hidden ones; one request to a store."""
        if self.local is not None:
            return {name: size for name in self.names() if (size := self.size(name)) is not None}
        infos = [info for info in self._list(recursive=False) if info.type == pafs.FileType.File]
        return {info.base_name: info.size for info in infos if not info.base_name.startswith(".")}

    def walk(self) -> Iterator[str]:
        """Paths, relative to it, of all files below it; hidden files and folders are skipped."""
        for folder, names in self.tree():
            yield from (f"{folder}/{name}" if folder else name for name in names)

    def tree(self, below: str = "", *, hidden: bool = False) -> Iterator[tuple[str, list[str]]]:
        """List everything below it, folder by folder. Hidden files and folders are skipped unless `hidden`.

        Local links to folders are followed, but not in circles, which pyarrow's and fsspec's listings do not notice.

        Args:
            below: Path of the folder to begin at, relative to this one.
            hidden: Whether hidden files and folders are listed too.

        Yields:
            Path of a folder with files, relative to this one, and their names, sorted.

        Raises:
            OSError: A local folder cannot be read.
        """
        if self.local is not None:
            if os.path.isdir(self.place(below)):
                yield from _local_tree(self.url, below, frozenset(), hidden)
            return
        found: dict[str, list[str]] = {}
        start = len(self._reach()[1].lstrip("/")) + 1
        infos = self.sub(below)._list(recursive=True) if below else self._list(recursive=True)
        while infos:  # emptied while it is read: a million of them take much memory
            info = infos.pop()
            path = info.path.lstrip("/")[start:]
            if info.type == pafs.FileType.File and (hidden or not _is_hidden(path)):
                folder, _, name = path.rpartition("/")
                found.setdefault(folder, []).append(name)
        for folder in sorted(found):
            yield folder, sorted(found.pop(folder))

    def _list(self, recursive: bool) -> list[pafs.FileInfo]:
        files, path = self._reach()
        with reaching(str(self)), contextlib.suppress(FileNotFoundError):
            return files.get_file_info(pafs.FileSelector(path, recursive=recursive))
        return []

    def remove(self, name: str) -> None:
        """Remove a file; it need not exist."""
        with contextlib.suppress(FileNotFoundError):
            if self.local is not None:
                os.unlink(self.place(name))
                return
            files, path = self._reach(name)
            with reaching(self.shown(name)):
                files.delete_file(path)

    def drop(self, name: str) -> None:
        """Remove the folder `name` in it with everything in it; it need not exist."""
        files, path = self._reach(name)
        with contextlib.suppress(FileNotFoundError), reaching(self.shown(name)):
            files.delete_dir(path)

    def clear(self) -> None:
        """Remove everything in it, also hidden files and folders, except the mark of its owner."""
        if self.local is not None:
            for entry in list(self.local.iterdir()) if self.local.is_dir() else []:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            return
        infos = self._list(recursive=False)
        files, _ = self._reach()
        with reaching(str(self)):
            for info in infos:
                if info.type == pafs.FileType.Directory:
                    files.delete_dir(info.path)
        names = [info.base_name for info in infos if info.type == pafs.FileType.File and info.base_name != OWNER]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(self.remove, names))

    def _reach(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        """The filesystem, and the path of `name` in it."""
        place = self.place(name)
        if self.local is not None:
            return pafs.LocalFileSystem(), place
        address = Address.of(place)
        return client(address), place if address.scheme in ("http", "https") else address.path


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _local_tree(root: str, below: str, above: frozenset[str], hidden: bool) -> Iterator[tuple[str, list[str]]]:
    place = os.path.join(root, below) if below else root
    real = os.path.realpath(place)
    if real in above:
        return
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(place) as entries:
        for entry in entries:
            if hidden or not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    if files:
        files.sort()
        yield below, files
    del files
    for name in sorted(folders):
        yield from _local_tree(root, f"{below}/{name}" if below else name, above | {real}, hidden)
