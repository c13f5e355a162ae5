"""What a worker on another node writes, as it arrives in the stage's folder on the driver's node; the transport is replaced."""

import json
import logging
import os
import subprocess
import sys

import pytest
import ray

from pipeline.config.places import CACHE
from pipeline.runtime.usage import Spent
from pipeline.storage.folder import Folder
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.workers import relay
from pipeline.workers.heartbeat import FOLDER, Heartbeat
from pipeline.workers.log_forwarding import FILE, passing_on
from pipeline.workers.relay import STOP, Receiver, _Sending
from pipeline.workers.unreadable import NOTE


class Actor:
    """Calls the receiver where Ray would; may lose the answer."""

    def __init__(self, receiver):
        self.receiver, self.loses = receiver, False
        self.take = self.copy_journal = self

    def remote(self, *arguments):
        answer = (self.receiver.take if len(arguments) == 3 else self.receiver.copy_journal)(*arguments)
        return ray.exceptions.GetTimeoutError("lost") if self.loses else answer


@pytest.fixture
def both(tmp_path, monkeypatch):
    def get(answer, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(relay.ray, "get", get)
    stage, own = tmp_path / "stage", tmp_path / "own"
    stage.mkdir()
    own.mkdir()
    actor = Actor(Receiver(stage))
    return stage, own, actor, _Sending(own, actor)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_arrive_once_also_where_an_answer_was_lost(both, caplog):
    stage, own, actor, sending = both
    driver, worker = (Tracker.attach(RunHandle("", "", str(folder / "metrics.jsonl"))) for folder in (stage, own))
    driver.log({"a": 1}, 0)
    worker.log({"a": 1}, 1)
    with (own / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "half')
    assert sending.send() and steps(stage) == [0, 1]
    with (own / "metrics.jsonl").open("a") as file:
        file.write('": 1}\n')
    actor.loses = True
    with caplog.at_level(logging.WARNING):
        assert not sending.send() and not sending.send()
    assert len(caplog.records) == 1
    driver.log({"a": 1}, 7)  # both write to the same file
    worker.log({"a": 1}, 3)
    actor.loses = False
    assert sending.send() and sending.send()
    assert steps(stage) == [0, 1, 2, 7, 3]


def test_the_driver_sees_what_a_worker_does_and_can_stop_it(both, tmp_path):
    stage, own, actor, sending = both
    (stage / FOLDER).mkdir()
    with passing_on(own, 3):
        logging.getLogger("pipeline.x").warning("slow")
    with Heartbeat(own, 3, 600) as heartbeat:
        sending.send()
        beat = stage / FOLDER / "rank-00003.json"
        before = beat.read_text()
        heartbeat("a step")
        heartbeat._report()
        (own / NOTE).write_text("{}")
        sending.send()
        assert beat.read_text() != before and (stage / NOTE).exists()
        assert not (own / STOP).exists()
        (stage / STOP).touch()
        sending.send()
        assert (own / STOP).exists()
    (own / NOTE).unlink()
    (stage / STOP).unlink()
    sending.finish()
    assert not beat.exists() and not (stage / NOTE).exists() and not (own / STOP).exists()
    assert json.loads((stage / FILE).read_text())["warning"] == "slow"

    (own / "metrics.jsonl").write_text('{"step": 5, "metrics": {"cost/wall_clock_s": 2.0, "cost/images_seen": 5}}\n')
    home = Folder.at(tmp_path / "home")
    sending.copy_journal(home)
    assert home.read("metrics.jsonl") == (stage / "metrics.jsonl").read_bytes() != b""
    assert actor.receiver.begin() == (None, Spent(images_seen=5, wall_clock_s=2.0))


def test_folders_of_workers_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, kept = (tmp_path / f"wavemim-worker-{ended.pid}-{name}" for name in "ab")
    running = tmp_path / f"wavemim-worker-{os.getppid()}-c"
    for folder in (left, kept, running):
        folder.mkdir()
    (kept / relay.KEPT).touch()  # has a checkpoint that the store lacks
    own = relay._new_folder()
    assert not left.exists() and kept.exists() and running.exists() and own.is_dir()
