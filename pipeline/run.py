"""All stages in a row, each as it would be called by itself, and the report at the end."""

from __future__ import annotations

import time
from typing import Any

import click

import pipeline.report as report
from pipeline.build import check_model
from pipeline.config import Recipe
from pipeline.session import ray_session
from pipeline.sources import check_source
from pipeline.tune import read_space


def run(recipe: Recipe, *, progress: bool = True) -> str:
    """Prepare, pretrain, evaluate, tune, export; write and return the report."""
    from pipeline.evaluate import evaluate
    from pipeline.export import check_export, export
    from pipeline.prepare import prepare
    from pipeline.pretrain import pretrain
    from pipeline.tune import tune

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
        stage("prepare", prepared, report.prepare_line(prepared))
        pretrained = pretrain(recipe, session, progress=progress)
        stage("pretrain", pretrained, report.pretrain_line(recipe, pretrained))
        evaluated = evaluate(recipe, session, progress=progress)
        stage("evaluate", evaluated, report.evaluate_lines(recipe, evaluated))
        tuned = tune(recipe, session, progress=progress)
        stage("tune", tuned, report.tune_lines(tuned))
    exported = export(recipe)
    stage("export", exported, report.export_line(exported))
    text = report.write(recipe, results, seconds)
    return f"\n{text}"
