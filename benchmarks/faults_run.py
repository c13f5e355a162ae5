"""The pretraining run that benchmarks/faults.py disturbs: the command, its files and messages, its worker processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

BATCH, LOG_EVERY = 50, 2  # metrics are logged, and losses known, to within 100 images
RECIPE: dict[str, Any] = {
    "encoder": {"name": "vit_base_patch16_224", "patch_size": 8, "width": 32, "depth": 2, "heads": 2},
    "decoder": {"width": 16, "heads": 2},
    "target": {"taps": {3: 1, 4: 2}},
    "train": {"workers": 2, "batch": BATCH, "warmup_epochs": 0.01, "log_every": LOG_EVERY, "monitor_minutes": None},
    "tracking": {"system_metrics": False},
}
WORKERS = ("ray::RayTrainWo", "ray::train_alon")  # processes that train: of a group, and a single one
PATIENCE = 900.0  # seconds to wait for anything


class Run:
    """A run in its own folder, and the calls of the command for it."""

    def __init__(self, folder: Path, shards: Path, images: int, every: int) -> None:
        """Train on `images` images, with a checkpoint after every `every` of them."""
        self.folder, self.shards, self.middle = folder, shards, images // 2
        folder.mkdir(parents=True, exist_ok=True)
        manifest = json.loads((shards / "manifest.json").read_text())
        rows = sum(entry["rows"] for entry in manifest["splits"]["train"]["files"])
        size, levels = manifest["image_size"], manifest["levels"]
        self.recipe = {
            **RECIPE,
            "name": "fault",
            "out": str(folder / "out"),
            "shards": str(shards),
            "data": {"image_size": size, "levels": levels if isinstance(levels, int) else len(levels)},
        }
        self.recipe["encoder"] = {**RECIPE["encoder"], "image_size": size}
        self.recipe["train"] = {**RECIPE["train"], "epochs": images / rows, "checkpoint_every": every / rows}
        self.stage = folder / "out" / "runs" / "fault" / "pretrain"
        self.said: list[tuple[float, str]] = []
        self.exits: list[int] = []
        self.process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []

    def start(
        self, *settings: str, environment: dict[str, str] | None = None, stage: str = "pretrain"
    ) -> subprocess.Popen[str]:
        """Call the command as a user does, in a new process group."""
        path = self.folder / "fault.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", stage, "--quiet", "-r", str(path), *settings],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        reader.start()
        self._readers.append(reader)
        return self.process

    def end(self) -> int:
        """Wait for the command to end."""
        assert self.process is not None
        self.exits.append(self.process.wait(PATIENCE))
        self._readers[-1].join(timeout=10)
        return self.exits[-1]

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                self.said.append((time.monotonic(), line.strip()))

    def steps(self) -> list[int]:
        """Images seen at each logged line, in order."""
        with contextlib.suppress(OSError):
            lines = [json.loads(line) for line in (self.stage / "metrics.jsonl").read_text().splitlines()]
            return [line["step"] for line in lines if "train/loss" in line["metrics"]]
        return []

    def metrics(self, name: str) -> list[float]:
        """The logged values of a metric, in order."""
        lines = [json.loads(line) for line in (self.stage / "metrics.jsonl").read_text().splitlines()]
        return [float(line["metrics"][name]) for line in lines if name in line["metrics"]]

    def trained(self, images: int) -> None:
        """Wait until `images` images have been logged and there is a checkpoint."""
        self.wait(lambda: bool(self.steps()) and self.steps()[-1] >= images and bool(self.checkpoints()))

    def checkpoints(self) -> list[int]:
        """Images seen at the existing checkpoints, the newest last."""
        return sorted(int(path.parent.name.partition("-")[2]) for path in self.stage.glob("images-*/state.json"))

    def wait(self, happened: Callable[[], bool]) -> None:
        """Wait until `happened()` is true.

        Raises:
            RuntimeError: the command ended, or it took longer than `PATIENCE`.
        """
        assert self.process is not None
        ends = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None:
                raise RuntimeError(f"the command ended with {self.process.returncode}: {self.said[-3:]}")
            if time.monotonic() > ends:
                raise RuntimeError(f"timed out after {PATIENCE:.0f} s; last messages: {self.said[-3:]}")
            time.sleep(0.1)

    def workers(self) -> list[psutil.Process]:
        """The processes of the training workers."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.name().startswith(WORKERS)]

    def result(self, since: float, until: Callable[[str], bool] | None = None) -> dict[str, Any]:
        """The report of a fault at time `since`; `until` recognises the message about it."""
        steps, lost = self.steps(), 0
        for before, after in itertools.pairwise(steps):
            if after <= before:
                lost += before - (after - BATCH * LOG_EVERY)
        noticed = next((at - since for at, line in self.said if at >= since and (until is None or until(line))), None)
        newest = max(self.stage.glob("images-*/state.json"), default=None)
        weights = json.loads(newest.read_text())["files"]["model.safetensors"] if newest else None
        return {
            "lost": lost,
            "noticed": None if noticed is None or until is None else round(noticed, 1),
            "exit": self.exits,
            "weights": weights,
            "said": [line for at, line in self.said if at >= since],
        }
