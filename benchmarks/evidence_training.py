"""Trains, probes and fine-tunes one variant of a comparison, without Ray; called by evidence.py and progressive.py.

What must be installed: torch, torchvision, timm, numpy, PyWavelets, safetensors, scikit-learn, scipy, pyarrow, pydantic,
PyYAML, filelock, tqdm, psutil and Pillow; for the plot matplotlib.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evidence_variants import resetting

PROBE_IMAGES = 10_000  # train images that a probe is fitted on, at most
ITERATIONS = 300  # of its solver; converging would take as long as training
STRENGTHS = (0.01, 0.1, 1.0)
POINTS = "points.jsonl"  # in the folder of a run
LOCK = ".lock"
Point = dict[str, Any]


def recipe_of(
    shards: Any,
    recipe_name: str,
    overrides: Mapping[str, Any],
    *,
    seed: int,
    images_seen: int,
    points: int = 1,
    warmup: float = 0.1,
) -> Any:
    """The recipe of a run, with the training length in images.

    Args:
        shards: The shard set.
        recipe_name: Name or path of the recipe.
        overrides: Settings to override in it.
        seed: Seed of the run.
        images_seen: Images to train on.
        points: Checkpoints during training, evenly spaced; the last is at the end.
        warmup: Share of the training that the learning rate rises.

    Raises:
        SettingError: A setting is unknown or not allowed.
    """
    from pipeline.config.load import load, with_overrides

    epochs = images_seen / shards.rows["train"]
    settings = {"train.epochs": epochs, "train.workers": 1, "train.warmup_epochs": epochs * warmup, "seed": seed}
    settings |= {"train.checkpoint_every": epochs / points, "train.log_every": 50}
    return with_overrides(load(recipe_name), {**settings, **resetting(overrides)})


def curve(
    shards_at: str,
    recipe_name: str,
    overrides: Mapping[str, Any],
    *,
    seed: int,
    images_seen: int,
    points: int,
    device: str,
    warmup: float = 0.1,
    work: str | None = None,
) -> list[Point]:
    """Train a recipe and probe its encoder at several points. Progress is printed at each of them.

    Args:
        shards_at: Folder or URL of the shard set.
        recipe_name: As for `recipe_of`.
        overrides: As for `recipe_of`.
        seed: As for `recipe_of`.
        images_seen: As for `recipe_of`.
        points: Probes during training, evenly spaced; the last is at the end.
        device: Torch device.
        warmup: As for `recipe_of`.
        work: Folder for the last checkpoint and the points so far. Another call with the same arguments resumes there.

    Returns:
        One entry per point: images, seconds, FLOPs, images of each size, top-1 and its interval in %, and `correct`, which
        val images were classified correctly, as text (`correct_of`). Seconds are those of training without probes and
        checkpoints: CPU seconds of the process on a CPU, wall time on a GPU (see `pace`).
    """
    import torch

    from pipeline.shards.shard_set import ShardSet
    from pipeline.training.pretrain_loop import train
    from pipeline.training.schedule import TrainSchedule

    shards = ShardSet.open(shards_at)
    recipe = recipe_of(shards, recipe_name, overrides, seed=seed, images_seen=images_seen, points=points, warmup=warmup)
    schedule = TrainSchedule.of(recipe, shards.rows["train"])
    total = schedule.total_steps
    assert total >= points, f"{total} steps are fewer than {points} points"
    with _run_folder(work) as folder:
        lines, resume = _done(folder)
        if lines and lines[-1]["step"] == total:
            return lines
        clock = time.process_time if device == "cpu" else time.perf_counter
        before, apart, began = lines[-1]["seconds"] if lines else 0.0, 0.0, clock()

        def keep(write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
            nonlocal apart, resume
            if 0 < total - state["step"] < schedule.checkpoint_steps / 2:
                return  # the end follows, where the steps do not divide evenly
            if device != "cpu":
                torch.cuda.synchronize()
            stopped = clock()
            path = folder / str(state["images"])
            write(path)
            line = {"step": state["step"], "images": state["images"], "seconds": before + stopped - began - apart}
            line["flops"] = sum(part["flops"] for part in state["parts"])
            line["sizes"] = {str(part["image_size"]): part["images_seen"] for part in state["parts"]}
            line |= _probed(recipe, shards, device, path)
            with (folder / POINTS).open("a") as file:
                file.write(json.dumps(line) + "\n")
            lines.append(line)
            if resume is not None:
                shutil.rmtree(resume, ignore_errors=True)
            resume = path
            rate = line["images"] / max(line["seconds"], 1e-9)
            print(f"{line['top1']:.1f} % after {line['images']:,} images, {rate:.0f} images/s", flush=True)
            apart += clock() - stopped

        threads = max(2, torch.get_num_threads())  # that read batches
        train(recipe, shards, device=torch.device(device), threads=threads, resume=resume, on_checkpoint=keep)
    return lines


@contextlib.contextmanager
def _run_folder(work: str | None) -> Iterator[Path]:
    """The folder of a run, which is this process's alone: a process of an interrupted call may still be at it."""
    from filelock import FileLock, Timeout

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("waits for the process of an interrupted call, which is still running", flush=True)
            lock.acquire()
        with lock:
            yield folder


def _done(folder: Path) -> tuple[list[Point], Path | None]:
    """The points of an interrupted run and the checkpoint of the last one. What is behind that checkpoint is dropped."""
    from wavemim.weights import checkpoint

    lines: list[Point] = []
    for text in (folder / POINTS).read_text().splitlines() if (folder / POINTS).exists() else ():
        with contextlib.suppress(ValueError):  # the last line may be incomplete
            lines.append(json.loads(text))
    known = {line["images"] for line in lines}
    for images, path in checkpoint.seen(folder):
        if images not in known:
            shutil.rmtree(path)  # interrupted before it was probed
    last = checkpoint.latest(folder)
    lines = [line for line in lines if last is not None and line["images"] <= int(last.name)]
    (folder / POINTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines, last


def _probed(recipe: Any, shards: Any, device: str, path: Path | None) -> Point:
    """The probe of a checkpoint, or without one of the untrained encoder. Draws nothing from the training's generators."""
    import torch

    from pipeline.models.build import build_inputs, build_model
    from wavemim.weights import checkpoint

    with torch.random.fork_rng():
        model, inputs = build_model(recipe, shards).to(device), build_inputs(shards).to(device)
        if path is not None:
            checkpoint.load_trained(path, model)
        return probe(model.encoder.model.eval(), inputs, shards, recipe)


def untrained(shards_at: str, recipe_name: str, overrides: Mapping[str, Any], *, seed: int, device: str) -> Point:
    """The point of the untrained encoder, with which every curve begins. Arguments as for `curve`."""
    from pipeline.shards.shard_set import ShardSet

    shards = ShardSet.open(shards_at)
    recipe = recipe_of(shards, recipe_name, overrides, seed=seed, images_seen=shards.rows["train"])
    start: Point = {"step": 0, "images": 0, "seconds": 0.0, "flops": 0.0, "sizes": {}}
    return start | _probed(recipe, shards, device, None)


def probe(encode: Any, inputs: Any, shards: Any, recipe: Any) -> Point:
    """Linear probe on val, fitted on `PROBE_IMAGES` train images; its regularisation is chosen on a fifth of these."""
    from pipeline.evaluation.features import features_of
    from wavemim.evaluation.probes import fit_probe

    train, val = (
        features_of(encode, inputs, shards, split, window=recipe.encoder.image_size, batch=256, max_rows=rows)
        for split, rows in (("train", PROBE_IMAGES), ("val", None))
    )
    found = fit_probe(train, val[0], strengths=STRENGTHS, seed=0, max_iterations=ITERATIONS)
    return _accuracy(found.predicted == val[1])


def _accuracy(correct: np.ndarray) -> Point:
    """Top-1 in % with its interval, of how many images, and which of them were classified correctly."""
    from wavemim.evaluation.metrics import Accuracy

    accuracy = Accuracy.of(correct)
    packed = base64.b64encode(np.packbits(correct).tobytes()).decode()
    found = {"top1": accuracy.top1, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n}
    return {**found, "correct": packed}


def correct_of(point: Mapping[str, Any]) -> np.ndarray:
    """Which val images a point's probe classified correctly: bool (n,), in the order of the shard set."""
    packed = np.frombuffer(base64.b64decode(point["correct"]), np.uint8)
    return np.unpackbits(packed, count=int(point["n"])).astype(bool)


def finetuned(
    shards_at: str, work: str, overrides: Mapping[str, Any], *, seed: int, epochs: float, device: str
) -> Point:
    """Fine-tune the encoder that a run ended with, and classify val.

    Args:
        shards_at: Folder or URL of the shard set.
        work: The folder of the finished run, with its last checkpoint.
        overrides: Settings of the run, of which those of `finetune` are used.
        seed: Seed of fine-tuning.
        epochs: Passes over the train split.
        device: Torch device.

    Returns:
        Top-1 and its interval in %, and `correct` as in `curve`.
    """
    import torch

    from pipeline.config.load import validate, with_overrides
    from pipeline.models.encoder_source import find_encoder, finetune_size
    from pipeline.shards.shard_set import ShardSet
    from pipeline.training.finetune_loop import finetune
    from pipeline.training.setup import precision_of
    from wavemim.weights import checkpoint

    shards = ShardSet.open(shards_at)
    last = checkpoint.latest(Path(work))
    assert last is not None, f"{work} has no checkpoint"
    recipe = validate(checkpoint.read_state(last, verify=False)["recipe"])
    settings = {"seed": seed, "checkpoint": str(last), "finetune.workers": 1, "finetune.epochs": epochs}
    settings |= {"finetune.eval_every": max(1, round(epochs)), "finetune.precision": recipe.train.precision}
    settings |= {"finetune.warmup_epochs": min(recipe.finetune.warmup_epochs, epochs / 10)}
    settings |= {key: value for key, value in overrides.items() if key.startswith("finetune.")}
    recipe = with_overrides(recipe, settings)
    subject = find_encoder(recipe, shards)
    done = finetune(recipe, subject, shards, device=torch.device(device), on_log=_say_epochs(shards.rows["train"]))
    size, precision = finetune_size(recipe.finetune, subject), precision_of(recipe.finetune, torch.device(device))
    return _accuracy(classified(done.model, subject, shards, torch.device(device), precision, size))


def _say_epochs(rows: int) -> Callable[[dict[str, float], int], None]:
    """Prints the loss about once an epoch."""
    said = 0

    def say(metrics: dict[str, float], images: int) -> None:
        nonlocal said
        if "train/loss" in metrics and images // rows > said:
            said = images // rows
            print(f"fine-tuned for {said} epochs, loss {metrics['train/loss']:.3f}", flush=True)

    return say


def classified(model: Any, subject: Any, shards: Any, device: Any, precision: Any, size: int) -> np.ndarray:
    """Which val images of `size` pixels a fine-tuned model classifies correctly: bool (n,), in the order of the shard set."""
    import torch

    from pipeline.shards.batches import sequential
    from wavemim.finetune import middle

    host, inputs = subject.inputs(shards), subject.inputs(shards).to(device)
    found = []
    model.eval()
    batches = sequential(shards, "val", 256, window=shards.image_size, pixels=shards.layout.windows)
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for batch in batches:
            pixels = batch.pixels if batch.pixels is not None else host.raw(batch.levels)[0]
            images = inputs.normalise(middle(pixels.to(device).float(), size))
            found.append((model(images).argmax(1).cpu() == batch.labels).numpy())
    return np.concatenate(found)


def pace(
    shards_at: str, recipe_name: str, overrides: Mapping[str, Any], *, steps: int, device: str
) -> dict[str, float]:
    """Measure the speed of training on an otherwise idle device, without compiling and other work at the beginning.

    Args:
        shards_at: As for `curve`.
        recipe_name: As for `recipe_of`.
        overrides: As for `recipe_of`.
        steps: Steps to train.
        device: Torch device.

    Returns:
        Images/s for each image size: the median of windows of 10 steps, without the first of each size.
    """
    import torch

    from pipeline.shards.shard_set import ShardSet
    from pipeline.training.pretrain_loop import train

    shards = ShardSet.open(shards_at)
    batch = recipe_of(shards, recipe_name, overrides, seed=0, images_seen=shards.rows["train"]).train.batch
    settings = {**overrides, "train.log_every": 10}
    recipe = recipe_of(shards, recipe_name, settings, seed=0, images_seen=steps * batch)
    rates: dict[str, list[float]] = {}

    def note(metrics: dict[str, float], images: int) -> None:
        if "train/image_size" in metrics:
            rates.setdefault(f"{metrics['train/image_size']:.0f}", []).append(metrics["perf/images_per_second"])

    train(recipe, shards, device=torch.device(device), threads=max(2, torch.get_num_threads()), on_log=note)
    return {size: statistics.median(found[1:] or found) for size, found in rates.items()}


def at_pace(points: list[Point], rates: Mapping[str, float]) -> list[Point]:
    """The points of a curve with the seconds that follow from `pace`."""
    return [
        {**point, "seconds": sum(images / rates[size] for size, images in point["sizes"].items())} for point in points
    ]
