"""What an error of MLflow means: whether it answered, and whether trying again can help."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from pipeline.tracking.store_uris import without_password


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


_INVALID = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


def answered(error: Exception) -> bool:
    """Whether the error is what the store answered, and not one of this machine, a time-out or a lost connection."""
    return not any(isinstance(link, OSError) for link in _chain(error))


def busy(error: Exception) -> bool:
    """Whether all connections of the server to its database are in use, which MLflow reports as a bad request."""
    return "QueuePool limit" in str(error)


def broken_file(error: Exception) -> bool:
    """Whether a SQLite store on this machine failed in a way that does not pass with time, as a lock of other processes does."""
    return any(isinstance(link, sqlite3.Error) and "locked" not in str(link) for link in _chain(error))


def refused(error: Exception) -> bool:
    """Whether the store answered that it rejects the data."""
    if not answered(error) or busy(error):
        return False
    code = getattr(error, "error_code", "")
    return isinstance(error, ValueError) or code not in ("", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


def invalid(error: Exception) -> bool:
    """Whether the data can never be stored; a missing permission, for example, may still be granted."""
    return isinstance(error, ValueError) or (getattr(error, "error_code", "") in _INVALID and not busy(error))


def unreachable(error: Exception) -> bool:
    """Whether there was no answer at all. An error such as a full disk on the server is an answer."""
    import requests

    none = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout)
    return any(isinstance(link, none) for link in _chain(error))


def no_connection(error: Exception) -> bool:
    """Whether there was no connection: the server is not running, or ended in the middle of an answer."""
    import requests

    late = any(isinstance(link, TimeoutError | requests.Timeout) for link in _chain(error))
    return unreachable(error) and not late


def reason(error: Exception) -> str:
    """The innermost error of the system or of SQLite, else the first line of the error itself, without a password."""
    words = [link.strerror for link in _chain(error) if isinstance(link, OSError) and link.strerror]
    words += [str(link) for link in _chain(error) if isinstance(link, sqlite3.Error)]
    text = str(words[-1] if words else error).strip()
    if "timed out" in text:  # instead of half a page about connection pools
        return "timed out"
    line = text.splitlines()[0] if text else type(error).__name__
    return without_password(line if len(line) <= 200 else line[:199] + "…")
