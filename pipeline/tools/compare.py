"""`wavemim compare`: runs side by side, as recorded in MLflow. No Ray in here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline.config.recipe import STAGE_SECTIONS, behaviour_of
from pipeline.errors import SettingError, StageError
from pipeline.runtime.formatting import duration, scaled, table
from pipeline.runtime.usage import PREFIX, Spent
from pipeline.tools.arguments import Output, tracking_uri
from pipeline.tracking import errors, store_uris
from pipeline.tracking import mlflow_client as store
from pipeline.tracking.runs import Run, find
from wavemim.figures.curves import Point, compare_figure

LIMIT = 300.0  # seconds for all requests to MLflow
TRAINING = "pretrain"
CLOCK = f"{PREFIX}wall_clock_s"
NONE = "–"
_TAGS = {
    "wavemim.shards": "shard set (fingerprint)",
    "mlflow.source.git.commit": "commit",
    "wavemim.version": "version",
}
_ACCURACIES = ("eval/linear_top1", "eval/finetune_top1", "monitor/linear_top1", "eval/rankme")
_LOSS = "train/loss"
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {  # title and format
    "images_seen": ("images seen", lambda value: f"{int(value):,}"),
    "wall_clock_s": ("wall-clock", duration),
    "worker_hours": ("CPU core-hours", lambda value: f"{value:.3g}"),
    "gpu_hours": ("GPU-hours", lambda value: f"{value:.3g}"),
    "flops": ("compute", lambda value: f"{scaled(value, 1000)}FLOP"),
    "peak_memory_bytes": ("peak memory per worker", lambda value: f"{scaled(value, 1024)}B"),
    "gpu_peak_memory_bytes": ("peak memory per GPU", lambda value: f"{scaled(value, 1024)}B"),
    "bytes_read": ("bytes read", lambda value: f"{scaled(value, 1024)}B"),
}


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN... [tracking.uri=URI]")
@click.option("--plot", default="compare.png", show_default=True, type=Output(), metavar="FILE.png", help="the plot")
@click.option("--json", "numbers", type=Output(), metavar="FILE", help="write the numbers there too")
@click.option("--metric", multiple=True, metavar="NAME", help="metric to plot  [default: an accuracy and the loss]")
def command(runs: tuple[str, ...], plot: str, numbers: str | None, metric: tuple[str, ...]) -> None:
    """Compare runs: the settings that differ, metrics with intervals, and cost; all read from MLflow.

    RUN is a run's name (name=), its folder (OUT/runs/NAME), or the name or id of an MLflow run. Without tracking.uri=
    MLflow's address is that of the folder, MLFLOW_TRACKING_URI, or wavemim-out/mlflow.db. Exit code 1 if MLflow does
    not answer.
    """
    names = [run for run in runs if not run.startswith("tracking.")]
    uri = tracking_uri([run for run in runs if run.startswith("tracking.")], "compare")
    if not names:
        raise SettingError("compare needs one or more runs: names, folders (OUT/runs/NAME) or ids of MLflow runs")
    file = Path(numbers) if numbers else None
    click.echo(compare(names, uri=uri, plot=Path(plot), numbers=file, metrics=metric))


def compare(
    names: Sequence[str],
    *,
    uri: str | None = None,
    plot: Path | None = None,
    numbers: Path | None = None,
    metrics: Sequence[str] = (),
) -> str:
    """Compare runs.

    Args:
        names: Names, folders or ids of runs.
        uri: MLflow's address; None: that of the folder, MLFLOW_TRACKING_URI, or wavemim-out/mlflow.db.
        plot: A PNG that curves are drawn to, if not None.
        numbers: A JSON file that the numbers are written to, if not None.
        metrics: Metrics to plot; empty: an accuracy and the loss.

    Returns:
        The comparison as Markdown.

    Raises:
        SettingError: A run or a metric is unknown.
        StageError: MLflow does not answer, or refuses.
    """
    for path in (plot, numbers):
        if path is not None and not path.absolute().parent.is_dir():
            raise SettingError(f"{path}: the folder {path.absolute().parent} does not exist; use another one")
    store.import_mlflow()
    try:
        runs, curves = store.within(LIMIT, lambda: _read(names, uri, metrics, drawn=plot is not None))
    except (SettingError, StageError):
        raise
    except Exception as error:
        verb = "refuses" if errors.refused(error) else "does not answer"
        raise StageError(
            f"MLflow{f' at {store_uris.without_password(uri)}' if uri else ''} {verb}: {errors.reason(error)}"
        ) from error
    content = _content(runs)
    if numbers is not None:
        numbers.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    lines = [_text(content, [run.label for run in runs])]
    if plot is not None:
        if any(points for of_runs in curves.values() for points in of_runs.values()):
            other = any(key.startswith("target.") for key in content["settings"])
            compare_figure(plot, curves, {_LOSS: f"{_LOSS}\n(targets differ: not comparable)"} if other else None)
            lines.append(f"Plot: {plot}")
        else:
            lines.append("No plot: none of the runs has a loss or an accuracy")
    return "\n".join(lines)


def _read(
    names: Sequence[str], uri: str | None, metrics: Sequence[str], *, drawn: bool
) -> tuple[list[Run], dict[str, dict[str, list[Point]]]]:
    runs = find(names, uri)
    there = {name for run in runs for stored in run.stages.values() for name in store.metrics_of(stored)}
    for name in metrics:
        if name not in there:
            known = ", ".join(sorted(key for key in there if _shown(key)))
            raise SettingError(f"--metric {name}: none of the runs has it; they have {known or 'no metrics'}")
    chosen = list(dict.fromkeys(metrics))
    if not chosen:
        chosen = [next((name for name in _ACCURACIES if name in there), ""), _LOSS if _LOSS in there else ""]
    if not drawn:
        return runs, {}
    curves: dict[str, dict[str, list[Point]]] = {name: {} for name in chosen if name}
    for run in runs:
        client = store.connect(run.uri, create=False)
        clock = _clock(client, run)
        for name, of_runs in curves.items():
            of_runs[run.label] = _curve(client, run, name, clock)
    return runs, curves


def _clock(client: Any, run: Run) -> Callable[[int], float | None]:
    """Seconds of pretraining by images seen: as measured, or else from the times at which losses were logged."""
    stored = run.stages.get(TRAINING)
    if stored is None:
        return lambda images: None
    measured = store.history(client, stored.info.run_id, CLOCK)
    if measured:
        steps, seconds = list(measured), [value for value, _ in measured.values()]
    else:
        losses = store.history(client, stored.info.run_id, _LOSS)
        steps, seconds = list(losses), [(at - stored.info.start_time) / 1000 for _, at in losses.values()]
    if not steps:
        return lambda images: None
    return lambda images: float(np.interp(images, [0, *steps], [0.0, *seconds]))


def _curve(client: Any, run: Run, name: str, clock: Callable[[int], float | None]) -> list[Point]:
    stored = next((run.stages[stage] for stage in _by_rank(run) if name in store.metrics_of(run.stages[stage])), None)
    if stored is None:
        return []
    bounds = _bounds(name, store.metrics_of(stored))
    low, high = (store.history(client, stored.info.run_id, bound) for bound in bounds) if bounds else ({}, {})
    return [
        Point(
            images,
            clock(images),
            value,
            (low[images][0], high[images][0]) if images in low and images in high else None,
        )
        for images, (value, _) in store.history(client, stored.info.run_id, name).items()
    ]


def _by_rank(run: Run) -> list[str]:
    """Its stages, by precedence where two have a setting or a metric of the same name."""
    return sorted(run.stages, key=lambda stage: (stage != TRAINING, list(run.stages).index(stage)))


def _bounds(name: str, metrics: Mapping[str, float]) -> tuple[str, str] | None:
    """Names of the bounds of a metric's interval, if it has one: NAME_low, or NAME_low_SUBJECT for NAME_SUBJECT."""
    for at in [len(name), *(index for index in range(len(name) - 1, 0, -1) if name[index] == "_")]:
        low, high = (f"{name[:at]}_{end}{name[at:]}" for end in ("low", "high"))
        if low in metrics and high in metrics:
            return low, high
    return None


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything in the comparison, as JSON values."""
    settings = {run.label: _settings(run) for run in runs}
    # Settings of a stage that one of the runs has not reached yet would all differ.
    sections = set.intersection(*({_section(key) for key in of_run} for of_run in settings.values()))
    keys = sorted({k for of_run in settings.values() for k in of_run if _section(k) in sections}, key=_setting_order)
    differing = {}
    for key in keys:
        values = {label: of_run.get(key) for label, of_run in settings.items()}
        if len(set(values.values())) > 1:
            differing[key] = values
    stages = list(dict.fromkeys(stage for run in runs for stage in _by_rank(run)))
    return {
        "runs": {
            run.label: {
                stage: {"run_id": stored.info.run_id, "name": stored.info.run_name, "status": stored.info.status}
                for stage, stored in run.stages.items()
            }
            for run in runs
        },
        "settings": differing,
        "metrics": {run.label: _metrics(run) for run in runs},
        "cost": {stage: {run.label: _cost(run, stage) for run in runs} for stage in stages},
        "notes": [note for run in runs for note in run.notes],
    }


def _settings(run: Run) -> dict[str, str]:
    """Settings of the stages that were run, by the first stage that has them, and what identifies data and code."""
    settings: dict[str, str] = {}
    for stage in _by_rank(run):
        sections = STAGE_SECTIONS.get("tune" if stage == "trial" else stage)
        for key, value in run.stages[stage].data.params.items():
            section, dot, _ = key.partition(".")
            if behaviour_of(key).compared and (not dot or sections is None or section in sections):
                settings.setdefault(key, value)
    for stage in _by_rank(run):
        tags = run.stages[stage].data.tags
        for tag, title in _TAGS.items():
            if tag in tags:
                settings.setdefault(title, tags[tag])
    return settings


def _section(key: str) -> str:
    section, dot, _ = key.partition(".")
    return section if dot else ""


def _setting_order(key: str) -> tuple[bool, bool, str]:
    return key in _TAGS.values(), "." not in key, key


def _metrics(run: Run) -> dict[str, dict[str, float]]:
    """Last values by name, with the bounds of their intervals."""
    found: dict[str, dict[str, float]] = {}
    for stage in _by_rank(run):
        metrics = store.metrics_of(run.stages[stage])
        ends = {end for name in metrics for end in (_bounds(name, metrics) or ())}
        for name, value in metrics.items():
            if not _shown(name) or name in ends or name in found:
                continue
            found[name] = {"value": value}
            if bounds := _bounds(name, metrics):
                found[name] |= {"low": metrics[bounds[0]], "high": metrics[bounds[1]]}
    return found


def _shown(name: str) -> bool:
    """Whether a metric is a result: not about the progress of a run, nor its cost."""
    if name.startswith("train/"):
        return name.startswith(_LOSS)
    return not name.startswith((PREFIX, "system/", "prepare/", "perf/", "monitor/cpu"))


def _cost(run: Run, stage: str) -> dict[str, float] | None:
    metrics = store.metrics_of(run.stages[stage]) if stage in run.stages else {}
    return Spent.of(metrics).record() if CLOCK in metrics else None


def _text(content: Mapping[str, Any], labels: Sequence[str]) -> str:
    parts = []
    states = {label: _state(content["runs"][label]) for label in labels}
    if any(states.values()):
        parts.append(table(("", *labels), [("not finished", *(states[label] or NONE for label in labels))]))
    rows = [(key, *(_short(values[label]) for label in labels)) for key, values in content["settings"].items()]
    same = "One run: nothing to compare it with." if len(labels) == 1 else "No setting differs."
    parts += ["## Settings that differ", table(("setting", *labels), rows) if rows else same]
    metrics = content["metrics"]
    names = sorted({name for label in labels for name in metrics[label]}, key=_metric_order)
    rows = [(name, *(_with_interval(metrics[label].get(name)) for label in labels)) for name in names]
    parts += [
        "## Metrics (with 95 % intervals where available)",
        table(("metric", *labels), rows) if rows else "None.",
    ]
    for stage, costs in content["cost"].items():
        if any(costs.values()):
            parts += [f"## Cost of {stage}", _cost_table(costs, labels)]
    lacking = [label for label in labels if not any(costs[label] for costs in content["cost"].values())]
    notes = [*content["notes"], *(f"{label}: its cost is unknown, it was not measured" for label in lacking)]
    return "\n\n".join([*parts, *(f"Note: {note}" for note in notes)])


def _cost_table(costs: Mapping[str, Mapping[str, float] | None], labels: Sequence[str]) -> str:
    rows = []
    for name, (title, shown) in _COSTS.items():
        values = [cost[name] if (cost := costs[label]) else None for label in labels]
        if any(values):
            rows.append((title, *(NONE if value is None else shown(value) if value else "0" for value in values)))
    return table(("", *labels), rows)


def _state(stages: Mapping[str, Mapping[str, str]]) -> str:
    return ", ".join(f"{stage} {about['status']}" for stage, about in stages.items() if about["status"] != "FINISHED")


def _metric_order(name: str) -> tuple[int, str]:
    return ("eval/", "monitor/", _LOSS).index(
        next((p for p in ("eval/", "monitor/", _LOSS) if name.startswith(p)), _LOSS)
    ), name


def _with_interval(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return NONE
    if "low" not in metric:
        return f"{metric['value']:.4g}"
    width = metric["high"] - metric["low"]
    digits = max(1, 1 - math.floor(math.log10(width))) if width > 0 else 1
    value, low, high = (f"{metric[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _short(value: str | None) -> str:
    text = NONE if value is None else " ".join(value.split()).replace("|", "/")
    return text if len(text) <= 40 else f"{text[:39]}…"
