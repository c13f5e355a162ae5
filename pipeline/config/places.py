"""Places that people give: paths and URLs in settings, recipes and the arguments of tools.

Every command passes what it was given through `local_place` and `check_place`, so that a place either works everywhere or
is refused before anything starts.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from pathlib import Path

from pipeline.errors import SettingError

LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, on Linux
_ROOM = 300  # bytes that files in a place may add to its path
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
CACHE = "WAVEMIM_CACHE"  # environment variable: where this machine keeps copies of out folders in object stores


def local_place(place: str) -> str:
    """The path of a ``file://`` URL, percent-decoded, or of one in the home folder (``~/…``); anything else as it is.

    Raises:
        SettingError: The URL names another machine.
    """
    if place == "~" or place.startswith("~/"):  # no shell has expanded it: in a recipe, or in quotes
        return os.path.expanduser(place)
    if re.match("file:/(?!/)", place, re.IGNORECASE):  # as Java writes it
        place = f"file://{place[5:]}"
    if place[:7].lower() != "file://":
        return place
    host, slash, path = place[7:].partition("/")
    if host not in ("", "localhost"):
        raise SettingError(f"'{printable(place)}' names the machine '{host}'; a local file is file:///PATH")
    return urllib.parse.unquote(slash + path, errors="surrogateescape")


def is_url(place: str) -> bool:
    """Whether a place, whose ``file://`` is decoded, is in an object store."""
    return _URL.match(place) is not None


def below(place: str, name: str) -> str:
    """The path or URL of `name` in a folder; the options of a URL stay at its end."""
    if not is_url(place):
        return str(Path(place) / name)
    folder, mark, options = place.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def cache_of(url: str) -> Path:
    """Where this machine keeps its copy of a folder in an object store; it may be deleted while nothing uses it."""
    folder, _, options = url.partition("?")
    root = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "wavemim")
    words = re.sub("[^A-Za-z0-9._-]+", "-", folder.partition("://")[2]).strip("-._")[-80:]
    digest = hashlib.sha256(f"{folder.rstrip('/')}?{options}".encode()).hexdigest()[:12]
    return Path(root).expanduser().absolute() / f"{words}-{digest}"


def check_text(what: str, text: str) -> None:
    """Raise SettingError where a text cannot be stored or shown in one line.

    Args:
        what: What the message begins with, such as ``out=…``; it may contain the text.
        text: The text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingError(f"{printable(what)}: not valid UTF-8; rename it, or give a link with another name") from None
    if found := re.search(r"[\x00-\x1f\x7f]", text):
        raise SettingError(f"{printable(what)}: contains the control character {found[0]!r}; rename it")


def check_place(what: str, place: str) -> None:
    """Raise SettingError where no file system has such a place, or a name could not be stored and shown.

    Args:
        what: What the message begins with, such as ``out=…``.
        place: A path or URL.
    """
    check_text(what, place)
    check_length(what, place)


def check_length(what: str, place: str) -> None:
    """Raise SettingError where a path, or a name in it, is longer than file systems allow."""
    if is_url(place):
        return
    longest = max((len(os.fsencode(part)) for part in place.split("/")), default=0)
    if longest > LONGEST_NAME:
        raise SettingError(
            f"{_shortened(what)}: a name of {longest} bytes is longer than file systems allow, {LONGEST_NAME}; "
            "use a shorter one"
        )
    length = len(os.fsencode(place if os.path.isabs(place) else os.path.join(os.getcwd(), place)))
    if length > LONGEST_PATH - _ROOM:
        raise SettingError(
            f"{_shortened(what)}: a path of {length} bytes leaves no room for the files in it, "
            f"{LONGEST_PATH} are allowed; use a shorter one"
        )


def printable(text: str) -> str:
    """A text as it may be printed and stored: bytes that are not UTF-8 as ``\\xNN``, control characters escaped."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: ascii(found[0])[1:-1], text)


def _shortened(what: str) -> str:
    what = printable(what)
    return what if len(what) <= 80 else f"{what[:60]}…{what[-16:]}"
