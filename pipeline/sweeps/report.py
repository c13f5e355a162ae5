"""The report of a sweep as Markdown, and its table of trials."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.runtime.formatting import table
from pipeline.runtime.usage import Spent, together
from pipeline.sweeps.answer import Answer, Arm
from pipeline.sweeps.importance import Importance
from pipeline.sweeps.pareto import pareto_table
from pipeline.sweeps.response import Responses
from pipeline.sweeps.trials import CURVE_IMAGES, OBJECTIVE_IMAGES, Sweep, Trial, short_name, short_names, short_value

CURVES = "learning_curves.png"
CURVE_END = "curve_end"  # in the table of trials: the last point of a trial's curve
LONGEST_NOTE = 5000  # characters; MLflow allows 8000 in a tag, its older servers 5000
_SHOWN = 20  # trials in the report


def ranked(sweep: Sweep) -> list[Trial]:
    """The trials, the highest objective first; then those without one, stopped before failed."""
    order = {"finished": 0, "stopped": 1, "failed": 2}

    def place(trial: Trial) -> tuple[float, float, int]:
        value = trial.value
        return (0.0 if value is not None else 1.0 + order[trial.state], -(value or 0.0), trial.number)

    return sorted(sweep.trials, key=place)


def trials_table(sweep: Sweep, rows: int | None = None) -> str:
    """The trials as a Markdown table, the best first.

    Args:
        sweep: The trials.
        rows: Number of trials that are shown; None for all.
    """
    names, trials = short_names(list(sweep.settings)), ranked(sweep)
    shown = trials if rows is None else trials[:rows]
    header = ("trial", *(names[key] for key in sweep.settings), "role", "seed", _short(sweep.objective))
    lines = []
    for trial in shown:
        values = (_cell(short_value(trial.point[key])) if key in trial.point else "" for key in sweep.settings)
        lines.append((short_name(trial.number), *values, trial.role, trial.seed, _outcome(trial)))
    rest = len(trials) - len(shown)
    return table(header, lines) + (f"\n\n… and {rest} more in trials.csv." if rest else "")


def _outcome(trial: Trial) -> str:
    if trial.value is not None:
        return f"{trial.value:.2f}"
    state = (
        f"{trial.state} at {trial.objective:.2f}"
        if trial.state == "stopped" and trial.objective is not None
        else trial.state
    )
    if state == "finished":
        state = "finished without an objective"
    return _cell(f"{state}: {trial.reason}" if trial.reason else state)


def _cell(text: str, longest: int = 120) -> str:
    """Text in one cell of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _short(objective: str) -> str:
    return objective.removeprefix("eval/")


def report(
    sweep: Sweep,
    found: Answer,
    curves: Responses,
    shares: Importance,
    *,
    best: str = "best.yaml",
    missing: Mapping[str, str] | None = None,
    longest: int | None = None,
) -> str:
    """The report.

    Args:
        sweep: The trials.
        found: The comparison of the finalists with the recipe.
        curves: The responses of the settings.
        shares: The importance of the settings.
        best: The name of the recommended recipe's file.
        missing: {name of a figure that is not drawn: why}.
        longest: Trials are left out of the table until the report is no longer than so many characters.

    Returns:
        Markdown.
    """
    rows = _SHOWN
    while True:
        text = _report(sweep, found, curves, shares, best, rows) + _not_drawn(missing or {})
        if longest is None or len(text) <= longest:
            return text
        if rows == 0:
            return text[: longest - 1] + "…"
        rows -= 1


def description(sweep: Sweep, found: Answer, curves: Responses, shares: Importance) -> str:
    """The report, short enough for the description of a run in MLflow."""
    return report(sweep, found, curves, shares, longest=LONGEST_NOTE)


def _report(sweep: Sweep, found: Answer, curves: Responses, shares: Importance, best: str, rows: int) -> str:
    parts = [f"# Sweep: {sweep.question or ', '.join(sweep.settings)}"]
    own = "the recipe's own settings" if not found.chosen else "the chosen settings"
    lines = [*found.sentences, *(curve.sentence for curve in curves.curves), *curves.notes]
    parts.append("\n".join(f"- {line}" for line in lines))
    parts.append(f"Objective: `{sweep.objective}`. Recommended recipe: `{best}`, with {own}.")
    arms = [*([found.recipe] if found.recipe else []), *found.finalists]
    if arms:
        parts += ["## Recipe and finalists", _arms_table(arms)]
        if found.finalists and found.recipe and found.noise:
            parts.append(
                "Means of fresh seeds. Intervals are of 95 %; those of the differences hold for all finalists together (Dunnett)."
            )
    parts += ["## Settings", _settings(curves, shares)]
    if sweep.cost is not None and (front := pareto_table(sweep)):
        parts += [
            "## Pareto front",
            front,
            "No other point is at least as accurate and as cheap. Points with one seed are uncertain by the noise of a trial.",
        ]
    counts = {state: sum(trial.state == state for trial in sweep.trials) for state in ("finished", "stopped", "failed")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    parts += ["## Trials", f"{len(sweep.trials)} trials: {said}."]
    if said := _measures(sweep):
        parts.append(said)
    if rows:
        parts.append(trials_table(sweep, rows))
    if forks := _forks_table(sweep, rows):
        parts += [
            "## Forks",
            forks,
            "A trial of the left column went on from a checkpoint of the trial beside it, with these settings. As its settings "
            "changed during training, it is not used for the response and the importance of settings.",
        ]
    cost = together(Spent.of(trial.cost) for trial in sweep.trials)
    if str(cost):
        parts += ["## Cost", f"All trials: {cost}."]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def measured_on(sweep: Sweep) -> tuple[str, str]:
    """What the points of the curves, and the objective at the end of a trial, are measured on: "by …" or "on … images"."""
    during, at_end = (sweep.images_of(name) for name in (CURVE_IMAGES, OBJECTIVE_IMAGES))
    points = f"on {'fewer' if during is None else f'{during:,}'} images"
    # At a rung, the probe has one strength of regularisation, also where there are no more images at the end.
    return (f"by a cheaper probe {points}" if sweep.unit else points), (
        f"on {'more' if at_end is None else f'{at_end:,}'} images"
    )


def _measures(sweep: Sweep) -> str:
    """That the curves and the objective are two measures; "" without curves."""
    if not sweep.has_curves:
        return ""
    during, at_end = measured_on(sweep)
    if during == at_end:  # RankMe of few images, which has no cheaper form
        return f"The curves of `{CURVES}` and the objective at the end of a trial are both measured {at_end}."
    stopped = any(trial.state == "stopped" and trial.objective is not None for trial in sweep.trials)
    return (
        f"The curves of `{CURVES}` are measured during training, {during}; the objective, by which trials are ranked, once at "
        f"the end, {at_end}. Compare curves with curves alone: the figure shows the objective apart from them."
        + (" The value of a stopped trial is the last point of its curve." if stopped else "")
    )


def _not_drawn(missing: Mapping[str, str]) -> str:
    reasons = "; ".join(f"`{name}`, since {why}" for name, why in missing.items())
    return f"\nNot drawn: {reasons}.\n" if reasons else ""


def _forks_table(sweep: Sweep, most: int) -> str:
    """The decisions of population-based training in their order, `most` of them; "" if there are none."""
    names = short_names(list(sweep.settings))
    forks = sorted((fork for trial in sweep.trials for fork in trial.forks), key=lambda fork: (fork.rung, fork.number))
    rows = []
    for fork in forks[:most]:
        values = (_cell(short_value(fork.point[key])) if key in fork.point else "" for key in sweep.settings)
        rows.append((short_name(fork.number), short_name(fork.donor), f"{fork.images:,}", *values))
    header = ("trial", "continued from", "images seen", *(names[key] for key in sweep.settings))
    rest = len(forks) - len(rows)
    return table(header, rows) + (f"\n\n… and {rest} more in trials.csv." if rest else "") if forks else ""


def _arms_table(arms: Sequence[Arm]) -> str:
    rows = []
    for arm in arms:
        mean = f"{arm.mean:.2f}" + (f" ({_interval(arm.interval, '.2f')})" if arm.interval else "")
        gap = "" if arm.difference is None else f"{arm.difference:+.2f} ({_interval(arm.difference_interval, '+.2f')})"
        rows.append((_cell(arm.name), len(arm.values), mean, gap))
    return table(("settings", "seeds", "mean", "difference to the recipe"), rows)


def _interval(ends: tuple[float, float] | None, style: str) -> str:
    return f"{ends[0]:{style}} to {ends[1]:{style}}" if ends else "?"


def _settings(curves: Responses, shares: Importance) -> str:
    """Importance, and how good the fits are."""
    lines = []
    if shares.shares:
        rows = [
            (
                name,
                f"{100 * share:.0f} %",
                f"{shares.counts[name]} points with this setting" if name in shares.counts else "",
            )
            for name, share in shares.shares.items()
        ]
        lines.append(table(("setting", "share of the variance", ""), rows))
        lines.append(
            "Importance by fANOVA: what each setting explains alone; the rest is due to combinations and noise."
        )
    else:
        lines.append(f"Importance: {shares.note}")
    if curves.explained is not None:
        share = max(curves.explained, 0.0)
        lines.append(
            f"The fitted responses explain {100 * share:.0f} % of the variance between points; the points are {curves.residual:.2f} "
            "(standard deviation) around the fit."
        )
    return "\n\n".join(lines)


def trials_csv(sweep: Sweep) -> str:
    """All trials as CSV, the best first; lists and mappings are written as JSON, and settings that do not apply are empty."""
    trials = ranked(sweep)
    results = dict.fromkeys(name for trial in trials for name in (*trial.cost, *trial.metrics))
    ends = {trial.number: [value for _, value in trial.curve if math.isfinite(value)][-1:] for trial in trials}
    results |= dict.fromkeys([CURVE_END] if any(ends.values()) else [])
    measures = [name for name in (OBJECTIVE_IMAGES, CURVE_END, CURVE_IMAGES) if name in results]  # side by side
    for name in (sweep.objective, *measures):
        results.pop(name, None)
    columns = ["trial", "role", "state", "seed", *sweep.settings, sweep.objective, *measures, *results, "reason"]
    if any(trial.forks for trial in trials):
        columns.append("forked")
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    for trial in trials:
        row: dict[str, Any] = {**trial.cost, **trial.metrics}
        row |= {key: _plain(trial.point[key]) for key in sweep.settings if key in trial.point}
        row |= {
            "trial": trial.number,
            "role": trial.role,
            "state": trial.state,
            "seed": trial.seed,
            "reason": trial.reason,
        }
        if trial.forks:
            row["forked"] = "; ".join(f"{short_name(fork.donor)} after {fork.images} images" for fork in trial.forks)
        row[sweep.objective] = trial.objective
        if ends[trial.number]:
            row[CURVE_END] = ends[trial.number][0]
        writer.writerow(row)
    return file.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value) if value is None or isinstance(value, bool | list | tuple | Mapping) else value
