"""A sweep on Ray Tune: each trial pretrains in its own process with some settings changed, and is judged honestly.

The loss of a trial depends on its level weights and its mask, so it cannot rank trials. The objective is a measure that
the searched values cannot move by themselves: the linear probe's accuracy on a part of the train split that the probe
has not seen (val stays untouched, for the final evaluation), or RankMe where there are no labels.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.tune
import torch
import yaml
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from tqdm import tqdm

from pipeline.config.checks import check_searchable
from pipeline.config.load import read_yaml, validate, with_overrides
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.features import features_of
from pipeline.models.build import build_inputs, check_model, check_shards
from pipeline.runtime.formatting import table as _table
from pipeline.runtime.ray_session import SessionInfo, check_room, uses_gpu
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.batches import split_bytes
from pipeline.shards.shard_set import ShardSet
from pipeline.tracking.tracker import RunHandle, Tracker, end_trials
from pipeline.training.pretrain_loop import train
from wavemim.evaluation.metrics import rankme
from wavemim.evaluation.probes import held_out, linear_probe
from wavemim.figures.plots import sweep_figure
from wavemim.flops import forward_flops

PROBE, RANK = "eval/linear_top1_heldout", "eval/rankme"
TRIALS = "trials"  # in the stage's folder: what each of them logged
KINDS = ("uniform", "log_uniform", "choice", "int_uniform")


def tune(recipe: Recipe, session: SessionInfo, *, progress: bool = True) -> dict[str, Any]:
    """Run the sweep; gives the summary that is also the stage's finishing mark."""
    check_model(recipe)
    shards = ShardSet.open(recipe.shards_at)
    check_shards(recipe, shards)
    check_room(recipe, session, 1)
    space = read_space(recipe)
    objective = PROBE if shards.classes is not None else RANK
    same = {**identity(recipe, "tune"), "space": {k: dict(v) for k, v in space.items()}, "shards": shards.fingerprint}
    with stage_folder(recipe.stage_dir("tune"), same, restart=recipe.restart) as folder:
        if folder.finished:
            return {**folder.result(), "state": "finished already"}
        meter = Meter(before=spent_in(folder.path))
        folder.clear()  # an unfinished sweep starts over: its trials are short, and half a search is another search
        tags = {"wavemim.shards": shards.fingerprint, "wavemim.space": recipe.tune.space}
        with Tracker.start(recipe, "tune", log_dir=folder.path, tags=tags) as tracker:
            statuses: dict[str, str] = {}

            def record() -> Spent:
                spent = meter.read(spent_in(trial) for trial in (folder.path / TRIALS).glob("*"))
                tracker.log(spent.metrics(), spent.images_seen)
                return spent

            follow = functools.partial(_Follow, objective=objective, statuses=statuses, record=record)
            try:
                record()  # what an earlier sweep has spent goes with its files
                results = _search(recipe, shards, space, objective, tracker.handle, folder, session, follow, progress)
            finally:
                end_trials(tracker.handle.uri, tracker.handle.run_id, statuses)
                spent = record()
            if _ended(results, objective) < recipe.tune.trials:
                raise KeyboardInterrupt  # Ray Tune takes Ctrl-C for itself, and gives back what it has as if whole
            trials = _trials(results, space, objective)
            if not any(np.isfinite(trial[objective]) for trial in trials):
                raise StageError(
                    f"all {len(trials)} trials failed; the first: {trials[0].get('error', 'no reason given')}"
                )
            result = {**_write(recipe, folder, trials, space, objective, tracker), "cost": spent.record()}
            folder.finish(result)
        return {**result, "state": "started over" if folder.state == "unfinished" else folder.state}


def read_space(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The searched settings and their ranges, without the levels that the recipe does not tap. Raises SettingError."""
    name = recipe.tune.space
    entries = read_yaml(name, "tune_spaces", "", "tune.space").get("space")
    if not isinstance(entries, dict) or not entries:
        raise SettingError(f"tune.space={name}: the file needs a mapping 'space' of settings to ranges")
    space: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        section, _, last = str(key).rpartition(".")
        if section == "target.weights" and last.isdigit() and int(last) not in recipe.target.taps:
            continue
        _check_entry(recipe, str(key), entry)
        space[str(key)] = entry
    if not space:
        raise SettingError(f"tune.space={name}: none of its levels is tapped by the recipe (target.taps)")
    return space


def _check_entry(recipe: Recipe, key: str, entry: Any) -> None:
    """Raise SettingError unless `entry` is a range of values that a trial of `recipe` can have for setting `key`."""
    where = f"tune.space={recipe.tune.space}: {key}"
    check_searchable(key, where)
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise SettingError(f"{where} needs one of {', '.join(KINDS)}, for example {{uniform: [0.4, 0.9]}}")
    kind, values = next(iter(entry.items()))
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise SettingError(f"{where}: choice needs a list of values, got {values}")
    else:
        numbers = isinstance(values, list) and len(values) == 2 and all(type(v) in (int, float) for v in values)
        if not numbers or values[0] >= values[1] or (kind == "log_uniform" and values[0] <= 0):
            above = " above 0" if kind == "log_uniform" else ""
            raise SettingError(f"{where}: {kind} needs [low, high]{above}, got {values}")
        if kind == "int_uniform" and not all(type(value) is int for value in values):
            raise SettingError(f"{where}: int_uniform needs whole numbers, got {values}")
    # A range that leaves what is allowed is found before the sweep; so is a whole number asked for in fractions.
    between = [values[0] + (values[1] - values[0]) * 0.37] if kind in ("uniform", "log_uniform") else []
    for value in (*values, *between):
        with_overrides(recipe, _changes(recipe, {key: value}))


def _changes(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial changes in the recipe: its length, one worker, and the searched values."""
    changes = {"train.epochs": recipe.tune.epochs, "train.workers": 1, "tracking.system_metrics": False, **config}
    if "train.warmup_epochs" not in config and recipe.train.warmup_epochs >= changes["train.epochs"]:
        changes["train.warmup_epochs"] = changes["train.epochs"] / 10
    return changes


def _domain(entry: Mapping[str, Any]) -> Any:
    kind, values = next(iter(entry.items()))
    if kind == "choice":
        return ray.tune.choice(values)
    make = {"uniform": ray.tune.uniform, "log_uniform": ray.tune.loguniform, "int_uniform": _whole}[kind]
    return make(*values)


def _whole(low: int, high: int) -> Any:
    return ray.tune.randint(low, high + 1)  # Ray leaves the upper end out


def _search(
    recipe: Recipe,
    shards: ShardSet,
    space: Mapping[str, Mapping[str, Any]],
    objective: str,
    parent: RunHandle,
    folder: StageFolder,
    session: SessionInfo,
    follow: Callable[[tqdm], ray.tune.Callback],
    progress: bool,
) -> ray.tune.ResultGrid:
    use_gpu = uses_gpu(recipe, session)
    slots = int(session.gpus if use_gpu else session.cpus // recipe.cluster.cpus_per_worker)
    concurrent = recipe.tune.concurrent or max(1, min(slots, recipe.tune.trials))
    search: Any
    if recipe.tune.search == "optuna":
        import optuna
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # a quarter of the trials at random first; with fewer, TPE would only ever guess
        sampler = TPESampler(seed=recipe.seed, n_startup_trials=max(4, recipe.tune.trials // 4))
        search = ConcurrencyLimiter(OptunaSearch(sampler=sampler), max_concurrent=concurrent)
    else:
        search = BasicVariantGenerator(random_state=recipe.seed, max_concurrent=concurrent)
    trial = ray.tune.with_parameters(
        _trial,
        settings=recipe.dump(),
        shards_path=shards.folder.url,
        parent=parent,
        objective=objective,
        logs=str(folder.path / TRIALS),
        use_gpu=use_gpu,
    )
    bar = tqdm(total=recipe.tune.trials, desc="tune", unit=" trial", disable=not progress)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"cpu": recipe.cluster.cpus_per_worker, "gpu": 1 if use_gpu else 0}),
        param_space={key: _domain(entry) for key, entry in space.items()},
        tune_config=ray.tune.TuneConfig(
            metric=objective, mode="max", num_samples=recipe.tune.trials, search_alg=search
        ),
        run_config=ray.tune.RunConfig(name="ray", storage_path=str(folder.path), verbose=0, callbacks=[follow(bar)]),
    )
    with bar:
        return tuner.fit()


class _Follow(ray.tune.Callback):
    """Moves the bar, notes what was spent, and remembers how each trial's MLflow run has to end."""

    def __init__(self, bar: tqdm, *, objective: str, statuses: dict[str, str], record: Callable[[], object]) -> None:
        self.bar, self.objective, self.statuses, self.record = bar, objective, statuses, record
        self.best = float("-inf")

    def __getstate__(self) -> dict[str, Any]:
        """Without what only this process has: Tune writes callbacks down, and nobody reads them."""
        return {**vars(self), "bar": None, "record": None}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself."""
        value = trial.last_result.get(self.objective)
        if value is not None:
            self.best = max(self.best, float(value))
            self.bar.set_postfix(best=f"{self.best:.2f}")
        self._note(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed: the sweep goes on."""
        self._note(trial, "FAILED")

    def _note(self, trial: Any, status: str) -> None:
        self.bar.update()
        self.record()
        run_id = (trial.last_result or {}).get("mlflow_run")
        if run_id:
            self.statuses[run_id] = status


def _trial(
    config: dict[str, Any],
    settings: dict[str, Any],
    shards_path: str,
    parent: RunHandle,
    objective: str,
    logs: str,
    use_gpu: bool,
) -> None:
    """One trial: a short pretraining and its judgement, in this process."""
    torch.set_num_threads(1)
    base = validate(settings)
    recipe = with_overrides(base, _changes(base, config))
    shards = ShardSet.open(shards_path)
    device = torch.device("cuda" if use_gpu else "cpu")
    trial_id = ray.tune.get_context().get_trial_id()
    with Tracker.start(
        recipe,
        "trial",
        parent=parent,
        name=f"trial-{trial_id}",
        log_dir=Path(logs) / trial_id,
        tags={"wavemim.shards": shards.fingerprint},
    ) as tracker:
        trained = train(recipe, shards, device=device, on_log=tracker.log)
        cores, gpus = recipe.cluster.cpus_per_worker, float(use_gpu)
        meter = Meter(cores=cores, gpus=gpus, before=spent_in(Path(logs) / trial_id))
        inputs = build_inputs(shards).to(device)
        features, labels = features_of(
            trained.model.encoder.model.eval(),
            inputs,
            shards,
            "train",
            window=recipe.encoder.image_size,
            batch=recipe.evaluate.batch,
            max_rows=recipe.tune.max_images,
        )
        measured = {RANK: rankme(features)}
        if objective == PROBE:
            out = held_out(len(labels), recipe.seed)
            probe, _ = linear_probe(
                (features[~out], labels[~out]),
                (features[out], labels[out]),
                strengths=recipe.evaluate.probe_strengths[:1] if len(labels) < 100 else recipe.evaluate.probe_strengths,
                seed=recipe.seed,
            )
            measured |= {PROBE: probe.top1, f"{PROBE}_low": probe.low, f"{PROBE}_high": probe.high}
        final = {name: value for name, value in trained.position.history[-1].items() if name != "epoch"}
        flops = forward_flops(trained.model.encoder.model, shards.channels, recipe.encoder.image_size)
        read = split_bytes(shards, "train", recipe.tune.max_images)
        meter.add(images=len(labels), flops=flops * len(labels), bytes_read=read)
        measured |= meter.read().metrics()
        tracker.log(measured, trained.position.images)
        ray.tune.report({**measured, **final, "images": trained.position.images, "mlflow_run": tracker.handle.run_id})


def _ended(results: ray.tune.ResultGrid, objective: str) -> int:
    """Trials that came to their own end, judged or failed."""
    ends = [results[index] for index in range(len(results))]
    return sum(result.error is not None or objective in (result.metrics or {}) for result in ends)


def _trials(results: ray.tune.ResultGrid, space: Mapping[str, Any], objective: str) -> list[dict[str, Any]]:
    """One flat mapping a trial, the best first."""
    trials = []
    for result in (results[index] for index in range(len(results))):
        metrics = result.metrics or {}
        trial: dict[str, Any] = {key: (result.config or {}).get(key) for key in space}
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
    space: Mapping[str, Any],
    objective: str,
    tracker: Tracker,
) -> dict[str, Any]:
    """Table, picture and the best settings as a recipe; all of it to MLflow too."""
    table = folder.path / "trials.csv"
    columns = list(dict.fromkeys(name for trial in trials for name in trial))
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(trials)
    picture = folder.path / "sweep.png"
    sweep_figure(picture, trials, parameters=list(space), metric=objective)
    best = trials[0]
    chosen = {key: best[key] for key in space}
    best_recipe = with_overrides(recipe, chosen).dump()
    for place in ("images", "shards", "checkpoint"):
        best_recipe.pop(place)
    best_recipe |= {"name": f"{recipe.name}-tuned", "restart": False, "force": False}
    best_path = folder.path / "best.yaml"
    best_path.write_text(
        f"# Best of {len(trials)} trials over {recipe.tune.space}: {objective} {best[objective]:.2f}\n"
        + yaml.safe_dump(best_recipe, sort_keys=False),
        encoding="utf-8",
    )
    for path in (table, picture, best_path):
        tracker.artifact(path)
    images = int(best.get("images", 0))
    tracker.log({f"tune/best_{objective.rpartition('/')[2]}": best[objective]}, images)
    return {
        "objective": objective,
        "trials": trials,
        "parameters": list(space),
        "best": chosen,
        "best_recipe": str(best_path),
        "table": str(table),
        "figure": str(picture),
        "mlflow_run": tracker.handle.run_id,
    }


def tune_lines(result: Mapping[str, Any]) -> str:
    """The sweep's table and where it is."""
    return (
        f"{sweep_table(result)}\n"
        f"tune: {len(result['trials'])} trials → {result['table']}, picture {result['figure']}, "
        f"best settings as a recipe {result['best_recipe']} ({result['state']})"
    )


def sweep_table(result: Mapping[str, Any]) -> str:
    """The trials of a sweep as a table."""
    objective = result["objective"]
    header = ("trial", *result["parameters"], objective.removeprefix("eval/"))
    rows = []
    for number, trial in enumerate(result["trials"], 1):
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (trial[key] for key in result["parameters"])]
        outcome = trial.get("error") or f"{trial[objective]:.2f}"
        rows.append((str(number), *values, outcome))
    return _table(header, rows)
