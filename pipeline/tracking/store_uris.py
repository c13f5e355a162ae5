"""URIs of MLflow's stores."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

_SQLITE = ("sqlite:///", "sqlite+pysqlite:///")  # how the URI of a SQLite store begins


def absolute_uri(uri: str) -> str:
    """A store URI that means the same in every working directory."""
    if uri in ("databricks", "databricks-uc", "uc"):
        return uri
    for prefix in (*_SQLITE, "file://", "file:"):
        rest = uri.removeprefix(prefix)
        if rest != uri:
            place, mark, query = rest.partition("?")
            in_memory = prefix in _SQLITE and place in ("", ":memory:")
            return uri if in_memory else f"{prefix}{os.path.abspath(os.path.expanduser(place))}{mark}{query}"
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores, and for one in memory."""
    prefix = next((prefix for prefix in _SQLITE if uri.startswith(prefix)), None)
    place = urllib.parse.unquote(uri[len(prefix) :].partition("?")[0]) if prefix else ""
    return Path(place) if place not in ("", ":memory:") else None


def sqlite_uri(path: Path) -> str:
    """The URI of a SQLite store.

    Only what SQLAlchemy would misread is encoded. With the driver in the URI, MLflow does not create the parent of the
    encoded path.
    """
    encoded = re.sub("[%?#]", lambda found: urllib.parse.quote(found[0]), str(path))
    return (_SQLITE[0] if encoded == str(path) else _SQLITE[1]) + encoded


def artifacts_beside(path: Path | None) -> str | None:
    """Where the artifacts of a SQLite store lie: a path, or a URI where MLflow would misread the path."""
    place = path.parent.absolute() / "mlartifacts" if path else None
    return (place.as_uri() if re.search("[%?#]", str(place)) else str(place)) if place else None


def without_password(uri: str) -> str:
    """The URI, or a text with URIs, as it may be shown and stored, with passwords masked."""
    text = re.sub(r"(://[^/@:\s]*):(?!\d+(?:[/?\s]|$))[^\s'\"]*@", r"\1:***@", uri)
    return re.sub(
        r"(?i)([?&;][^=&;\s]*(?:secret|token|passw|pwd|key|sig|credential)[^=&;\s]*=)[^&;\s'\"]+", r"\1***", text
    )
