"""Evaluation of frozen features: the trained encoder beside the same encoder untrained and beside raw pixels.

Each is one Ray task, so that they run at once and where the cluster has room.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch
from tqdm import tqdm

from pipeline.build import build_inputs, build_model, check_shards
from pipeline.config import Recipe, identity, validate
from pipeline.features import features_of
from pipeline.pretrain import check_room, checkpoint_of, recipe_of, root_cause, uses_gpu
from pipeline.session import SessionInfo
from pipeline.shards import ShardSet
from pipeline.stage import StageError, stage_folder
from pipeline.tracking import Tracker
from wavemim import checkpoint
from wavemim.evaluate import judge

SUBJECTS = {"trained": "trained encoder", "untrained": "same encoder, untrained", "pixels": "raw pixels (32×32)"}
PIXELS_SIDE = 32  # raw pixels are averaged to this side: a probe on more of them is slower and no better


def evaluate(recipe: Recipe, session: SessionInfo, *, progress: bool = True) -> dict[str, Any]:
    """Judge the recipe's checkpoint; gives the summary that is also the stage's finishing mark."""
    path = checkpoint_of(recipe)
    trained_with = recipe_of(path)
    shards = ShardSet.open(recipe.shards_at)
    check_shards(trained_with, shards)
    check_room(recipe, session, 1)
    state = checkpoint.read_state(path)
    same = {
        **identity(recipe, "evaluate"),
        "checkpoint": state["files"][checkpoint.MODEL],
        "shards": shards.fingerprint,
    }
    with stage_folder(recipe.stage_dir("evaluate"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.checkpoint": str(path)}
        with Tracker.start(recipe, "evaluate", log_dir=folder.path, tags=tags) as tracker:
            pending = {
                _task(recipe, session).remote(
                    subject,
                    recipe.dump(),
                    trained_with.dump(),
                    shards.folder.url,
                    str(path.absolute()),
                    uses_gpu(recipe, session),
                ): subject
                for subject in SUBJECTS
            }
            measured: dict[str, dict[str, float]] = {}
            with tqdm(total=len(pending), desc="evaluate", unit=" encoder", disable=not progress) as bar:
                while pending:
                    (ready,), _ = ray.wait(list(pending))
                    try:
                        measured[pending.pop(ready)] = ray.get(ready)
                    except ray.exceptions.RayError as error:
                        raise StageError(f"evaluation failed: {root_cause(error)}") from error
                    bar.update()
            images = int(state["images"])
            tracker.log(measured["trained"], images)
            for subject in ("untrained", "pixels"):
                tracker.log({f"{name}_{subject}": value for name, value in measured[subject].items()}, images)
            result = {
                "checkpoint": str(path),
                "images_seen": images,
                "labelled": shards.classes is not None and bool(shards.rows.get("val")),
                "classes": len(shards.classes or ()),
                "train_images": min(shards.rows["train"], recipe.evaluate.max_images),
                "val_images": shards.rows.get("val", 0),
                "measured": {subject: measured[subject] for subject in SUBJECTS},
            }
            folder.finish(result)
        return {**result, "state": folder.state}


def _task(recipe: Recipe, session: SessionInfo) -> Any:
    gpus = 1 if uses_gpu(recipe, session) else 0
    return ray.remote(num_cpus=1, num_gpus=gpus)(_measure)


def _measure(
    subject: str, settings: dict[str, Any], trained_with: dict[str, Any], shards_path: str, path: str, use_gpu: bool
) -> dict[str, float]:
    """All measures of one subject."""
    torch.set_num_threads(1)
    recipe, trained = validate(settings), validate(trained_with)
    shards = ShardSet.open(shards_path)
    device = torch.device("cuda" if use_gpu else "cpu")
    encode = _encoder(subject, trained, shards, Path(path), device)
    inputs = build_inputs(shards, checkpoint.read_state(Path(path), verify=False)).to(device)
    test_split = "val" if shards.rows.get("val") else "train"
    train_set, test_set = (
        features_of(
            encode,
            inputs,
            shards,
            split,
            window=trained.encoder.image_size,
            batch=recipe.evaluate.batch,
            max_rows=recipe.evaluate.max_images,
        )
        for split in ("train", test_split)
    )
    return dict(
        judge(
            train_set,
            test_set,
            labelled=shards.classes is not None and test_split == "val",
            strengths=recipe.evaluate.probe_strengths,
            k=recipe.evaluate.knn_k,
            seed=recipe.seed,
        )
    )


def _encoder(subject: str, trained: Recipe, shards: ShardSet, path: Path, device: torch.device) -> Any:
    if subject == "pixels":
        side = min(PIXELS_SIDE, trained.encoder.image_size)
        return lambda images: torch.nn.functional.interpolate(images, size=(side, side), mode="area")
    model = build_model(trained, shards, start=subject == "untrained")
    if subject == "trained":
        checkpoint.load_trained(path, model)
    return model.encoder.model.to(device).eval()
