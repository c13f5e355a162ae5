"""Export of the encoder to timm's own folder format, with what it was made from."""

from __future__ import annotations

from typing import Any

from pipeline.build import build_blank_model
from pipeline.config import Recipe, identity
from pipeline.pretrain import checkpoint_of, recipe_of
from pipeline.stage import stage_folder
from pipeline.tracking import Tracker
from wavemim import __version__, checkpoint


def export(recipe: Recipe) -> dict[str, Any]:
    """Write the trained encoder to the run's ``export/encoder``; gives the stage's summary."""
    path = checkpoint_of(recipe)
    trained = recipe_of(path)
    state = checkpoint.read_state(path)
    same = {**identity(recipe, "export"), "checkpoint": state["files"][checkpoint.MODEL], "version": __version__}
    with stage_folder(recipe.stage_dir("export"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        with Tracker.start(recipe, "export", log_dir=folder.path, tags={"wavemim.shards": state["shards"]}) as tracker:
            model = build_blank_model(trained)
            checkpoint.load_trained(path, model)
            target = folder.path / "encoder"
            config = checkpoint.export_timm(
                target,
                model.encoder.model,
                architecture=model.encoder.name,
                arguments=model.encoder.arguments,
                image_size=model.encoder.image_size,
                pixel_mean=state["pixel_mean"],
                pixel_std=state["pixel_std"],
                about={
                    "version": __version__,
                    "recipe": trained.name,
                    "images_seen": state["images"],
                    "shards": state["shards"],
                },
            )
            weights = target / checkpoint.MODEL
            tracker.artifact(weights, "encoder")
            tracker.artifact(target / "config.json", "encoder")
            result = {
                "encoder": str(target),
                "weights": str(weights),
                "sha256": config["sha256"],
                "load": f"timm.create_model('local-dir:{target}', pretrained=True)",
            }
            folder.finish(result)
        return {**result, "state": folder.state}
