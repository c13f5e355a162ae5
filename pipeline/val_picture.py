"""The picture of what a model makes of the first images of val, the same ones each time. No Ray in here."""

from __future__ import annotations

from pathlib import Path

from pipeline.batches import sequential
from pipeline.build import build_views
from pipeline.config import Recipe
from pipeline.shards import ShardSet
from wavemim.inputs import Inputs
from wavemim.model import MaskedImageModel
from wavemim.reconstruction_figure import reconstruction_figure

IMAGES = 4


def draw_val(path: Path, model: MaskedImageModel, inputs: Inputs, recipe: Recipe, shards: ShardSet) -> None:
    """Write the figure of `IMAGES` images of val, of train where there is no val."""
    split = "val" if shards.rows.get("val") else "train"
    batch = next(iter(sequential(shards, split, IMAGES, window=recipe.encoder.image_size, max_rows=IMAGES)))
    reconstruction_figure(
        path,
        model=model.eval(),
        views=build_views(recipe, model, inputs, augment=False),
        stored=batch.levels,
        rows=batch.rows,
        crop=batch.crop,
        names=[f"{split} row {row}" for row in batch.rows.tolist()],
    )
