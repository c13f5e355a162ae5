"""The encoder on its way to other tools: a folder for timm and transformers, ONNX, MLflow's model registry."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoints.find import checkpoint_of, recipe_of
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.models.build import build_blank_model
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.stages.model_card import evaluation_of, model_card
from pipeline.tracking import mlflow_client as store
from pipeline.tracking.journal import SendOffset
from pipeline.tracking.tracker import Tracker, store_uri
from wavemim import __version__
from wavemim.encoders.base import Encoder
from wavemim.weights import checkpoint
from wavemim.weights.onnx_export import FILE, PACKAGES, export_onnx, missing_packages
from wavemim.weights.timm_folder import export_timm

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
        config = export_timm(
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


_LIMIT = 1800.0  # seconds: a large model over a slow line


def register(
    recipe: Recipe, folder: Path, onnx: Mapping[str, Any], *, name: str, about: Mapping[str, Any]
) -> dict[str, str]:
    """Make the ONNX file a version of the registered model `name`; gives name, version and how to load it.

    `folder` is that of the export, whose MLflow run keeps the files. `onnx` is what `export_onnx` gave, with its path;
    `about` become tags of the version. Raises StageError where MLflow does not take it.
    """
    uri = store_uri(recipe)
    run_id = SendOffset.of(folder).run_id
    where = store.without_password(uri)
    again = f"the encoder is in {folder}, and the same call tries again"
    if not run_id:
        raise StageError(f"export.registry={name}: MLflow at {where} does not answer; {again}")

    def send() -> str:
        with tempfile.TemporaryDirectory(prefix="wavemim-") as room:
            model = Path(room) / "model"
            store.save_onnx(Path(onnx["path"]), model, shape=onnx["input"], features=onnx["features"], about=about)
            return store.register_version(store.connect(uri, create=False), run_id, name, model, about)

    store.import_mlflow()
    try:
        version = store.within(_LIMIT, send)
    except Exception as error:  # of MLflow's many kinds
        raise StageError(f"export.registry={name}: MLflow at {where}: {store.reason(error)}; {again}") from error
    return {"name": name, "version": version, "load": f"mlflow.pyfunc.load_model('models:/{name}/{version}')"}


def export_line(result: Mapping[str, Any]) -> str:
    """What export wrote where."""
    parts = [result["encoder"]]
    if "onnx" in result:
        parts.append(result["onnx"]["path"])
    if "registered" in result:
        parts.append(
            f"version {result['registered']['version']} of the registered model {result['registered']['name']}"
        )
    return f"export: encoder → {', '.join(parts)} ({result['state']})"
