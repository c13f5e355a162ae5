"""All stages in a row, each as it would be called by itself, and the report at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from pipeline.config.recipe import Recipe
from pipeline.evaluation.tables import evaluation_tables, verdict
from pipeline.images.sources import check_source
from pipeline.models.build import check_model
from pipeline.runtime.formatting import table as _table
from pipeline.runtime.ray_session import ray_session
from pipeline.runtime.usage import Spent, together
from pipeline.stages.tune import read_space, sweep_table
from pipeline.tracking.tracker import ui_command


def run(recipe: Recipe, *, progress: bool = True) -> str:
    """Prepare, pretrain, evaluate, tune, export; write and return the"""
    from pipeline.stages import pretrain as pretraining
    from pipeline.stages.evaluate import evaluate, evaluate_lines
    from pipeline.stages.export import check_export, export, export_line
    from pipeline.stages.prepare import prepare, prepare_line
    from pipeline.stages.tune import tune, tune_lines

    check_model(recipe)
    check_source(recipe.images)
    read_space(recipe)
    check_export(recipe)
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    results: dict[str, dict[str, Any]] = {}

    def stage(name: str, result: dict[str, Any], line: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())
        results[name] = result
        click.echo(line)

    with ray_session(recipe.cluster) as session:
        seconds["start"] = time.perf_counter() - began
        prepared = prepare(recipe, progress=progress)
        stage("prepare", prepared, prepare_line(prepared))
        pretrained = pretraining.run(recipe, session, pretraining.check(recipe), progress=progress)
        stage("pretrain", pretrained, pretraining.summary(recipe, pretrained))
        evaluated = evaluate(recipe, session, progress=progress)
        stage("evaluate", evaluated, evaluate_lines(recipe, evaluated))
        tuned = tune(recipe, session, progress=progress)
        stage("tune", tuned, tune_lines(tuned))
    exported = export(recipe)
    stage("export", exported, export_line(exported))
    text = write(recipe, results, seconds)
    return f"\n{text}"


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
    parts += ["## Sweep", "", sweep_table(results["tune"]), ""]
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
