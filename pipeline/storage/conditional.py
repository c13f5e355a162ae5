"""Conditional writes to S3: an object is created only if there is none, or replaced only while nobody has changed it.

The store compares and writes in one step (``If-None-Match`` and ``If-Match`` of PutObject), so of several processes that
write at the same moment exactly one succeeds. pyarrow's client does not offer this; it is done by boto3, where that is
installed (``pip install wavemim[s3]``). Some stores that speak S3 refuse such requests, and older ones ignore the condition.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import CONNECT_TIMEOUT, REQUEST_TIMEOUT, TRIES, Address, S3Options, reaching

log = logging.getLogger(__name__)

_REFUSED = (409, 412)  # another write at this moment; the condition does not hold
_UNSUPPORTED = (400, 405, 501)
_MISSING = "NoSuchKey"


class UnsupportedError(Exception):
    """The store does not take conditional writes."""


@dataclass(frozen=True)
class S3Object:
    """One object of an S3 store, whose versions are its ETags."""

    client: Any  # boto3's
    bucket: str
    key: str
    shown: str  # its URL without credentials

    @classmethod
    def at(cls, folder: Folder, name: str) -> S3Object | None:
        """The object `name` in a folder; None where the folder is not in S3, or boto3 is missing or not usable."""
        if folder.local is not None or (address := Address.of(folder.place(name))).scheme != "s3":
            return None
        try:
            import boto3
            import botocore
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError:
            return None
        options = S3Options.of(address)
        signed = {} if not options.anonymous else {"signature_version": botocore.UNSIGNED}
        style = "virtual" if options.virtual or not options.endpoint else "path"
        try:
            client = boto3.client(
                "s3",
                aws_access_key_id=options.key,
                aws_secret_access_key=options.secret,
                region_name=options.region,
                endpoint_url=f"{options.transport}://{options.endpoint}" if options.endpoint else None,
                verify=options.certificates,
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT,
                    read_timeout=REQUEST_TIMEOUT,
                    retries={"max_attempts": TRIES, "mode": "standard"},
                    s3={"addressing_style": style},
                    **signed,
                ),
            )
        except (BotoCoreError, ValueError) as error:
            log.debug("%s: no conditional writes: %s", folder, error)
            return None
        bucket, _, key = address.path.partition("/")
        return cls(client, bucket, key, folder.shown(name))

    def read(self) -> tuple[bytes | None, str | None]:
        """Content and version of the object; (None, None) if there is none. Raises StorageError, SettingError."""
        from botocore.exceptions import ClientError

        with reaching(self.shown):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.key)
                return answer["Body"].read(), str(answer["ETag"])
            except ClientError as error:
                if error.response["Error"].get("Code") != _MISSING:
                    raise
                return None, None

    def write(self, content: bytes, *, only_if: str | None) -> str | None:
        """Write the object if it is still as it was read.

        Args:
            content: What to write.
            only_if: The version that it must have; None if there must be none.

        Returns:
            The new version; None if the condition does not hold, so that nothing was written.

        Raises:
            UnsupportedError: The store does not take conditional writes.
            StorageError: It does not answer, or failed.
            SettingError: It denies access.
        """
        from botocore.exceptions import ClientError, ParamValidationError

        condition = {"IfNoneMatch": "*"} if only_if is None else {"IfMatch": only_if}
        with reaching(self.shown):
            try:
                return str(self.client.put_object(Bucket=self.bucket, Key=self.key, Body=content, **condition)["ETag"])
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status in _REFUSED or error.response["Error"].get("Code") == _MISSING:
                    return None
                if status not in _UNSUPPORTED:
                    raise
                reason = str(error)
            except ParamValidationError as error:  # a boto3 from before conditional writes
                reason = str(error)
        raise UnsupportedError(reason)
