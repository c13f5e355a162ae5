"""URIs of MLflow's stores."""

from __future__ import annotations

import importlib.metadata
import os
import re
import urllib.parse
from pathlib import Path

from pipeline.errors import SettingError

_SCHEMES = {"http", "https", "file", "databricks", "databricks-uc", "uc", "sqlite", "postgresql", "mysql", "mssql"}
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


def check_uri(uri: str) -> None:
    """Raise SettingError where MLflow has no store of this kind. `uri` is absolute."""
    scheme, mark, _ = uri.partition("://")
    if mark:
        plugins = [plugin.name for plugin in importlib.metadata.entry_points(group="mlflow.tracking_store")]
        known = scheme.partition("+")[0] in _SCHEMES or scheme in plugins
    else:
        known = not os.path.isfile(uri)
    if not known:
        raise SettingError(
            f"tracking.uri={without_password(uri)}: MLflow has no such store; give http://HOST:PORT of a server, "
            "sqlite:///FILE.db or a folder, or leave it out"
        )


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
