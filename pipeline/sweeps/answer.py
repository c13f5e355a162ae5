"""Whether a sweep found better settings than the recipe's, judged by fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from pipeline.sweeps.trials import Sweep, Trial, point_key, short_name, trial_name

LEVEL, POWER = 0.05, 0.8  # of the tests, as is usual
_DRAWS = 200_000  # of the largest statistic: an error of the critical value of about 0.3 %
_MOST_SEEDS = 1000
_LONGEST_NAME = 60  # characters in a sentence


@dataclass(frozen=True)
class Arm:
    """Some settings and what their seeds gave.

    Attributes:
        name: For people.
        point: The values of the searched settings.
        values: The objective of each seed that finished.
        lost: Number of seeds that did not finish.
        interval: 95 % interval of the mean, from the noise of all arms; None if that is unknown.
        difference: Mean minus the recipe's mean; None for the recipe, or without one.
        difference_interval: Its interval, which holds for all finalists together in 95 % of sweeps.
    """

    name: str
    point: Mapping[str, Any]
    values: tuple[float, ...]
    lost: int = 0
    interval: tuple[float, float] | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Mean of its seeds."""
        return float(np.mean(self.values))


@dataclass(frozen=True)
class Answer:
    """What a sweep says about its question.

    Attributes:
        recipe: The recipe's own settings; None if none of its seeds finished.
        finalists: The finalists, the best first.
        noise: Standard deviation between seeds, pooled over the recipe and the finalists; None if no settings were run with
            two seeds.
        freedom: Its degrees of freedom.
        verdict: "better": the best finalist is better than the recipe; "worse"; "equal": they cannot be told apart; or
            "unknown": the noise or the difference was not measured.
        resolution: The difference that would be found in 80 % of such sweeps; None if unknown.
        chosen: The point to use. Empty: the recipe's own values.
        sentences: The answer in words.
    """

    recipe: Arm | None
    finalists: tuple[Arm, ...]
    noise: float | None
    freedom: int
    verdict: str
    resolution: float | None
    chosen: Mapping[str, Any]
    sentences: tuple[str, ...]


def answer(sweep: Sweep) -> Answer:
    """Compare the finalists with the recipe.

    Only fresh seeds count: the value with which the search chose a finalist is the highest of many, and so too high by
    chance. The variance between seeds is pooled. Intervals of the differences are Dunnett's, for all finalists together.

    Args:
        sweep: The trials.

    Returns:
        The comparison, and the answer in words.
    """
    recipe, finalists = _arms(sweep)
    every = [*([recipe] if recipe else []), *finalists]
    freedom = sum(len(arm.values) - 1 for arm in every)
    squares = sum(float(np.var(arm.values)) * len(arm.values) for arm in every)
    noise = math.sqrt(squares / freedom) if freedom else None
    if noise is not None:
        recipe, finalists = _with_intervals(recipe, finalists, noise, freedom)
    verdict, chosen = _verdict(sweep, recipe, finalists, noise)
    resolution = None
    if noise and recipe and finalists:
        sizes = [len(arm.values) for arm in finalists]
        factor = critical_value(sizes, len(recipe.values), freedom)
        resolution = noise * _spread(sizes[0], len(recipe.values)) * detectable(factor, freedom)
    found = Answer(recipe, tuple(finalists), noise, freedom, verdict, resolution, chosen, ())
    return Answer(**{**vars(found), "sentences": tuple(_sentences(sweep, found))})


def critical_value(sizes: Sequence[int], control: int, freedom: int, level: float = LEVEL) -> float:
    """Dunnett's two-sided critical value.

    Args:
        sizes: Number of values of each group that is compared.
        control: Number of values of the group that they are compared with.
        freedom: Degrees of freedom of the pooled variance.
        level: Probability that the largest statistic exceeds it, where all means are equal.

    Returns:
        The factor of the standard error of a difference.
    """
    if len(sizes) == 1:
        return float(stats.t.isf(level / 2, freedom))
    random = np.random.default_rng(0)
    counts = np.array(sizes)
    groups = random.standard_normal((_DRAWS, len(sizes))) / np.sqrt(counts)
    shared = random.standard_normal((_DRAWS, 1)) / math.sqrt(control)
    scale = np.sqrt(random.chisquare(freedom, (_DRAWS, 1)) / freedom)
    statistics = np.abs(groups - shared) / np.sqrt(1 / counts + 1 / control) / scale
    return float(np.quantile(statistics.max(1), 1 - level))


def detectable(critical: float, freedom: int, power: float = POWER) -> float:
    """The difference, in standard errors, whose statistic exceeds `critical` with the probability `power`."""

    def missing(gap: float) -> float:
        return float(stats.nct.sf(critical, freedom, gap)) - power

    return float(optimize.brentq(missing, 0.0, 10 * critical + 10))


def seeds_needed(difference: float, noise: float, finalists: int) -> int | None:
    """Seeds of the recipe and of each finalist with which a difference is found in 80 % of sweeps.

    Args:
        difference: The difference of the means.
        noise: Standard deviation between seeds.
        finalists: Number of finalists.

    Returns:
        The number, with Bonferroni's correction for the number of finalists; None if it is above 1000.
    """
    for seeds in range(2, _MOST_SEEDS + 1):
        freedom = (finalists + 1) * (seeds - 1)
        factor = stats.t.isf(LEVEL / 2 / finalists, freedom)
        if stats.nct.sf(factor, freedom, abs(difference) / noise / _spread(seeds, seeds)) >= POWER:
            return seeds
    return None


def _spread(first: int, second: int) -> float:
    """Standard error of a difference of two means, in standard deviations."""
    return math.sqrt(1 / first + 1 / second)


def _arms(sweep: Sweep) -> tuple[Arm | None, list[Arm]]:
    """The recipe, and the finalists with at least one seed that finished, the best first."""

    def arm(trials: Sequence[Trial], name: str) -> Arm | None:
        values = tuple(trial.value for trial in trials if trial.value is not None)
        return Arm(name, trials[0].point, values, len(trials) - len(values)) if values else None

    own = [trial for trial in sweep.trials if trial.role == "recipe"]
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        if trial.role == "finalist":
            groups.setdefault(point_key(trial.point), []).append(trial)
    # A finalist is called by the number under which the search found it.
    numbers = {point_key(trial.point): trial.number for trial in reversed(sweep.trials) if trial.role == "search"}
    found = []
    for key, trials in groups.items():
        name = trial_name(numbers.get(key, trials[0].number), trials[0].point, sweep.settings)
        found.append(arm(trials, name))
    finalists = sorted((one for one in found if one is not None), key=lambda one: -one.mean)
    return (arm(own, "recipe") if own else None), finalists


def _with_intervals(
    recipe: Arm | None, finalists: Sequence[Arm], noise: float, freedom: int
) -> tuple[Arm | None, list[Arm]]:
    factor = float(stats.t.isf(LEVEL / 2, freedom))

    def own(arm: Arm) -> tuple[float, float]:
        half = factor * noise / math.sqrt(len(arm.values))
        return arm.mean - half, arm.mean + half

    filled = [Arm(**{**vars(arm), "interval": own(arm)}) for arm in finalists]
    if recipe is None:
        return None, filled
    recipe = Arm(**{**vars(recipe), "interval": own(recipe)})
    if not filled:
        return recipe, []
    together = critical_value([len(arm.values) for arm in filled], len(recipe.values), freedom)
    compared = []
    for arm in filled:
        difference, half = arm.mean - recipe.mean, together * noise * _spread(len(arm.values), len(recipe.values))
        interval = (difference - half, difference + half)
        compared.append(Arm(**{**vars(arm), "difference": difference, "difference_interval": interval}))
    return recipe, compared


def _verdict(
    sweep: Sweep, recipe: Arm | None, finalists: Sequence[Arm], noise: float | None
) -> tuple[str, Mapping[str, Any]]:
    """What is known about the best finalist, and the point to use."""
    if finalists and recipe and noise and finalists[0].difference_interval is not None:
        low, high = finalists[0].difference_interval
        if low > 0:
            return "better", finalists[0].point
        return ("worse" if high < 0 else "equal"), {}
    if recipe is not None:  # nothing was shown to be better
        return "unknown", {}
    if finalists:
        return "unknown", finalists[0].point
    searched = sweep.finished("search")
    return "unknown", max(searched, key=lambda trial: trial.value or -math.inf).point if searched else {}


def _sentences(sweep: Sweep, found: Answer) -> list[str]:
    unit, searched = sweep.unit, sweep.finished("search")
    if not searched and not found.finalists:
        return ["No trial finished, so the sweep says nothing."]
    if found.verdict == "unknown":
        return _without_comparison(sweep, found)
    assert found.recipe and found.noise is not None
    best = found.finalists[0]
    assert best.difference is not None and best.difference_interval is not None
    low, high = best.difference_interval
    measured = f"{best.mean:.2f} against {found.recipe.mean:.2f}, difference {best.difference:+.2f}{unit} (95 % interval {low:+.2f} to {high:+.2f})"
    lines, name = [], _said(best.name)
    if found.verdict == "better":
        lines.append(f"{name} is better than the recipe: {measured}.")
    elif found.verdict == "worse":
        lines.append(f"No finalist is better than the recipe; the best one, {name}, is worse: {measured}.")
    else:
        lines.append(f"The sweep does not tell the best finalist, {name}, and the recipe apart: {measured}.")
    spread = f"The seeds of the same settings differ by {found.noise:.2f}{unit} (standard deviation, {found.freedom} degrees of freedom)"
    assert found.resolution is not None
    lines.append(f"{spread}; a difference of {found.resolution:.2f}{unit} would be found in 80 % of such sweeps.")
    if found.verdict == "equal":
        count = seeds_needed(best.difference, found.noise, len(found.finalists))
        many = f"about {count}" if count else f"more than {_MOST_SEEDS}"
        lines.append(f"To find a difference of {abs(best.difference):.2f}{unit}, {many} seeds of each would be needed.")
    if found.verdict != "better":
        lines.append("The recipe's own settings are kept.")
    return lines + _among_finalists(found) + _lost(found) + _schedules(sweep)


def _without_comparison(sweep: Sweep, found: Answer) -> list[str]:
    """The answer where no difference to the recipe with an interval is known: why, and what is there."""
    unit, searched, lines = sweep.unit, sweep.finished("search"), []
    if found.noise is None:
        lines.append("The noise was not measured: no settings were run with more than one seed.")
    elif found.noise == 0:
        lines.append("All seeds of the same settings gave exactly the same value, so the noise is unknown.")
    else:
        lines.append(
            f"The seeds of the same settings differ by {found.noise:.2f}{unit} (standard deviation, {found.freedom} degrees "
            "of freedom)."
        )
        missing = "finalist with fresh seeds" if found.recipe else "seed of the recipe's own settings"
        lines.append(f"No {missing} finished, so no settings can be called better than the recipe.")
    if searched:
        best = max(searched, key=lambda trial: trial.value or -math.inf)
        name = _said(trial_name(best.number, best.point, sweep.settings))
        equal = [
            trial for trial in searched if trial is not best and math.isclose(trial.value or 0.0, best.value or 0.0)
        ]
        if equal:
            name += f" ({_among([short_name(trial.number) for trial in equal])} equal)"
        lines.append(
            f"The highest of {len(searched)} searched trials is {name} with {best.value:.2f}; as the highest of many single "
            "runs, it may be so by chance."
        )
    if found.recipe:
        lines.append(f"The recipe's own settings are kept (mean {found.recipe.mean:.2f}).")
    return lines + _lost(found) + _schedules(sweep)


def _among(names: Sequence[str], most: int = 3) -> str:
    """Who is equal: "#04 is", "#04 and #07 are", or "12 others are"."""
    if len(names) > most:
        return f"{len(names)} others are"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) + (" is" if len(names) == 1 else " are")


def _schedules(sweep: Sweep) -> list[str]:
    """What finalists are of trials whose settings changed during training: a recipe has no schedules of settings."""
    forked = sum(bool(trial.forks) for trial in sweep.trials)
    if not forked:
        return []
    return [
        f"Population-based training changed the settings of {forked} trials during training; the finalists and the "
        "recommended recipe have the last values of such a trial, constant from the start."
    ]


def _among_finalists(found: Answer) -> list[str]:
    """Whether the best finalist can be told from the others, by Tukey's test of all pairs."""
    if len(found.finalists) < 2 or not found.noise or found.verdict != "better":
        return []
    arms = [arm.values for arm in found.finalists]
    deviation = _tukey([np.asarray(values) for values in arms], found.noise, found.freedom)
    close = [arm.name.split()[0] for arm, p in zip(found.finalists[1:], deviation[1:], strict=True) if p > LEVEL]
    return [f"It is not told apart from {', '.join(close)} among the finalists."] if close else []


def _tukey(groups: Sequence[np.ndarray], noise: float, freedom: int) -> list[float]:
    """p-value of each group's difference from the first, with the pooled noise of the whole sweep."""
    first, count = groups[0], len(groups)
    found = []
    for group in groups:
        gap = abs(first.mean() - group.mean()) / (noise * _spread(len(first), len(group)))
        found.append(float(stats.studentized_range.sf(gap * math.sqrt(2), count, freedom)))
    return found


def _said(name: str) -> str:
    """A trial's name in a sentence: without its settings if they are many, since the tables have them."""
    return name if len(name) <= _LONGEST_NAME else name.partition(" ")[0]


def _lost(found: Answer) -> list[str]:
    arms = [*([found.recipe] if found.recipe else []), *found.finalists]
    return [
        f"{arm.lost} of {arm.lost + len(arm.values)} seeds of {_said(arm.name)} did not finish and are not in its mean."
        for arm in arms
        if arm.lost
    ]
