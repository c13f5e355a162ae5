"""Trains and probes one variant of a comparison, without Ray; called by evidence.py and progressive.py."""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PROBE_IMAGES = 10_000  # train images that a probe is fitted on, at most
ITERATIONS = 300  # of its solver; converging would take as long as training
STRENGTHS = (0.01, 0.1, 1.0)


def curve(
    shards_at: str,
    recipe_name: str,
    overrides: Mapping[str, Any],
    *,
    seed: int,
    images_seen: int,
    points: int,
    device: str,
    untrained: bool = True,
    **_: Any,
) -> list[dict[str, Any]]:
    """Train a recipe and probe its encoder at several points.

    Args:
        shards_at: folder or URL of the shard set.
        recipe_name: the recipe.
        overrides: settings to override in it.
        seed: seed of the run.
        images_seen: images to train on.
        points: probes during training, evenly spaced; the last is at the end.
        device: torch device.
        untrained: begin with a point of the untrained encoder.

    Returns:
        One entry per point: images, seconds, FLOPs, top-1 and its interval in %, and `correct`, which val images were
        classified correctly, as text (`correct_of`). Seconds are those of training without probes and checkpoints: CPU
        seconds of the process on a CPU, wall time on a GPU.
    """
    import torch

    from pipeline.config.load import load, with_overrides
    from pipeline.models.build import build_inputs, build_model
    from pipeline.shards.shard_set import ShardSet
    from pipeline.training.pretrain_loop import train
    from pipeline.training.schedule import TrainSchedule
    from wavemim.weights import checkpoint

    shards = ShardSet.open(shards_at)
    epochs = images_seen / shards.rows["train"]
    settings = {"train.epochs": epochs, "train.workers": 1, "train.warmup_epochs": epochs / 10, "seed": seed}
    settings |= {"train.checkpoint_every": epochs / points, "train.log_every": 50}
    if isinstance(overrides.get("target.taps"), dict):
        settings["target.bands"] = {}
    recipe = with_overrides(load(recipe_name), {**settings, **overrides})
    total = TrainSchedule.of(recipe, shards.rows["train"]).total_steps
    assert total >= points, f"{total} steps are fewer than {points} points"
    clock = time.process_time if device == "cpu" else time.perf_counter
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        kept: list[Path] = []
        apart, began = 0.0, clock()

        def keep(write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
            nonlocal apart
            stopped = clock()
            if device != "cpu":
                torch.cuda.synchronize()
            path = Path(folder) / str(state["images"])
            write(path)
            apart += clock() - stopped
            if lines and state["images"] - lines[-1]["images"] < images_seen / points / 2:
                lines.pop(), kept.pop()  # shortly before the end, where the steps do not divide evenly
            flops = sum(part["flops"] for part in state["parts"])
            lines.append({"images": state["images"], "seconds": clock() - began - apart, "flops": flops})
            kept.append(path)

        train(recipe, shards, device=torch.device(device), on_checkpoint=keep)
        model, inputs = build_model(recipe, shards).to(device), build_inputs(shards).to(device)
        first: dict[str, Any] = {"images": 0, "seconds": 0.0, "flops": 0.0}
        if untrained:
            first |= probe(model.encoder.model.eval(), inputs, shards, recipe)
        for line, path in zip(lines, kept, strict=True):
            checkpoint.load_trained(path, model)
            line |= probe(model.encoder.model.eval(), inputs, shards, recipe)
    return [first, *lines] if untrained else lines


def probe(encode: Any, inputs: Any, shards: Any, recipe: Any) -> dict[str, Any]:
    """Linear probe on val, fitted on `PROBE_IMAGES` train images; its regularisation is chosen on a fifth of these."""
    from pipeline.evaluation.features import features_of
    from wavemim.evaluation.metrics import Accuracy
    from wavemim.evaluation.probes import fit_probe

    train, val = (
        features_of(encode, inputs, shards, split, window=recipe.encoder.image_size, batch=256, max_rows=rows)
        for split, rows in (("train", PROBE_IMAGES), ("val", None))
    )
    found = fit_probe(train, val[0], strengths=STRENGTHS, seed=0, max_iterations=ITERATIONS)
    correct = found.predicted == val[1]
    accuracy = Accuracy.of(correct)
    return {
        "top1": accuracy.top1,
        "low": accuracy.low,
        "high": accuracy.high,
        "n": accuracy.n,
        "correct": base64.b64encode(np.packbits(correct).tobytes()).decode(),
    }


def correct_of(point: Mapping[str, Any]) -> np.ndarray:
    """Which val images a point's probe classified correctly: bool (n,), in the order of the shard set."""
    packed = np.frombuffer(base64.b64decode(point["correct"]), np.uint8)
    return np.unpackbits(packed, count=int(point["n"])).astype(bool)
