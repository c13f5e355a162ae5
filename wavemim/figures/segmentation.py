"""Figure of segmentations: images, ground truth and predictions."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from wavemim.evaluation.segmentation import IGNORED
from wavemim.figures.plots import save_figure, shown_channels

matplotlib.use("Agg")

NAMED = 24  # classes in the legend, at most: those that cover most pixels
_IGNORED_COLOUR = (255, 255, 255)


def class_colour(value: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class, which only depends on its value in the masks; 0 is dark grey.

    Hues step by the golden ratio, so that consecutive values differ most; brightness and saturation vary too.
    """
    if value == 0:
        return 60, 60, 60
    hue = (0.08 + value * 0.6180339887) % 1
    light, full = (0.95, 0.7, 0.85)[value % 3], (0.75, 0.95, 0.45)[value // 3 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, full, light)
    return round(255 * red), round(255 * green), round(255 * blue)


def coloured(classes: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Colour a segmentation.

    Args:
        classes: (S, S), or IGNORED, which is white.
        values: The classes' values in the masks.

    Returns:
        RGB (S, S, 3), uint8.
    """
    table = np.array([*(class_colour(value) for value in values), _IGNORED_COLOUR], np.uint8)  # -1 is the last
    assert IGNORED == -1
    return table[classes]


def segmentation_figure(
    path: Path,
    *,
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    titles: Sequence[str],
    values: Sequence[int],
    names: Sequence[str],
) -> None:
    """Draw one row per image: the image, its ground truth and its predictions; below, the classes.

    Args:
        path: The PNG file to write.
        images: Images (C, S, S) in [0, 255].
        truths: Classes (S, S), or IGNORED, which is white.
        predictions: {title: classes (S, S) of each image}.
        titles: The images' titles.
        values: The classes' values in the masks.
        names: The classes' names.
    """
    channels, note = shown_channels(images[0].shape[0])
    columns = [f"image{note}", "ground truth", *predictions]
    legend_rows = -(-min(len(values), NAMED) // 4)
    figure, axes = plt.subplots(
        len(images),
        len(columns),
        figsize=(2.5 * len(columns), 2.6 * len(images) + 0.3 + 0.22 * legend_rows),
        squeeze=False,
        layout="constrained",
    )
    for row, image in enumerate(images):
        picture = np.rint(image[channels]).clip(0, 255).astype(np.uint8)
        _picture(axes[row][0], picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0))
        axes[row][0].set_title(_short(titles[row]), fontsize=8, parse_math=False)
        found = [truths[row], *(predicted[row] for predicted in predictions.values())]
        for axis, title, classes in zip(axes[row][1:], columns[1:], found, strict=True):
            _picture(axis, coloured(classes, values))
            counted = truths[row] != IGNORED
            correct = (
                f", {100 * float((classes == truths[row])[counted].mean()):.0f} % correct" if counted.any() else ""
            )
            axis.set_title(title if title == "ground truth" else f"{title}{correct}", fontsize=9)
    _legend(figure, truths, list(predictions.values()), values, names)
    save_figure(figure, path)


def _picture(axis: Any, picture: np.ndarray) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _legend(
    figure: Any,
    truths: Sequence[np.ndarray],
    predictions: Sequence[Sequence[np.ndarray]],
    values: Sequence[int],
    names: Sequence[str],
) -> None:
    shown = np.concatenate([np.ravel(classes) for part in (truths, *predictions) for classes in part])
    pixels = np.bincount(shown[shown != IGNORED], minlength=len(values))
    largest = [int(i) for i in np.argsort(-pixels, kind="stable")[:NAMED] if pixels[i]]
    handles = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*class_colour(values[i])),
            edgecolor="0.3",
            label=_short(names[i], 24),
        )
        for i in sorted(largest)
    ]
    if (shown == IGNORED).any():
        handles.append(Patch(facecolor="white", edgecolor="0.3", label="ignored"))
    more = int((pixels > 0).sum()) - len(largest)
    title = f"and {more} more classes" if more > 0 else None
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, title=title, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a class may be named a$b


def _short(text: str, most: int = 36) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
