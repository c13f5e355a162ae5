"""A sweep on Ray Tune: each trial pretrains in its own process with some settings changed, and is evaluated.

The loss of a trial depends on its level weights and its mask, so it cannot rank trials. The objective is a metric that
does not contain the searched settings: the linear probe's accuracy on a held-out part of the train split (val stays
untouched, for the final evaluation), or RankMe where there are no labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
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
from pipeline.stages.tune_plan import optuna_sampler, planned_points
from pipeline.stages.tune_space import Space, names_of_spaces, read_space
from pipeline.stages.tune_trial import PROBE, RANK, run_trial
from pipeline.sweeps.trials import Sweep, Trial, relative_weights, short_value
from pipeline.sweeps.write import BEST, REPORT, RESPONSE, TABLE, write_results
from pipeline.tracking.tracker import RunHandle, Tracker, end_trials

TRIALS = "trials"  # in the stage's folder: a folder per trial with what it logged


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
    """Run the sweep.

    Args:
        recipe: The settings.
        session: The Ray session.
        checked: What `check` returned.
        progress: Whether a progress bar is shown.

    Returns:
        The trials and the best settings, which is also the stage's finishing mark.

    Raises:
        SettingError: The folder holds a sweep with other settings.
        StageError: All trials failed.
    """
    shards, space = checked.shards, checked.space
    check_room(recipe, session, 1)
    objective = PROBE if shards.classes is not None else RANK
    same = {**identity(recipe, "tune"), "space": space.record(), "shards": shards.fingerprint}
    with stage_folder(recipe.stage_dir("tune"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        meter = Meter(before=spent_in(folder.path))
        folder.clear()  # an unfinished sweep starts over: its trials are short, and the search depends on their order
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.space": " + ".join(names_of_spaces(recipe))}
        with Tracker.start(recipe, "tune", log_dir=folder.path, tags=tags) as tracker:
            statuses: dict[str, str] = {}

            def record() -> Spent:
                spent = meter.read(spent_in(trial) for trial in (folder.path / TRIALS).glob("*"))
                tracker.log(spent.metrics(), spent.images_seen)
                return spent

            follow = functools.partial(_Follow, objective=objective, statuses=statuses, record=record)
            try:
                record()  # the cost of an earlier sweep would be lost with its files
                results = _search(recipe, shards, space, objective, tracker.handle, folder, session, follow, progress)
            finally:
                end_trials(tracker.handle.uri, tracker.handle.run_id, statuses)
                spent = record()
            if _ended(results, objective) < trials_of(recipe, space):
                raise KeyboardInterrupt  # Ray Tune catches Ctrl-C, and returns the trials so far as if they were all
            trials = _trials(results, space, objective)
            if not any(np.isfinite(trial[objective]) for trial in trials):
                raise StageError(
                    f"all {len(trials)} trials failed; the first: {trials[0].get('error', 'no reason given')}"
                )
            result = {**_write(recipe, folder, trials, space, objective, tracker), "cost": spent.record()}
            folder.finish(result)
        return {**result, "state": "started over" if folder.state == "unfinished" else folder.state}


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """The sweep's answer, its table, and its files."""
    files = [f"table {result['table']}", f"picture {result['figure']}", f"recommended recipe {result['best_recipe']}"]
    if "report" in result:  # not in the result of an earlier version
        files.insert(0, f"report {result['report']}")
    return f"{sweep_table(result)}\ntune: {len(result['trials'])} trials → {', '.join(files)} ({result['state']})"


def _config(space: Space, trial: Any) -> dict[str, Any]:
    """The configuration of a trial whose point Optuna draws; Ray adds to it what was drawn."""
    return {"point": space.suggest(trial)}


def _search(
    recipe: Recipe,
    shards: ShardSet,
    space: Space,
    objective: str,
    parent: RunHandle,
    folder: StageFolder,
    session: SessionInfo,
    follow: Callable[[tqdm], ray.tune.Callback],
    progress: bool,
) -> ray.tune.ResultGrid:
    use_gpu = uses_gpu(recipe, session)
    slots = int(session.gpus if use_gpu else session.cpus // recipe.cluster.cpus_per_worker)
    trials = trials_of(recipe, space)
    concurrent = recipe.tune.concurrent or max(1, min(slots, trials))
    search: Any
    points = planned_points(recipe, space, trials)
    if points is None:
        from ray.tune.search.optuna import OptunaSearch

        draw = functools.partial(_config, space)  # which Ray can pickle
        search = OptunaSearch(draw, metric=objective, mode="max", sampler=optuna_sampler(recipe))
        search, candidates, samples = ConcurrencyLimiter(search, max_concurrent=concurrent), {}, trials
    else:
        search = BasicVariantGenerator(max_concurrent=concurrent)
        candidates, samples = {"point": ray.tune.grid_search(points)}, 1
    trial = ray.tune.with_parameters(
        run_trial,
        settings=recipe.dump(),
        shards_path=shards.folder.url,
        parent=parent,
        objective=objective,
        logs=str(folder.path / TRIALS),
        use_gpu=use_gpu,
    )
    bar = tqdm(total=trials, desc="tune", unit=" trial", disable=not progress)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"cpu": recipe.cluster.cpus_per_worker, "gpu": 1 if use_gpu else 0}),
        param_space=candidates,
        tune_config=ray.tune.TuneConfig(metric=objective, mode="max", num_samples=samples, search_alg=search),
        run_config=ray.tune.RunConfig(name="ray", storage_path=str(folder.path), verbose=0, callbacks=[follow(bar)]),
    )
    with bar:
        return tuner.fit()


class _Follow(ray.tune.Callback):
    """Updates the progress bar and the cost, and remembers with which status each trial's MLflow run has to end."""

    def __init__(self, bar: tqdm, *, objective: str, statuses: dict[str, str], record: Callable[[], object]) -> None:
        self.bar, self.objective, self.statuses, self.record = bar, objective, statuses, record
        self.best = float("-inf")

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be pickled: Tune saves callbacks, though nobody loads them."""
        return {**vars(self), "bar": None, "record": None}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has finished."""
        value = trial.last_result.get(self.objective)
        if value is not None:
            self.best = max(self.best, float(value))
            self.bar.set_postfix(best=f"{self.best:.2f}")
        self._note(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed: the sweep continues."""
        self._note(trial, "FAILED")

    def _note(self, trial: Any, status: str) -> None:
        self.bar.update()
        self.record()
        run_id = (trial.last_result or {}).get("mlflow_run")
        if run_id:
            self.statuses[run_id] = status


def _ended(results: ray.tune.ResultGrid, objective: str) -> int:
    """Number of trials that finished or failed, rather than being interrupted."""
    ends = [results[index] for index in range(len(results))]
    return sum(result.error is not None or objective in (result.metrics or {}) for result in ends)


def _trials(results: ray.tune.ResultGrid, space: Space, objective: str) -> list[dict[str, Any]]:
    """One flat mapping per trial, the best first."""
    trials = []
    for result in (results[index] for index in range(len(results))):
        metrics = result.metrics or {}
        point = (result.config or {}).get("point", {})
        trial: dict[str, Any] = {**{key: point.get(key) for key in space.settings}, "point": point}
        trial[objective] = float(metrics.get(objective, float("nan")))
        for name, value in metrics.items():
            if name.startswith(("eval/", "train/loss_level", "cost/")) or name in (
                "images",
                "mlflow_run",
                "time_total_s",
            ):
                trial.setdefault(name, value)
        if result.error is not None:
            trial["error"] = str(result.error).strip().splitlines()[-1]
        trials.append(trial)
    return sorted(trials, key=lambda trial: -trial[objective] if np.isfinite(trial[objective]) else float("inf"))


def _write(
    recipe: Recipe,
    folder: StageFolder,
    trials: Sequence[dict[str, Any]],
    space: Space,
    objective: str,
    tracker: Tracker,
) -> dict[str, Any]:
    """Write the table, the report, the best settings as a recipe, and the figures; log them to MLflow too."""
    sweep = _sweep(recipe, trials, space, objective)
    written = write_results(folder.path, recipe, sweep)
    for path in written.files.values():
        tracker.artifact(path)

    def place(name: str) -> str:
        return str(written.files.get(name, "not written"))

    tracker.tag("mlflow.note.content", written.description)
    best = trials[0]
    tracker.log({f"tune/best_{objective.rpartition('/')[2]}": best[objective]}, int(best.get("images", 0)))
    return {
        "objective": objective,
        "trials": trials,
        "parameters": list(space.settings),
        "best": dict(written.answer.chosen),
        "verdict": written.answer.verdict,
        "answer": list(written.sentences),
        "best_recipe": place(BEST),
        "table": place(TABLE),
        "report": place(REPORT),
        "figure": place(RESPONSE),
        "mlflow_run": tracker.handle.run_id,
    }


def _sweep(recipe: Recipe, trials: Sequence[Mapping[str, Any]], space: Space, objective: str) -> Sweep:
    """The trials, numbered from the best to the worst, in the form that the answer is computed from."""
    found = []
    for number, trial in enumerate(trials, 1):
        rest = {
            name: value for name, value in trial.items() if name not in (*space.settings, objective, "point", "error")
        }
        value = float(trial[objective])
        ok = "error" not in trial and np.isfinite(value)
        found.append(
            Trial(
                number,
                role="search",
                point=trial["point"],
                seed=recipe.seed,
                state="finished" if ok else "failed",
                objective=value if np.isfinite(value) else None,
                reason=str(trial.get("error", "" if ok else "no objective")),
                curve=[(int(trial.get("images", 0)), value)],
                cost={name: value for name, value in rest.items() if name.startswith("cost/")},
                metrics={name: value for name, value in rest.items() if not name.startswith("cost/")},
            )
        )
    return Sweep(
        objective,
        list(space.settings),
        found,
        question=" ".join(question.text for question in space.questions),
        log=[
            key
            for dimension in space.dimensions
            if getattr(dimension.distribution, "log", False)
            for key in dimension.settings
        ],
        relative=relative_weights(recipe, list(space.settings)),
    )


def sweep_table(result: Mapping[str, Any]) -> str:
    """The answer and the trials of a sweep as Markdown, from the result of the stage."""
    objective = result["objective"]
    header = ("trial", *result["parameters"], objective.removeprefix("eval/"))
    rows = []
    for number, trial in enumerate(result["trials"], 1):
        values = [short_value(trial["point"][key]) if key in trial["point"] else "" for key in result["parameters"]]
        outcome = trial.get("error") or f"{trial[objective]:.2f}"
        rows.append((str(number), *values, outcome))
    said = "\n".join(f"- {line}" for line in result.get("answer", ()))
    return f"{said}\n\n{table(header, rows)}" if said else table(header, rows)
