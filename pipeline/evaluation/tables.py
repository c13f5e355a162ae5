"""Tables and figures of an evaluation: per-class results, confusion matrices and the report."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.images.plan import some_of
from pipeline.runtime.formatting import table
from wavemim.evaluation.metrics import class_table
from wavemim.figures.confusion import confusion_figure

POOLS = {"mean": "mean of the patch tokens", "token": "class token"}
COLUMNS = ("class", "n", "correct", "accuracy", "low", "high", "encoder")


def write_tables(
    folder: Path, matrices: Mapping[str, Mapping[str, np.ndarray]], names: list[str], titles: Mapping[str, str]
) -> list[Path]:
    """Write per-class results and confusion matrices.

    ``classes_PROTOCOL.csv`` has the accuracy within each class for every encoder, in percent with 95 % Wilson
    intervals. ``confusion_PROTOCOL.csv`` and ``.png`` are the confusion matrix of the trained encoder, with true
    classes in rows and predicted classes in columns.

    Args:
        folder: Where the files are written.
        matrices: {protocol: {encoder: confusion matrix (c, c)}}.
        names: Class names.
        titles: {encoder: title}, in the order of the tables.

    Returns:
        The files written.
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
    """A percentage with two decimals; empty for a class without images."""
    return f"{value:.2f}" if np.isfinite(value) else ""


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def evaluation_tables(result: Mapping[str, Any]) -> str:
    """The report of an evaluation as text: metrics of every encoder, blocks of the trained one, and numbers of images.

    Args:
        result: The result of the stage `evaluate`.
    """
    titles, measured = result["titles"], result["measured"]
    parts = [
        table(
            ("", *titles.values()), [(name, *cells) for name, cells in _rows(titles, measured, result.get("pools", ()))]
        )
    ]
    if not result["labelled"]:
        return parts[0]
    if curve := _curve(titles, measured):
        parts += [f"kNN by number of neighbours, top-1 %:\n\n{curve}"]
    if blocks := _blocks(measured["trained"]):
        parts += [f"Linear probe of each block of the {titles['trained']} (pooled patch tokens):\n\n{blocks}"]
    parts.append(
        f"Top-1 in percent with 95 % intervals over the val images. {result['classes']} classes, probes fitted to "
        f"{result['train_images']:,} train images, evaluated on {result['val_images']:,} val images."
    )
    if missing := result.get("classes_without_val"):
        share = len(missing) / result["classes"]
        parts.append(f"{share:.0%} of the classes have no image in val, and are not evaluated: {some_of(missing)}.")
    fitted = next(
        (found["eval/attentive_images"] for found in measured.values() if "eval/attentive_images" in found), 0
    )
    if 0 < fitted < result["train_images"]:
        parts.append(f"The attentive probe was fitted to {fitted:,.0f} of them (evaluate.attentive_images).")
    open_ended = [
        titles[which]
        for which in titles
        if any(
            key.startswith("eval/linear") and "_converged" in key and value == 0
            for key, value in measured[which].items()
        )
    ]
    if open_ended:
        parts.append(
            f"The linear probe of {' and '.join(open_ended)} did not converge, so that its accuracy is an "
            "approximate lower bound; raise evaluate.probe_iterations."
        )
    return "\n\n".join(parts)


def verdict(result: Mapping[str, Any]) -> str:
    """One line on what pretraining gains over the untrained encoder; empty without a linear probe."""
    values = [result["measured"][which] for which in ("trained", "untrained")]
    if any("eval/linear_top1" not in found for found in values):
        return ""
    trained, untrained = values
    untrained_title = result["titles"]["untrained"]
    gain = trained["eval/linear_top1"] - untrained["eval/linear_top1"]
    if trained["eval/linear_top1_low"] > untrained["eval/linear_top1_high"]:
        return f"Pretraining gains {gain:+.1f} points over the {untrained_title}; the intervals do not overlap."
    return (
        f"Pretraining gains {gain:+.1f} points over the {untrained_title}, but the intervals overlap: no clear benefit."
    )


def _rows(
    titles: Mapping[str, str], measured: Mapping[str, Mapping[str, float]], pools: Sequence[str]
) -> list[tuple[str, list[str]]]:
    names = {}
    for protocol, name in (("linear", "linear probe"), ("attentive", "attentive probe"), ("knn", "kNN")):
        pooled = pools if protocol != "attentive" else ()
        names[f"eval/{protocol}_top1"] = f"{name}, {POOLS[pooled[0]]}" if pooled else name
        names |= {f"eval/{protocol}_{pool}_top1": f"{name}, {POOLS[pool]}" for pool in pooled[1:]}
    rows = [
        (name, [_interval(measured[which], key) for which in titles])
        for key, name in names.items()
        if any(key in measured[which] for which in titles)
    ]
    few = [
        key.removesuffix("_std") for key in measured["trained"] if key.startswith("eval/few") and key.endswith("_std")
    ]
    for key in few:
        share, labels = key.removeprefix("eval/few").removesuffix("_top1"), measured["trained"][f"{key}_labels"]
        name = f"linear probe, {share} % of the labels ({labels:,.0f}): mean (worst to best draw)"
        rows.append((name, [_spread(measured[which], key) for which in titles]))
    for key, name in (("eval/rankme", "RankMe"), ("eval/alpha_req", "alpha-ReQ")):
        if any(key in measured[which] for which in titles):
            rows.append((name, [_number(measured[which], key, 2 if key.endswith("req") else 1) for which in titles]))
    return rows


def _curve(titles: Mapping[str, str], measured: Mapping[str, Mapping[str, float]]) -> str:
    start = "eval/knn_top1_k"
    ks = [name.removeprefix(start) for name in measured["trained"] if name.startswith(start)]
    ks = [k for k in ks if k.isdigit()]  # without the bounds of intervals
    rows = [(titles[which], *(_number(measured[which], f"{start}{k}") for k in ks)) for which in titles]
    return table(("k", *ks), rows) if len(ks) > 1 else ""


def _blocks(values: Mapping[str, float]) -> str:
    best = values.get("eval/best_block")
    if best is None:
        return ""
    rows, number = [], 1
    while f"eval/linear_top1_block{number}" in values:
        mark = " (best on train)" if number == best else ""
        held_out = _number(values, f"eval/linear_heldout_block{number}")
        rows.append((f"{number}{mark}", held_out, _interval(values, f"eval/linear_top1_block{number}")))
        number += 1
    return table(("block", "held-out part of train", "val"), rows)


def _interval(values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return "–"
    return f"{values[key]:.1f} ({values[f'{key}_low']:.1f} to {values[f'{key}_high']:.1f})"


def _spread(values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return "–"
    return f"{values[key]:.1f} ({values[f'{key}_min']:.1f} to {values[f'{key}_max']:.1f})"


def _number(values: Mapping[str, float], key: str, digits: int = 1) -> str:
    return f"{values[key]:.{digits}f}" if key in values else "–"
