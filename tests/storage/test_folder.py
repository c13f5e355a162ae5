"""The door to local folders and object stores: what is read, written, listed, owned, and what goes wrong."""

import os
import pickle
import socket
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import SettingError
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, StorageError, explained, is_remote, masked, reaching

pytest_plugins = ["s3_server"]


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request, tmp_path):
    """A folder that is not there yet."""
    if request.param == "local":
        return Folder.at(tmp_path / "new folder")
    if request.param == "memory":
        return Folder.at(f"memory://test-{time.monotonic_ns()}/new folder")
    return request.getfixturevalue("bucket").sub("new folder")


def test_files_come_back(folder, tmp_path):
    assert folder.names() == [] and list(folder.walk()) == [] and folder.kind() is None and folder.size("a") is None
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    content = {"a.json": b"one", "deep/er/b c%20é#.bin": bytes(range(256)), "empty": b"", ".hidden": b"h", ".x/y": b"h"}
    for name, value in content.items():
        folder.write(name, b"old")
        folder.write(name, value)
        assert folder.read(name) == value and folder.size(name) == len(value)
    assert folder.names() == ["a.json", "empty"]
    assert folder.sizes() == {"a.json": 3, "empty": 0}
    assert sorted(folder.walk()) == ["a.json", "deep/er/b c%20é#.bin", "empty"]
    assert list(folder.sub("deep").walk()) == ["er/b c%20é#.bin"]
    assert folder.kind() == "folder" and folder.kind("deep/er") == "folder" and folder.kind("a.json") == "file"
    with folder.open("deep/er/b c%20é#.bin") as file:
        assert file.size() == 256 and file.read_at(3, 100) == bytes([100, 101, 102])
    again = pickle.loads(pickle.dumps(folder.sub("deep")))  # noqa: S301
    assert again.size("er/b c%20é#.bin") == 256
    (tmp_path / "made").write_bytes(b"x" * 100_000)
    folder.put(tmp_path / "made", "put/here")
    assert folder.size("put/here") == 100_000 and not (tmp_path / "made").exists()
    folder.remove("a.json")
    folder.remove("a.json")
    assert folder.names() == ["empty"]
    folder.clear()
    assert list(folder.walk()) == [] and folder.size(".x/y") is None and folder.size(".hidden") is None
    folder.clear()


def test_nothing_half_written_is_seen(tmp_path, monkeypatch):
    folder = Folder.at(tmp_path)
    folder.write("a", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_local_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert list(Folder.at(tmp_path).walk()) == ["a/1", "b/1"]


def test_urls_keep_their_options_and_hide_their_credentials():
    url = "s3://KEY:SE%2FCRET@bucket/a?endpoint_override=127.0.0.1:9&scheme=http"
    folder = Folder.at(url).sub("b/c")
    assert folder.url == "s3://KEY:SE%2FCRET@bucket/a/b/c?endpoint_override=127.0.0.1:9&scheme=http"
    assert "CRET" not in f"{folder} {folder!r} {folder.shown('x')} {masked(url)}" and "bucket/a/b/c" in str(folder)
    assert Address.of("s3://b/train-?.tar").path == "b/train-?.tar"
    assert Address.of("s3://b/?.tar?region=x").options == "region=x"
    assert is_remote("s3://b") and not is_remote("/a/b") and not is_remote("file:///a") and not is_remote("C:\\a")
    assert Folder.at("file:///a/b").url == "/a/b" and Folder.at("x").local == Path("x").absolute()


def test_mistakes_in_urls_are_one_line(s3, bucket, monkeypatch):
    def line(url):
        with pytest.raises(SettingError) as caught:
            Folder.at(url).names()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "scheme 's4' cannot be used" in line("s4://KEY:SECRET@bucket/x") and "SECRET" not in line(
        "s4://KEY:SECRET@b/x"
    )
    assert "no such bucket" in line(f"s3://no-bucket/x?endpoint_override={s3}&scheme=http")
    assert "unknown option 'endpoint'" in line("s3://bucket/x?endpoint=a")
    assert "names no bucket" in line("s3://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    plain = Folder.at(f"s3://{Address.of(bucket.url).path}")
    plain.write("a", b"1")
    assert bucket.names() == ["a"]


def test_access_denied_is_a_mistake_in_the_settings():
    text = "AWS Error ACCESS_DENIED during HeadObject operation: No response body."
    assert "access denied" in str(_explained(OSError(text)))
    assert isinstance(_explained(OSError(text)), SettingError)
    assert isinstance(_explained(OSError("AWS Error INTERNAL_FAILURE during GetObject operation: x")), StorageError)


def _explained(error):
    return explained("s3://bucket/x", error)


def test_a_dead_endpoint_fails_soon():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # nothing answers: not even listening
        port = listening.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"^s3://\*\*\*@bucket/x\?\S+: the store does not answer \("):
            Folder.at(f"s3://K:S@bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http").names()
        assert time.monotonic() - began < 15


def test_a_silent_endpoint_fails_in_half_a_minute(monkeypatch):
    from pipeline.storage import object_stores as stores

    monkeypatch.setattr(stores, "REQUEST_TIMEOUT", 2)
    stores._filesystem.cache_clear()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        began = time.monotonic()
        with pytest.raises(StorageError, match="does not answer"):
            Folder.at(f"s3://K:S@bucket/x?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http").read("a")
        assert time.monotonic() - began < 20
    stores._filesystem.cache_clear()


def test_arrow_errors_of_local_files_stay_what_they_are(tmp_path):
    with pytest.raises(pa.ArrowInvalid), reaching(str(tmp_path)):
        raise pa.ArrowInvalid("x")
