"""What a person reads: a line at the end of each stage, and the report of a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Recipe
from pipeline.costs import Spent, scaled, together
from pipeline.evaluation_report import evaluation_tables, verdict
from pipeline.progress import duration
from pipeline.tables import table as _table
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
        f"picture: {folder / result['reconstruction']}{_parts(result.get('parts', []))}"
    )


def _parts(parts: Sequence[Mapping[str, float]]) -> str:
    """What each image size has cost, where there were several."""
    if len(parts) < 2:
        return ""
    lines = [
        f"\n  {part['image_size']} px: {part['images_seen']:,} images, {scaled(part['flops'], 1000)}FLOP, "
        f"{scaled(part['bytes_read'], 1024)}B read, {duration(part['wall_clock_s'])}"
        for part in parts
    ]
    return "".join(lines)


def evaluate_lines(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What evaluate measured and where it is."""
    files = ", ".join(["result.json", *result["files"]])
    return f"{evaluation_tables(result)}\n\nevaluate: → {recipe.stage_dir('evaluate')}: {files} ({result['state']})"


def finetune_line(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What fine-tuning reached, and where it is."""
    values = result["measured"]
    named = [values[f"eval/finetune_top1{end}"] for end in ("", "_low", "_high")]
    top1, low, high = (f"{value:.1f}" for value in named)
    return (
        f"finetune: top-1 {top1} % ({low} to {high}, {result['val_images']:,} val images, {result['classes']} classes) of "
        f"{result['encoder']}\nfinetune: → {recipe.stage_dir('finetune')}: result.json, classes.csv, confusion.csv; "
        f"classifier for timm in {result['model']} ({result['state']})"
    )


def segment_lines(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What segmentation measured, on what, and where it is."""
    rows = []
    for subject, title in result["titles"].items():
        values = result["measured"][subject]
        cells = (
            f"{values[name]:.1f} ({values[f'{name}_low']:.1f} to {values[f'{name}_high']:.1f})"
            for name in ("eval/segment_miou", "eval/segment_pixel_accuracy")
        )
        rows.append((title, *cells))
    table = _table(("", "mIoU % (95 % interval)", "pixel accuracy %"), rows)
    rejected = f", {result['rejected']} rejected (see rejected.csv)" if result["rejected"] else ""
    left_out = f", {result['left_out']:,} left out (segment.max_images)" if result["left_out"] else ""
    unseen = result["classes_only_in_val"]
    lacking = f" Train lacks {', '.join(unseen[:5])}: never predicted, and counted." if unseen else ""
    return (
        f"{table}\n\n{result['classes']} classes, heads fitted to {result['train_images']:,} images and judged on "
        f"{result['val_images']:,} ({result['layout']}{rejected}{left_out}).{lacking}\n"
        f"segment: → {recipe.stage_dir('segment')}: result.json, classes.csv, confusion.csv, segmentation.png "
        f"({result['state']})"
    )


def tune_lines(result: Mapping[str, Any]) -> str:
    """The sweep's table and where it is."""
    return (
        f"{_sweep_table(result)}\n"
        f"tune: {len(result['trials'])} trials → {result['table']}, picture {result['figure']}, "
        f"best settings as a recipe {result['best_recipe']} ({result['state']})"
    )


def export_line(result: Mapping[str, Any]) -> str:
    """What export wrote where."""
    parts = [result["encoder"]]
    if "onnx" in result:
        parts.append(result["onnx"]["path"])
    if "registered" in result:
        parts.append(
            f"version {result['registered']['version']} of the registered model {result['registered']['name']}"
        )
    return f"export: encoder → {', '.join(parts)} ({result['state']})"


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
    parts += ["## Frozen features", "", evaluation_tables(evaluated), "", verdict(evaluated), ""]
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
    parts.append(_cost_line(results))
    parts.append(f"Seconds: {timing}; together {sum(seconds.values()):.0f}.")
    text = "\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _cost_line(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What all stages have cost together, attempts that were cut off included, and pretraining's share."""
    costs = {stage: Spent.of(result["cost"]) for stage, result in results.items() if "cost" in result}
    return f"Cost of all stages: {together(costs.values())}; of pretraining: {costs.get('pretrain', Spent())}."


def _loss_table(history: Sequence[Mapping[str, float]]) -> str:
    first, last = history[0], history[-1]
    names = [name for name in first if name != "epoch"]
    rows = [
        (name.removeprefix("train/loss_").replace("level", "level "), f"{first[name]:.3f}", f"{last[name]:.3f}")
        for name in names
    ]
    return _table(("", f"epoch {first['epoch']:.0f}", f"epoch {last['epoch']:.0f}"), rows)


def _sweep_table(result: Mapping[str, Any]) -> str:
    objective = result["objective"]
    header = ("trial", *result["parameters"], objective.removeprefix("eval/"))
    rows = []
    for number, trial in enumerate(result["trials"], 1):
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (trial[key] for key in result["parameters"])]
        outcome = trial.get("error") or f"{trial[objective]:.2f}"
        rows.append((str(number), *values, outcome))
    return _table(header, rows)
