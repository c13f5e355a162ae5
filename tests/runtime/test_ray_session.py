import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from pipeline.config.settings import Cluster
from pipeline.errors import StageError
from pipeline.runtime.ray_session import ray_session

PRIVATE = """
import os, signal, time, ray, psutil
from pipeline.config.settings import Cluster
from pipeline.runtime.ray_session import ray_data, ray_session

with ray_session(Cluster()) as session:
    assert session.private and session.cpus >= 2 and session.nodes == 1, session
    with ray_session(Cluster()) as inner:
        assert not inner.private and inner.address == session.address
    assert ray.is_initialized(), "a session inside another leaves Ray running"
    import ray.data
    with ray_data(session, in_order=True):
        rows = ray.data.range(6, override_num_blocks=6).map(lambda row: {"square": row["id"] ** 2}, num_cpus=1)
        assert [row["square"] for row in rows.iter_rows()] == [0, 1, 4, 9, 16, 25]
    assert not ray.util.list_named_actors(all_namespaces=True), "Ray Data starts processes that nobody needs"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "Ray keeps its handler to itself"
    processes = psutil.Process().children(recursive=True)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in [psutil.Process(), *processes]
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::1"}, listening
    print("children", *[process.pid for process in processes], flush=True)
    while os.environ.get("WAIT"):
        time.sleep(0.1)  # not in one long call: the system may give the signal to another thread, and the call goes on
assert not ray.is_initialized()
assert "RAY_AUTH_MODE" not in os.environ
"""


def environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **more}


def children_of(line: str) -> list[int]:
    assert line.startswith("children"), line
    return [int(word) for word in line.split()[1:]]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not [pid for pid in pids if alive(pid)]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_private_ray_is_quiet_listens_on_loopback_only_and_ends() -> None:
    done = subprocess.run([sys.executable, "-c", PRIVATE], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert_gone(children_of(done.stdout))


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(240)
def test_interrupt_ends_the_private_ray() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRIVATE],
        env=environment(WAIT="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        children = children_of(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0  # 5 s on idle cores, more than 30 beside tests that keep both busy
    assert_gone(children)


def test_a_cluster_that_is_not_there_is_one_line_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        begin = time.monotonic()
        for cluster in (Cluster(address=address), Cluster()):
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(StageError, match=f"no Ray cluster at {address}") as caught, ray_session(cluster):
                pass
            assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 20


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(StageError, match="nonsense"), ray_session(Cluster(address="nonsense")):
        pass


def test_a_ray_that_does_not_start_in_time_is_started_once_more_and_then_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    started = []

    def too_slow(**_: object) -> None:
        started.append(1)
        raise Exception("The current node timed out during startup. This could happen\nfor many reasons")

    monkeypatch.setattr(ray, "init", too_slow)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(StageError, match=r"could not start Ray on this machine: .*timed out") as error,
        ray_session(Cluster()),
    ):
        pass
    assert len(started) == 2 and "once more" in caplog.text
    assert "\n" not in str(error.value)
