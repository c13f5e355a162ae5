"""Other image sizes than the recipe's: what a run with one of them would be (train.progressive)."""

from __future__ import annotations

from pipeline.recipe import Recipe


def for_size(recipe: Recipe, size: int, stored_size: int, stored_levels: int) -> tuple[Recipe, int]:
    """The recipe for images of `size` pixels, and how often the stored ones, of `stored_size`, are halved for it.

    As often as the network's images shrink, rounded up where the stored ones are large enough: then the fewest levels
    are read. The recipe is as if the halved images had been stored; the wavelet target's levels that are then missing
    are computed from the coarsest approximation.
    """
    halvings = 0
    while (
        size << halvings < recipe.encoder.image_size
        and size << (halvings + 1) <= stored_size
        and halvings + 1 < stored_levels
    ):
        halvings += 1
    deepest = max(recipe.target.taps) if recipe.target.kind == "wavelet" else 1
    data = {"image_size": stored_size >> halvings, "levels": max(stored_levels - halvings, deepest)}
    sections = {
        "encoder": recipe.encoder.model_copy(update={"image_size": size}),
        "data": recipe.data.model_copy(update=data),
        "train": recipe.train.model_copy(update={"progressive": {}}),
    }
    return recipe.model_copy(update=sections), halvings
