"""An S3 server on this machine, which pyarrow's own S3 client talks to."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator

import pyarrow.fs as pafs
import pytest

from pipeline.storage.folder import Folder

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint (HOST:PORT) of a server that forgets everything at the end; credentials are in the environment."""
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    before = {name: os.environ.get(name) for name in KEYS}
    server.start()
    os.environ.update(KEYS)
    try:
        host, port = server.get_host_and_port()
        yield f"{host}:{port}"
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def new_bucket(endpoint: str) -> Folder:
    """An empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    files = pafs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    files.create_dir(name)
    return Folder.at(f"s3://{name}?endpoint_override={endpoint}&scheme=http")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of a server for the tests of a file."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str) -> Folder:
    """An empty bucket for a test."""
    return new_bucket(s3)
