"""What repeats in the background, what tries again after pauses, and what is written whole or not at all."""

import threading
import time

import pytest

from pipeline.periodic import Periodic
from pipeline.retry import attempts
from wavemim.atomic import PARTIAL, new_file, new_folder


def test_periodic_work_ends_with_its_block():
    calls, last = [], []
    called = threading.Event()

    def call():
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            called.set()

    with Periodic(call, 0.01, name="often", last=lambda: last.append(len(calls))):
        assert called.wait(10)
    count = len(calls)
    assert set(calls) == {"often"} and last == [count]
    time.sleep(0.05)
    assert len(calls) == count


def test_periodic_work_begins_after_a_pause_unless_at_once():
    calls = []
    with (
        Periodic(lambda: calls.append("later"), 60, name="a"),
        Periodic(lambda: calls.append("now"), lambda: 60.0, name="b", at_once=True),
    ):
        time.sleep(0.1)
    assert calls == ["now"]


def test_periodic_work_that_returns_false_ends():
    calls, last = [], []

    def call():
        calls.append(1)
        return len(calls) < 2

    work = Periodic(call, 0.01, name="twice", last=lambda: last.append(1)).start()
    work._thread.join(10)
    assert not work._thread.is_alive() and len(calls) == 2 and not last
    work.stop()


def test_stopping_does_not_wait_for_work_that_hangs():
    begun, let_go = threading.Event(), threading.Event()
    began = time.monotonic()
    with Periodic(lambda: (begun.set(), let_go.wait(30)), 0.0, name="hangs", join=0.1):
        assert begun.wait(10)
    assert time.monotonic() - began < 10
    let_go.set()


def test_attempts_come_at_once_and_after_each_pause():
    waited = []
    assert [(attempt, len(waited)) for attempt in attempts((5.0, 7.0), waited.append)] == [(0, 0), (1, 1), (2, 2)]
    assert waited == [5.0, 7.0]
    waited.clear()
    next(attempts((5.0,), waited.append))
    assert waited == []


def test_a_file_appears_at_once_or_not_at_all(tmp_path):
    target = tmp_path / "deeper" / "a.txt"
    with new_file(target) as partial:
        partial.write_text("old")
        assert not target.exists() and partial.name.startswith(".a.txt.") and partial.name.endswith(PARTIAL)
    with pytest.raises(ZeroDivisionError), new_file(target) as partial:
        partial.write_text(str(1 / 0))
    assert target.read_text() == "old" and [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_a_folder_appears_at_once_or_not_at_all(tmp_path):
    target = tmp_path / "deeper" / "set"
    with new_folder(target) as partial:
        (partial / "old").write_text("1")
        assert not target.exists() and partial.name.startswith(".set.") and partial.name.endswith(PARTIAL)
    with pytest.raises(ZeroDivisionError), new_folder(target) as partial:
        (partial / "half").write_text(str(1 / 0))
    with pytest.raises(OSError, match="not empty"), new_folder(target, replace=False) as partial:
        (partial / "new").write_text("2")
    assert [path.name for path in target.iterdir()] == ["old"]
    with new_folder(target) as partial:
        (partial / "new").write_text("2")
    assert [path.name for path in target.iterdir()] == ["new"] and list(target.parent.iterdir()) == [target]
