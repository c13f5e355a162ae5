"""One small door to local folders and object stores.

A place is a local path or a URL: ``s3://BUCKET/FOLDER``, and every other scheme that pyarrow or an installed fsspec
package knows. A URL is taken literally, as ``aws s3`` does: no percent-encoding; options come last, as in
``s3://photos/2024?endpoint_override=127.0.0.1:9000&scheme=http``. Credentials come from the environment (``AWS_*``), or
stand before the bucket as ``s3://KEY:SECRET@BUCKET``; they are masked in every message.

Local errors are OSErrors as anywhere. Of a store, what the user can mend in the settings is a SettingError, and a store
that does not answer is a StorageError, within about half a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.storage.object_stores import Address, StorageError, client, is_remote, masked, reaching

__all__ = ["Folder", "StorageError", "is_remote", "masked", "reaching"]

log = logging.getLogger(__name__)

OWNER = ".owner.json"  # in a remote folder: whose it is
_PARALLEL = 8


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder, local or in an object store; it need not be there yet. Small, and can be pickled.

    Names may lead further down ("a/b.json"). In another process the folder is reached with that process's environment.
    """

    url: str  # an absolute local path, or scheme://…; may hold credentials: show str(folder)

    @classmethod
    def at(cls, where: str | Path) -> Folder:
        """The folder at a path or URL. Raises SettingError where the URL is malformed."""
        text = os.fspath(where)
        if is_remote(text):
            address = Address.of(text)
            return cls(address.at(address.path))
        text = text.removeprefix("file://") if text.lower().startswith("file://") else text
        return cls(os.path.abspath(os.path.expanduser(text)))

    def __str__(self) -> str:
        return masked(self.url)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    @property
    def local(self) -> Path | None:
        """The path; None for object stores."""
        return None if is_remote(self.url) else Path(self.url)

    def sub(self, name: str) -> Folder:
        """A folder in it."""
        return Folder(self.place(name))

    def place(self, name: str) -> str:
        """URL or path of `name` in it."""
        if not is_remote(self.url):
            return os.path.join(self.url, name) if name else self.url
        address = Address.of(self.url)
        return address.at(f"{address.path}/{name}" if name else address.path)

    def shown(self, name: str) -> str:
        """`place` for messages: without credentials."""
        return masked(self.place(name))

    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError, OSError, StorageError, SettingError."""
        if self.local is not None:
            return Path(self.place(name)).read_bytes()
        with reaching(self.shown(name)), self._open(name) as file:
            return bytes(file.read())

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access, from several threads too; put `reaching` around reads from it."""
        with reaching(self.shown(name)):
            return self._open(name)

    def _open(self, name: str) -> pa.NativeFile:
        files, path = self._reach(name)
        return files.open_input_file(path)

    def write(self, name: str, content: bytes) -> None:
        """Write a file; a reader sees the old content or the whole new one, never half."""
        if self.local is None:
            self._upload(name, pa.py_buffer(content))
            return
        with _renamed_into(Path(self.place(name))) as temporary, open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def put(self, file: Path, name: str) -> None:
        """Move a finished local file to `name` in the folder, whole or not at all."""
        if self.local is None:
            # Handed over in one piece: a half-read file can then not be completed into a half-written object.
            with pa.memory_map(str(file)) as source:
                self._upload(name, source.read_buffer())
            file.unlink()
            return
        target = Path(self.place(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_dev == target.parent.stat().st_dev:
            os.replace(file, target)
            return
        with _renamed_into(target) as temporary:
            shutil.copyfile(file, temporary)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        file.unlink()

    def _upload(self, name: str, content: pa.Buffer) -> None:
        files, path = self._reach(name)
        with reaching(self.shown(name)), files.open_output_stream(path) as stream:
            stream.write(content)

    def kind(self, name: str = "") -> str | None:
        """Whether `name` (without one: the folder itself) is there: "file", "folder" or None."""
        if self.local is not None:
            place = self.place(name)
            return "folder" if os.path.isdir(place) else "file" if os.path.exists(place) else None
        kind = self._info(name).type
        return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(kind)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        if self.local is not None:
            path = Path(self.place(name))
            return path.stat().st_size if path.is_file() else None
        info = self._info(name)
        return info.size if info.type == pafs.FileType.File else None

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds, by the clock of the place where it lies; None if that is not known."""
        info = self._info(name)
        return info.mtime.timestamp() if info.mtime is not None else None

    def _info(self, name: str) -> pafs.FileInfo:
        files, path = self._reach(name)
        with reaching(self.shown(name)):
            return files.get_file_info(path)

    def names(self) -> list[str]:
        """Files directly in it but hidden ones, sorted; none if it is not there."""
        if self.local is not None:
            if not self.local.is_dir():
                return []
            with os.scandir(self.url) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_file())
        files = [info.base_name for info in self._list(recursive=False) if info.type == pafs.FileType.File]
        return sorted(name for name in files if not name.startswith("."))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly in it, by name, hidden ones left out; of a store, asked for once."""
        if self.local is not None:
            return {name: size for name in self.names() if (size := self.size(name)) is not None}
        infos = [info for info in self._list(recursive=False) if info.type == pafs.FileType.File]
        return {info.base_name: info.size for info in infos if not info.base_name.startswith(".")}

    def walk(self) -> Iterator[str]:
        """Paths, relative to it, of all files below it; hidden files and folders are left out."""
        for folder, names in self.tree():
            yield from (f"{folder}/{name}" if folder else name for name in names)

    def tree(self, below: str = "") -> Iterator[tuple[str, list[str]]]:
        """Every folder from `below` on that has files, as its path relative to this one and the sorted file names.

        Hidden ones are left out; local links to folders are followed, but not in circles. Raises OSError of a local
        folder that cannot be read.
        """
        if self.local is not None:
            if os.path.isdir(self.place(below)):
                yield from _local_tree(self.url, below, frozenset())
            return
        found: dict[str, list[str]] = {}
        start = len(self._reach()[1].lstrip("/")) + 1
        infos = self.sub(below)._list(recursive=True) if below else self._list(recursive=True)
        while infos:  # emptied as it is read: a million of them are large
            info = infos.pop()
            path = info.path.lstrip("/")[start:]
            if info.type == pafs.FileType.File and not any(part.startswith(".") for part in path.split("/")):
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
        """Remove a file; it need not be there."""
        with contextlib.suppress(FileNotFoundError):
            if self.local is not None:
                os.unlink(self.place(name))
                return
            files, path = self._reach(name)
            with reaching(self.shown(name)):
                files.delete_file(path)

    def drop(self, name: str) -> None:
        """Remove the folder `name` in it with all that it holds; it need not be there."""
        files, path = self._reach(name)
        with contextlib.suppress(FileNotFoundError), reaching(self.shown(name)):
            files.delete_dir(path)

    def clear(self) -> None:
        """Remove everything below it, hidden things too, but for the mark of its owner."""
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


@contextlib.contextmanager
def _renamed_into(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _local_tree(root: str, below: str, above: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    place = os.path.join(root, below) if below else root
    real = os.path.realpath(place)
    if real in above:
        return
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(place) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    if files:
        files.sort()
        yield below, files
    del files
    for name in sorted(folders):
        yield from _local_tree(root, f"{below}/{name}" if below else name, above | {real})
