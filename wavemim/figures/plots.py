"""Figures of sweeps, losses and pyramids, and helpers for all figures."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from wavemim.atomic import new_file

matplotlib.use("Agg")

DPI = 110


def sweep_figure(path: Path, trials: Sequence[Mapping[str, Any]], *, parameters: Sequence[str], metric: str) -> None:
    """Draw one panel per searched setting: the objective of each trial against the setting's value.

    The best trial is marked.

    Args:
        path: The PNG file to write.
        trials: Values of the settings and the metric of each trial; trials without the metric are skipped.
        parameters: Names of the searched settings.
        metric: Name of the objective.
    """
    done = [trial for trial in trials if isinstance(trial.get(metric), int | float) and np.isfinite(trial[metric])]
    shown = [name for name in parameters if any(name in trial for trial in done)] or list(parameters)
    figure, axes = plt.subplots(
        1, max(len(shown), 1), figsize=(2.9 * max(len(shown), 1), 3), squeeze=False, sharey=True, layout="constrained"
    )
    best = max(done, key=lambda trial: trial[metric]) if done else None
    for axis, name in zip(axes[0], shown, strict=False):
        values = [trial.get(name) for trial in done]
        if any(isinstance(value, str) for value in values):
            values = [str(value) for value in values]
        axis.scatter(values, [trial[metric] for trial in done], s=36, color="#4477aa")
        if best is not None:
            mark = best.get(name)
            axis.scatter(
                [str(mark) if any(isinstance(value, str) for value in values) else mark],
                [best[metric]],
                s=110,
                facecolors="none",
                edgecolors="#cc3311",
                linewidths=2,
            )
        numbers = [value for value in values if isinstance(value, int | float) and value > 0]
        if numbers and max(numbers) / min(numbers) > 20:
            axis.set_xscale("log")
        elif numbers:
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(metric)
    save_figure(figure, path)


def loss_figure(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draw the loss of each level against the epoch.

    Args:
        path: The PNG file to write.
        history: For each epoch its number ("epoch") and losses ("train/loss_…").
    """
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name in history[0]:
        if name != "epoch":
            label = name.removeprefix("train/loss_").replace("level", "level ")
            axis.plot([line["epoch"] for line in history], [line[name] for line in history], label=label, marker=".")
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss on hidden positions")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, completely or not at all, and close it."""
    try:
        with new_file(path) as partial, warnings.catch_warnings():  # about names in scripts that the font lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(partial, format="png", dpi=DPI)
    finally:
        plt.close(figure)


def shown_channels(channels: int) -> tuple[list[int], str]:
    """Choose the channels that a picture shows.

    Args:
        channels: Channels of the images.

    Returns:
        Indices of the channels (one for grey, three for colour), and a note for the title; empty for RGB images.
    """
    if channels == 3:
        return [0, 1, 2], ""
    if channels < 3:
        return [0], " (grey)" if channels == 1 else " (the first of 2 channels, as grey)"
    return [0, 1, 2], f" (the first 3 of {channels} channels, as red, green, blue)"


def pyramid_figure(
    path: Path,
    *,
    images: Sequence[np.ndarray],
    pyramids: Sequence[Mapping[int, np.ndarray]],
    titles: Sequence[str],
    energies: Mapping[str, float],
    energy_of: str,
) -> None:
    """Draw images, their pyramids as nested quadrants, and the energy of each level.

    Args:
        path: The PNG file to write.
        images: Images (C, H, W) in [0, 255].
        pyramids: The pyramid {level: (C, K, h, w)} of each image. Details are scaled level by level around mid-grey.
        titles: The images' titles.
        energies: {label of a bar: share of `energy_of`, from 0 to 1}.
        energy_of: What the energies are shares of, for the title.
    """
    channels, note = shown_channels(images[0].shape[0])
    levels = sorted(pyramids[0], reverse=True)
    gains = {level: _gain([pyramid[level][channels, -3:] for pyramid in pyramids]) for level in levels}
    width = max(3.0 * len(images), 7.5)
    figure = plt.figure(figsize=(width, 9.6), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(3.3, 3.6, 2.7))
    top, middle, bottom = parts
    top.suptitle(f"Images reconstructed from the shards{note}", fontsize=11)
    scales = ", ".join(
        f"level\N{NO-BREAK SPACE}{level}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{gain:.2g}"
        for level, gain in gains.items()
    )
    words = (
        "Their pyramids: at each level, coarser levels top left, H top right, V bottom left, D bottom right; the "
        f"approximation A in the corner. Mid-grey is 0. Details are amplified: {scales}"
    )
    middle.suptitle(textwrap.fill(words, int(width * 14)), fontsize=9)
    upper, lower = (part.subplots(1, len(images), squeeze=False)[0] for part in (top, middle))
    for axis, image, title in zip(upper, images, titles, strict=True):
        _picture(axis, image[channels])
        short = title if len(title) <= 36 else f"{title[:35]}…"
        axis.set_title(short, fontsize=9, parse_math=False)
    for axis, pyramid in zip(lower, pyramids, strict=True):
        _picture(axis, nested({level: pyramid[level][channels] for level in levels}, gains))
        _level_borders(axis, images[0].shape[-1], len(levels))
    _energy_bars(bottom.subplots(), energies, energy_of)
    save_figure(figure, path)


def nested(pyramid: Mapping[int, np.ndarray], gains: Mapping[int, float]) -> np.ndarray:
    """Arrange a pyramid as one picture of nested quadrants: A and H above V and D.

    Args:
        pyramid: {level: (C, K, h, w)}.
        gains: {level: factor of its details}.

    Returns:
        (C, H, W) with values in about [0, 255].
    """
    coarsest = max(pyramid)
    picture = pyramid[coarsest][:, 0] / 2**coarsest  # A is 2^level times the mean of the pixels
    for level in range(coarsest, 0, -1):
        h, v, d = np.moveaxis(127.5 + pyramid[level][:, -3:] * gains[level], 1, 0)
        upper, lower = np.concatenate((picture, h), -1), np.concatenate((v, d), -1)
        picture = np.concatenate((upper, lower), -2)
    return picture


def _gain(details: Sequence[np.ndarray]) -> float:
    """A factor that makes details visible: their 99th percentile fills most of the range; 1 if there are none."""
    peak = float(np.quantile(np.abs(np.stack(details)), 0.99))
    return 100.0 / peak if peak > 1e-6 else 1.0


def _picture(axis: Any, values: np.ndarray) -> None:
    picture = np.rint(values).clip(0, 255).astype(np.uint8)
    axis.imshow(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
    axis.axis("off")


def _level_borders(axis: Any, side: int, levels: int) -> None:
    for level in range(1, levels + 1):
        middle, end = (side >> level) - 0.5, (side >> (level - 1)) - 0.5
        line = {"color": "#cc3311", "linewidth": 1 if level <= 2 else 0.6}
        axis.plot([-0.5, end], [middle, middle], **line)
        axis.plot([middle, middle], [-0.5, end], **line)
        if level <= 2:  # further in there is no room for labels
            pad = side / 100
            for band, x, y in (("H", middle, 0), ("V", 0, middle), ("D", middle, middle)):
                axis.text(
                    x + pad,
                    y + pad,
                    f"{level} {band}",
                    fontsize=7,
                    va="top",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
                )
    axis.set_xlim(-0.5, side - 0.5)
    axis.set_ylim(side - 0.5, -0.5)


def _energy_bars(axis: Any, energies: Mapping[str, float], energy_of: str) -> None:
    shares = [100 * share for share in energies.values()]
    bars = axis.bar(range(len(shares)), shares, width=0.6, color="#4477aa")
    axis.bar_label(bars, [f"{share:.3g} %" for share in shares], padding=2, fontsize=9)
    axis.set_xticks(range(len(shares)), list(energies))
    axis.set_ylabel("% (log scale)")
    axis.set_title(f"Share of {energy_of}", fontsize=11)
    seen = [share for share in shares if share > 0]
    if seen and max(seen) > 30 * min(seen):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(min(seen) / 3, max(seen) * 4)
    else:
        axis.set_ylabel("%")
        axis.set_ylim(0, max([*seen, 1]) * 1.15)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
