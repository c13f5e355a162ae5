"""Progress: the time that is left by a fake clock, lines on files, a bar on terminals, files that are half written."""

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch

from pipeline.runtime import progress
from pipeline.runtime.formatting import duration
from pipeline.runtime.progress import Follower, Pace, following, images_of_run, memory_metric


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write(path, step, *, loss=0.5, rate=100.0, end="\n", **metrics):
    metrics = {"train/loss": loss, "perf/images_per_second": rate, "perf/data_wait_share": 0.004, **metrics}
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "time": 0.0, "metrics": metrics}) + end)


def follower(path, clock, stream=None, **changes):
    settings = {"total": 10_000, "seconds": 30.0} | changes
    return Follower(path, stream=stream or io.StringIO(), clock=clock, **settings)


def test_time_left_is_images_left_by_the_recent_rate():
    pace = Pace(100_000)
    assert pace.left(0) is None
    pace.add(10, 1000, rate=100)
    assert pace.left(10) == pytest.approx(99_000 / 100)  # what training says of itself, as there is nothing else
    for at in range(20, 1010, 10):  # 200 a second for a long time
        pace.add(at, 1000 + (at - 10) * 200 // 10)
    for at in range(1010, 1410, 10):  # and of late 50
        pace.add(at, pace.images + 500)
    assert pace.rate(1400) == pytest.approx(50)
    assert pace.left(1400) == pytest.approx((100_000 - pace.images) / 50)
    assert pace.left(1404) == pytest.approx(pace.left(1400) - 4)  # it runs down between two looks


def test_an_eta_at_a_steady_pace_is_when_it_ends():
    pace = Pace(6000, seen=1000)
    ends = []
    for i in range(1, 51):
        now = 70 + 2.0 * i
        pace.add(now, 1000 + 100 * i)
        if i > 1:
            ends.append(now + pace.left(now))
    assert ends == pytest.approx([170.0] * 49)
    assert pace.left(200) == 0


def test_what_an_earlier_call_did_is_no_part_of_the_rate():
    pace = Pace(10_000, seen=8000)
    pace.add(50, 8100)
    pace.add(60, 8200)
    assert pace.rate(60) == 10
    assert pace.left(60) == 180


def test_a_restart_from_a_checkpoint_goes_back():
    pace = Pace(10_000)
    for i in range(1, 6):
        pace.add(10 * i, 1000 * i)
    pace.add(100, 2000, rate=90)  # 3000 images are done again
    assert pace.images == 2000
    assert pace.rate(100) == 90
    pace.add(110, 3000)
    assert pace.rate(110) == 100
    assert pace.left(110) == 70


def test_standing_still_is_said_and_counts():
    pace = Pace(10_000)
    for i in range(1, 6):
        pace.add(10 * i, 1000 * i)
    assert pace.silent(70) == 0
    assert pace.silent(90) == 40
    assert pace.rate(90) == pytest.approx(4000 / 80)
    assert pace.left(90) == pytest.approx(5000 / 50)


def test_lines_that_are_read_at_once_are_one_point():
    pace = Pace(10_000)
    for images in (100, 200, 300):
        pace.add(10, images, rate=25)
    assert pace.rate(10) == 25
    pace.add(20, 400)
    assert pace.rate(20) == 10


def test_rare_looks_are_kept():
    pace = Pace(10**6)
    for i in range(1, 11):
        pace.add(1000.0 * i, 5000 * i)
    assert pace.rate(10_000) == pytest.approx(5)
    assert len(pace.points) == progress.FEWEST


def test_lines_where_no_terminal_is(tmp_path):
    path, clock, out = tmp_path / "metrics.jsonl", Clock(), io.StringIO()
    write(path, 9000)  # of an earlier call
    shown = follower(path, clock, out, seen=2000)
    for i in range(1, 11):
        clock.now += 10
        write(path, 2000 + 400 * i, **{progress.MEMORY: 2.25})
        shown.look()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # every 30 of 100 seconds
    assert lines[0] == (
        "pretrain: 3,200 of 10,000 images (32.0%), 40 images/s, loss 0.5, data wait 0.4%, 2.2 GiB, 2 min 50 s left"
    )
    write(path, 10_000)
    shown.close()
    assert re.search(r"10,000 of 10,000 images \(100.0%\), .*, done$", out.getvalue().splitlines()[-1])
    assert "\r" not in out.getvalue()
    shown.close()
    assert len(out.getvalue().splitlines()) == 4  # nothing is said twice


def test_skipped_steps_are_named_once_there_are_any(tmp_path):
    path, clock = tmp_path / "metrics.jsonl", Clock()
    shown = follower(path, clock)
    write(path, 100, **{progress.SKIPPED: 0.0})
    shown.look()
    assert "skipped" not in shown.words(clock.now)
    write(path, 200, **{progress.SKIPPED: 1.0})
    shown.look()
    assert "loss 0.5, data wait 0.4%, 1 step skipped, " in shown.words(clock.now)
    with path.open("a") as file:  # all steps since then were skipped: there is no loss
        file.write(json.dumps({"step": 300, "metrics": {progress.SKIPPED: 5.0, "perf/images_per_second": 9.0}}) + "\n")
    shown.look()
    assert shown.pace.images == 300 and "wavemim_loss" not in shown.published(clock.now)
    assert ", 5 steps skipped, " in shown.words(clock.now) and "loss" not in shown.words(clock.now)


def test_a_bar_on_a_terminal(tmp_path):
    path, clock, out = tmp_path / "metrics.jsonl", Clock(), Terminal()
    shown = follower(path, clock, out, seen=5000)
    shown.look()
    assert "50%" in out.getvalue()
    write(path, 7500)
    clock.now += 10
    shown.look()
    assert "75%" in out.getvalue()
    assert "100 images/s, loss 0.5, data wait 0.4%, 25 s left" in out.getvalue()
    write(path, 6000)  # restarted
    shown.look()
    assert "60%" in out.getvalue()
    shown.close()


def test_half_written_damaged_and_other_lines(tmp_path):
    path, clock = tmp_path / "metrics.jsonl", Clock()
    shown = follower(path, clock)
    shown.look()  # there is no file yet
    write(path, 100)
    write(path, 200, end="")
    shown.look()
    assert shown.pace.images == 100
    with path.open("a") as file:
        file.write("\n{damaged\n[1, 2]\n" + json.dumps({"step": 7, "metrics": {"system/cpu": 1.0}}) + "\n")
    write(path, 300, loss="nan", rate="inf")
    shown.look()
    assert shown.pace.images == 300
    assert "loss nan" in shown.words(clock.now)


def test_a_file_that_was_begun_anew(tmp_path):
    path, clock = tmp_path / "metrics.jsonl", Clock()
    for step in (100, 200):
        write(path, step)
    shown = follower(path, clock)
    path.unlink()
    write(path, 50)
    shown.look()
    assert shown.pace.images == 50


def test_following_in_a_thread(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "POLL", 0.01)
    path = tmp_path / "metrics.jsonl"
    with following(path, total=200, seconds=60):
        write(path, 100)
    assert "pretrain: 100 of 200 images (50.0%), 100 images/s" in capsys.readouterr().err
    with following(path, total=200, enabled=False):
        write(path, 200)
    assert capsys.readouterr().err == ""


def test_a_closed_stream_is_nobodys_trouble(tmp_path, monkeypatch):
    read, out = os.pipe()
    os.close(read)
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(progress.sys, "stderr", os.fdopen(out, "w", buffering=1))
    with following(tmp_path / "metrics.jsonl", total=200, seconds=0.0):
        write(tmp_path / "metrics.jsonl", 100)


@pytest.mark.parametrize(
    ("steps", "batches", "batch", "rows", "images"),
    [(8, 4, 10, 40, 80), (9, 4, 10, 37, 84), (3, 4, 10, 37, 30), (4, 4, 10, 37, 37), (1, 1, 64, 64, 64)],
)
def test_images_of_a_run(steps, batches, batch, rows, images):
    assert images_of_run(steps, batches, batch, rows) == images


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "? s"), (0, "0 s"), (59.7, "1 min"), (75, "1 min 15 s"), (3600, "1 h"), (9000, "2 h 30 min"), (180_000, "2 d 2 h")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_memory_of_this_process():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert memory_metric(torch.device("cpu"))[progress.MEMORY] == pytest.approx(resident / 2**30, rel=0.1)
