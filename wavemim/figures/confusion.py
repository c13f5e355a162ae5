"""Figure of a confusion matrix, for a few classes or a thousand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wavemim.figures.plots import plt, save_figure

NAMED, COUNTED = 40, 20  # classes up to which names, and numbers in the cells, are legible


def confusion_figure(path: Path, matrix: np.ndarray, names: list[str], *, title: str) -> None:
    """Draw a confusion matrix in percent of each true class.

    Args:
        path: The PNG file to write.
        matrix: Counts (c, c), rows are true classes.
        names: The names of the c classes.
        title: The figure's title.
    """
    classes = len(matrix)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = float(np.clip(0.34 * classes + 1.6, 4, 9))
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    # Most cells off the diagonal are nearly empty: colours follow the square root.
    image = axis.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=10, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.046)
    bar.set_ticks([0, 10**0.5, 5, 50**0.5, 10], labels=["0", "10", "25", "50", "100"])
    bar.set_label("% of the true class")
    if classes <= NAMED:
        shown = [name if len(name) <= 20 else name[:19] + "…" for name in names]
        axis.set_xticks(range(classes), shown, rotation=90, fontsize=8)
        axis.set_yticks(range(classes), shown, fontsize=8)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)  # a class may be named a$b
    if classes <= COUNTED:
        for row in range(classes):
            for column in range(classes):
                dark = shares[row, column] > 40
                axis.text(
                    column,
                    row,
                    f"{shares[row, column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(title, fontsize=9, parse_math=False)
    save_figure(figure, path)
