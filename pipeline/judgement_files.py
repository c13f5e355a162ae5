"""Tables and pictures of what was judged: a line a class, and confusion matrices."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from wavemim.confusion_figure import confusion_figure
from wavemim.measures import class_table

COLUMNS = ("class", "n", "correct", "accuracy", "low", "high", "encoder")


def write_tables(
    folder: Path, matrices: Mapping[str, Mapping[str, np.ndarray]], names: list[str], titles: Mapping[str, str]
) -> list[Path]:
    """Write what `matrices` {protocol: {encoder: (c, c)}} say into `folder`; gives the files.

    ``classes_PROTOCOL.csv``: accuracy within each class, in percent with its 95 % Wilson interval, of every encoder.
    ``confusion_PROTOCOL.csv`` and ``.png``: of the trained encoder, true classes down and predicted ones across.
    """
    written = []
    for protocol, of_encoders in matrices.items():
        table, matrix, picture = (
            folder / name
            for name in (f"classes_{protocol}.csv", f"confusion_{protocol}.csv", f"confusion_{protocol}.png")
        )
        encoders = [which for which in titles if which in of_encoders]
        lines = [
            (line.name, line.n, line.correct, *(_text(v) for v in (line.accuracy, line.low, line.high)), which)
            for which in encoders
            for line in class_table(of_encoders[which], names)
        ]
        _write(table, COLUMNS, lines)
        trained = of_encoders["trained"]
        _write(
            matrix,
            ("class", *names),
            ([name, *row] for name, row in zip(names, trained.tolist(), strict=True)),
        )
        right = 100 * trained.trace() / max(trained.sum(), 1)
        title = f"{protocol}: {right:.1f} % of {trained.sum():,} images"
        confusion_figure(picture, trained, names, title=title)
        written += [table, matrix, picture]
    return written


def _text(value: float) -> str:
    """Percent with two digits; nothing where a class has no images."""
    return f"{value:.2f}" if np.isfinite(value) else ""


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
