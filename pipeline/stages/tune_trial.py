"""One trial of a sweep: a short pretraining and its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.tune
import torch

from pipeline.config.load import validate, with_overrides
from pipeline.evaluation.features import features_of
from pipeline.models.build import build_inputs
from pipeline.runtime.usage import Meter, spent_in
from pipeline.shards.batches import split_bytes
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import changes
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.pretrain_loop import train
from wavemim.evaluation.metrics import rankme
from wavemim.evaluation.probes import held_out, linear_probe
from wavemim.flops import forward_flops

PROBE, RANK = "eval/linear_top1_heldout", "eval/rankme"


def run_trial(
    config: dict[str, Any],
    settings: dict[str, Any],
    shards_path: str,
    parent: RunHandle,
    objective: str,
    logs: str,
    use_gpu: bool,
) -> None:
    """One trial: a short pretraining and its evaluation, in this process. `config` has its point of the search space."""
    torch.set_num_threads(1)
    base = validate(settings)
    recipe = with_overrides(base, changes(base, config["point"]))
    shards = ShardSet.open(shards_path)
    device = torch.device("cuda" if use_gpu else "cpu")
    trial_id = ray.tune.get_context().get_trial_id()
    with Tracker.start(
        recipe,
        "trial",
        parent=parent,
        name=f"trial-{trial_id}",
        log_dir=Path(logs) / trial_id,
        tags={"wavemim.shards": shards.fingerprint},
    ) as tracker:
        trained = train(recipe, shards, device=device, on_log=tracker.log)
        cores, gpus = recipe.cluster.cpus_per_worker, float(use_gpu)
        meter = Meter(cores=cores, gpus=gpus, before=spent_in(Path(logs) / trial_id))
        inputs = build_inputs(shards).to(device)
        features, labels = features_of(
            trained.model.encoder.model.eval(),
            inputs,
            shards,
            "train",
            window=recipe.encoder.image_size,
            batch=recipe.evaluate.batch,
            max_rows=recipe.tune.max_images,
        )
        measured = {RANK: rankme(features)}
        if objective == PROBE:
            out = held_out(len(labels), recipe.seed)
            probe, _ = linear_probe(
                (features[~out], labels[~out]),
                (features[out], labels[out]),
                strengths=recipe.evaluate.probe_strengths[:1] if len(labels) < 100 else recipe.evaluate.probe_strengths,
                seed=recipe.seed,
            )
            measured |= {PROBE: probe.top1, f"{PROBE}_low": probe.low, f"{PROBE}_high": probe.high}
        final = {name: value for name, value in trained.position.history[-1].items() if name != "epoch"}
        flops = forward_flops(trained.model.encoder.model, shards.channels, recipe.encoder.image_size)
        read = split_bytes(shards, "train", recipe.tune.max_images)
        meter.add(images=len(labels), flops=flops * len(labels), bytes_read=read)
        measured |= meter.read().metrics()
        tracker.log(measured, trained.position.images)
        ray.tune.report({**measured, **final, "images": trained.position.images, "mlflow_run": tracker.handle.run_id})
