"""The encoder on its way to other tools: a folder for timm and transformers, ONNX, MLflow's model registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.build import build_blank_model
from pipeline.checkpoint_fetch import checkpoint_of, recipe_of
from pipeline.config import Recipe, SettingError, identity
from pipeline.errors import StageError
from pipeline.model_card import evaluation_of, model_card
from pipeline.registry import register
from pipeline.stage import StageFolder, stage_folder
from pipeline.tracking import Tracker
from wavemim import __version__, checkpoint
from wavemim.encoders import Encoder
from wavemim.onnx_export import FILE, PACKAGES, export_onnx, missing_packages

ENCODER, ONNX = "encoder", "onnx"  # folders of the stage


def check_export(recipe: Recipe) -> None:
    """Raise SettingError where what `export.…` asks for is not installed."""
    asked = {
        "export.onnx=true": recipe.export.onnx,
        f"export.registry={recipe.export.registry}": recipe.export.registry,
    }
    setting = next((key for key, value in asked.items() if value), None)
    if setting and (missing := missing_packages()):
        raise SettingError(
            f"{setting} needs {', '.join(PACKAGES)}, and {', '.join(missing)} cannot be imported; "
            "pip install 'wavemim[onnx]'"
        )


def export(recipe: Recipe) -> dict[str, Any]:
    """Write the trained encoder to the run's ``export/encoder``; gives the stage's summary.

    With `export.onnx` also to ``export/onnx``; with `export.registry` that is a version of a registered model too. A
    finished export is done again where something was asked for since, or the run was evaluated: the card names it.
    """
    check_export(recipe)
    path = checkpoint_of(recipe)
    trained = recipe_of(path)
    state = checkpoint.read_state(path)
    same = {**identity(recipe, "export"), "checkpoint": state["files"][checkpoint.MODEL], "version": __version__}
    with stage_folder(recipe.stage_dir("export"), same, restart=recipe.restart) as folder:
        evaluation = evaluation_of(recipe, state)
        made = {"onnx": recipe.export.onnx or recipe.export.registry is not None, "evaluation": evaluation}
        before = folder.result() if folder.finished else {}
        word, result = "finished already", before
        if before.get("made") != json.loads(json.dumps(made)):
            word = "renewed" if before else folder.state
            kept: dict[str, Any] = {
                key: before[key] for key in ("onnx", "registered") if key in before
            }  # of the same weights
            result = {**_write(recipe, trained, path, state, folder, made, kept), **kept}
            folder.finish(result)
        if recipe.export.registry and result.get("registered", {}).get("name") != recipe.export.registry:
            about = {
                "wavemim.shards": state["shards"],
                "wavemim.images_seen": state["images"],
                "sha256": result["sha256"],
            }
            registered = register(recipe, folder.path, result["onnx"], name=recipe.export.registry, about=about)
            result = {**result, "registered": registered}
            folder.finish(result)
        return {**result, "state": word}


def _write(
    recipe: Recipe,
    trained: Recipe,
    path: Path,
    state: Mapping[str, Any],
    folder: StageFolder,
    made: Mapping[str, Any],
    kept: Mapping[str, Any],
) -> dict[str, Any]:
    tags = {"wavemim.shards": state["shards"]}
    with Tracker.start(recipe, "export", log_dir=folder.path, tags=tags) as tracker:
        model = build_blank_model(trained)
        checkpoint.load_trained(path, model)
        encoder = model.encoder.eval()
        target = folder.path / ENCODER
        about = {
            "version": __version__,
            "recipe": trained.name,
            "images_seen": state["images"],
            "shards": state["shards"],
            "value_range": trained.data.value_range,  # what its images were scaled by, for wavemim embed
        }
        features = int(encoder.model.num_features)  # type: ignore[arg-type]
        config = checkpoint.export_timm(
            target,
            encoder.model,
            architecture=encoder.name,
            arguments=encoder.arguments,
            image_size=encoder.image_size,
            pixel_mean=state["pixel_mean"],
            pixel_std=state["pixel_std"],
            about=about,
            card=model_card(trained, state, made["evaluation"], features),
        )
        tracker.artifact(target, ENCODER)
        result = {
            "encoder": str(target),
            "weights": str(target / checkpoint.MODEL),
            "sha256": config["sha256"],
            "load": f"timm.create_model('local-dir:{target}', pretrained=True)",
            "made": dict(made),
        }
        if made["onnx"] and "onnx" not in kept:
            result["onnx"] = _write_onnx(folder.path / ONNX, encoder, state, {**about, "sha256": config["sha256"]})
            if recipe.export.registry is None:
                tracker.artifact(folder.path / ONNX, ONNX)
        return result


def _write_onnx(target: Path, encoder: Encoder, state: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = export_onnx(
            target,
            encoder.model,
            image_size=encoder.image_size,
            pixel_mean=state["pixel_mean"],
            pixel_std=state["pixel_std"],
            about=about,
        )
    except ValueError as error:
        raise StageError(f"export.onnx: {error}") from error
    return {"path": str(target / FILE), **found}
