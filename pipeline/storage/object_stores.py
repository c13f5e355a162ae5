"""Object stores behind URLs: the client, its options, and its errors in one line."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import SettingError, StageError

# Three attempts of so many seconds each, so that a dead endpoint fails within about 30. On Linux, the second is for how
# long a transfer may stall.
CONNECT_TIMEOUT, REQUEST_TIMEOUT, TRIES = 4, 8, 3
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
# A `?` may also belong to a glob: options are name=value up to the end.
_OPTIONS = re.compile(r"\?([A-Za-z_]+=[^?&]*(?:&[A-Za-z_]+=[^?&]*)*)$")
_NATIVE = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")  # schemes of pyarrow itself
_S3_OPTIONS = ("endpoint_override", "scheme", "region", "anonymous", "force_virtual_addressing", "tls_ca_file_path")
_SECRET = re.compile(r"key|secret|token|sig|passw|credential", re.IGNORECASE)
_DENIED = re.compile(
    r"ACCESS_?DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|EXPIRED_?TOKEN|PERMISSION_DENIED|HTTP response code 40[13]"
    r"|forbidden|UNRECOGNIZED_CLIENT|INVALID_CLIENT_TOKEN|MISSING_AUTHENTICATION",
    re.IGNORECASE,
)


class StorageError(StageError):
    """An object store does not answer, or failed: one line. The same call may succeed later."""


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
        """Parse a URL. Raises SettingError if it is malformed."""
        match = _URL.match(url)
        if match is None:
            raise SettingError(f"'{url}' is not a URL; write scheme://bucket/folder")
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
    """`url` as it may be shown, with credentials masked."""
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
    # One that was made in another process or with other settings in the environment must not be used again.
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    bucket = address.path.partition("/")[0]
    return _filesystem(replace(address, path=bucket), os.getpid(), environment)


@functools.lru_cache(maxsize=16)
def _filesystem(address: Address, process: int, environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """The filesystem of a bucket; `process` and `environment` only tell the cached ones apart."""
    url = address.at(address.path)
    with reaching(masked(url)):
        if address.scheme == "s3":
            return _s3(address)
        try:
            if address.scheme in ("gs", "gcs"):
                options = "&".join(filter(None, (address.options, "retry_limit_seconds=15")))
                return pafs.FileSystem.from_uri(replace(address, options=options).at(address.path))[0]
            return pafs.FileSystem.from_uri(url)[0]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            if "nrecognized filesystem" not in str(error) and "not built" not in str(error):
                raise SettingError(f"{masked(url)}: {_first_line(error)}") from None
        return _fsspec(address.scheme, url)


@dataclass(frozen=True)
class S3Options:
    """How to reach an S3 store: what a URL and the environment say together."""

    key: str | None  # None: the usual places for credentials are searched
    secret: str | None
    anonymous: bool
    endpoint: str | None  # HOST:PORT; None: AWS itself
    transport: str  # "https" or "http"
    region: str
    virtual: bool  # whether the bucket is part of the host name also at an endpoint of one's own
    certificates: str | None  # file with those that are trusted; None: those of the system

    @classmethod
    def of(cls, address: Address) -> S3Options:
        """The options of a URL in this process's environment. Raises SettingError for an unknown one."""
        options = {key: value for key, _, value in _pairs(address.options)}
        for name in options:
            if name not in _S3_OPTIONS:
                url = masked(address.at(address.path))
                raise SettingError(f"{url}: unknown option '{name}'; allowed are {', '.join(_S3_OPTIONS)}")
        key, _, secret = address.user.partition(":")
        # pyarrow itself looks at the environment's endpoint only where it parses the URL.
        endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
        transport = options.get("scheme")
        if endpoint and "://" in endpoint:
            named, _, endpoint = endpoint.rstrip("/").partition("://")
            transport = transport or named
        region = options.get("region")
        if not region and not endpoint:
            region = pafs.resolve_s3_region(address.path.partition("/")[0])
        return cls(
            key=urllib.parse.unquote(key) or None,
            secret=urllib.parse.unquote(secret) or None,
            anonymous=_is_true(options.get("anonymous", "")),
            endpoint=endpoint,
            transport=transport or "https",
            region=region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            virtual=_is_true(options.get("force_virtual_addressing", "")),
            certificates=options.get("tls_ca_file_path"),
        )


def _is_true(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def _s3(address: Address) -> pafs.FileSystem:
    options = S3Options.of(address)
    return pafs.S3FileSystem(
        access_key=options.key,
        secret_key=options.secret,
        anonymous=options.anonymous,
        region=options.region,
        scheme=options.transport,
        endpoint_override=options.endpoint,
        force_virtual_addressing=options.virtual,
        tls_ca_file_path=options.certificates,
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=REQUEST_TIMEOUT,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,  # a small file is one request
    )


def check_scheme(url: str) -> None:
    """Raise SettingError where no store can be reached by such a URL; nothing is connected."""
    address = Address.of(url)
    if address.scheme not in _NATIVE:
        with _usable(address.scheme, url):
            import fsspec

            fsspec.get_filesystem_class(address.scheme)


def _fsspec(scheme: str, url: str) -> pafs.FileSystem:
    with _usable(scheme, url):
        import fsspec

        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.core.url_to_fs(url)[0]))


@contextlib.contextmanager
def _usable(scheme: str, url: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, ValueError) as error:
        raise SettingError(
            f"{masked(url)}: scheme '{scheme}' cannot be used ({_first_line(error)}); give a folder, or s3://…"
        ) from None


@contextlib.contextmanager
def reaching(shown: str) -> Iterator[None]:
    """Turn a store's errors in the block into StorageError or SettingError, about `shown` (a masked URL).

    A FileNotFoundError passes unchanged, and so do all errors if `shown` is a local path.
    """
    try:
        yield
    except (FileNotFoundError, SettingError, StageError, MemoryError):
        raise
    except Exception as error:  # of the library behind the scheme
        if not is_remote(shown):
            raise
        raise explained(shown, error) from None


def explained(shown: str, error: Exception) -> SettingError | StorageError:
    """The error of a store as one line about `shown`."""
    text = _first_line(error)
    if re.search(r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found", text):
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
