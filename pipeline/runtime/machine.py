"""What machines and other programs leave in the environment, made fit for this one: called once, when a command starts.

Only this process and what it starts see the changes.
"""

from __future__ import annotations

import contextlib
import gc
import getpass
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import SettingError

PACKAGES = Path(__file__).resolve().parents[2]  # the folder that holds `pipeline` and `wavemim`
LONGEST_SOCKET = 107  # bytes of a Unix socket's path, on Linux; 103 on macOS
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
FEWEST_FILES = 1024  # open files: a private Ray with two workers needs several hundred in its largest process


def prepare() -> None:
    """Change the environment of this process where it would break a command."""
    _use_utf8()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the terminal's encoding lacks are shown escaped
            stream.reconfigure(errors="backslashreplace")
    # Notebooks set a backend that only exists in their kernel; figures are only written to files.
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # the stages use its interface
    for name in ("no_proxy", "NO_PROXY"):  # an MLflow server or an object store on this machine
        known = [host for host in os.environ.get(name, os.environ.get("no_proxy", "")).split(",") if host]
        missing = [host for host in ("localhost", "127.0.0.1", "::1") if host not in known]
        os.environ[name] = ",".join(known + missing)
    for name in ("TMPDIR", "RAY_TMPDIR"):  # Ray takes an empty one for a folder, and is started from another folder
        folder = os.environ.pop(name, "")
        if folder:
            os.environ[name] = os.path.abspath(folder)
    if not os.environ.get("HOME") and os.path.expanduser("~") == "~":  # a user without an entry in passwd
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    _make_figures_quiet()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While the block imports libraries, nothing is collected: of their many new objects none is garbage, and looking for it
    takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def call(place: str, *arguments: Any) -> Any:
    """Call a function, MODULE:NAME, whose module is imported here: in a process that has not loaded the libraries yet."""
    module, _, name = place.partition(":")
    with importing():
        function = getattr(importlib.import_module(module), name)
    return function(*arguments)


def _use_utf8() -> None:
    """Start this command again where Python would read and write file names in another encoding than UTF-8."""
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8") or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # the same command


def _make_figures_quiet() -> None:
    """Give matplotlib a folder for its cache where the home folder cannot be written; else it warns in every process."""
    if "MPLCONFIGDIR" in os.environ:
        return
    home = Path(os.path.expanduser("~"))
    there = next((place for place in (home / ".cache", home) if place.exists()), home)
    if not _writable(there):
        os.environ["MPLCONFIGDIR"] = os.path.join(tempfile.gettempdir(), f"matplotlib-{os.getuid()}")


def ray_folder() -> str | None:
    """The folder for a private Ray's files, with its Unix sockets; None for Ray's own choice.

    Raises:
        SettingError: The temporary folder's path is too long for sockets or not a folder, and /tmp cannot be used instead.
    """
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    chosen = os.environ.get(name)
    if not chosen or (_fits(chosen) and _writable(Path(chosen))):
        return None
    if _writable(Path("/tmp")):
        return "/tmp/ray"
    raise SettingError(
        f"{name}={chosen}: Ray's sockets need a folder that can be written, with a path of at most "
        f"{LONGEST_SOCKET - len(_RAY_SOCKET)} bytes, of letters, digits, '/', '.', '_' and '-' only; set {name} to another one"
    )


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder. What the permissions say is not enough: file systems may be read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _fits(folder: str) -> bool:
    """Whether Ray's sockets fit there. Ray passes the path to its processes in commands, so it has to be plain."""
    plain = folder.isascii() and all(sign.isalnum() or sign in "/._-+=@:," for sign in folder)
    return plain and len(os.path.abspath(folder)) + len(_RAY_SOCKET) <= LONGEST_SOCKET


def check_open_files() -> None:
    """Raise SettingError where this process may open too few files for a private Ray, and may not raise the limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = hard if hard != resource.RLIM_INFINITY else FEWEST_FILES  # Ray raises the soft limit
    if max(soft, allowed) < FEWEST_FILES:
        raise SettingError(
            f"this process may open {max(soft, allowed)} files, and Ray needs {FEWEST_FILES}; raise the limit with "
            f"ulimit -n {FEWEST_FILES}"
        )
