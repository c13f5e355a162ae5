"""A sweep on Ray Tune: each trial pretrains in its own process with some settings changed, and is evaluated.

The loss of a trial depends on its level weights and its mask, so it cannot rank trials. The objective is a metric that
does not contain the searched settings: the linear probe's accuracy on a held-out part of the train split (val stays
untouched, for the final evaluation), or RankMe where there are no labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
import yaml
from tqdm import tqdm

from pipeline.config.recipe import Recipe, identity
from pipeline.errors import StageError
from pipeline.models.build import check_model, check_shards
from pipeline.runtime.formatting import table
from pipeline.runtime.ray_session import SessionInfo, check_room, uses_gpu
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import check_space, trials_of
from pipeline.stages.tune_draws import draws_of, own_point
from pipeline.stages.tune_engine import run_plan
from pipeline.stages.tune_space import Space, names_of_spaces, read_space
from pipeline.stages.tune_trial import PROBE, RANK, TrialTask, run_trial
from pipeline.sweeps.ledger import Ended, Ledger
from pipeline.sweeps.plan import Budget, Plan
from pipeline.sweeps.trials import Sweep, relative_weights, short_value
from pipeline.sweeps.write import BEST, REPORT, RESPONSE, TABLE, write_results
from pipeline.tracking.tracker import Tracker, end_trials

TRIALS = "trials"  # in the stage's folder: a folder per trial with what it logged
LEDGER = "trials.jsonl"  # in the stage's folder: every trial as it begins and ends
MORE = (
    "tune.trials",
    "tune.recipe_seeds",
    "tune.finalists",
    "tune.fresh_seeds",
)  # a sweep goes on when these are raised
RETRIES = 3  # of a trial whose process or node was lost


CHECKS = (check_model, check_space)


@dataclass(frozen=True)
class Checked:
    """What the trials train on, and what is searched."""

    shards: ShardSet
    space: Space


def check(recipe: Recipe) -> Checked:
    """Open the shard set and read the search space.

    Raises:
        SettingError: The recipe cannot be trained on the shard set.
        StageError: There is no shard set.
    """
    shards = ShardSet.open(recipe.shards_at)
    check_shards(recipe, shards)
    return Checked(shards, read_space(recipe))


def run(recipe: Recipe, session: SessionInfo, checked: Checked, *, progress: bool = True) -> dict[str, Any]:
    """Run the sweep, or go on with one that was interrupted or is to have more trials.

    Args:
        recipe: The settings.
        session: The Ray session.
        checked: What `check` returned.
        progress: Whether a progress bar is shown.

    Returns:
        The trials and the best settings, which is also the stage's finishing mark.

    Raises:
        SettingError: The folder holds a sweep with other settings.
        StageError: All trials failed, or too many in a row for the same reason.
    """
    shards, space = checked.shards, checked.space
    check_room(recipe, session, 1)
    objective = PROBE if shards.classes is not None else RANK
    decisive = identity(recipe, "tune")
    del decisive["tune.trials"]  # it may be raised: the sweep goes on
    same = {**decisive, "space": space.record(), "shards": shards.fingerprint}
    with stage_folder(recipe.stage_dir("tune"), same, restart=recipe.restart) as folder:
        plan = _plan(recipe, space, folder)
        kept = len(plan.ledger.ended)
        if folder.finished and plan.done:
            return {**folder.result(), "state": "finished already"}
        meter = Meter(before=spent_in(folder.path))
        tags = {
            "wavemim.shards": shards.fingerprint,
            "wavemim.space": " + ".join(names_of_spaces(recipe)),
        }
        with Tracker.start(recipe, "tune", log_dir=folder.path, tags=tags, dataset=shards.about) as tracker:
            tracker.text(yaml.safe_dump(space.record(), sort_keys=False, allow_unicode=True), "space.yaml")
            spent = _run(recipe, session, checked, plan, folder, tracker, meter, objective, progress)
            sweep = _sweep(recipe, space, plan.ledger, objective)
            if plan.failing is not None:
                raise StageError(
                    f"{plan.budget.same_reason} trials in a row failed for the same reason: {plan.failing}"
                )
            if not sweep.finished():
                raise StageError(f"all {len(sweep.trials)} trials failed; the first: {sweep.trials[0].reason}")
            result = {**_write(recipe, folder, sweep, tracker), "cost": spent.record()}
            folder.finish(result)
        state = f"continued, {kept} trials were done" if kept else folder.state
        return {**result, "state": "new" if state == "unfinished" else state}


def _plan(recipe: Recipe, space: Space, folder: StageFolder) -> Plan:
    tune = recipe.tune
    budget = Budget(
        trials_of(recipe, space),
        recipe_seeds=tune.recipe_seeds,
        finalists=tune.finalists,
        fresh_seeds=tune.fresh_seeds,
    )
    ledger = Ledger(folder.path / LEDGER)
    return Plan(ledger, draws_of(recipe, space), budget, own=own_point(recipe, space), seed=recipe.seed)


def _run(
    recipe: Recipe,
    session: SessionInfo,
    checked: Checked,
    plan: Plan,
    folder: StageFolder,
    tracker: Tracker,
    meter: Meter,
    objective: str,
    progress: bool,
) -> Spent:
    """Run the plan, with a progress bar and the cost so far in MLflow."""
    use_gpu = uses_gpu(recipe, session)
    slots = int(session.gpus if use_gpu else session.cpus // recipe.cluster.cpus_per_worker)
    task = TrialTask(
        settings=recipe.dump(),
        shards=checked.shards.folder.url,
        parent=tracker.handle,
        objective=objective,
        logs=str(folder.path / TRIALS),
        searched=checked.space.settings,
        use_gpu=use_gpu,
    )
    statuses: dict[str, str] = {}

    def record() -> Spent:
        spent = meter.read(spent_in(trial) for trial in (folder.path / TRIALS).glob("*"))
        tracker.log(spent.metrics(), spent.images_seen)
        return spent

    with tqdm(
        total=plan.total, initial=len(plan.ledger.ended), desc="tune", unit=" trial", disable=not progress
    ) as bar:

        def on_end(ended: Ended) -> None:
            bar.update()
            values = [trial.value for trial in plan.ledger.trials() if trial.value is not None]
            if values:
                bar.set_postfix(best=f"{max(values):.2f}")
            if run := ended.metrics.get("mlflow_run"):
                statuses[run] = "FAILED" if ended.state == "failed" else "FINISHED"
            record()

        try:
            run_plan(
                plan,
                ray.tune.with_parameters(run_trial, task=task),
                objective=objective,
                resources={"cpu": recipe.cluster.cpus_per_worker, "gpu": 1 if use_gpu else 0},
                concurrent=recipe.tune.concurrent or max(1, min(slots, plan.total)),
                retries=RETRIES,
                folder=str(folder.path),
                on_end=on_end,
            )
        finally:
            end_trials(tracker.handle.uri, tracker.handle.run_id, statuses)
            spent = record()
    return spent


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """The sweep's answer, its table, and its files."""
    files = [f"table {result['table']}", f"picture {result['figure']}", f"recommended recipe {result['best_recipe']}"]
    if "report" in result:  # not in the result of an earlier version
        files.insert(0, f"report {result['report']}")
    return f"{sweep_table(result)}\ntune: {len(result['trials'])} trials → {', '.join(files)} ({result['state']})"


def _sweep(recipe: Recipe, space: Space, ledger: Ledger, objective: str) -> Sweep:
    """The trials in the form that the answer is computed from."""
    return Sweep(
        objective,
        list(space.settings),
        ledger.trials(),
        question=" ".join(question.text for question in space.questions),
        log=[
            key
            for dimension in space.dimensions
            if getattr(dimension.distribution, "log", False)
            for key in dimension.settings
        ],
        relative=relative_weights(recipe, list(space.settings)),
    )


def _write(recipe: Recipe, folder: StageFolder, sweep: Sweep, tracker: Tracker) -> dict[str, Any]:
    """Write the table, the report, the best settings as a recipe, and the figures; log them to MLflow too."""
    written = write_results(folder.path, recipe, sweep)
    for path in written.files.values():
        tracker.artifact(path)

    def place(name: str) -> str:
        return str(written.files.get(name, "not written"))

    pictures = [path.name for path in written.files.values() if path.suffix == ".png"]
    tracker.description(written.description, pictures)
    objective = sweep.objective
    best = max(sweep.finished(), key=lambda trial: trial.value or 0.0)
    tracker.log({f"tune/best_{objective.rpartition('/')[2]}": best.value or 0.0}, int(best.metrics.get("images", 0)))
    ranked = sorted(sweep.trials, key=lambda trial: -(float("-inf") if trial.value is None else trial.value))
    return {
        "objective": objective,
        "trials": [
            {
                "number": trial.number,
                "role": trial.role,
                "seed": trial.seed,
                "state": trial.state,
                "point": dict(trial.point),
                objective: trial.value,
                **trial.cost,
                **trial.metrics,
                **({"error": trial.reason} if trial.reason else {}),
            }
            for trial in ranked
        ],
        "parameters": list(sweep.settings),
        "best": dict(written.answer.chosen),
        "verdict": written.answer.verdict,
        "answer": list(written.sentences),
        "best_recipe": place(BEST),
        "table": place(TABLE),
        "report": place(REPORT),
        "figure": place(RESPONSE),
        "mlflow_run": tracker.handle.run_id,
    }


def sweep_table(result: Mapping[str, Any]) -> str:
    """The answer and the trials of a sweep as Markdown, from the result of the stage."""
    objective = result["objective"]
    header = ("trial", "role", "seed", *result["parameters"], objective.removeprefix("eval/"))
    rows = []
    for trial in result["trials"]:
        values = [short_value(trial["point"][key]) if key in trial["point"] else "" for key in result["parameters"]]
        outcome = trial.get("error") or f"{trial[objective]:.2f}"
        rows.append((str(trial["number"]), trial["role"], str(trial["seed"]), *values, outcome))
    said = "\n".join(f"- {line}" for line in result.get("answer", ()))
    return f"{said}\n\n{table(header, rows)}" if said else table(header, rows)
