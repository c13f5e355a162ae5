"""A sweep on Ray Tune: each trial pretrains in its own process with some settings changed, and is evaluated.

The loss of a trial depends on its level weights and its mask, so it cannot rank trials. The objective is a metric that
does not contain the searched settings: the linear probe's accuracy on a held-out part of the train split (val stays
untouched, for the final evaluation), or RankMe where there are no labels.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
import yaml
from tqdm import tqdm

from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.models.build import check_model, check_shards
from pipeline.runtime import observability
from pipeline.runtime.formatting import table
from pipeline.runtime.ray_session import SessionInfo, uses_gpu
from pipeline.runtime.room import check_room
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import check_budget, check_gpu_hours, check_space, trials_of
from pipeline.stages.tune_draws import draws_of
from pipeline.stages.tune_engine import RAY, run_plan
from pipeline.stages.tune_parts import KEPT, TRIALS, folder_of, home_of, note_stopped, remove_checkpoints
from pipeline.stages.tune_perturb import perturbed
from pipeline.stages.tune_plan import slots_of
from pipeline.stages.tune_rungs import plan_rungs
from pipeline.stages.tune_schedulers import scheduler_of
from pipeline.stages.tune_space import Space, names_of_spaces, read_space
from pipeline.stages.tune_trial import PROBE, RANK, TrialTask, run_trial
from pipeline.sweeps.budget import Limits
from pipeline.sweeps.ledger import Ended, Ledger
from pipeline.sweeps.plan import Budget, Plan
from pipeline.sweeps.population import Population
from pipeline.sweeps.trials import Sweep, own_point, relative_weights, short_name, short_value, trial_name
from pipeline.sweeps.write import BEST, REPORT, RESPONSE, TABLE, write_results
from pipeline.tracking import store_uris
from pipeline.tracking.tracker import Tracker, end_trials, store_uri

log = logging.getLogger(__name__)

LEDGER = "trials.jsonl"  # in the stage's folder: every trial as it begins and ends
RETRIES = 3  # of a trial whose process or node was lost
STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # of a trial's run in MLflow
_NODES_EVERY = 5.0  # seconds between two looks at which nodes there are
PROBE_SHARE = 0.2  # of a trial's time that probes are to take at most
# Of a copy in a store: trials copy their own files, and Ray's are of no use there.
_LEFT_OUT = (f"{TRIALS}/*", f"{RAY}/*")


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
    if recipe.home is not None and recipe.tune.scheduler == "pbt":
        raise SettingError(
            f"out={recipe.home}: tune.scheduler=pbt copies checkpoints from trial to trial in a folder that all nodes share; "
            "give such a folder, or set tune.scheduler=asha or none"
        )
    shards = ShardSet.open(recipe.shards_at)
    check_shards(recipe, shards)
    check_budget(recipe, shards.rows["train"])
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
    use_gpu = uses_gpu(recipe, session)
    check_gpu_hours(recipe, use_gpu)
    objective = PROBE if shards.classes is not None else RANK
    _check_tracking(recipe, session)
    place, home, same = recipe.stage_dir("tune"), recipe.stage_home("tune"), _identity(recipe, checked)
    with stage_folder(place, same, restart=recipe.restart, home=home, left_out=_LEFT_OUT, work=(LEDGER,)) as folder:
        meter = Meter(before=Spent(wall_clock_s=spent_in(folder.path).wall_clock_s))  # trials keep the rest themselves
        concurrent = _concurrent(recipe, session, use_gpu)
        plan = _plan(recipe, checked, folder, meter, concurrent())
        kept = len(plan.ledger.ended)
        if folder.finished and plan.done:
            return {**folder.result(), "state": "finished already"}
        with _start(recipe, checked, folder) as tracker:
            tracker.text(yaml.safe_dump(space.record(), sort_keys=False, allow_unicode=True), "space.yaml")
            measuring = plan_rungs(recipe, shards)
            task = TrialTask(
                settings=recipe.dump(),
                shards=shards.folder.url,
                parent=tracker.handle,
                objective=objective,
                logs=str(folder.path / TRIALS),
                searched=space.settings,
                use_gpu=use_gpu,
                gpu_share=recipe.tune.gpus_per_trial,
                rungs=measuring.rungs,
                rung_images=measuring.images,
                end_images=measuring.at_end,
            )
            spent = _run(recipe, plan, folder, tracker, meter, task, concurrent, progress)
            sweep = _sweep(recipe, space, plan.ledger, objective)
            if plan.failing is not None:
                raise StageError(
                    f"{plan.budget.same_reason} trials in a row failed for the same reason: {plan.failing}; finished "
                    "trials are kept, and the same command begins these again"
                )
            if not sweep.finished():
                raise StageError(f"all {len(sweep.trials)} trials failed; the first: {sweep.trials[0].reason}")
            result = {**_write(recipe, folder, sweep, tracker), "cost": spent.record(), **_probe_share(sweep)}
            folder.finish(result)
        state = f"continued, {kept} trials were done" if kept else folder.state
        return {**result, "state": "new" if state == "unfinished" else state}


def _check_tracking(recipe: Recipe, session: SessionInfo) -> None:
    """Warn where trials on other nodes do not reach MLflow."""
    if recipe.home is not None and session.nodes > 1 and store_uris.sqlite_path(store_uri(recipe)) is not None:
        log.warning(
            "MLflow's store is a file on this machine, which trials on other nodes do not see; wavemim sync %s sends what they "
            "log, or set tracking.uri= to a server", recipe.home,
        )  # fmt: skip


def _identity(recipe: Recipe, checked: Checked) -> dict[str, Any]:
    """What decides the trials of a sweep."""
    same = {**identity(recipe, "tune"), "space": checked.space.record(), "shards": checked.shards.fingerprint}
    if recipe.tune.scheduler == "pbt":
        same["tune.trials"] = recipe.tune.trials  # a population cannot grow once trials were forked
    return same


def _start(recipe: Recipe, checked: Checked, folder: StageFolder) -> Tracker:
    """Begin the sweep's run: its parameters are the settings of the sweep, the others are in the artifact recipe.yaml."""
    shards = checked.shards
    tags = {"wavemim.shards": shards.fingerprint, "wavemim.space": " + ".join(names_of_spaces(recipe))}
    params = {"tune": recipe.dump()["tune"]}
    return Tracker.start(recipe, "tune", params=params, log_dir=folder.path, tags=tags, dataset=shards.about)


def _concurrent(recipe: Recipe, session: SessionInfo, use_gpu: bool) -> Callable[[], int]:
    """How many trials may run at the same time: as set, or as the nodes that are there now have room for."""
    slots = recipe.tune.concurrent or slots_of(recipe, use_gpu, session.gpus, session.cpus)
    if recipe.tune.concurrent or session.private:
        return lambda: slots
    asked = time.monotonic()

    def now() -> int:
        nonlocal slots, asked
        if time.monotonic() - asked > _NODES_EVERY:  # it is asked many times a second
            there = ray.cluster_resources()
            slots = slots_of(recipe, use_gpu, there.get("GPU", 0), there.get("CPU", 0))
            asked = time.monotonic()
        return slots

    return now


def _plan(recipe: Recipe, checked: Checked, folder: StageFolder, meter: Meter, concurrent: int) -> Plan:
    tune, space = recipe.tune, checked.space
    limits = Limits(
        images=tune.images,
        hours=tune.hours,
        gpu_hours=tune.gpu_hours,
        images_each=tune.epochs * checked.shards.rows["train"],
        concurrent=concurrent,
    )
    budget = Budget(
        trials_of(recipe, space),
        recipe_seeds=tune.recipe_seeds,
        finalists=tune.finalists,
        fresh_seeds=tune.fresh_seeds,
        limits=limits,
    )
    population = None
    if tune.scheduler == "pbt":
        population = Population(tune.rungs, tune.quantile, recipe.seed, partial(perturbed, space))
    return Plan(
        Ledger(folder.path / LEDGER, folder.changed),
        draws_of(recipe, space),
        budget,
        own=own_point(recipe, space.settings),
        seed=recipe.seed,
        elapsed=lambda: meter.read().wall_clock_s / 3600,
        population=population,
    )


def _run(
    recipe: Recipe,
    plan: Plan,
    folder: StageFolder,
    tracker: Tracker,
    meter: Meter,
    task: TrialTask,
    concurrent: Callable[[], int],
    progress: bool,
) -> Spent:
    """Run the plan, with a progress bar and the cost so far in MLflow."""
    objective, logs = task.objective, folder.path / TRIALS
    statuses: dict[str, str] = {}

    def record() -> Spent:
        spent = meter.read(_spent(plan.ledger, logs, number) for number in list(plan.ledger.begun))
        tracker.log(spent.metrics(), spent.images_seen)
        return spent

    with tqdm(
        total=plan.total, initial=len(plan.ledger.ended), desc="tune", unit=" trial", disable=not progress
    ) as bar:

        def on_end(ended: Ended) -> None:
            bar.update()
            _publish(recipe, plan)
            values = [trial.value for trial in plan.ledger.trials() if trial.value is not None]
            if values:
                bar.set_postfix(best=f"{max(values):.2f}")
            point = plan.ledger.point(ended.number)  # a trial whose process was lost has not reported its run
            run = ended.metrics.get("mlflow_run") or trial_name(ended.number, point, task.searched)
            statuses[run] = STATUSES[ended.state]
            if ended.state != "failed":  # one that failed may begin again, in a later call
                remove_checkpoints(logs, ended.number, home_of(recipe, ended.number))
            if plan.search_ended:
                for kept in logs.glob(f"*/{KEPT}"):
                    shutil.rmtree(kept, ignore_errors=True)
            record()

        def on_stop(number: int) -> None:
            note_stopped(logs, number, home_of(recipe, number))

        _publish(recipe, plan)
        try:
            run_plan(
                plan,
                ray.tune.with_parameters(run_trial, task=task),
                scheduler=scheduler_of(recipe, plan, objective, on_stop),
                objective=objective,
                resources={"cpu": recipe.cluster.cpus_per_worker, "gpu": task.gpu_share * task.use_gpu},
                concurrent=concurrent,
                retries=RETRIES,
                folder=str(folder.path),
                on_end=on_end,
            )
        finally:
            end_trials(tracker.handle.uri, tracker.handle.run_id, statuses)
            spent = record()
    return spent


def _publish(recipe: Recipe, plan: Plan) -> None:
    """Publish how many trials are in which state."""
    ended = Counter(end.state for end in plan.ledger.ended.values())
    numbers = {f"wavemim_trials.{state}": float(count) for state, count in ended.items()}
    numbers["wavemim_trials.running"] = float(len(plan.ledger.begun) - len(plan.ledger.ended))
    observability.publish(recipe.name, "tune", len(plan.ledger.ended), plan.total, "trials", numbers)


def _spent(ledger: Ledger, logs: Path, number: int) -> Spent:
    """What a trial has spent: by its folder, if this node has it, or else by what it reported at its end."""
    spent = spent_in(folder_of(logs, number))
    ended = ledger.ended.get(number)
    return spent if spent.wall_clock_s or ended is None else Spent.of(ended.cost)


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """The sweep's answer, its table, and its files."""
    files = [f"report {result['report']}", f"table {result['table']}", f"picture {result['figure']}"]
    files.append(f"recommended recipe {result['best_recipe']}")
    lines = [sweep_table(result)]
    if (share := result.get("probe_share")) is not None:
        advice = "; a smaller tune.max_images or tune.rungs makes them cheaper" if share > PROBE_SHARE else ""
        lines.append(f"probes took {100 * share:.0f} % of the time of a trial{advice}")
    lines.append(f"tune: {len(result['trials'])} trials → {', '.join(files)} ({result['state']})")
    return "\n".join(lines)


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
        cost=recipe.tune.cost,
    )


def _probe_share(sweep: Sweep) -> dict[str, float]:
    """The share of the finished trials' time that probes took."""
    shares = [trial.metrics["perf/probe_share"] for trial in sweep.finished() if "perf/probe_share" in trial.metrics]
    return {"probe_share": statistics.median(shares)} if shares else {}


def _write(recipe: Recipe, folder: StageFolder, sweep: Sweep, tracker: Tracker) -> dict[str, Any]:
    """Write the table, the report, the best settings as a recipe, and the figures; log them to MLflow too."""
    written = write_results(folder.path, recipe, sweep)
    for path in written.files.values():
        tracker.artifact(path)

    def place(name: str) -> str:
        return recipe.place_of(written.files[name]) if name in written.files else "not written"

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
                **({"forks": [asdict(fork) for fork in trial.forks]} if trial.forks else {}),
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
        if trial.get("state") == "stopped":
            outcome = f"stopped: {outcome}"
        rows.append((short_name(trial["number"]), trial["role"], str(trial["seed"]), *values, outcome))
    said = "\n".join(f"- {line}" for line in result["answer"])
    return f"{said}\n\n{table(header, rows)}"
