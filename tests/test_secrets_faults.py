"""All stages for real, with planted secrets in the environment: none of them is in any file or in what is printed."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mlflow_server import mlflow_server

PASSWORD, KEY, SECRET, TOKEN = "PLANTEDpassword", "PLANTEDkeyid", "PLANTEDsecret", "PLANTEDtoken"
SETTINGS = [
    "data.image_size=32",
    "data.levels=3",
    "encoder.image_size=32",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "decoder.width=16",
    "decoder.heads=2",
    "train.epochs=2",
    "train.batch=20",
    "train.warmup_epochs=1",
    "train.log_every=2",
    "tune.space=level_weights_and_mask_ratio",
    "tune.trials=2",
    "tune.recipe_seeds=1",
    "tune.finalists=1",
    "tune.fresh_seeds=1",
    "tune.epochs=1",
]

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(800)]


def test_no_secret_is_in_any_file_or_message_of_a_whole_run(photo_folder, tmp_path):
    out, server, session = tmp_path / "out", tmp_path / "server", Path(tempfile.mkdtemp(prefix="ray-"))
    server.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    environment |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "RAY_TMPDIR": str(session)}
    call = [sys.executable, "-m", "wavemim"]
    settings = [*SETTINGS, "target.taps={2: 1, 3: 2}", "evaluate.probe_strengths=[0.1]"]
    printed = []
    try:
        with mlflow_server(server) as address:
            environment["MLFLOW_TRACKING_URI"] = f"http://me:{PASSWORD}@{address}"
            for stage, more, code in (
                ("run", [f"images={photo_folder}", f"out={out}"], 0),
                ("prepare", ["images=s3://photos/2024", f"out={tmp_path / 'none'}"], 1),  # the store does not answer
            ):
                done = subprocess.run(
                    [*call, stage, *settings, *more], env=environment, capture_output=True, text=True, timeout=600
                )
                assert done.returncode == code, done.stdout + done.stderr
                printed.append(done.stdout + done.stderr)
        files = [path for folder in (tmp_path, session) for path in folder.rglob("*") if path.is_file()]
        assert any(path.name == "best.yaml" for path in files) and any("runtime_env" in path.name for path in files)
        found = [str(path) for path in files if b"PLANTED" in path.read_bytes()]
        assert not found
        assert "PLANTED" not in "".join(printed)
    finally:
        shutil.rmtree(session, ignore_errors=True)
