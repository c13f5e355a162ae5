"""The real command on a machine where nothing is as usual."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SIZES = [
    *("data.image_size=32", "data.levels=3", "encoder.image_size=32", "encoder.patch_size=4", "encoder.width=32"),
    *(
        "encoder.depth=2",
        "encoder.heads=2",
        "target.taps={1: 1, 2: 2}",
        "target.weights={1: 1, 2: 1}",
        "mask.unit=null",
    ),
    *("decoder.width=16", "decoder.heads=2", "train.epochs=1", "train.warmup_epochs=0", "train.batch=8"),
]


@pytest.mark.ray
@pytest.mark.faults  # two private Rays of its own: half a minute
def test_prepare_and_pretrain_where_nothing_is_as_usual(tmp_path):
    """Odd names everywhere; foreign modules, a notebook's backend, a long temporary folder, proxies, no home, no locale."""
    images, here, other = tmp_path / "im ages%20#é[1]?'\"", tmp_path / "here", tmp_path / "other"
    generator = np.random.default_rng(0)
    for name in ("a b", "ü%41"):
        (images / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.kron(generator.integers(0, 255, (4, 4, 3)), np.ones((10, 10, 1))).astype("uint8")
            Image.fromarray(pixels).save(images / name / f"#{number}%20?.png")
    Image.fromarray(pixels).save(os.fsencode(images / "a b") + b"/caf\xe9.png")
    (other / "pipeline").mkdir(parents=True)
    here.mkdir()
    for place in (here / "pipeline.py", other / "pipeline" / "__init__.py"):
        place.write_text("raise SystemExit('a module of the same name')\n")
    long = tmp_path / "a folder of a job" / ("x" * 60)
    long.mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "RAY_ADDRESS", "RAY_TMPDIR")}
    environment |= {"PYTHONPATH": f"{other}:{ROOT}", "TMPDIR": str(long), "LC_ALL": "C", "RAY_TRAIN_V2_ENABLED": "0"}
    environment |= {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MLFLOW_RUN_ID": "0",
        "MLFLOW_EXPERIMENT_ID": "7",
    }
    environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    for stage in (["prepare", f"images={images.as_uri()}"], ["pretrain"]):
        call = [sys.executable, "-P", "-m", "wavemim", *stage, "out=my%20out y?#é'", "name=x", *SIZES, "-q"]
        done = subprocess.run(call, env=environment, cwd=here, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "MLflow" not in done.stderr
    out = here / "my%20out y?#é'"
    assert {path.name for path in here.iterdir()} == {out.name, "pipeline.py"}  # no folder of a decoded or encoded name
    assert (out / "runs" / "x" / "pretrain" / "reconstruction.png").is_file()
    with sqlite3.connect(out / "mlflow.db") as store:
        assert store.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone() == (2,)
    assert list((out / "mlartifacts").rglob("reconstruction.png"))
