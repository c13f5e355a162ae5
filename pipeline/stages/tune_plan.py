"""What a sweep is going to do: its points, its budget and the time that it will take. Starts no Ray and writes nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.load import with_overrides
from pipeline.config.recipe import Recipe
from pipeline.errors import StageError
from pipeline.models.build import build_blank_model, check_model, check_shards
from pipeline.runtime.formatting import duration, scaled, table
from pipeline.runtime.usage import spent_in
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.tune_check import changes, check_budget, check_points, trials_of
from pipeline.stages.tune_distributions import RandomTrial, shown
from pipeline.stages.tune_rungs import milestones, plan_rungs
from pipeline.stages.tune_space import Space, read_space
from pipeline.sweeps.population import replaced
from wavemim.flops import cost_of, forward_flops

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import TPESampler

FIRST = 10  # points that are shown
_TIMED_STEPS = 4
_TIMED_FLOPS = 2e10  # of a timed step


def planned_points(recipe: Recipe, space: Space, count: int) -> list[dict[str, Any]] | None:
    """The first points of a sweep, if they are known before it: of a grid or a random search. None: Optuna draws them."""
    grid = space.grid()
    if grid is not None:
        return grid[:count]
    if not draws_at_random(recipe):
        return None
    return [space.suggest(RandomTrial(recipe.seed, number)) for number in range(count)]


def draws_at_random(recipe: Recipe) -> bool:
    """Whether points are random. Those of a population are: they are drawn before there are results that could guide Optuna."""
    return recipe.tune.search == "random" or recipe.tune.scheduler == "pbt"


def optuna_sampler(recipe: Recipe) -> TPESampler:
    """The sampler of Optuna, which is imported here."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.samplers.TPESampler(seed=recipe.seed, n_startup_trials=startup_trials(recipe))


def optuna_study(recipe: Recipe) -> Study:
    """A new study: of the objective, and of the cost if `tune.cost` names one."""
    import optuna

    sampler = optuna_sampler(recipe)
    if recipe.tune.cost is None:
        return optuna.create_study(direction="maximize", sampler=sampler)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def startup_trials(recipe: Recipe) -> int:
    """Trials that are random before the estimator has results to start from: a quarter."""
    return max(4, recipe.tune.trials // 4)


def dry_run(recipe: Recipe, say: Callable[[str], object] = print) -> None:
    """Check a sweep and print its space, first points, budget and expected time.

    Args:
        recipe: The settings.
        say: Called with the text.

    Raises:
        SettingError: The sweep would be refused.
    """
    check_model(recipe)
    space = read_space(recipe)
    check_points(recipe, space)
    trials = trials_of(recipe, space)
    points, drawn = _first_points(recipe, space, min(trials, FIRST))
    rows = [
        (number, *(shown(point[key]) if key in point else "" for key in space.settings))
        for number, point in enumerate(points, 1)
    ]
    lines = [f"{one.space}: {one.text}{f' [{one.unit}]' if one.unit else ''}" for one in space.questions if one.text]
    for key, entries in space.record().items():
        for entry in entries if isinstance(entries, list) else [entries]:
            lines.append(f"  {key}: {shown(entry)}")
    lines += ["", f"{trials} trials; {drawn}", "", table(("trial", *space.settings), rows), ""]
    say("\n".join([*lines, *_cost_lines(recipe, points, trials)]))


def _first_points(recipe: Recipe, space: Space, count: int) -> tuple[list[dict[str, Any]], str]:
    """The first points of a sweep, and how they are chosen."""
    points = planned_points(recipe, space, count)
    if points is not None:
        if space.grid() is not None:
            return points, "all points of the grid are tried:"
        if recipe.tune.scheduler == "pbt":
            return points, "a population that begins at points drawn at random:"
        return points, "drawn at random:"
    study = optuna_study(recipe)
    points = [space.suggest(study.ask()) for _ in range(count)]
    startup = startup_trials(recipe)
    if startup >= count:
        return points, "drawn at random by Optuna:"
    return points, f"the first {startup} are drawn at random, the others follow from results and are examples here:"


def _cost_lines(recipe: Recipe, points: Sequence[Mapping[str, Any]], trials: int) -> list[str]:
    """The budget and the expected time."""
    trial_of = [with_overrides(recipe, changes(recipe, point)) for point in points]
    epochs = sorted({one.train.epochs for one in trial_of})
    length = f"{epochs[0]:g}" if len(epochs) == 1 else f"{epochs[0]:g} to {epochs[-1]:g}"
    try:
        shards = ShardSet.open(recipe.shards_at)
    except StageError as error:
        extra = recipe.tune.recipe_seeds + recipe.tune.finalists * recipe.tune.fresh_seeds
        known = f"budget: {trials} trials of the search and {extra} of the recipe's seeds and finalists"
        return [f"{known}, each of {length} epochs", f"expected time: unknown, since {error}"]
    check_shards(recipe, shards)
    rows = shards.rows["train"]
    images = statistics.fmean(one.train.epochs * rows for one in trial_of)
    measuring = plan_rungs(recipe, shards)
    measured = measuring.at_end + (measuring.rungs + 1) * measuring.images
    flops = statistics.fmean(_trial_flops(one, shards, measured) for one in trial_of)
    check_budget(recipe, rows)
    rate, source = _recorded_rate(recipe) or _timed_rate(recipe, shards)
    seconds = flops / rate
    limits, searched = _limited(recipe, trials, images, seconds)
    extra = recipe.tune.recipe_seeds + recipe.tune.finalists * recipe.tune.fresh_seeds
    total = searched + extra
    budget = f"budget: {searched} trials of the search and {extra} of the recipe's seeds and finalists, each of {length} epochs "
    budget += f"× {rows:,} images: {round(total * images):,} images seen"
    at_once = _at_once(recipe, total)
    # The trials of a population wait for each other.
    rounds = sum(-(-n // at_once) for n in ((searched, extra) if recipe.tune.scheduler == "pbt" else (total,)))
    return [
        f"{budget}, {scaled(total * flops, 1000)}FLOP",
        *limits,
        f"expected time: {duration(rounds * seconds)} ({duration(seconds)} a trial, {at_once} at a time), estimated from "
        f"the counted FLOPs of these points at {scaled(rate, 1000)}FLOP/s, {source}; "
        "without starting processes and fitting probes",
    ]


def _limited(recipe: Recipe, trials: int, images: float, seconds: float) -> tuple[list[str], int]:
    """What the limits of a sweep mean, in lines, and how many trials of the search are within them.

    Args:
        recipe: The settings.
        trials: Trials of the search without limits.
        images: Images of a trial.
        seconds: Its expected time.
    """
    tune = recipe.tune
    fixed = tune.recipe_seeds + tune.finalists * tune.fresh_seeds
    at_once = _at_once(recipe, trials + fixed)
    share = tune.gpus_per_trial
    lines, least = [], trials
    if tune.images is not None:
        least = min(least, int(tune.images / images) - fixed)
        lines.append(f"tune.images={tune.images}: no new point once {tune.images:,} images are seen or reserved")
    if tune.hours is not None:
        least = min(least, int(tune.hours * 3600 / seconds) * at_once - fixed)
        lines.append(f"tune.hours={tune.hours:g}: no new point once {duration(tune.hours * 3600)} are used or reserved")
    if tune.gpu_hours is not None:
        least = min(least, int(tune.gpu_hours * 3600 / (seconds * share)) - fixed)
        lines.append(f"tune.gpu_hours={tune.gpu_hours:g}: no new point once {tune.gpu_hours:g} are used or reserved")
    if tune.scheduler == "asha":
        at = ", ".join(f"{100 * rung / tune.rungs:.0f} %" for rung in milestones(tune.rungs, tune.reduction))
        lines.append(
            f"asha: after {at} of a trial, those not among the best 1/{tune.reduction:g} are stopped; not counted here"
        )
    if tune.scheduler == "pbt":
        at = ", ".join(f"{100 * rung / tune.rungs:.0f} %" for rung in range(1, tune.rungs))
        count = replaced(max(least, 0), tune.quantile)
        lines.append(
            f"pbt: after {at} of a trial, the worst {count} of {max(least, 0)} go on from checkpoints of the best {count} with "
            "changed settings; no trial is shorter"
        )
    return lines, max(least, 0)


def _trial_flops(recipe: Recipe, shards: ShardSet, measured: int) -> float:
    """FLOPs of a trial: of its training, and of the features of its probes, of so many images in all."""
    rows = shards.rows["train"]
    with torch.device("meta"):
        model = build_blank_model(recipe)
        training = recipe.train.epochs * rows * cost_of(model, recipe.mask.count).training_flops
        each = forward_flops(model.encoder.model, shards.channels, recipe.encoder.image_size)
    return training + measured * each


def _at_once(recipe: Recipe, trials: int) -> int:
    """Trials at the same time: as set, or as this machine has room for; 1 on a cluster, whose size is not known here."""
    if recipe.tune.concurrent:
        return min(recipe.tune.concurrent, trials)
    if recipe.cluster.address or os.environ.get("RAY_ADDRESS"):
        return 1
    slots = slots_of(recipe, _on_gpu(recipe), torch.cuda.device_count(), os.cpu_count() or 1)
    return max(1, min(slots, trials))


def slots_of(recipe: Recipe, use_gpu: bool, gpus: float, cpus: float) -> int:
    """Trials that so many GPUs and CPUs have room for at the same time, at least 1.

    Args:
        recipe: The settings: `tune.gpus_per_trial` and the CPUs of a trial.
        use_gpu: Whether trials run on GPUs.
        gpus: Number of GPUs.
        cpus: Number of CPUs.
    """
    by_cpus = int(cpus // recipe.cluster.cpus_per_worker)
    a_gpu = int(1 / recipe.tune.gpus_per_trial + 1e-9)  # a trial does not use parts of two GPUs
    return max(1, min(by_cpus, int(gpus) * a_gpu) if use_gpu else by_cpus)


def _on_gpu(recipe: Recipe) -> bool:
    return torch.cuda.is_available() if recipe.cluster.gpus is None else recipe.cluster.gpus


def _recorded_rate(recipe: Recipe) -> tuple[float, str] | None:
    """FLOP/s of a trial, from what was spent in the out folder: in trials of this sweep, else in the latest pretraining."""
    trials = list((recipe.stage_dir("tune") / "trials").glob("*"))
    runs = sorted(recipe.run_dir.parent.glob("*/pretrain"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    own = recipe.stage_dir("pretrain")
    for folders, what in ((trials, "as in its earlier trials"), ([own], ""), *(([run], "") for run in runs)):
        rates = [rate for folder in folders if (rate := _rate_in(folder, gpu=_on_gpu(recipe)))]
        if rates:
            return statistics.median(rates), what or f"as in the run {folders[0].parent.name} in {recipe.out}"
    return None


def _rate_in(folder: Path, *, gpu: bool) -> float | None:
    """FLOP/s of a GPU, or of a core, in what a stage has recorded: a trial computes on one of them."""
    spent = spent_in(folder)
    hours = spent.gpu_hours if gpu else (0.0 if spent.gpu_hours else spent.worker_hours)
    return spent.flops / (hours * 3600) if hours and spent.flops else None


def _timed_rate(recipe: Recipe, shards: ShardSet) -> tuple[float, str]:
    """FLOP/s of a few steps of training on this machine, with one thread, as a trial trains."""
    from pipeline.training.pretrain_loop import train

    with torch.device("meta"):
        flops = cost_of(build_blank_model(recipe), recipe.mask.count).training_flops
    rows = shards.rows["train"]
    batch = max(1, min(recipe.train.batch, rows, int(_TIMED_FLOPS // flops)))
    steps = {"train.batch": batch, "train.epochs": _TIMED_STEPS / max(rows // batch, 1), "train.log_every": 1}
    fixed = {"train.warmup_epochs": 0, "train.accumulate": 1, "train.workers": 1, "train.progressive": {}}
    found: list[float] = []
    threads, device = torch.get_num_threads(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    try:
        train(
            with_overrides(recipe, {**steps, **fixed}),
            shards,
            device=device,
            on_log=lambda metrics, images: found.append(metrics.get("perf/images_per_second", 0.0)),
        )
    finally:
        torch.set_num_threads(threads)
    timed = [rate for rate in found[1:] if rate] or found  # the first step allocates memory
    where = "on this machine's GPU" if device.type == "cuda" else "on one core of this machine"
    return statistics.median(timed) * flops, f"timed in {len(timed)} steps of {batch} images {where}"
