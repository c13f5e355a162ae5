"""Workers that hang, found by what they say of themselves: real processes without Ray, and a clock of the test's own."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.workers import heartbeat
from pipeline.workers.heartbeat import (
    BATCH,
    FOLDER,
    OTHERS,
    STEP,
    HangMonitor,
    Heartbeat,
    WorkerStatus,
    ending_hung_workers,
    start_time_of,
    started,
)

LIMIT = 1.0  # seconds

# A worker that does steps, and waits in the end as the last argument says.
WORKER = """
import sys, time
from pathlib import Path
from pipeline.workers.heartbeat import BATCH, OTHERS, STEP, Heartbeat

folder, rank, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with Heartbeat(folder, rank, float(sys.argv[4]), node="here") as beat:
    for number in range(10**9):
        beat(BATCH)
        if end == "reading" and number == 10:
            time.sleep(100)
        beat(STEP)
        if end == "exchanging" and number == 10:
            beat(OTHERS)
            time.sleep(100)
        time.sleep(0.01)
"""


@pytest.fixture
def workers(tmp_path):
    started = []

    def start(*ends):
        for rank, end in enumerate(ends):
            command = [sys.executable, "-c", WORKER, str(tmp_path), str(rank), end, str(LIMIT)]
            started.append(subprocess.Popen(command))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def watch(folder, until, seconds=20):
    """Look as the driver does until `until(steps of each rank)`, or until a worker is ended; gives those ended."""
    ended, ends = [], time.monotonic() + seconds
    watcher = HangMonitor(folder, LIMIT, lambda beat: ended.append(beat) or True)
    while not ended and time.monotonic() < ends:
        time.sleep(watcher.interval)
        watcher.look()
        if until({rank: known.status.steps for rank, known in watcher._observed.items()}):
            break
    return ended


@pytest.mark.faults
def test_a_stopped_process_is_found_and_named_within_the_limit(workers, tmp_path, caplog):
    processes = workers("never", "never")
    assert watch(tmp_path, lambda steps: min(steps.values(), default=0) > 5 and len(steps) == 2) == []
    assert watch(tmp_path, lambda steps: min(steps.values(), default=0) > 150) == []  # and all is well
    os.kill(processes[1].pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        (ended,) = watch(tmp_path, lambda steps: False)
    assert (ended.rank, ended.pid, ended.node) == (1, processes[1].pid, "here")
    (line,) = caplog.messages
    assert line.startswith(f"rank 1 on {ended.host} (process {ended.pid})") and "does not respond" in line
    assert "train.hang_timeout=1" in line and "\n" not in line


@pytest.mark.faults
def test_of_workers_that_wait_for_each_other_the_one_behind_is_ended(workers, tmp_path, caplog):
    processes = workers("exchanging", "reading", "exchanging")
    with caplog.at_level(logging.WARNING):
        (ended,) = watch(tmp_path, lambda steps: False)
    assert (ended.pid, ended.activity) == (processes[1].pid, BATCH)
    assert "waiting for a batch of the shard set" in caplog.messages[0] and "makes no progress" in caplog.messages[0]


def write(folder, mark, **beat):
    path = folder / FOLDER / f"rank-{beat['rank']:05d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "h", "pid": 7, "node": "n", "group": "first", **beat}))
    os.utime(path, ns=(mark, mark))


def looks(watcher, now, times, step):
    for _ in range(times):
        now[0] += step
        watcher.look()


def test_the_start_may_take_longer_and_a_machine_that_slept_ends_nobody(tmp_path):
    now, ended = [0.0], []
    watcher = HangMonitor(tmp_path, 100.0, lambda beat: ended.append(beat) or True, clock=lambda: now[0])
    write(tmp_path, 1, rank=0, steps=1, activity=STEP)
    looks(watcher, now, 100, watcher.interval)  # 500 s
    assert not ended
    looks(watcher, now, 30, watcher.interval)
    assert len(ended) == 1  # 650 s
    looks(watcher, now, 1000, watcher.interval)
    assert len(ended) == 1, "once a group"
    write(tmp_path, 2, rank=0, steps=9, pid=8, group="second")  # the group that took over
    looks(watcher, now, 1, watcher.interval)
    looks(watcher, now, 1, 1e6)  # the machine slept
    looks(watcher, now, 10, watcher.interval)
    assert len(ended) == 1
    write(tmp_path, 3, rank=0, steps=9, pid=8, group="second")
    looks(watcher, now, 16, watcher.interval)
    write(
        tmp_path, 1, rank=0, steps=10, pid=8, group="second"
    )  # the clock was set back: another time is a sign of life
    looks(watcher, now, 16, watcher.interval)
    assert len(ended) == 1
    looks(watcher, now, 5, watcher.interval)
    assert [beat.pid for beat in ended] == [7, 8]


def test_a_worker_that_stops_in_its_first_steps_does_not_respond_though_others_still_say_they_wait(tmp_path, caplog):
    now, ended = [0.0], []
    watcher = HangMonitor(tmp_path, 100.0, lambda beat: ended.append(beat) or True, clock=lambda: now[0])
    write(tmp_path, 1, rank=1, pid=8, count=3, steps=1, activity=STEP)  # it reports its first step at once
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            write(tmp_path, number, rank=0, count=84, steps=25, activity=OTHERS, stalled=number * watcher.interval)
            looks(watcher, now, 1, watcher.interval)
    assert [beat.pid for beat in ended] == [8]
    assert "its process does not respond" in caplog.text


def test_a_worker_that_could_not_be_ended_is_tried_again(tmp_path):
    now, tries = [0.0], []

    def end(beat):
        tries.append(beat.pid)
        if len(tries) == 1:
            raise TimeoutError("its node does not answer")
        return True

    watcher = HangMonitor(tmp_path, 100.0, end, clock=lambda: now[0])
    write(tmp_path, 1, rank=0, steps=9)
    with pytest.raises(TimeoutError):  # a warning, in the thread that calls this
        looks(watcher, now, 30, watcher.interval)
    looks(watcher, now, 100, watcher.interval)
    assert tries == [7, 7]


def test_all_at_the_same_place_are_named_so(tmp_path, caplog):
    watcher = HangMonitor(tmp_path, 100.0, lambda beat: True)
    for rank in range(2):
        write(tmp_path, 1, rank=rank, steps=9, count=30, activity=OTHERS, where="a.py:3, wait", stalled=99.0)
    with caplog.at_level(logging.WARNING):
        assert watcher.look().rank == 0
    assert "all workers are stuck at the same place" in caplog.messages[0]
    assert "waiting for the other workers (a.py:3, wait)" in caplog.messages[0]


def test_workers_of_a_group_that_died_hang_no_more(tmp_path, caplog):
    now, asked = [0.0], []
    watcher = HangMonitor(tmp_path, 100.0, lambda beat: asked.append(beat), clock=lambda: now[0])
    for rank in range(3):
        write(tmp_path, 1, rank=rank, steps=9)
    looks(watcher, now, 2, watcher.interval)
    for rank in range(2):  # fewer took over, and they live
        write(tmp_path, 2, rank=rank, steps=9, group="second")
    for mark in range(60):
        write(tmp_path, mark, rank=0, steps=9, group="second")
        write(tmp_path, mark, rank=1, steps=9, group="second")
        looks(watcher, now, 1, watcher.interval)
    assert not asked
    looks(watcher, now, 60, watcher.interval)  # now these are gone too: there is nothing that could be ended
    assert len(asked) == 1 and not caplog.messages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_a_process_is_told_from_a_later_one_of_its_number():
    assert start_time_of(os.getpid()) == start_time_of(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        assert start_time_of(child.pid) not in ("", start_time_of(os.getpid()))
    finally:
        child.kill()
        child.wait()
    assert start_time_of(child.pid) == ""


def test_a_full_disk_is_no_hang(tmp_path, monkeypatch):
    with Heartbeat(tmp_path, 0, LIMIT) as beat:
        beat.steps = 10
        before = beat.path.stat().st_mtime_ns
        monkeypatch.setattr(heartbeat.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert watch(tmp_path, lambda steps: False, seconds=2 * LIMIT) == []
        assert beat.path.stat().st_mtime_ns > before
    assert not beat.path.exists()


def test_beats_of_an_earlier_call_are_removed_and_a_failing_end_is_a_warning(tmp_path, caplog):
    write(tmp_path, 1, rank=3)
    with ending_hung_workers(tmp_path, None, lambda beat: None):
        assert not list((tmp_path / FOLDER).iterdir())

    def fail(beat):
        raise TimeoutError("node gone")

    with caplog.at_level(logging.WARNING), ending_hung_workers(tmp_path, LIMIT, fail):
        write(tmp_path, 1, rank=0, steps=9, stalled=9.0)
        ends = time.monotonic() + 10
        while "could not be ended: node gone" not in caplog.text and time.monotonic() < ends:
            time.sleep(0.05)
    assert "could not be ended: node gone" in caplog.text


def test_a_beat_says_where_its_thread_stands(tmp_path):
    with Heartbeat(tmp_path, 0, LIMIT) as beat:
        beat(BATCH)
        time.sleep(0.5)
        said = WorkerStatus(**json.loads(beat.path.read_bytes()))
    assert said.activity == BATCH and said.stalled > 0.1
    assert said.where.startswith("tests/workers/test_heartbeat.py:") and said.where.endswith(
        "test_a_beat_says_where_its_thread_stands"
    )


def test_the_first_step_is_reported_at_once(tmp_path):
    """Would catch: an interrupt in the first seconds of training that saves no checkpoint, as if nothing had begun."""
    with Heartbeat(tmp_path, 0, 600.0) as heartbeat:
        heartbeat("the data")
        assert not started(tmp_path)
        heartbeat(STEP)
        assert started(tmp_path)
