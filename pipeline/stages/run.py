"""`wavemim run` and `wavemim demo`: all stages in order, and a report at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import with_overrides
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError
from pipeline.evaluation.tables import evaluation_tables, verdict
from pipeline.images.demo import write_demo_images
from pipeline.runtime import interrupts
from pipeline.runtime.formatting import table
from pipeline.runtime.usage import Spent, together
from pipeline.stages import evaluate, export, prepare, pretrain, tune
from pipeline.stages.sequence import Stage, run_stages
from pipeline.storage.folder import Folder
from pipeline.tracking.tracker import ui_command

STAGES: dict[str, Stage] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "tune": tune,
    "export": export,
}


def run(recipe: Recipe, *, progress: bool = True, say: Callable[[str], object] = print) -> None:
    """Prepare, pretrain, evaluate, tune and export; then write the report.

    Args:
        recipe: The settings.
        progress: Whether progress bars are shown.
        say: Called with the summary of each stage, and with the report.

    Raises:
        SettingError: The settings or the inputs cannot be used.
        StageError: A stage could not finish.
    """
    outcome = run_stages(STAGES, recipe, progress=progress, say=say)
    with interrupts.during("report", restarts=recipe.restart):
        say(f"\n{write_report(recipe, outcome.results, outcome.seconds)}")


def demo(recipe: Recipe, *, progress: bool = True, say: Callable[[str], object] = print) -> None:
    """As `run`, on labelled images that are generated first unless the recipe names images."""
    if recipe.home is not None:
        raise SettingError(
            f"out={recipe.home}: demo draws its images into a local folder; give one, or use wavemim run"
        )
    if recipe.images is None:
        folder = Path(recipe.out) / "images"
        with interrupts.during("images"):
            write_demo_images(folder, progress=progress)
        recipe = with_overrides(recipe, {"images": str(folder)})
    run(recipe, progress=progress, say=say)


def write_report(recipe: Recipe, results: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> str:
    """Write the report of all stages as report.md into the run's folder.

    Args:
        recipe: The settings.
        results: Results of the stages by name.
        seconds: Durations of the stages by name.

    Returns:
        The report, as Markdown.
    """
    prepared, pretrained, evaluated = results["prepare"], results["pretrain"], results["evaluate"]
    folder, counts, place = recipe.run_dir, prepared["counts"], recipe.place_of
    parts = [f"# {recipe.name}: report", ""]
    parts.append(
        f"Images: {counts['kept']:,} of {counts['inputs']:,} kept, {counts['rejected']:,} rejected ({recipe.images})."
    )
    if found := prepared.get("layout"):
        parts.append(f"Found: {found}.")
    if (cropped := prepared.get("cropped_share")) is not None:
        parts.append(f"The central squares were stored: {cropped:.1%} of the pixels were cropped away.")
    parts += [f"Warning: {note}." for note in prepared.get("notes", ())]
    if not evaluated["labelled"]:
        parts.append("There are no labelled val images, so what needs labels (linear probe, kNN) was skipped.")
    if results["tune"]["objective"].endswith("rankme"):
        parts.append("The sweep's objective is RankMe, the effective rank of the features.")
    parts += ["", "## Loss on hidden cells, per level", "", _loss_table(pretrained["history"]), ""]
    parts += ["## Frozen features", "", evaluation_tables(evaluated), "", verdict(evaluated), ""]
    parts += ["## Sweep", "", tune.sweep_table(results["tune"]), ""]
    rows = [
        ("reconstruction picture", place(folder / "pretrain" / pretrained["reconstruction"])),
        ("sweep picture", place(results["tune"]["figure"])),
        ("best settings as a recipe", place(results["tune"]["best_recipe"])),
        ("exported weights", place(results["export"]["weights"])),
        ("this report", place(folder / "report.md")),
    ]
    parts += ["## Files", "", table(("what", "where"), rows), ""]
    copied = "" if recipe.home is None else f", where {results['export']['encoder']} is copied to"
    parts += [f"In Python{copied}:", "", f"    import timm; encoder = {results['export']['load']}", ""]
    parts += ["Everything in MLflow's UI:", "", f"    {ui_command(recipe)}", ""]
    timing = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    parts.append(_cost_line(results))
    parts.append(f"Seconds: {timing}; total {sum(seconds.values()):.0f}.")
    text = "\n".join(parts) + "\n"
    Folder.at(place(folder)).write("report.md", text.encode())
    return text


def _cost_line(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Total cost of all stages, interrupted attempts included, and that of pretraining."""
    costs = {stage: Spent.of(result["cost"]) for stage, result in results.items() if "cost" in result}
    return f"Cost of all stages: {together(costs.values())}; of pretraining: {costs.get('pretrain', Spent())}."


def _loss_table(history: Sequence[Mapping[str, float]]) -> str:
    first, last = history[0], history[-1]
    names = [name for name in first if name != "epoch"]
    rows = [
        (name.removeprefix("train/loss_").replace("level", "level "), f"{first[name]:.3f}", f"{last[name]:.3f}")
        for name in names
    ]
    return table(("", f"epoch {first['epoch']:.0f}", f"epoch {last['epoch']:.0f}"), rows)
