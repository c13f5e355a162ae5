"""A sweep on Ray Tune: each trial pretrains in its own process with some settings changed, and is evaluated.

The loss of a trial depends on its level weights and its mask, so it cannot rank trials. The objective is a metric that
does not contain the searched settings: the linear probe's accuracy on a held-out part of the train split (val stays
untouched, for the final evaluation), or RankMe where there are no labels.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.tune
import yaml
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from tqdm import tqdm

from pipeline.config.load import with_overrides
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import StageError
from pipeline.models.build import check_model, check_shards
from pipeline.runtime.formatting import table
from pipeline.runtime.ray_session import SessionInfo, check_room, uses_gpu
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import check_space, trials_of
from pipeline.stages.tune_distributions import shown
from pipeline.stages.tune_plan import optuna_sampler, planned_points
from pipeline.stages.tune_space import Space, names_of_spaces, read_space
from pipeline.stages.tune_trial import PROBE, RANK, run_trial
from pipeline.tracking.tracker import RunHandle, Tracker, end_trials
from wavemim.figures.plots import sweep_figure

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
    """The sweep's table, and its files."""
    return (
        f"{sweep_table(result)}\n"
        f"tune: {len(result['trials'])} trials → {result['table']}, picture {result['figure']}, "
        f"best settings as a recipe {result['best_recipe']} ({result['state']})"
    )


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
    """Write the table, the picture and the best settings as a recipe; log them to MLflow too."""
    csv_file = folder.path / "trials.csv"
    columns = list(dict.fromkeys(name for trial in trials for name in trial if name != "point"))
    with open(csv_file, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(trials)
    picture = folder.path / "sweep.png"
    drawn = [trial | {key: _coordinate(trial[key]) for key in space.settings} for trial in trials]
    sweep_figure(picture, drawn, parameters=space.settings, metric=objective)
    best = trials[0]
    chosen = best["point"]
    best_recipe = with_overrides(recipe, chosen).dump()
    for place in ("images", "shards", "checkpoint"):
        best_recipe.pop(place)
    best_recipe |= {"name": f"{recipe.name}-tuned", "restart": False, "force": False}
    best_path = folder.path / "best.yaml"
    best_path.write_text(
        f"# Best of {len(trials)} trials over {' + '.join(names_of_spaces(recipe))}: {objective} {best[objective]:.2f}\n"
        + yaml.safe_dump(best_recipe, sort_keys=False),
        encoding="utf-8",
    )
    for path in (csv_file, picture, best_path):
        tracker.artifact(path)
    images = int(best.get("images", 0))
    tracker.log({f"tune/best_{objective.rpartition('/')[2]}": best[objective]}, images)
    return {
        "objective": objective,
        "trials": trials,
        "parameters": list(space.settings),
        "best": chosen,
        "best_recipe": str(best_path),
        "table": str(csv_file),
        "figure": str(picture),
        "mlflow_run": tracker.handle.run_id,
    }


def _coordinate(value: Any) -> Any:
    """A value as an axis takes it: a number, or a text."""
    return value if isinstance(value, int | float) else shown(value)


def sweep_table(result: Mapping[str, Any]) -> str:
    """The trials of a sweep as a Markdown table, from the result of the stage."""
    objective = result["objective"]
    header = ("trial", *result["parameters"], objective.removeprefix("eval/"))
    rows = []
    for number, trial in enumerate(result["trials"], 1):
        values = [shown(trial["point"][key]) if key in trial["point"] else "" for key in result["parameters"]]
        outcome = trial.get("error") or f"{trial[objective]:.2f}"
        rows.append((str(number), *values, outcome))
    return table(header, rows)
