"""What a model makes of hidden image parts: truth, prediction and error of every level, and the image rebuilt.

Legend: B images, C channels, H = W pixels a side, N cells of the mask, P positions a side of a tap.
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

PANEL, GAP, TITLE, NAME, BAR = 200, 10, 20, 34, 56  # pixels: a panel's side about, and what is between and above them
PANELS_ACROSS = 6  # as many images stand side by side as have together no more panels than this
HIDDEN_GREY = 200.0
NOT_ASKED = 0.88  # grey, from 0 to 1, of what is not asked for


@dataclass(frozen=True)
class LevelComparison:
    """One level of B images. Pictures are (B, C or 1, h, w) in about [0, 255]."""

    level: int
    true: torch.Tensor
    predicted: torch.Tensor
    hidden: torch.Tensor | None  # (B, P, P): hidden share of each position; None where all of the image is asked for
    error: torch.Tensor  # (B, P, P) of each position, or (B, H, W) of each frequency; NaN where nothing is asked for
    loss: torch.Tensor  # (B,): the tap's loss of each image
    note: str = ""  # for titles of the pictures

    @property
    def name(self) -> str:
        """What titles and lines call it."""
        return f"level {self.level}" if self.level else "patch"


@dataclass(frozen=True)
class Comparison:
    """What a model was shown, what it made of it, and what would have been right. Images are pixel values."""

    image: torch.Tensor  # (B, C, H, W)
    seen: torch.Tensor  # (B, C, H, W): hidden patches grey, or without the frequencies that were taken away
    seen_as: list[str]  # words for it
    rebuilt: torch.Tensor | None  # (B, C, H, W), or None: the target's predictions determine no image
    levels: list[LevelComparison]  # from coarse to fine
    by_frequency: bool  # errors are those of frequencies, the lowest in the middle


def compare(model: MaskedImageModel, view: View) -> Comparison:
    """Predict everything that is hidden in `view`; what is visible is the input's own.

    Losses are over all hidden positions, also where training draws a part of them (decoder.predict).
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
            words = [f"{'high' if high else 'low'} frequencies seen" for high in without_mean]
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
    """Write what `model` makes of stored images with row numbers (B,), as `draw` does; gives what was drawn."""
    comparison = compare(model, views(stored, rows, epoch=epoch, crop=crop))
    draw(path, comparison, names)
    return comparison


def draw(path: Path, comparison: Comparison, names: Sequence[str] | None = None) -> None:
    """Write a PNG with a block of panels for each image, its name above.

    Left, from top to bottom: the image, what the encoder saw of it, and the image rebuilt from the predictions. Beside
    these a column a level, from coarse to fine: true, predicted, and the error as a heat map whose title is the tap's
    loss of this image; its scale, at the foot of the column, is the same for all images.

    What is visible is not asked for: it is light grey in predictions and errors. Where frequencies were hidden, the
    Fourier target's pictures are of these alone. Scales that a target does not predict (normalise="patch") are those of
    the true image. Of more than three channels the first three are shown, of one or two the first.
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
        true, predicted = _asked_frequencies(target, level, true, predicted, view.spectrum)
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
    """Distance at each frequency that the tap answers for, the mean over channels (B, H, W), frequency 0 in the middle."""
    weight = share if spectrum is None else torch.ones_like(share)
    difference = (prediction.float() - truth) * weight[:, :, None]
    pixels = from_positions(difference, target.channels, 1, target.side(level))[:, :, 0]
    distance = torch.fft.fft2(pixels, norm="ortho").abs().pow(target.gamma).mean(1)
    counted = target.frequencies(level)[None] if spectrum is None else target.frequencies(level) & spectrum
    return torch.fft.fftshift(torch.where(counted, distance, torch.nan), (-2, -1))


def _asked_frequencies(
    target: FourierTarget, level: int, true: torch.Tensor, predicted: torch.Tensor, spectrum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of pictures (B, C, H, W) the frequencies that are asked for; around mid-grey, stretched, where the mean is not."""
    base = target.to_pixels(torch.zeros_like(true))
    with_mean = target.frequencies(level)[0, 0].expand(len(true))
    true, predicted = true - base, predicted - base
    if spectrum is not None:
        with_mean = with_mean & spectrum[:, 0, 0]
        true, predicted = corrupt(true, ~spectrum), corrupt(predicted, ~spectrum)
    peak = torch.quantile(true.abs().flatten(1), 0.99, dim=1)[:, None, None, None]
    gain = 100 / torch.where(peak > 0.01, peak, 100)  # below there is rounding alone: nothing of the tap was hidden
    with_mean = with_mean[:, None, None, None]
    shown = [torch.where(with_mean, base + picture, 127.5 + gain * picture) for picture in (true, predicted)]
    return shown[0], shown[1]


def _figure(comparison: Comparison, names: Sequence[str] | None) -> Any:
    """The figure, with every panel at whole pixels of the file, so that small images stay sharp."""
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
    title = ("image", comparison.seen_as[number], "rebuilt")[row]
    pictures = (comparison.image, comparison.seen, comparison.rebuilt)[row]
    if pictures is None:
        axis.text(0.5, 0.5, "no image follows\nfrom this target", ha="center", va="center", fontsize=9, color="0.4")
        axis.axis("off")
        return
    _picture(axis, pictures[number], title)


def _level_panel(axis: Any, level: LevelComparison, number: int, row: int, top: float) -> None:
    if row == 2:
        colours = matplotlib.colormaps["magma"].with_extremes(bad=str(NOT_ASKED))
        axis.imshow(level.error[number].detach().cpu().numpy(), cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        asked = bool(level.error[number].isfinite().any())
        words = f"error {float(level.loss[number]):.3g}" if asked else "nothing was hidden"
        axis.set_title(f"{level.name} · {words}", fontsize=9, pad=4)
        axis.axis("off")
        return
    picture = (level.true, level.predicted)[row][number]
    if row == 1 and level.hidden is not None:
        size = (picture.shape[-2], picture.shape[-1])
        visible = torch.nn.functional.interpolate((level.hidden[number][None, None] == 0).float(), size)[0]
        picture = picture.masked_fill(visible > 0, 255 * NOT_ASKED)
    _picture(axis, picture, f"{level.name} · {('true', 'predicted')[row]}{level.note}")


def _picture(axis: Any, picture: torch.Tensor, title: str) -> None:
    """A picture (C, h, w) of values in about [0, 255]."""
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
    """Where a level's colours end: a few outliers must not make all others dark."""
    known = error.detach().cpu().numpy()
    known = known[np.isfinite(known)]
    return max(float(np.quantile(known, 0.98)), 1e-6) if known.size else 1.0


def _colour_bar(axis: Any, top: float, by_frequency: bool) -> None:
    axis.imshow(np.linspace(0, 1, 256)[None], cmap="magma", aspect="auto", extent=(0, top, 0, 1))
    axis.set_yticks([])
    axis.set_xticks([0, top], ["0", f"≥ {top:.2g}"], fontsize=8)
    axis.set_title("error by frequency" if by_frequency else "error by position", fontsize=8, pad=3)
