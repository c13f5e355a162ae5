"""What a trained model makes of a user's own pictures (`wavemim show`). No Ray in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints.find import found_at
from pipeline.config.load import validate, with_overrides
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import decode_image
from pipeline.tools.commands import check_target

MOST = 16  # images of one figure


def show(
    where: str, images: Sequence[str], *, out: str, mask_ratio: float | None = None, seed: int | None = None
) -> str:
    """Write the figure of what a checkpoint makes of image files to `out`; gives a line with the errors per level.

    Each image is its middle square, resized to the encoder's image size. `mask_ratio` and `seed` stand for those of
    the recipe. Errors are means over the images; those of each are in the figure. Raises SettingError for what the user
    can mend, CheckpointError for a damaged checkpoint.
    """
    if len(images) > MOST:
        raise SettingError(f"{len(images)} images are too many for one figure, which holds {MOST}; give fewer")
    check_target(Path(out), picture=True)
    files = [_content(name) for name in images]
    from pipeline.checkpoints.find import local_copy

    path = found_at(local_copy(where, Path.cwd() / "wavemim-out"))

    import torch

    from pipeline.models.build import model_of_checkpoint
    from wavemim.figures.reconstruction import compare, draw
    from wavemim.weights import checkpoint

    state = checkpoint.read_state(path, verify=False)
    recipe = _with_mask(validate(state["recipe"]), mask_ratio, seed)
    pixels = torch.from_numpy(_decoded(images, files, recipe)).float()
    model, inputs, _ = model_of_checkpoint(path)
    views = _views(recipe, model, inputs)
    pyramid = _pyramid(pixels, recipe, inputs.wavelet)
    view = views.of(inputs.normalise(pixels), pyramid, torch.arange(len(images)), epoch=0)
    comparison = compare(model.eval(), view)
    draw(Path(out), comparison, [Path(name).name for name in images])
    count = f"{len(images)} image{'s' * (len(images) != 1)}"
    errors = ", ".join(f"{level.name} {float(level.loss.mean()):.4g}" for level in comparison.levels)
    return f"{out}: {count}; {'mean ' * (len(images) > 1)}error of {errors}"


def _content(name: str) -> bytes:
    path = Path(name)
    if path.is_dir():
        raise SettingError(f"{path}: a folder; give image files")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror or error}") from None


def _decoded(names: Sequence[str], files: Sequence[bytes], recipe: Recipe) -> np.ndarray:
    """Images (B, C, H, W), uint8, as `prepare` would decode them, at the encoder's size."""
    data = recipe.data
    wanted = Pixels(recipe.encoder.image_size, data.channels, data.max_pixels, data.min_side, data.value_range)
    images = []
    for name, content in zip(names, files, strict=True):
        try:
            images.append(decode_image(content, name, wanted))
        except RejectedImage as error:
            raise SettingError(f"{name}: {error}") from None
    return np.stack(images)


def _with_mask(recipe: Recipe, ratio: float | None, seed: int | None) -> Recipe:
    if ratio is not None and recipe.mask.kind == "frequency":
        raise SettingError(
            f"--mask-ratio {ratio}: this model was trained with mask.kind=frequency, which hides no share"
        )
    changes: Mapping[str, Any] = {"mask.ratio": ratio, "seed": seed}
    return with_overrides(recipe, {key: value for key, value in changes.items() if value is not None})


def _views(recipe: Recipe, model: Any, inputs: Any) -> Any:
    """Views under the recipe's mask, which may hide another share than the one that the model was built with."""
    from pipeline.models.build import build_views

    try:
        views = build_views(recipe, model, inputs, augment=False)
    except ValueError as error:
        raise SettingError(str(error)) from None
    model.hide(views.masking.hidden)
    return views


def _pyramid(pixels: Any, recipe: Recipe, wavelet: str) -> dict[int, Any]:
    """Coefficients of pixels (B, C, H, W), of as many levels as are stored, or as the image's size allows."""
    from wavemim.wavelets import decompose

    side, levels = pixels.shape[-1], max(recipe.data.levels, *recipe.target.taps)
    while side % 2**levels:
        levels -= 1
    pyramid: dict[int, Any] = decompose(pixels, levels, wavelet)
    return pyramid
