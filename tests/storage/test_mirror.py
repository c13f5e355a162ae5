"""The local copy of a folder in a store: what arrives there, what another machine gets, and failures of the store."""

import json
import logging
import time

import pytest
from faulty_proxy import faulty_proxy

from pipeline.checkpoints import uploader
from pipeline.checkpoints.find import COPIED
from pipeline.errors import SettingError, StageError
from pipeline.runtime import usage
from pipeline.runtime.stage_folder import stage_folder
from pipeline.stages import segment
from pipeline.storage import locks, mirror, object_stores
from pipeline.storage.folder import OWNER, Folder
from pipeline.storage.mirror import WRITER, Mirror, mirrored
from pipeline.tracking import journal
from pipeline.workers import heartbeat, relay

pytest_plugins = ["s3_server"]

LARGE = bytes(range(256)) * 1000  # is sent in several pieces


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.05)
    monkeypatch.setattr(locks, "RENEW", 0.2)
    monkeypatch.setattr(locks, "STALE", 2.0)
    monkeypatch.setattr(locks, "_LOOK", 0.3)


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def contents(folder):
    found = {}
    for below, names in Folder.at(folder).tree(hidden=True):
        for name in names:
            path = f"{below}/{name}" if below else name
            if name not in (WRITER, OWNER):
                found[path] = Folder.at(folder).read(path).decode()
    return found


def opened(home, local):
    copy = Mirror(home, local, left_out=COPIED)
    copy.pull()
    return copy


def test_another_machine_gets_everything_and_the_first_one_then_what_that_has_changed(bucket, tmp_path):
    home, here, there = bucket.sub("runs/a/pretrain"), tmp_path / "here", tmp_path / "there"
    copy = opened(home, here)
    write(here, settings_json="1", metrics="a\n", figures__one="picture", blow__two="x")
    (here / ".mlflow-outbox.jsonl").write_text("hidden\n")
    files = contents(here)
    # What belongs to this machine, or is copied by others, is not sent.
    write(here, best_json="{}")
    for name in (".beats/rank-0.json", "images-000000000010/state.json", ".ray/x", "figures/.one.abc.partial", ".stop"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("-")
    assert copy.push() == sum(map(len, files.values()))
    assert contents(home.url) == files and len(files) == 5
    assert copy.push() == 0

    other = opened(home, there)
    assert contents(there) == files
    write(there, metrics="a\nb\n", new="1")
    (there / "figures/one").unlink()
    other.push()
    write(here, metrics="never seen by others", stale="1")
    copy = opened(home, here)  # the other machine was the last to write
    assert contents(here) == contents(there) == contents(home.url)
    assert not (here / "images-000000000010").exists()


def test_files_of_one_machine_are_recognised_by_the_names_that_their_owners_gave_them(tmp_path):
    copy = Mirror(Folder.at("memory://names"), tmp_path)
    stay = [WRITER, OWNER, heartbeat.FOLDER, relay.STOP, usage._OTHERS, journal.LOCK, uploader._LEASE, segment.TOKENS]
    go = [journal.METRICS, journal.OUTBOX, journal.SENT, usage._TASKS, "images-000000000010", f"checkpoints/{OWNER}"]
    write(tmp_path, **dict.fromkeys([f"{name}/inside" if "." not in name[1:] else name for name in [*stay, *go]], "-"))
    assert {name.removesuffix("/inside") for name, _ in copy._files()} == set(go)


def test_the_machine_that_wrote_last_keeps_what_it_could_not_send(bucket, tmp_path):
    home, here = bucket.sub("runs/a/tune"), tmp_path / "here"
    copy = opened(home, here)
    write(here, ledger="1\n", result_json="old", lost="1")
    copy.push()
    write(here, ledger="1\n2\n")
    (here / "result.json").unlink()
    (here / "lost").unlink()
    copy = opened(home, here)  # after a kill
    assert contents(here) == {"ledger": "1\n2\n", "lost": "1"}  # a deleted cache deletes nothing in the store
    copy.push()
    assert contents(home.url) == contents(here)  # but what was finished no longer is
    (here / "lost").unlink()
    copy.push()
    assert contents(home.url) == {"ledger": "1\n2\n"}
    copy.clear()
    assert contents(home.url) == {}
    copy.push()
    assert contents(home.url) == {"ledger": "1\n2\n"}


def test_a_file_that_speaks_of_others_is_sent_last_and_as_it_was_before_them(bucket, tmp_path, monkeypatch):
    home, here, order, send = bucket.sub("runs/a/pretrain"), tmp_path / "here", [], Folder.write
    copy = opened(home, here)
    write(here, result_json="done", zz="1", checkpoints__c__state_json="s", checkpoints__c__weights="w")
    (here / "metrics.jsonl").write_text("1\n")
    (here / ".mlflow-sent.json").write_text("sent 1")

    def growing(folder, name, content):
        if name == "metrics.jsonl":  # logged and sent to MLflow while files are copied
            (here / "metrics.jsonl").write_text("1\n2\n")
            (here / ".mlflow-sent.json").write_text("sent 2")
        order.append(name)
        send(folder, name, content)

    monkeypatch.setattr(Folder, "write", growing)
    copy.push()
    sent = [name for name in order if name != WRITER]
    assert set(sent[-2:]) == {"result.json", ".mlflow-sent.json"}
    assert sent.index("checkpoints/c/state.json") > sent.index("checkpoints/c/weights")
    assert home.read(".mlflow-sent.json") == b"sent 1"  # never of lines that the store lacks
    copy.push()
    assert contents(home.url) == contents(here)

    def full(folder, name, content):
        if name == "zz":
            raise object_stores.StorageError("the store failed")
        send(folder, name, content)

    monkeypatch.setattr(Folder, "write", full)
    write(here, result_json="done again", zz="2")
    with pytest.raises(StageError):
        copy.push()
    assert home.read("result.json") == b"done"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", "the store failed"),
        ("cut", "the store does not answer"),
        ("silent", "the store does not answer"),
        ("expired", "access denied; check the credentials"),
    ],
)
def test_a_failing_store_ends_nothing_and_gets_everything_later(
    s3, bucket, tmp_path, monkeypatch, caplog, fault, words
):
    monkeypatch.setattr(object_stores, "REQUEST_TIMEOUT", 1)
    monkeypatch.setattr(object_stores, "CONNECT_TIMEOUT", 1)
    monkeypatch.setattr(object_stores, "TRIES", 1)
    with faulty_proxy(s3) as proxy:
        home = Folder.at(f"{bucket.url.partition('?')[0]}/runs/a?endpoint_override={proxy.endpoint}&scheme=http")
        copy = opened(home, tmp_path)
        write(tmp_path, metrics="1\n", large="old")
        copy.attempt()
        (tmp_path / "large").write_bytes(LARGE)
        write(tmp_path, metrics="1\n2\n", result_json="done")
        copy.wake()
        proxy.fault = fault
        with caplog.at_level(logging.WARNING):
            copy.attempt()
            copy.wake()
            copy.attempt()  # not again at once, though it was woken
        assert proxy.faults >= 1
        (line,) = [record.getMessage() for record in caplog.records]
        assert words in line and "the stage continues" in line and str(tmp_path) in line
        monkeypatch.setattr(mirror, "RETRIES", (0.01,))
        if fault == "silent":  # takes seconds: one more is not tried
            proxy.fault = "503"
        with pytest.raises(
            StageError, match=rf"not all files of {home.url.partition('?')[0]}.*the same command copies them"
        ):
            copy.finish()
        proxy.fault = ""
        assert home.read("large") == b"old" and home.kind("result.json") is None  # nothing half, no mark of the end
        copy.finish()
    assert bucket.read("runs/a/large") == LARGE and bucket.read("runs/a/result.json") == b"done"
    assert bucket.read("runs/a/metrics") == b"1\n2\n"


def test_a_stage_in_a_store_has_one_owner_and_another_machine_goes_on(bucket, tmp_path):
    def stage(machine, **more):
        local = tmp_path / machine / "runs/a/evaluate"
        return stage_folder(local, {"seed": more.pop("seed", 0)}, home=bucket.sub("runs/a/evaluate").url, **more)

    with stage("one") as folder:
        (folder.path / "part").write_text("half")
        began = time.monotonic()
        with pytest.raises(StageError, match="is being written by another run; wait for it"), stage("two"):
            raise AssertionError
        assert time.monotonic() - began < locks.STALE  # its owner was seen to renew its mark
    with pytest.raises(SettingError, match="the work of other settings"), stage("two", seed=1):
        raise AssertionError
    with stage("two") as folder:
        assert folder.state == "unfinished" and (folder.path / "part").read_text() == "half"
        folder.finish({"measured": 1})
    with stage("one") as folder:
        assert folder.finished and folder.result() == {"measured": 1}
    bucket.write("runs/a/evaluate/images-000000000010/state.json", b"of the earlier one")
    with stage("three", restart=True) as folder:
        assert folder.state == "new"
    assert set(contents(bucket.sub("runs/a/evaluate").url)) == {"settings.json"}


def test_a_run_that_lost_its_folder_writes_nothing_there(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "RETRIES", ())
    home = bucket.sub("runs/a/tune")

    def lose(copy):
        home.write(OWNER, json.dumps({"id": "another"}).encode())
        write(copy.local, ledger="mine")
        copy.attempt()

    with pytest.raises(StageError, match="taken over by another run"), mirrored(home, tmp_path / "here") as copy:
        lose(copy)
    assert contents(home.url) == {}
