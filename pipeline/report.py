"""What a person reads: a line at the end of each stage, and the report of a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Recipe
from pipeline.evaluate import SUBJECTS
from pipeline.tracking import ui_command


def prepare_line(result: Mapping[str, Any]) -> str:
    """What prepare wrote where."""
    counts = result["counts"]
    rejected = f", {counts['rejected']} rejected (see rejected.parquet)" if counts["rejected"] else ""
    labels = f"{result['classes']} classes" if result["classes"] else "unlabelled"
    found = result.get("layout", labels)  # what the folder was taken for: a wrong guess should not pass in silence
    return f"prepare: {counts['kept']:,} images ({found}){rejected} → {result['path']} ({result['state']})"


def pretrain_line(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What pretrain wrote where."""
    folder = recipe.stage_dir("pretrain")
    return (
        f"pretrain: {result['images_seen']:,} images seen → {folder / result['checkpoint']} ({result['state']}); "
        f"picture: {folder / result['reconstruction']}"
    )


def evaluate_lines(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What evaluate measured and where it is."""
    where = recipe.stage_dir("evaluate") / "result.json"
    return f"{_evaluation_table(result)}\nevaluate: → {where} ({result['state']})"


def tune_lines(result: Mapping[str, Any]) -> str:
    """The sweep's table and where it is."""
    return (
        f"{_sweep_table(result)}\n"
        f"tune: {len(result['trials'])} trials → {result['table']}, picture {result['figure']}, "
        f"best settings as a recipe {result['best_recipe']} ({result['state']})"
    )


def export_line(result: Mapping[str, Any]) -> str:
    """What export wrote where."""
    return f"export: encoder → {result['encoder']} ({result['state']})"


def write(recipe: Recipe, results: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> str:
    """The report of a whole run, as text; also kept as report.md in the run's folder."""
    prepared, pretrained, evaluated = results["prepare"], results["pretrain"], results["evaluate"]
    folder = recipe.run_dir
    parts = [f"# {recipe.name}: report", ""]
    counts = prepared["counts"]
    parts.append(
        f"Images: {counts['kept']:,} of {counts['inputs']:,} kept, {counts['rejected']:,} rejected ({recipe.images})."
    )
    if not evaluated["labelled"]:
        parts.append("There are no labelled val images: what needs them (linear probe, kNN) is left out.")
    if results["tune"]["objective"].endswith("rankme"):
        parts.append("The sweep's objective is RankMe, the effective rank of the features.")
    parts += ["", "## Loss on hidden cells, per level", "", _loss_table(pretrained["history"]), ""]
    parts += ["## Frozen features", "", _evaluation_table(evaluated), "", _verdict(evaluated), ""]
    parts += ["## Sweep", "", _sweep_table(results["tune"]), ""]
    rows = [
        ("reconstruction picture", folder / "pretrain" / pretrained["reconstruction"]),
        ("sweep picture", results["tune"]["figure"]),
        ("best settings as a recipe", results["tune"]["best_recipe"]),
        ("exported weights", results["export"]["weights"]),
        ("this report", folder / "report.md"),
    ]
    parts += ["## Where things are", "", _table(("what", "where"), rows), ""]
    parts += ["In Python:", "", f"    import timm; encoder = {results['export']['load']}", ""]
    parts += ["Everything in MLflow's UI:", "", f"    {ui_command(recipe)}", ""]
    timing = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    parts.append(f"Seconds: {timing}; together {sum(seconds.values()):.0f}.")
    text = "\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _loss_table(history: Sequence[Mapping[str, float]]) -> str:
    first, last = history[0], history[-1]
    names = [name for name in first if name != "epoch"]
    rows = [
        (name.removeprefix("train/loss_").replace("level", "level "), f"{first[name]:.3f}", f"{last[name]:.3f}")
        for name in names
    ]
    return _table(("", f"epoch {first['epoch']:.0f}", f"epoch {last['epoch']:.0f}"), rows)


def _evaluation_table(result: Mapping[str, Any]) -> str:
    rows = []
    for subject, title in SUBJECTS.items():
        values = result["measured"][subject]
        row = [title]
        if result["labelled"]:
            row.append(
                f"{values['eval/linear_top1']:.1f} ({values['eval/linear_top1_low']:.1f} to {values['eval/linear_top1_high']:.1f})"
            )
            row.append(f"{values['eval/knn_top1']:.1f}")
        row.append(f"{values['eval/rankme']:.1f}")
        rows.append(tuple(row))
    header = (
        ("", "linear probe top-1 % (95 % interval)", "kNN top-1 %", "RankMe") if result["labelled"] else ("", "RankMe")
    )
    table = _table(header, rows)
    if not result["labelled"]:
        return table
    return (
        f"{table}\n\n{result['classes']} classes, probes fitted to {result['train_images']:,} train images, "
        f"judged on {result['val_images']:,} val images."
    )


def _verdict(result: Mapping[str, Any]) -> str:
    if not result["labelled"]:
        return ""
    trained, untrained = (result["measured"][subject] for subject in ("trained", "untrained"))
    gain = trained["eval/linear_top1"] - untrained["eval/linear_top1"]
    if trained["eval/linear_top1_low"] > untrained["eval/linear_top1_high"]:
        return f"Pretraining is worth {gain:+.1f} points over the untrained encoder; the intervals do not overlap."
    return (
        f"Pretraining is worth {gain:+.1f} points over the untrained encoder, within the intervals: not shown to help."
    )


def _sweep_table(result: Mapping[str, Any]) -> str:
    objective = result["objective"]
    header = ("trial", *result["parameters"], objective.removeprefix("eval/"))
    rows = []
    for number, trial in enumerate(result["trials"], 1):
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (trial[key] for key in result["parameters"])]
        outcome = trial.get("error") or f"{trial[objective]:.2f}"
        rows.append((str(number), *values, outcome))
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
