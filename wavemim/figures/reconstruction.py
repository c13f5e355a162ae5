"""Figure of a model's predictions: target, prediction and error of every level, and the reconstructed image.

Legend: B images, C channels, H = W pixels per side, N cells of the mask, P positions per side of a tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from wavemim.figures.plots import DPI, plt, save_figure, shown_channels
from wavemim.inputs import Crop
from wavemim.masking import corrupt, filled_in, share_at
from wavemim.model import MaskedImageModel
from wavemim.targets.base import Target, elementwise, from_positions
from wavemim.targets.fourier import FourierTarget
from wavemim.views import View, Views

PANEL, GAP, TITLE, NAME, BAR = (
    200,
    10,
    20,
    34,
    56,
)  # pixels: the approximate side of a panel, and the space between and above
PANELS_ACROSS = 6  # panels side by side, at most, unless a single image has more
HIDDEN_GREY = 200.0
VISIBLE_GREY = 0.88  # from 0 to 1, of parts that are visible and thus not predicted


@dataclass(frozen=True)
class LevelComparison:
    """One level of B images. Pictures are (B, C or 1, h, w) in about [0, 255].

    Attributes:
        level: The level.
        true: Picture of the targets.
        predicted: Picture of the predictions.
        hidden: (B, P, P), the hidden fraction of each position; None if the whole image is predicted.
        error: (B, P, P) per position, or (B, H, W) per frequency; NaN where nothing is predicted.
        loss: (B,), the tap's loss of each image.
        note: For titles of the pictures.
    """

    level: int
    true: torch.Tensor
    predicted: torch.Tensor
    hidden: torch.Tensor | None
    error: torch.Tensor
    loss: torch.Tensor
    note: str = ""

    @property
    def name(self) -> str:
        """Its name in titles and messages."""
        return f"level {self.level}" if self.level else "patch"


@dataclass(frozen=True)
class Comparison:
    """A model's input, predictions and targets. Images are in pixel values.

    Attributes:
        image: (B, C, H, W).
        seen: (B, C, H, W), the encoder's input: hidden patches grey, or without the removed frequencies.
        seen_as: Title of each image's input.
        rebuilt: (B, C, H, W), the reconstruction; None if predictions do not determine an image.
        levels: From coarse to fine.
        by_frequency: Whether errors are per frequency, the lowest in the middle.
    """

    image: torch.Tensor
    seen: torch.Tensor
    seen_as: list[str]
    rebuilt: torch.Tensor | None
    levels: list[LevelComparison]
    by_frequency: bool


def compare(model: MaskedImageModel, view: View) -> Comparison:
    """Predict everything that is hidden in a view and compare it with the targets.

    Losses are over all hidden positions, even if training only predicts a part of them (decoder.predict).

    Args:
        model: The model.
        view: The view.

    Returns:
        The comparison.
    """
    target, grid = model.target, model.encoder.grid
    with torch.no_grad():
        truth = target(view.images, view.pyramid)
        predictions = model.predict(view.seen, view.mask)
        levels = [
            _compare_level(target, level, predictions[level], truth[level], grid, view)
            for level in sorted(model.levels, reverse=True)
        ]
        image = target.to_pixels(view.images)
        rebuilt = target.rebuild(predictions, view.images, view.pyramid, view.mask)
        if view.spectrum is None:
            seen = filled_in(image, HIDDEN_GREY, view.mask)
            words = [f"masked ({part:.0%} hidden)" for part in view.mask.float().mean(1).tolist()]
        else:
            seen = target.to_pixels(view.seen)
            without_mean = view.spectrum[:, 0, 0].tolist()
            words = [f"{'high' if high else 'low'}-pass filtered" for high in without_mean]
            if rebuilt is not None:
                rebuilt = corrupt(image, view.spectrum) + corrupt(rebuilt, ~view.spectrum)
    return Comparison(image, seen, words, rebuilt, levels, isinstance(target, FourierTarget))


def reconstruction_figure(
    path: Path,
    *,
    model: MaskedImageModel,
    views: Views,
    stored: Mapping[int, torch.Tensor],
    rows: torch.Tensor,
    crop: Crop | None = None,
    epoch: int = 0,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Predict the hidden parts of stored images and draw the result with `draw`.

    Args:
        path: The PNG file to write.
        model: The model.
        views: Make the views.
        stored: Integers {level: (B, C, K, h, w)}, of windows or whole images.
        rows: Row numbers (B,) of the images.
        crop: Windows to cut, if any.
        epoch: For the masks.
        names: Titles of the images.

    Returns:
        What was drawn.
    """
    comparison = compare(model, views(stored, rows, epoch=epoch, crop=crop))
    draw(path, comparison, names)
    return comparison


def draw(path: Path, comparison: Comparison, names: Sequence[str] | None = None) -> None:
    """Draw a block of panels for each image.

    The left column shows the image, the encoder's input, and the image reconstructed from the predictions. Each further
    column shows a level, from coarse to fine: target, prediction, and the error as a heat map, with the tap's loss of
    this image as its title. The scale of the errors, below the column, is the same for all images.

    Visible parts are not predicted and light grey in predictions and errors. If frequencies were hidden, the Fourier
    target's pictures only show these. Scales that a target does not predict (normalise="patch") are those of the true
    image. Of more than three channels the first three are shown, of two the first.

    Args:
        path: The PNG file to write.
        comparison: What to draw.
        names: Titles of the images.
    """
    figure = _figure(comparison, names)
    save_figure(figure, path)


def _compare_level(
    target: Target, level: int, prediction: torch.Tensor, truth: torch.Tensor, grid: int, view: View
) -> LevelComparison:
    share = share_at(view.mask, grid, target.positions(level))
    loss = target.error(level, prediction, truth, share, None, view.spectrum)
    true, predicted = (
        target.picture(level, vectors, view.images, view.pyramid, view.mask) for vectors in (truth, prediction)
    )
    if isinstance(target, FourierTarget):
        error = _spectral_error(target, level, prediction, truth, share, view.spectrum)
        true, predicted = _predicted_frequencies(target, level, true, predicted, view.spectrum)
    else:
        error = elementwise(prediction.float(), truth, target.loss).mean(-1)
        error = torch.where(share > 0, error, torch.nan).unflatten(1, (target.positions(level), -1))
    hidden = None if view.spectrum is not None else share.unflatten(1, (target.positions(level), -1))
    note = " (hidden)" if isinstance(target, FourierTarget) and view.spectrum is not None else ""
    return LevelComparison(level, true, predicted, hidden, error, loss, note)


def _spectral_error(
    target: FourierTarget,
    level: int,
    prediction: torch.Tensor,
    truth: torch.Tensor,
    share: torch.Tensor,
    spectrum: torch.Tensor | None,
) -> torch.Tensor:
    """Distance at each of the tap's frequencies, the mean over channels (B, H, W), frequency 0 in the middle."""
    weight = share if spectrum is None else torch.ones_like(share)
    difference = (prediction.float() - truth) * weight[:, :, None]
    pixels = from_positions(difference, target.channels, 1, target.side(level))[:, :, 0]
    distance = torch.fft.fft2(pixels, norm="ortho").abs().pow(target.gamma).mean(1)
    counted = target.frequencies(level)[None] if spectrum is None else target.frequencies(level) & spectrum
    return torch.fft.fftshift(torch.where(counted, distance, torch.nan), (-2, -1))


def _predicted_frequencies(
    target: FourierTarget, level: int, true: torch.Tensor, predicted: torch.Tensor, spectrum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted frequencies of pictures (B, C, H, W); amplified around mid-grey if the mean is not among them."""
    base = target.to_pixels(torch.zeros_like(true))
    with_mean = target.frequencies(level)[0, 0].expand(len(true))
    true, predicted = true - base, predicted - base
    if spectrum is not None:
        with_mean = with_mean & spectrum[:, 0, 0]
        true, predicted = corrupt(true, ~spectrum), corrupt(predicted, ~spectrum)
    peak = torch.quantile(true.abs().flatten(1), 0.99, dim=1)[:, None, None, None]
    gain = 100 / torch.where(peak > 0.01, peak, 100)  # below is only rounding: none of the tap's frequencies was hidden
    with_mean = with_mean[:, None, None, None]
    shown = [torch.where(with_mean, base + picture, 127.5 + gain * picture) for picture in (true, predicted)]
    return shown[0], shown[1]


def _figure(comparison: Comparison, names: Sequence[str] | None) -> Any:
    """The figure, with every panel aligned to pixels of the file, so that small images stay sharp."""
    images, levels, side = len(comparison.image), comparison.levels, comparison.image.shape[-1]
    panel = side * max(1, round(PANEL / side)) if side <= 1.5 * PANEL else PANEL
    down = -(-images // max(1, PANELS_ACROSS // (1 + len(levels))))
    across = -(-images // down)
    block_width = (1 + len(levels)) * (panel + GAP) + GAP
    block_height = (NAME if names else GAP) + 3 * (panel + TITLE)
    width, height = across * block_width + GAP, down * block_height + BAR + GAP
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    scales = {level.level: _scale(level.error) for level in levels}

    def axis_at(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    for number in range(images):
        line, place = divmod(number, across)
        left, top = place * block_width + GAP, line * block_height + (NAME if names else GAP)
        if names:
            _name(figure, names[number], left / width, 1 - (top - NAME / 2) / height, block_width)
        for column in range(1 + len(levels)):
            for row in range(3):
                x, y = left + column * (panel + GAP), top + row * (panel + TITLE) + TITLE
                axis = axis_at(x, y, panel, panel)
                if column == 0:
                    _image_panel(axis, comparison, number, row)
                else:
                    _level_panel(axis, levels[column - 1], number, row, scales[levels[column - 1].level])
    for place in range(across):
        for column, level in enumerate(levels, 1):
            x = place * block_width + GAP + column * (panel + GAP)
            bar = axis_at(x + panel * 0.1, down * block_height + BAR - 32, panel * 0.8, 10)
            _colour_bar(bar, scales[level.level], comparison.by_frequency)
    return figure


def _image_panel(axis: Any, comparison: Comparison, number: int, row: int) -> None:
    title = ("image", comparison.seen_as[number], "reconstruction")[row]
    pictures = (comparison.image, comparison.seen, comparison.rebuilt)[row]
    if pictures is None:
        axis.text(
            0.5, 0.5, "this target does not\ndetermine an image", ha="center", va="center", fontsize=9, color="0.4"
        )
        axis.axis("off")
        return
    _picture(axis, pictures[number], title)


def _level_panel(axis: Any, level: LevelComparison, number: int, row: int, top: float) -> None:
    if row == 2:
        colours = matplotlib.colormaps["magma"].with_extremes(bad=str(VISIBLE_GREY))
        axis.imshow(level.error[number].detach().cpu().numpy(), cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        predicted = bool(level.error[number].isfinite().any())
        words = f"error {float(level.loss[number]):.3g}" if predicted else "nothing hidden"
        axis.set_title(f"{level.name} · {words}", fontsize=9, pad=4)
        axis.axis("off")
        return
    picture = (level.true, level.predicted)[row][number]
    if row == 1 and level.hidden is not None:
        size = (picture.shape[-2], picture.shape[-1])
        visible = torch.nn.functional.interpolate((level.hidden[number][None, None] == 0).float(), size)[0]
        picture = picture.masked_fill(visible > 0, 255 * VISIBLE_GREY)
    _picture(axis, picture, f"{level.name} · {('target', 'predicted')[row]}{level.note}")


def _picture(axis: Any, picture: torch.Tensor, title: str) -> None:
    """Draw a picture (C, h, w) with values in about [0, 255]."""
    channels, _ = shown_channels(picture.shape[0])
    values = picture[channels].detach().cpu().float().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    axis.imshow(values[..., 0] if len(channels) == 1 else values, cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=9, pad=4)
    axis.axis("off")


def _name(figure: Any, name: str, x: float, y: float, wide: float) -> None:
    most = int(wide / 8)
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    figure.text(x, y, short, fontsize=10, fontweight="bold", va="center", parse_math=False)


def _scale(error: torch.Tensor) -> float:
    """The upper end of a level's colour scale: a few outliers must not make all others dark."""
    known = error.detach().cpu().numpy()
    known = known[np.isfinite(known)]
    return max(float(np.quantile(known, 0.98)), 1e-6) if known.size else 1.0


def _colour_bar(axis: Any, top: float, by_frequency: bool) -> None:
    axis.imshow(np.linspace(0, 1, 256)[None], cmap="magma", aspect="auto", extent=(0, top, 0, 1))
    axis.set_yticks([])
    axis.set_xticks([0, top], ["0", f"≥ {top:.2g}"], fontsize=8)
    axis.set_title("error by frequency" if by_frequency else "error by position", fontsize=8, pad=3)
