"""`ray job submit` as a person uses it: a cluster with a token, a folder that is uploaded, the `wavemim` command."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@dataclass(frozen=True)
class Head:
    url: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def environment_with(token: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **clean,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing to drain at the end: 30 seconds otherwise
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only, as in pipeline/runtime/ray_session.py
    }


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, and wants a token
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("a" * 64)
    environment = environment_with(token)
    port = free_port()
    session = tempfile.mkdtemp(prefix="ray-")  # socket paths may have 107 characters, so none of pytest's long folders
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--port=0",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
    ]
    command += [f"--temp-dir={session}", "--object-store-memory=200000000", "--disable-usage-stats"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    log = folder / "log.txt"
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log)
        yield Head(f"http://127.0.0.1:{port}", environment)
    finally:
        process.terminate()  # and nothing else: `ray stop` would end every Ray on the machine
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(session, ignore_errors=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with one recipe more than the installed package, and ignored data."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("wavemim", "pipeline", "tune_spaces"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", folder)
    (folder / "pipeline" / "recipes" / "submitted.yaml").write_text("base: small\ndata: {rows_per_shard: 16}\n")
    (folder / "wavemim-out").mkdir()
    (folder / "wavemim-out" / "large.bin").write_bytes(os.urandom(2**20))
    return folder


def submit(head: Head, checkout: Path, *entrypoint: str, token: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", head.url, "--working-dir", str(checkout), "--"]
    environment = {**head.environment, "RAY_AUTH_TOKEN_PATH": str(token)} if token else head.environment
    return subprocess.run([*command, *entrypoint], env=environment, capture_output=True, text=True, timeout=180)


def test_prepare_runs_the_submitted_code_on_the_cluster(
    head: Head, checkout: Path, photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = submit(head, checkout, "wavemim", "prepare", "--recipe=submitted", f"images={photo_folder}", f"out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((out / "shards" / "manifest.json").read_text())
    assert manifest
    # 120 photos in shards of 16: only the recipe of the submitted folder says so
    assert len(list((out / "shards").glob("train-*.parquet"))) >= 6
    assert "prepare: 120 images" in done.stdout


def test_ignored_data_is_not_uploaded(head: Head, checkout: Path) -> None:
    listing = "import os, pipeline; print('sees', sorted(os.listdir())); print('code of', pipeline.__file__)"
    done = submit(head, checkout, "python", "-c", listing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'pipeline'" in done.stdout and "wavemim-out" not in done.stdout
    assert "working_dir_files" in done.stdout.split("code of", 1)[1]


def test_a_mistake_in_the_settings_fails_the_job_with_its_line(head: Head, checkout: Path, tmp_path: Path) -> None:
    done = submit(head, checkout, "wavemim", "prepare", "data.imagesize=64", f"out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "unknown setting 'data.imagesize'; did you mean 'data.image_size'?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_wrong_token_is_refused(head: Head, checkout: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("b" * 64)
    done = submit(head, checkout, "touch", str(tmp_path / "ran"), token=wrong)
    assert done.returncode != 0
    assert "403" in done.stdout + done.stderr or "token" in (done.stdout + done.stderr).lower()
    assert not (tmp_path / "ran").exists()
