"""A server that is slow because many log to it at once: nothing is skipped, and runs are ended by those who began them."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.tracking import background, errors
from pipeline.tracking.journal import SendOffset
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracker import Tracker


class _Answer(Exception):
    """MLflow's answer to a request that is not OK."""

    error_code = "BAD_REQUEST"


_POOL = "QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00"


def test_a_busy_server_loses_no_value_and_gets_all_of_it_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow says "bad request" where the connections to its database are in use; a refused value says the same."""
    monkeypatch.setattr(background, "_AGAIN", (0.05, 0.1))
    with Tracker.start(load("small", [f"out={tmp_path}"]), "x", log_dir=tmp_path / "busy") as tracker:
        client, left = tracker._sender._client, [3]
        log_batch = client.log_batch

        def busy(*arguments: object, **more: object) -> None:
            if left[0] > 0:
                left[0] -= 1
                raise _Answer(_POOL)
            log_batch(*arguments, **more)

        monkeypatch.setattr(client, "log_batch", busy)
        tracker.log({"a": 1.0, "b": 2.0}, 1)
    run = connect(tracker.handle.uri, create=False).get_run(tracker.handle.run_id)
    assert left == [0] and run.data.metrics == {"a": 1.0, "b": 2.0} and run.info.status == "FINISHED"
    assert SendOffset.of(tmp_path / "busy").refused == 0
    assert not [record for record in caplog.records if str(tmp_path) in record.getMessage()]


def test_what_an_error_means() -> None:
    assert errors.busy(_Answer(_POOL)) and not errors.refused(_Answer(_POOL)) and not errors.invalid(_Answer(_POOL))
    assert errors.refused(_Answer("no such run")) and errors.invalid(_Answer("no such run"))
    assert (
        errors.answered(_Answer(_POOL)) and not errors.answered(TimeoutError()) and not errors.answered(OSError(2, "x"))
    )


@pytest.mark.parametrize(
    ("answers", "alive", "sent", "at_least", "at_most"),
    [
        ([False, False, True], 5.0, True, 0.05, 2.0),  # slow: tried again, once before `flush` if the thread was quick
        ([False], 0.6, False, 0.4, 3.0),  # it has stopped to answer
        ([False], -1.0, False, 0.0, 0.3),  # away, or it refuses: not waited for
        ([False], 60.0, False, 0.9, 3.0),  # it never takes it: `most`
    ],
)
def test_the_end_waits_for_a_server_that_is_alive(
    monkeypatch: pytest.MonkeyPatch, answers: list[bool], alive: float, sent: bool, at_least: float, at_most: float
) -> None:
    monkeypatch.setattr(background, "_AGAIN", (0.05, 0.1))
    begun, given = time.monotonic(), itertools.chain(answers, itertools.repeat(answers[-1]))
    thread = background.SendingThread(lambda urgent: next(given), lambda: begun + alive)
    thread.wake()
    assert thread.flush(0.2, 1.0) is sent
    assert at_least <= time.monotonic() - begun <= at_most
    thread.close()
