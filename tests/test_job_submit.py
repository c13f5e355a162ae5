"""`ray job submit` as a person uses it: a cluster with a token, a folder that is uploaded, the `wavemim` command."""

import json
import os
import re
import shutil
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
from mlflow_server import free_port

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@dataclass(frozen=True)
class Head:
    url: str
    environment: dict[str, str]


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


def wavemim_on(head: Head, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`wavemim submit` and its like, as typed in a folder; the address and the token come from the environment."""
    environment = {**head.environment, "RAY_ADDRESS": head.url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "wavemim", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_submit_runs_the_code_of_this_command_and_returns_the_exit_code_of_the_stage(
    head: Head, photo_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("base: mid.yaml\n")
    (tmp_path / "mid.yaml").write_text("base: small\ndata: {rows_per_shard: 16}\n")
    out = tmp_path / "out"
    call = ("submit", "prepare", "-r", "mine.yaml", "--quiet", f"out={out}")
    done = wavemim_on(head, tmp_path, *call, f"images={photo_folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepare: 120 images" in done.stdout and "succeeded" in done.stderr
    assert len(list((out / "shards").glob("train-*.parquet"))) >= 6
    job = done.stderr.split("submitted job ")[1].split(";")[0]
    # What only the cluster can know is said by the job, with the exit code of a mistake.
    other = wavemim_on(head, tmp_path, *call, "images=/nowhere/photos", "restart=true")
    assert other.returncode == 2, other.stdout + other.stderr
    assert "wavemim: images=/nowhere/photos: no such folder" in other.stdout
    assert "failed with exit code 2" in other.stderr
    listed = wavemim_on(head, tmp_path, "status")
    assert "nothing is running" in listed.stdout and f"job {job} succeeded  python -m wavemim prepare" in listed.stdout


def test_results_are_not_lost_in_the_folder_of_a_job(head: Head, checkout: Path, photo_folder: Path) -> None:
    done = submit(head, checkout, "wavemim", "prepare", f"images={photo_folder}")
    assert done.returncode != 0
    assert "wavemim: out=wavemim-out: in a Ray job this path is in the job's own folder" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def losses(folder: Path) -> int:
    """Lines of a run's metrics that training has written."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("train/loss") if metrics.exists() else 0


@pytest.mark.faults
@pytest.mark.timeout(1000)
def test_stopping_a_job_saves_a_checkpoint_from_which_the_next_job_resumes(
    head: Head, checkout: Path, photo_folder: Path, tmp_path: Path
) -> None:
    """Also with `ray job stop` and a job that was submitted without `wavemim submit`: nothing has to be set for it."""
    settings = ["-r", "small32", f"out={tmp_path / 'out'}", "data.image_size=32", "data.levels=3", "train.workers=1"]
    settings += [
        "train.log_every=2",
        "train.epochs=100000",
        "train.checkpoint_minutes=null",
        "train.checkpoint_every=100000",
    ]
    assert wavemim_on(head, tmp_path, "submit", "prepare", *settings, f"images={photo_folder}").returncode == 0
    folder = tmp_path / "out" / "runs" / "small32" / "pretrain"
    images = []
    for submitted in ("ray", "wavemim"):
        if submitted == "ray":
            command = ["job", "submit", "--no-wait", "--address", head.url, "--working-dir", str(checkout)]
            command += ["--", "wavemim", "pretrain", *settings]
            done = subprocess.run([str(BIN / "ray"), *command], env=head.environment, capture_output=True, text=True)
        else:
            done = wavemim_on(head, tmp_path, "submit", "--detach", "pretrain", *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        job = re.search(r"raysubmit_\w+", done.stdout + done.stderr)[0]
        until, trained = time.monotonic() + 400, losses(folder)
        while losses(folder) == trained:
            assert time.monotonic() < until, wavemim_on(head, tmp_path, "logs", job).stdout
            time.sleep(1)
        shown = wavemim_on(head, tmp_path, "status").stdout
        assert f"{job}  pretrain of small32" in shown and "images/s" in shown and "left" in shown
        stop = [str(BIN / "ray"), "job", "stop", "--address", head.url, job]
        subprocess.run(stop, env=head.environment, check=True, capture_output=True, timeout=180)
        assert wavemim_on(head, tmp_path, "logs", "--follow", job).returncode == 143
        images.append(max(int(path.name.partition("-")[2]) for path in folder.glob("images-*")))
        assert job not in wavemim_on(head, tmp_path, "status").stdout.partition("nothing is running")[0]
    assert 0 < images[0] < images[1]
    unknown = wavemim_on(head, tmp_path, "stop", "raysubmit_unknown")
    assert unknown.returncode == 2 and "no such job" in unknown.stderr


def test_a_wrong_token_is_refused(head: Head, checkout: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("b" * 64)
    done = submit(head, checkout, "touch", str(tmp_path / "ran"), token=wrong)
    assert done.returncode != 0
    assert "403" in done.stdout + done.stderr or "token" in (done.stdout + done.stderr).lower()
    assert not (tmp_path / "ran").exists()
