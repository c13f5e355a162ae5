"""The door to local folders and object stores: what is read, written, listed, owned, and what goes wrong."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import SettingError, StageError
from pipeline.storage import folder as storage
from pipeline.storage import locks
from pipeline.storage.folder import OWNER, Folder
from pipeline.storage.locks import owned
from pipeline.storage.object_stores import Address, StorageError, explained, is_remote, masked

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


# Ownership


def test_a_local_folder_has_one_owner(tmp_path):
    folder = Folder.at(tmp_path / "set")
    words = rf"set is being written by process {os.getpid()}; wait for it or give"
    with owned(folder, "prepare"), pytest.raises(StageError, match=words), owned(folder, "prepare"):
        raise AssertionError
    code = "import sys; from pipeline.storage.folder import Folder\nfrom pipeline.storage.locks import owned\nwith owned(Folder.at(sys.argv[1]), 'x'): print('mine')"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True)
    assert found.stdout == "mine\n"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.1)
    monkeypatch.setattr(locks, "RENEW", 0.2)


def test_a_remote_folder_has_one_owner(bucket, quick):
    folder = bucket.sub("set")
    with owned(folder, "prepare"):
        with (
            pytest.raises(
                StageError, match=rf"written by process {os.getpid()} \(prepare on .*\); wait for it"
            ) as caught,
            owned(folder, "other"),
        ):
            raise AssertionError
        assert "***" not in str(caught.value)
        first = folder.read(OWNER)
        time.sleep(1.7)
        assert folder.read(OWNER) != first  # renewed
        folder.write("x", b"1")
        folder.clear()
        assert folder.size(OWNER)
    assert folder.size(OWNER) is None and folder.sub("").names() == []
    assert not [name for name in bucket.sub("set")._list(recursive=True) if ".clock" in name.path]
    with owned(folder, "again"):
        pass


def test_a_stale_owner_is_succeeded(bucket, quick, monkeypatch, caplog):
    folder = bucket.sub("set")
    monkeypatch.setattr(locks, "RENEW", 60)
    with owned(folder, "dead"):
        time.sleep(2.1)  # the store's clock counts whole seconds
        monkeypatch.setattr(locks, "STALE", 1)
        with owned(folder, "next"):
            mark = folder.read(OWNER)
            assert b'"next"' in mark
        folder.write(OWNER, mark)
    assert folder.read(OWNER) == mark  # another's is left alone
    monkeypatch.setattr(locks, "RENEW", 0.1)
    monkeypatch.setattr(locks, "STALE", 0)
    with owned(folder, "mine"):
        folder.write(OWNER, mark)
        time.sleep(0.5)
        assert folder.read(OWNER) == mark
    assert "has been taken over by process" in caplog.text


def test_of_two_at_once_one_owns(bucket, quick, monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.5)
    folder, won, lost = bucket.sub("set"), [], []
    together = threading.Barrier(4)

    def work(name):
        together.wait()
        try:
            with owned(folder, name):
                won.append(name)
                time.sleep(1.5)
        except StageError:
            lost.append(name)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 3


def test_arrow_errors_of_local_files_stay_what_they_are(tmp_path):
    with pytest.raises(pa.ArrowInvalid), storage.reaching(str(tmp_path)):
        raise pa.ArrowInvalid("x")
