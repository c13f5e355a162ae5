"""One owner per folder: local locks, and marks in object stores that are written on condition."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import SettingError, StageError
from pipeline.storage import locks
from pipeline.storage.conditional import S3Object, UnsupportedError
from pipeline.storage.folder import OWNER, Folder
from pipeline.storage.locks import owned
from pipeline.storage.object_stores import StorageError

pytest_plugins = ["s3_server"]

HOLD = """
import sys, time
from pipeline.storage.folder import Folder
from pipeline.storage.locks import owned
with owned(Folder.at(sys.argv[1]), "x"):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_local_folder_has_one_owner(tmp_path):
    folder = Folder.at(tmp_path / "set")
    words = rf"set is being written by process {os.getpid()}; wait for it or give"
    with owned(folder, "prepare"):
        with pytest.raises(StageError, match=words), owned(folder, "prepare"):
            raise AssertionError
        with pytest.raises(StageError, match=words), owned(folder, "prepare"):  # a refusal releases nothing
            raise AssertionError
    with owned(folder, "prepare"):
        pass


def test_a_local_lock_ends_with_its_process_also_when_that_is_killed(tmp_path):
    folder = Folder.at(tmp_path / "set")
    owner = subprocess.Popen([sys.executable, "-c", HOLD, folder.url], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(StageError, match=f"set is being written by process {owner.pid};"), owned(folder, "y"):
            raise AssertionError
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with owned(folder, "y"):
        assert (tmp_path / ".set.lock").read_text() == str(os.getpid())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.1)
    monkeypatch.setattr(locks, "RENEW", 0.2)


@pytest.fixture
def unconditional(monkeypatch):
    """As without boto3."""
    monkeypatch.setitem(sys.modules, "boto3", None)


def check_one_owner(folder):
    with owned(folder, "prepare"):
        words = rf"written by process {os.getpid()} \(prepare on .*\); wait for it"
        with pytest.raises(StageError, match=words) as caught, owned(folder, "other"):
            raise AssertionError
        assert "***" not in str(caught.value)
        first = folder.read(OWNER)
        time.sleep(1.7)
        assert folder.read(OWNER) != first  # renewed
        folder.write("x", b"1")
        folder.clear()
        assert folder.size(OWNER)
    assert folder.size(OWNER) is None and folder.names() == []
    assert not [name for name in folder._list(recursive=True) if ".clock" in name.path]
    with owned(folder, "again"):
        pass


def check_succession(folder, monkeypatch, caplog):
    monkeypatch.setattr(locks, "RENEW", 60)
    with owned(folder, "dead"):
        time.sleep(2.1)  # the store's clock counts whole seconds
        monkeypatch.setattr(locks, "STALE", 1)
        with owned(folder, "next"):
            mark = folder.read(OWNER)
            assert b'"next"' in mark
        folder.write(OWNER, mark)
    assert folder.read(OWNER) == mark  # another's mark is not removed
    monkeypatch.setattr(locks, "RENEW", 0.1)
    monkeypatch.setattr(locks, "STALE", 0)
    with owned(folder, "mine"):
        folder.write(OWNER, mark)
        time.sleep(0.5)
        assert folder.read(OWNER) == mark
    assert "has been taken over by process" in caplog.text


def test_a_remote_folder_has_one_owner(bucket, quick):
    check_one_owner(bucket.sub("set"))


def test_a_remote_folder_has_one_owner_without_conditional_writes(bucket, quick, unconditional):
    check_one_owner(bucket.sub("set"))


def test_a_stale_owner_is_succeeded(bucket, quick, monkeypatch, caplog):
    check_succession(bucket.sub("set"), monkeypatch, caplog)


def test_a_stale_owner_is_succeeded_without_conditional_writes(bucket, quick, unconditional, monkeypatch, caplog):
    check_succession(bucket.sub("set"), monkeypatch, caplog)


@pytest.mark.parametrize("conditional", [True, False])
def test_of_several_at_once_one_owns(bucket, quick, monkeypatch, conditional):
    monkeypatch.setattr(locks, "PAUSE", 0.0 if conditional else 0.5)  # reading back has no part in it, or decides alone
    if not conditional:
        monkeypatch.setitem(sys.modules, "boto3", None)
    folder, won, lost = bucket.sub("set"), [], []
    together = threading.Barrier(6)

    def work(name):
        together.wait()
        try:
            with owned(folder, name):
                won.append(name)
                time.sleep(2.0)
        except StageError:
            lost.append(name)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5


@pytest.mark.parametrize("stale", [None, b'{"id": "dead", "pid": 1, "renewed": 0}'])
def test_the_store_decides_between_two_that_saw_the_same(bucket, stale):
    """The interleaving that reading back cannot settle: both have looked before either writes."""
    folder = bucket.sub("set")
    if stale:
        folder.write(OWNER, stale)
    first, second = locks._Lease(folder, "first"), locks._Lease(folder, "second")
    for lease in (first, second):
        lease._open(locks._mark(folder))
    assert first._write() and not second._write()
    assert json.loads(folder.read(OWNER))["what"] == "first"
    assert first.renew() and first.renew()
    folder.remove(OWNER)
    assert (
        first.renew() and json.loads(folder.read(OWNER))["what"] == "first"
    )  # a mark that was removed is written anew
    before = first.version
    second.version = before
    assert second._write() and not first.renew()  # and never over another's
    assert json.loads(folder.read(OWNER))["what"] == "second"


def test_a_mark_that_changed_since_it_was_found_stale_is_not_replaced(bucket):
    folder = bucket.sub("set")
    folder.write(OWNER, b'{"id": "dead", "pid": 1}')
    found = locks._mark(folder)
    folder.write(OWNER, b'{"id": "faster", "pid": 2}')
    with pytest.raises(StageError, match="is being written by process 2;"):
        locks._Lease(folder, "late")._open(found)


def test_a_repeated_request_is_not_another_owner(bucket):
    folder = bucket.sub("set")
    lease = locks._Lease(folder, "mine")
    lease._open(None)
    assert lease._write()
    lease.version = None  # as if the answer to the first request had been lost
    assert lease._write() and lease.renew()


def test_a_store_that_refuses_conditional_writes_is_written_without(bucket, quick, monkeypatch):
    folder = bucket.sub("set")

    def refuse(*_, **__):
        raise UnsupportedError("NotImplemented")

    monkeypatch.setattr(S3Object, "write", refuse)
    with owned(folder, "mine"):
        assert json.loads(folder.read(OWNER))["what"] == "mine"
        with pytest.raises(StageError), owned(folder, "other"):
            raise AssertionError
    assert folder.size(OWNER) is None


def test_conditional_writes_to_an_object(bucket):
    mark = S3Object.at(bucket.sub("a b"), "ü.json")
    assert mark.read() == (None, None)
    version = mark.write(b"1", only_if=None)
    assert version and mark.write(b"2", only_if=None) is None and mark.read() == (b"1", version)
    newer = mark.write(b"3", only_if=version)
    assert newer and mark.write(b"4", only_if=version) is None and bucket.read("a b/ü.json") == b"3"
    bucket.remove("a b/ü.json")
    assert mark.write(b"5", only_if=newer) is None
    assert S3Object.at(Folder.at("memory://x"), "a") is None and S3Object.at(Folder.at("/x"), "a") is None
    with pytest.raises(SettingError, match="no such bucket"):
        S3Object(mark.client, "nobody-has-this", "a", "s3://nobody-has-this/a").write(b"", only_if=None)
    nobody = S3Object.at(bucket, "a")
    nobody.client._request_signer._credentials = None
    with pytest.raises(StorageError):
        nobody.read()
