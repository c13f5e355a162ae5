"""One trial of a sweep: a short pretraining, which resumes from its own checkpoints, and its evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.tune
import torch
from torch import nn

from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate, with_overrides
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.features import features_of
from pipeline.models.build import build_inputs, build_model
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.batches import split_bytes
from pipeline.shards.errors import UnreadableError
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import changes
from pipeline.stages.tune_engine import CURVE, FAILED
from pipeline.stages.tune_parts import (
    CHECKPOINTS,
    Part,
    forks_in_words,
    home_of,
    keep_checkpoint,
    starting_checkpoint,
    trial_folder,
)
from pipeline.stages.tune_rungs import Rungs, tracked
from pipeline.stages.tune_schedulers import IMAGES, NUMBER, RUNG
from pipeline.sweeps.ledger import Measured
from pipeline.sweeps.trials import CURVE_IMAGES, OBJECTIVE_IMAGES, own_point, trial_name
from pipeline.tracking.mlflow_client import REASON
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.pretrain_loop import Trained, train
from pipeline.training.schedule import TrainSchedule
from wavemim.evaluation.metrics import Accuracy, rankme
from wavemim.evaluation.probes import held_out, linear_probe
from wavemim.flops import forward_flops
from wavemim.weights import checkpoint

PROBE, RANK = "eval/linear_top1_heldout", "eval/rankme"
# The metric of a trial's learning curve, which is of one measure. `objective` has the same values at the rungs, so that stopped
# trials have it too, but at the end the value that trials are ranked by.
OBJECTIVE_CURVE = "objective_curve"


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
        gpu_share: The share of it that the trial has.
        rungs: Measurements of the objective, the one at a trial's end included.
        rung_images: Images of a measurement at a rung; 0: only the end is measured.
        end_images: Images of the measurement at the end that trials are ranked by.
    """

    settings: Mapping[str, Any]
    shards: str
    parent: RunHandle
    objective: str
    logs: str
    searched: Sequence[str]
    use_gpu: bool
    gpu_share: float
    rungs: int
    rung_images: int
    end_images: int


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """One trial, or a part of it, in this process; `config` is of the engine. It reports the objective at its rungs, and at
    its end its results, or why it failed.

    What a repetition may mend (a shard that cannot be read, a disk) is raised, so that Ray begins the trial again.
    """
    torch.set_num_threads(1)
    try:
        result = _trial(config, task)
    except (UnreadableError, OSError):
        raise
    except Exception as error:
        # Without the objective, Ray Tune would end the whole sweep.
        result = {FAILED: reason_of(error), task.objective: math.nan}
    ray.tune.report(result)


def reason_of(error: Exception) -> str:
    """Why a trial failed, in one line. Lines of trials that failed alike are equal."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    return (text if isinstance(error, RuntimeError | ValueError) and text else f"{type(error).__name__}: {text}")[:300]


def _trial(config: Mapping[str, Any], task: TrialTask) -> dict[str, Any]:
    base = validate(dict(task.settings))
    refused: SettingError | None = None
    try:
        recipe = with_overrides(base, {**changes(base, config["point"]), "seed": config["seed"]})
    except SettingError as error:  # its run says so, with the values of the point as parameters
        recipe, refused = base, error
    shards = ShardSet.open(task.shards)
    device = torch.device("cuda" if task.use_gpu else "cpu")
    part, place = Part.of(config), home_of(base, config[NUMBER])
    with (
        trial_folder(base, Path(task.logs), config[NUMBER]) as (folder, save),
        tracked(_start(recipe, config, part, folder, task, shards), folder, place) as tracker,
    ):
        try:
            if refused is not None:
                raise refused
            resume = starting_checkpoint(folder.parent, config[NUMBER], part)
            rungs = _rungs(recipe, shards, device, folder, config[NUMBER], tracker, task, resume, part, save)
            trained = None if rungs.paused else _train(recipe, shards, device, folder, tracker, task, rungs, resume)
            if trained is None or trained.stopped:
                assert part.pause is not None
                keep_checkpoint(folder, part.pause)
                tracker.end(None)
                return _at_rung(rungs.measured(part.pause), tracker, task)
            measured, last = _measure(recipe, shards, device, folder, trained, task, rungs)
        except Exception as error:
            tracker.tag(REASON, reason_of(error))
            raise
        images = trained.position.images
        tracker.log(as_objective(measured, task.objective), images)
        final = {name: value for name, value in trained.position.history[-1].items() if name != "epoch"}
        if task.rung_images:
            tracker.log({OBJECTIVE_CURVE: last}, images)
        ended = {"images": images, "mlflow_run": tracker.handle.run_id, CURVE: [(images, last)]}
        ended |= {OBJECTIVE_IMAGES: task.end_images, CURVE_IMAGES: task.rung_images or task.end_images}
        return {**measured, **final, **ended}


def _start(
    recipe: Recipe, config: Mapping[str, Any], part: Part, folder: Path, task: TrialTask, shards: ShardSet
) -> Tracker:
    """Begin the trial's run, or go on with it.

    MLflow does not let parameters change. The run of a trial whose settings may still change has none: metrics `searched/…`,
    its name and its description say which they are. It gets its parameters with its last part, so that runs that have ended
    compare by the same parameters in every sweep.
    """
    name, values = trial_name(config[NUMBER], config["point"], task.searched), {}
    if part.pause is None:
        values = searched_values(recipe, config["point"], task.searched)
    tags = {
        "wavemim.shards": shards.fingerprint,
        "wavemim.role": config["role"],
        "wavemim.seed": str(config["seed"]),
        "wavemim.objective": task.objective,
        "wavemim.objective_images": str(task.end_images),
        "wavemim.curve_images": str(task.rung_images or task.end_images),
    }
    if part.forks:
        tags["mlflow.runName"] = name
        tags["wavemim.forked"] = "; ".join(f"#{fork.donor:02d} after {fork.images:,} images" for fork in part.forks)
    tracker = Tracker.start(
        recipe,
        "trial",
        parent=task.parent,
        name=name,
        params=values,
        log_dir=folder,
        tags=tags,
        dataset=shards.about,
    )
    forks = forks_in_words(part.forks, task.searched)
    tracker.description("\n\n".join(filter(None, (_measures(task), forks))))
    return tracker


def _measures(task: TrialTask) -> str:
    """What the metrics of a trial's objective are measured on, as Markdown."""
    text = (
        f"The last value of `objective` of a finished trial is `{task.objective}` at the end, on {task.end_images:,} train "
        "images; trials are ranked by it."
    )
    if task.rung_images:
        cheaper = "by a cheaper probe on " if task.objective == PROBE else "on "
        text += (
            f" `{OBJECTIVE_CURVE}`, and `objective` before the end, are measured {cheaper}{task.rung_images:,} images: "
            f"compare learning curves by `{OBJECTIVE_CURVE}`."
        )
    return text


def _at_rung(measured: Measured, tracker: Tracker, task: TrialTask) -> dict[str, Any]:
    """What a trial reports at a rung."""
    known = {RUNG: measured.rung, IMAGES: measured.images, task.objective: measured.objective}
    return {**known, CURVE_IMAGES: task.rung_images, "mlflow_run": tracker.handle.run_id}


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
    own = own_point(recipe, searched)
    values = {key: point.get(key, own.get(key)) for key in searched}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}


def as_objective(measured: Mapping[str, float], objective: str) -> dict[str, float]:
    """Metrics of a trial as they are logged: the objective first, under the name that all sweeps share."""
    return {"objective": measured[objective], **{name: value for name, value in measured.items() if name != objective}}


def _rungs(
    recipe: Recipe,
    shards: ShardSet,
    device: torch.device,
    folder: Path,
    number: int,
    tracker: Tracker,
    task: TrialTask,
    resume: Path | None,
    part: Part,
    save: Callable[[], None],
) -> Rungs:
    """Measurements during training: of the same images in all trials, with one strength of the probe."""
    before = Meter(cores=recipe.cluster.cpus_per_worker, gpus=task.gpu_share * task.use_gpu)

    def measure(model: nn.Module) -> float:
        features, labels = _features(model, recipe, shards, device, task.rung_images)
        if task.objective != PROBE:
            return float(rankme(features))
        strengths = sorted(recipe.evaluate.probe_strengths)
        return _probe(features, labels, task, strengths[(len(strengths) - 1) // 2 :][:1]).top1

    def report(measured: Measured, spent: Spent | None) -> None:
        if measured.rung == 0 and spent is not None:
            spent = before.read()  # training goes on from what this measurement has cost
        cost = (spent or spent_in(folder)).metrics()
        if spent is not None:  # not logged before an interruption
            values = {"objective": measured.objective, OBJECTIVE_CURVE: measured.objective}
            tracker.log({**values, **cost}, measured.images)
        if measured.rung != part.pause:  # that one is reported once its checkpoint is kept
            save()
            ray.tune.report({**_at_rung(measured, tracker, task), **cost})

    state = None if resume is None else checkpoint.read_state(resume)
    rungs = Rungs(
        folder,
        number,
        rungs=task.rungs,
        total_steps=TrainSchedule.of(recipe, shards.rows["train"], 1).total_steps,
        step=0 if state is None else int(state["step"]),
        model=build_model(recipe, shards, start=resume is None).to(device),
        measure=measure,
        report=report,
        at_start=task.rung_images > 0,
        pause=part.pause,
    )
    if not part.is_whole:
        own = own_point(recipe, task.searched)
        values = {f"searched/{key}": value for key, value in own.items() if isinstance(value, int | float)}
        tracker.log(values, 0 if state is None else int(state["images"]))
    return rungs


def _train(
    recipe: Recipe,
    shards: ShardSet,
    device: torch.device,
    folder: Path,
    tracker: Tracker,
    task: TrialTask,
    rungs: Rungs,
    resume: Path | None,
) -> Trained:
    """Pretrain from the start, or from a checkpoint on."""
    saved = folder / CHECKPOINTS
    saved.mkdir(parents=True, exist_ok=True)
    keeper = Keeper(saved, keep=1)

    def log(metrics: dict[str, float], images: int) -> None:
        tracker.log(metrics, images)

    def save(saver: checkpoint.Saver, state: dict[str, Any]) -> None:
        rungs.at_checkpoint(saver, state)
        keeper.save(saver)

    try:
        trained = train(
            recipe,
            shards,
            device=device,
            resume=resume,
            spent=spent_in(folder),
            on_log=log,
            on_checkpoint=save,
            coordinator=rungs,
            gpu_share=task.gpu_share,
        )
    finally:
        keeper.wait()
    if trained.stopped and (error := keeper.finish()):
        raise OSError(error)  # the trial is begun again
    return trained


def _features(
    model: nn.Module, recipe: Recipe, shards: ShardSet, device: torch.device, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, F) and labels (n,) of train images, n at most `most`. Raises StageError if they are not finite."""
    features, labels = features_of(
        model.encoder.model.eval(),  # type: ignore[union-attr]
        build_inputs(shards).to(device),
        shards,
        "train",
        window=recipe.encoder.image_size,
        batch=recipe.evaluate.batch,
        max_rows=most,
    )
    if not np.isfinite(features).all():
        raise StageError("the encoder's features are not finite: training has diverged; try a smaller train.lr")
    return features, labels


def _probe(features: np.ndarray, labels: np.ndarray, task: TrialTask, strengths: Sequence[float]) -> Accuracy:
    """Accuracy on held-out images: the same for all trials, whatever their seed. What differs between seeds is training."""
    seed = int(task.settings["seed"])
    out = held_out(len(labels), seed)
    train, test = (features[~out], labels[~out]), (features[out], labels[out])
    return linear_probe(train, test, strengths=strengths, seed=seed)[0]


def _measure(
    recipe: Recipe,
    shards: ShardSet,
    device: torch.device,
    folder: Path,
    trained: Trained,
    task: TrialTask,
    rungs: Rungs,
) -> tuple[dict[str, float], float]:
    """What is measured at the end, and the last point of the trial's curve. The cost of these, and of the features at rungs,
    is added to the trial's cost."""
    cores, gpus = recipe.cluster.cpus_per_worker, task.gpu_share * task.use_gpu
    meter = Meter(cores=cores, gpus=gpus, before=spent_in(folder))
    last = rungs.at_end(trained.model) if task.rung_images else None  # its seconds are those of the rungs
    began = time.perf_counter()
    features, labels = _features(trained.model, recipe, shards, device, task.end_images)
    measured = {RANK: rankme(features)}
    if task.objective == PROBE:
        strengths = recipe.evaluate.probe_strengths
        probe = _probe(features, labels, task, strengths[:1] if len(labels) < 100 else strengths)
        measured |= {PROBE: probe.top1, f"{PROBE}_low": probe.low, f"{PROBE}_high": probe.high}
    flops = forward_flops(trained.model.encoder.model, shards.channels, recipe.encoder.image_size)
    more = rungs.count * task.rung_images
    read = split_bytes(shards, "train", task.end_images)
    read += rungs.count * split_bytes(shards, "train", task.rung_images)
    meter.add(images=len(labels) + more, flops=flops * (len(labels) + more), bytes_read=read)
    spent = meter.read()
    seconds = rungs.seconds + time.perf_counter() - began
    found = measured | {"perf/probe_share": seconds / max(spent.wall_clock_s, 1e-9)} | spent.metrics()
    return found, measured[task.objective] if last is None else last
