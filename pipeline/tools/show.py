"""`wavemim show`: draw what a trained model predicts for a user's own images. No Ray in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline.config.load import validate, with_overrides
from pipeline.config.places import printable
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import decode_image
from pipeline.tools.arguments import Output, check_output

MOST = 16  # images of one figure


@click.command("show")
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--out", default="show.png", show_default=True, type=Output(), metavar="FILE.png", help="the figure")
@click.option(
    "--mask-ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="share of each image that is masked  [default: the recipe's]",
)
@click.option("--seed", type=click.IntRange(min=0), help="seed of the mask  [default: the recipe's]")
def command(checkpoint: str, images: tuple[str, ...], out: str, mask_ratio: float | None, seed: int | None) -> None:
    """Mask a part of each image and draw what the model predicts: every level next to the ground truth, and the
    reconstructed image.

    CHECKPOINT is the folder of a checkpoint or of a run (OUT/runs/NAME), or a URL of either, which is copied to
    wavemim-out/fetched. Up to 16 images; each is cropped to its central square.
    """
    click.echo(show(checkpoint, images, out=out, mask_ratio=mask_ratio, seed=seed))


def show(
    where: str, images: Sequence[str], *, out: str, mask_ratio: float | None = None, seed: int | None = None
) -> str:
    """Draw what a checkpoint predicts for image files.

    Each image is cropped to its central square and resized to the encoder's image size.

    Args:
        where: Folder or URL of a checkpoint or run.
        images: Image files, 16 at most.
        out: The figure, a PNG.
        mask_ratio: Share of each image that is masked, in (0, 1); None: as in the recipe.
        seed: Seed of the mask; None: as in the recipe.

    Returns:
        A line with the error of each level, averaged over the images; the figure has the errors of each image.

    Raises:
        SettingError: The checkpoint does not exist, or an image cannot be read.
        CheckpointError: The checkpoint is damaged.
    """
    if len(images) > MOST:
        raise SettingError(f"{len(images)} images are too many for one figure, which holds {MOST}; name fewer")
    check_output(Path(out), picture=True)
    files = [_content(name) for name in images]
    from pipeline.checkpoints.find import found_at, local_copy

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
    draw(Path(out), comparison, [_title(name) for name in images])
    count = f"{len(images)} image{'s' * (len(images) != 1)}"
    errors = ", ".join(f"{level.name} {float(level.loss.mean()):.4g}" for level in comparison.levels)
    return f"{out}: {count}; {'mean ' * (len(images) > 1)}error of {errors}"


def _title(name: str) -> str:
    """A file's name as the title of a picture, in which $ would begin a formula."""
    return printable(Path(name).name).replace("$", r"\$")


def _content(name: str) -> bytes:
    path = Path(name)
    if path.is_dir():
        raise SettingError(f"{path}: a folder; name image files")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror or error}") from None


def _decoded(names: Sequence[str], files: Sequence[bytes], recipe: Recipe) -> np.ndarray:
    """Images (B, C, H, W), uint8, decoded as `prepare` does, at the encoder's size."""
    data = recipe.data
    wanted = Pixels(
        recipe.encoder.image_size, data.channels, data.max_pixels, data.min_side, data.value_range, data.nodata
    )
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
            f"--mask-ratio {ratio}: this model was trained with mask.kind=frequency, which masks no share of the image"
        )
    changes: Mapping[str, Any] = {"mask.ratio": ratio, "seed": seed}
    return with_overrides(recipe, {key: value for key, value in changes.items() if value is not None})


def _views(recipe: Recipe, model: Any, inputs: Any) -> Any:
    """Views under the recipe's mask, whose ratio may differ from the one that the model was built with."""
    from pipeline.models.build import build_views

    try:
        views = build_views(recipe, model, inputs, augment=False)
    except ValueError as error:
        raise SettingError(str(error)) from None
    model.hide(views.masking.hidden)
    return views


def _pyramid(pixels: Any, recipe: Recipe, wavelet: str) -> dict[int, Any]:
    """Coefficients of pixels (B, C, H, W): as many levels as the shard set stores, or as the image's size allows."""
    from wavemim.wavelets import decompose

    side, levels = pixels.shape[-1], max(recipe.data.levels, *recipe.target.taps)
    while side % 2**levels:
        levels -= 1
    pyramid: dict[int, Any] = decompose(pixels, levels, wavelet)
    return pyramid
