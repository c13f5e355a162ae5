"""One trial of a sweep: a short pretraining, which resumes from its own checkpoints, and its evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
import torch

from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate, with_overrides
from pipeline.config.recipe import Recipe
from pipeline.evaluation.features import features_of
from pipeline.models.build import build_inputs
from pipeline.runtime.usage import Meter, spent_in
from pipeline.shards.batches import split_bytes
from pipeline.shards.errors import UnreadableError
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import changes
from pipeline.stages.tune_engine import CURVE, FAILED, NUMBER
from pipeline.sweeps.trials import WEIGHT, trial_name
from pipeline.tracking.tracker import RunHandle, Tracker, flatten
from pipeline.training.pretrain_loop import Trained, train
from wavemim.evaluation.metrics import rankme
from wavemim.evaluation.probes import held_out, linear_probe
from wavemim.flops import forward_flops
from wavemim.weights import checkpoint

PROBE, RANK = "eval/linear_top1_heldout", "eval/rankme"
CHECKPOINTS = "checkpoints"  # in a trial's folder while it trains


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a sweep share.

    Attributes:
        settings: The recipe's.
        shards: Where the shard set is.
        parent: The sweep's MLflow run.
        objective: Name of the objective.
        logs: Folder with a folder for each trial.
        searched: Dotted keys of the searched settings.
        use_gpu: Whether a trial has a GPU.
    """

    settings: Mapping[str, Any]
    shards: str
    parent: RunHandle
    objective: str
    logs: str
    searched: Sequence[str]
    use_gpu: bool


def folder_of(logs: Path, number: int) -> Path:
    """The folder of a trial."""
    return logs / f"{number:04d}"


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """One trial, in this process; `config` is of the engine. It reports once: its results, or why it failed.

    What a repetition may mend (a shard that cannot be read, a disk) is raised, so that Ray begins the trial again.
    """
    torch.set_num_threads(1)
    try:
        result = _trial(config, task)
    except (UnreadableError, OSError):
        raise
    except Exception as error:
        result = {FAILED: reason_of(error)}
    ray.tune.report(result)


def reason_of(error: Exception) -> str:
    """Why a trial failed, in one line. Lines of trials that failed alike are equal."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    return (text if isinstance(error, RuntimeError | ValueError) and text else f"{type(error).__name__}: {text}")[:300]


def _trial(config: Mapping[str, Any], task: TrialTask) -> dict[str, Any]:
    base = validate(dict(task.settings))
    recipe = with_overrides(base, {**changes(base, config["point"]), "seed": config["seed"]})
    shards = ShardSet.open(task.shards)
    device = torch.device("cuda" if task.use_gpu else "cpu")
    folder = folder_of(Path(task.logs), config[NUMBER])
    with Tracker.start(
        recipe,
        "trial",
        parent=task.parent,
        name=trial_name(config[NUMBER], config["point"], task.searched),
        params=searched_values(recipe, config["point"], task.searched),
        log_dir=folder,
        tags={
            "wavemim.shards": shards.fingerprint,
            "wavemim.role": config["role"],
            "wavemim.seed": str(config["seed"]),
            "wavemim.objective": task.objective,
        },
        dataset=shards.about,
    ) as tracker:
        try:
            trained = _train(recipe, shards, device, folder, tracker)
            measured = _measure(recipe, shards, device, folder, trained, task)
        except Exception as error:
            tracker.tag("wavemim.reason", reason_of(error))
            raise
        images = trained.position.images
        tracker.log(as_objective(measured, task.objective), images)
        final = {name: value for name, value in trained.position.history[-1].items() if name != "epoch"}
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        ended = {"images": images, "mlflow_run": tracker.handle.run_id, CURVE: [(images, measured[task.objective])]}
        return {**measured, **final, **ended}


def searched_values(recipe: Recipe, point: Mapping[str, Any], searched: Sequence[str]) -> dict[str, Any]:
    """The searched settings of a trial, as parameters of its run: the same names in all trials.

    MLflow's parallel coordinates leave out runs that lack a parameter, so a setting that the point does not give has the
    value that the trial trains with.

    Args:
        recipe: The trial's.
        point: The values that were drawn, by dotted key.
        searched: Dotted keys of all searched settings.

    Returns:
        {key: value}, numbers with four significant digits.
    """
    flat = flatten(recipe.dump())
    flat |= {f"{WEIGHT}{level}": json.dumps(weight) for level, weight in recipe.weights_by_level().items()}
    values = {key: point.get(key, flat.get(key, "null")) for key in searched}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}


def as_objective(measured: Mapping[str, float], objective: str) -> dict[str, float]:
    """Metrics of a trial as they are logged: the objective first, under the name that all sweeps share."""
    return {"objective": measured[objective], **{name: value for name, value in measured.items() if name != objective}}


def _train(recipe: Recipe, shards: ShardSet, device: torch.device, folder: Path, tracker: Tracker) -> Trained:
    """Pretrain, from the trial's last checkpoint on if it was interrupted."""
    saved = folder / CHECKPOINTS
    saved.mkdir(parents=True, exist_ok=True)
    keeper = Keeper(saved, keep=1)

    def log(metrics: dict[str, float], images: int) -> None:
        tracker.log(metrics, images)

    def save(saver: checkpoint.Saver, state: dict[str, Any]) -> None:
        keeper.save(saver)

    try:
        return train(
            recipe,
            shards,
            device=device,
            resume=checkpoint.latest(saved),
            spent=spent_in(folder),
            on_log=log,
            on_checkpoint=save,
        )
    finally:
        keeper.wait()


def _measure(
    recipe: Recipe, shards: ShardSet, device: torch.device, folder: Path, trained: Trained, task: TrialTask
) -> dict[str, float]:
    """Features of train images and what is measured of them; what this costs is added to the trial's cost."""
    cores, gpus = recipe.cluster.cpus_per_worker, float(task.use_gpu)
    meter = Meter(cores=cores, gpus=gpus, before=spent_in(folder))
    features, labels = features_of(
        trained.model.encoder.model.eval(),
        build_inputs(shards).to(device),
        shards,
        "train",
        window=recipe.encoder.image_size,
        batch=recipe.evaluate.batch,
        max_rows=recipe.tune.max_images,
    )
    measured = {RANK: rankme(features)}
    if task.objective == PROBE:
        # The same images for all trials, whatever their seed: what differs between seeds is training.
        seed = int(task.settings["seed"])
        out = held_out(len(labels), seed)
        probe, _ = linear_probe(
            (features[~out], labels[~out]),
            (features[out], labels[out]),
            strengths=recipe.evaluate.probe_strengths[:1] if len(labels) < 100 else recipe.evaluate.probe_strengths,
            seed=seed,
        )
        measured |= {PROBE: probe.top1, f"{PROBE}_low": probe.low, f"{PROBE}_high": probe.high}
    flops = forward_flops(trained.model.encoder.model, shards.channels, recipe.encoder.image_size)
    read = split_bytes(shards, "train", recipe.tune.max_images)
    meter.add(images=len(labels), flops=flops * len(labels), bytes_read=read)
    return measured | meter.read().metrics()
