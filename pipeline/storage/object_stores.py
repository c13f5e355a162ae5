"""Object stores behind URLs: which client, with which options, and their errors in one line."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import SettingError, StageError

# Three tries of this many seconds each: a dead endpoint fails in about 30. On Linux, the second is how long a transfer
# may stand still.
CONNECT_TIMEOUT, REQUEST_TIMEOUT, TRIES = 4, 8, 3
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
# A `?` may also be part of a glob: options are name=value to the end.
_OPTIONS = re.compile(r"\?([A-Za-z_]+=[^?&]*(?:&[A-Za-z_]+=[^?&]*)*)$")
_S3_OPTIONS = ("endpoint_override", "scheme", "region", "anonymous", "force_virtual_addressing", "tls_ca_file_path")
_SECRET = re.compile(r"key|secret|token|sig|passw|credential", re.IGNORECASE)
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|EXPIRED_?TOKEN|PERMISSION_DENIED|HTTP response code 40[13]"
    r"|forbidden|UNRECOGNIZED_CLIENT|INVALID_CLIENT_TOKEN|MISSING_AUTHENTICATION",
    re.IGNORECASE,
)


class StorageError(StageError):
    """An object store does not answer, or failed: one line. The same call may go well later."""


def is_remote(where: str) -> bool:
    """Whether `where` is a URL of something other than the local filesystem."""
    match = _URL.match(where)
    return match is not None and match[1].lower() != "file"


@dataclass(frozen=True)
class Address:
    """The parts of a URL."""

    scheme: str
    user: str  # before the @, or ""
    path: str  # BUCKET/FOLDER
    options: str  # after the ?, or ""

    @classmethod
    def of(cls, url: str) -> Address:
        """Take a URL apart. Raises SettingError."""
        match = _URL.match(url)
        if match is None:
            raise SettingError(f"'{url}' is no URL; write scheme://bucket/folder")
        rest = match[2]
        found = _OPTIONS.search(rest)
        options = found[1] if found else ""
        rest = rest[: found.start()] if found else rest
        first, slash, below = rest.partition("/")
        user, _, host = first.rpartition("@")
        path = (host + slash + re.sub("/{2,}", "/", below)).rstrip("/")
        if match[1].lower() != "memory" and not host:
            raise SettingError(f"'{masked(url)}' names no bucket; write {match[1]}://bucket/folder")
        return cls(match[1].lower(), user, path, options)

    def at(self, path: str) -> str:
        """The URL of another path in the same store."""
        user = f"{self.user}@" if self.user else ""
        return f"{self.scheme}://{user}{path}" + (f"?{self.options}" if self.options else "")


def masked(url: str) -> str:
    """`url` as it may be shown: without credentials."""
    url = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+://)([^?]*:[^?]*|[^/@]+)@", r"\1***@", url)
    found = _OPTIONS.search(url)
    if found is None or not is_remote(url):
        return url
    shown = [f"{k}=***" if _SECRET.search(k) else f"{k}={v}" for k, _, v in _pairs(found[1])]
    return url[: found.start() + 1] + "&".join(shown)


def _pairs(options: str) -> list[tuple[str, str, str]]:
    return [option.partition("=") for option in options.split("&")] if options else []


def client(address: Address) -> pafs.FileSystem:
    """The filesystem of a URL, in this process and with its present environment. Raises SettingError, StorageError."""
    # Settings of another environment or process are not to be met with an old client.
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    bucket = address.path.partition("/")[0]
    return _filesystem(address.scheme, address.user, bucket, address.options, os.getpid(), environment)


@functools.lru_cache(maxsize=16)
def _filesystem(
    scheme: str, user: str, bucket: str, options: str, process: int, environment: tuple[tuple[str, str], ...]
) -> pafs.FileSystem:
    url = Address(scheme, user, bucket, options).at(bucket)
    with reaching(masked(url)):
        if scheme == "s3":
            return _s3(url, user, bucket, {key: value for key, _, value in _pairs(options)}, dict(environment))
        try:
            if scheme in ("gs", "gcs"):
                options = "&".join(filter(None, (options, "retry_limit_seconds=15")))
            return pafs.FileSystem.from_uri(Address(scheme, user, bucket, options).at(bucket))[0]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            if "nrecognized filesystem" not in str(error) and "not built" not in str(error):
                raise SettingError(f"{masked(url)}: {_first_line(error)}") from None
        return _fsspec(scheme, url)


def _s3(url: str, user: str, bucket: str, options: dict[str, str], environment: dict[str, str]) -> pafs.FileSystem:
    for name in options:
        if name not in _S3_OPTIONS:
            raise SettingError(f"{masked(url)}: unknown option '{name}'; allowed are {', '.join(_S3_OPTIONS)}")
    key, _, secret = user.partition(":")
    # pyarrow itself looks at the environment's endpoint only where it parses the URL.
    endpoint = options.get("endpoint_override") or environment.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or environment.get("AWS_ENDPOINT_URL")
    transport = options.get("scheme")
    if endpoint and "://" in endpoint:
        named, _, endpoint = endpoint.rstrip("/").partition("://")
        transport = transport or named
    region = options.get("region")
    if not region and not endpoint:
        region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        access_key=urllib.parse.unquote(key) or None,
        secret_key=urllib.parse.unquote(secret) or None,
        anonymous=options.get("anonymous", "").lower() in ("1", "true", "yes"),
        region=region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1",
        scheme=transport or "https",
        endpoint_override=endpoint,
        force_virtual_addressing=options.get("force_virtual_addressing", "").lower() in ("1", "true", "yes"),
        tls_ca_file_path=options.get("tls_ca_file_path"),
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=REQUEST_TIMEOUT,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,  # a small file is one request
    )


def _fsspec(scheme: str, url: str) -> pafs.FileSystem:
    try:
        import fsspec

        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.core.url_to_fs(url)[0]))
    except (ImportError, ValueError) as error:
        raise SettingError(
            f"{masked(url)}: scheme '{scheme}' cannot be used ({_first_line(error)}); give a folder, or s3://…"
        ) from None


@contextlib.contextmanager
def reaching(shown: str) -> Iterator[None]:
    """What goes wrong with a store inside becomes StorageError or SettingError, about `shown` (a masked URL).

    FileNotFoundError stays what it is, and so does every error where `shown` is a local path.
    """
    try:
        yield
    except (FileNotFoundError, SettingError, StageError, MemoryError):
        raise
    except Exception as error:  # of whatever library is behind the scheme
        if not is_remote(shown):
            raise
        raise explained(shown, error) from None


def explained(shown: str, error: Exception) -> SettingError | StorageError:
    """The error of a store as one line about `shown`."""
    text = _first_line(error)
    if "NO_SUCH_BUCKET" in text or re.search(r"Bucket '.*' not found", text):
        return SettingError(f"{shown}: no such bucket")
    if isinstance(error, PermissionError) or _DENIED.search(text):
        return SettingError(f"{shown}: access denied; check the credentials, and what they may read and write")
    found = re.search(r"AWS Error (\w+) during (\w+) operation: (.*)", text)
    if found and found[1] == "NETWORK_CONNECTION":
        return StorageError(f"{shown}: the store does not answer ({found[3].rpartition('Details: ')[2]})")
    return StorageError(f"{shown}: the store failed ({f'{found[1]} in {found[2]}: {found[3]}' if found else text})")


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" ?\(Request ID: [^)]*\)", "", text)
    return re.sub(r"[^/\s']*:[^\s@']*@", "***@", text)[:300]
