"""Export of the encoder: a folder for timm and transformers, ONNX, MLflow's model registry."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints.find import checkpoint_of
from pipeline.config.load import validate
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.models.build import build_blank_model
from pipeline.models.timm_config import load_call
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.stages.model_card import evaluation_of, model_card
from pipeline.stages.sequence import local
from pipeline.tracking import errors, store_uris
from pipeline.tracking import mlflow_client as store
from pipeline.tracking.journal import SendOffset
from pipeline.tracking.tracker import Tracker, store_uri
from wavemim import __version__
from wavemim.encoders.base import Encoder
from wavemim.weights import checkpoint
from wavemim.weights.onnx_export import FILE, PACKAGES, export_onnx, missing_packages
from wavemim.weights.timm_folder import export_timm

ENCODER, ONNX = "encoder", "onnx"  # folders of the stage


@local
def check_packages(recipe: Recipe) -> None:
    """Raise SettingError where packages that `export.onnx` or `export.registry` need are not installed."""
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


CHECKS = (check_packages,)


@dataclass(frozen=True)
class Checked:
    """The checkpoint that is exported."""

    path: Path
    trained: Recipe  # the settings with which it was trained
    state: Mapping[str, Any]


def check(recipe: Recipe) -> Checked:
    """Find the checkpoint and verify its files.

    Raises:
        SettingError: `checkpoint=` names no checkpoint.
        StageError: The run has no checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    path = checkpoint_of(recipe)
    state = checkpoint.read_state(path)
    return Checked(path, validate(state["recipe"]), state)


def run(recipe: Recipe, session: None, checked: Checked, *, progress: bool = True) -> dict[str, Any]:
    """Write the trained encoder to the run's ``export/encoder``.

    With `export.onnx` also to ``export/onnx``; with `export.registry` that file becomes a version of a registered model.
    A finished export is renewed where more is asked for than before, or where the run was evaluated since: the model
    card shows the evaluation.

    Args:
        recipe: The settings.
        session: None: no Ray is needed.
        checked: What `check` returned.
        progress: Not used: there is no progress bar.

    Returns:
        The files and how to load them, which is also the stage's finishing mark.

    Raises:
        SettingError: The folder holds an export with other settings.
        StageError: The ONNX model differs from PyTorch, or MLflow does not register it.
    """
    path, trained, state = checked.path, checked.trained, checked.state
    same = {**identity(recipe, "export"), "checkpoint": state["files"][checkpoint.MODEL], "version": __version__}
    place, home = recipe.stage_dir("export"), recipe.stage_home("export")
    with stage_folder(place, same, restart=recipe.restart, home=home, work=()) as folder:
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


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What export wrote where."""
    parts = [result["encoder"]]
    if "onnx" in result:
        parts.append(result["onnx"]["path"])
    if "registered" in result:
        parts.append(
            f"version {result['registered']['version']} of the registered model {result['registered']['name']}"
        )
    return f"export: encoder → {', '.join(parts)} ({result['state']})"


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
            "value_range": trained.data.value_range,  # how its images were scaled, for wavemim embed
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
            "encoder": recipe.place_of(target),
            "weights": recipe.place_of(target / checkpoint.MODEL),
            "sha256": config["sha256"],
            "load": load_call(recipe, target),
            "made": dict(made),
        }
        if made["onnx"] and "onnx" not in kept:
            found = _write_onnx(folder.path / ONNX, encoder, state, {**about, "sha256": config["sha256"]})
            result["onnx"] = {"path": recipe.place_of(folder.path / ONNX / FILE), **found}
            if recipe.export.registry is None:
                tracker.artifact(folder.path / ONNX, ONNX)
        return result


def _write_onnx(target: Path, encoder: Encoder, state: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return export_onnx(
            target,
            encoder.model,
            image_size=encoder.image_size,
            pixel_mean=state["pixel_mean"],
            pixel_std=state["pixel_std"],
            about=about,
        )
    except ValueError as error:
        raise StageError(f"export.onnx: {error}") from error


_LIMIT = 1800.0  # seconds: a large model over a slow network


def register(
    recipe: Recipe, folder: Path, onnx: Mapping[str, Any], *, name: str, about: Mapping[str, Any]
) -> dict[str, str]:
    """Register the ONNX file as a version of a model in MLflow.

    Args:
        recipe: The settings.
        folder: The folder of the export, whose MLflow run holds the files.
        onnx: What `export_onnx` returned.
        name: Name of the registered model.
        about: Tags of the version.

    Returns:
        "name", "version", and "load", a Python expression that loads it.

    Raises:
        StageError: MLflow does not answer, or refuses.
    """
    uri = store_uri(recipe)
    run_id = SendOffset.of(folder).run_id
    where = store_uris.without_password(uri)
    again = f"the encoder is in {folder}; run the same command again to retry"
    if not run_id:
        raise StageError(f"export.registry={name}: MLflow at {where} does not answer; {again}")

    def send() -> str:
        with tempfile.TemporaryDirectory(prefix="wavemim-") as room:
            model = Path(room) / "model"
            store.save_onnx(folder / ONNX / FILE, model, shape=onnx["input"], features=onnx["features"], about=about)
            return store.register_version(store.connect(uri, create=False), run_id, name, model, about)

    store.import_mlflow()
    try:
        version = store.within(_LIMIT, send)
    except Exception as error:  # of MLflow's many kinds
        raise StageError(f"export.registry={name}: MLflow at {where}: {errors.reason(error)}; {again}") from error
    return {"name": name, "version": version, "load": f"mlflow.pyfunc.load_model('models:/{name}/{version}')"}
