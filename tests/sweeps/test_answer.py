"""The comparison of finalists with the recipe: statistics against scipy and simulation, and every sentence of the answer."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from tiny_sweeps import OBJECTIVE, flat, peaked, simulate

from pipeline.sweeps import answer as module
from pipeline.sweeps.answer import answer, critical_value, detectable, seeds_needed
from pipeline.sweeps.trials import Sweep, Trial


def sweep_of(recipe=(), finalists=(), searched=()):
    """A sweep with these objectives; None is a trial that failed."""
    trials = []

    def add(role, ratio, value, seed):
        state = "finished" if value is not None else "failed"
        trials.append(Trial(len(trials) + 1, role, {"mask.ratio": ratio}, seed, state, value))

    for seed, value in enumerate(recipe):
        add("recipe", 0.75, value, seed)
    for index, value in enumerate(searched):
        add("search", (index + 1) / 100, value, 0)
    for index, values in enumerate(finalists):
        for seed, value in enumerate(values):
            add("finalist", (index + 1) / 100, value, 10 + seed)
    return Sweep(OBJECTIVE, ["mask.ratio"], trials)


@pytest.mark.parametrize(("sizes", "control"), [((3,), 3), ((3, 3, 3), 3), ((3, 2, 5), 4)])
def test_the_critical_value_is_dunnetts(sizes, control):
    freedom = sum(sizes) + control - len(sizes) - 1
    factor = critical_value(sizes, control, freedom)

    # Groups whose statistics are exactly at the critical value: scipy's p-value is 5 %.
    def group(size, mean):
        noise = np.linspace(-1, 1, size) if size > 1 else np.zeros(1)
        return mean + noise * np.sqrt((size - 1) / max((noise**2).sum(), 1e-300))  # variance 1

    means = [factor * np.sqrt(1 / size + 1 / control) for size in sizes]
    found = stats.dunnett(*map(group, sizes, means), control=group(control, 0.0), rng=np.random.default_rng(0))
    assert found.pvalue == pytest.approx([0.05] * len(sizes), abs=0.002)


def test_the_detectable_difference_has_a_power_of_80_percent():
    random, n, freedom = np.random.default_rng(0), 20_000, 8
    gap = detectable(stats.t.isf(0.025, freedom), freedom)
    statistic = (gap + random.standard_normal(n)) / np.sqrt(random.chisquare(freedom, n) / freedom)
    assert np.mean(statistic > stats.t.isf(0.025, freedom)) == pytest.approx(0.8, abs=0.01)


def test_seeds_needed_agree_with_the_textbook():
    assert seeds_needed(1.0, 1.0, 1) == 17  # two-sided t-test of two groups, one standard deviation, power 0.8
    assert seeds_needed(0.5, 1.0, 1) == 64
    assert seeds_needed(1.0, 1.0, 3) > 17
    assert seeds_needed(0.001, 1.0, 1) is None


def test_a_clear_difference_is_better_and_its_point_is_chosen():
    found = answer(sweep_of((50, 50.5, 51), [(52, 53, 52.5), (60, 60.5, 61)], searched=(99, 62)))
    assert found.verdict == "better"
    assert found.chosen == {"mask.ratio": 0.02}
    assert found.noise == pytest.approx(0.5) and found.freedom == 6
    best = found.finalists[0]
    assert best.name == "#05 mask=0.02"  # its number in the search
    assert best.mean == 60.5 and best.difference == 10  # fresh seeds only: 62 and 99 do not count
    half = stats.t.isf(0.025, 6) * 0.5 / np.sqrt(3)
    assert best.interval == pytest.approx((60.5 - half, 60.5 + half))
    assert found.sentences[0] == (
        "#05 mask=0.02 is better than the recipe: 60.50 against 50.50, difference +10.00 points (95 % interval "
        f"{best.difference_interval[0]:+.2f} to {best.difference_interval[1]:+.2f})."
    )


def test_an_interval_that_contains_zero_keeps_the_recipe_and_says_what_could_be_seen():
    found = answer(sweep_of((50, 51, 52), [(51, 52, 53)], searched=(55,)))
    assert (found.verdict, found.chosen) == ("equal", {})
    text = " ".join(found.sentences)
    assert "does not tell the best finalist" in found.sentences[0] and "and the recipe apart" in found.sentences[0]
    assert f"a difference of {found.resolution:.2f} points would be found in 80 % of such sweeps" in text
    assert "To find a difference of 1.00 points, about 17 seeds of each would be needed." in text
    assert "The recipe's own settings are kept." in text


def test_a_worse_finalist_keeps_the_recipe():
    found = answer(sweep_of((60, 60.1, 60.2), [(50, 50.1, 50.2)]))
    assert (found.verdict, found.chosen) == ("worse", {})
    assert found.sentences[0].startswith("No finalist is better than the recipe")


def test_finalists_that_are_close_are_named():
    found = answer(sweep_of((50, 50.5, 51), [(60, 60.5, 61), (60.2, 60.7, 60.9), (55, 55.5, 56)], searched=(1, 2, 3)))
    assert "It is not told apart from #04 among the finalists." in found.sentences  # not #06, five points below
    assert not any("not told apart" in s for s in answer(sweep_of((50, 51), [(60, 60.1), (90, 90.1)])).sentences)


def test_without_repeated_seeds_nothing_is_called_better():
    found = answer(sweep_of(searched=(25, 28, 26)))
    assert found.verdict == "unknown" and found.noise is None and found.resolution is None
    assert found.sentences[0] == "The noise was not measured: no settings were run with more than one seed."
    assert "#02 mask=0.02 with 28.00" in found.sentences[1] and "by chance" in found.sentences[1]
    assert found.chosen == {"mask.ratio": 0.02}


def test_missing_parts_of_a_sweep():
    only_recipe = answer(sweep_of((50, 51, 52), searched=(70,)))
    assert only_recipe.verdict == "unknown" and only_recipe.chosen == {}
    assert "No finalist with fresh seeds finished" in only_recipe.sentences[1]
    no_recipe = answer(sweep_of((None, None), [(50, 51)]))
    assert no_recipe.verdict == "unknown" and "No seed of the recipe's own settings finished" in no_recipe.sentences[1]
    same = answer(sweep_of((50, 50, 50), [(51, 51, 51)]))
    assert same.verdict == "unknown" and "exactly the same value" in same.sentences[0] and same.chosen == {}
    assert answer(sweep_of((None,), searched=(None,))).sentences == ("No trial finished, so the sweep says nothing.",)
    lost = answer(sweep_of((50, 51, None), [(60, 61, 62)]))
    assert lost.sentences[-1] == "1 of 3 seeds of recipe did not finish and are not in its mean."


def test_stopped_trials_and_values_that_are_not_numbers_do_not_count():
    sweep = sweep_of((50, 51, 52), [(60, 61, 62)], searched=(70,))
    bad = [Trial(90, "recipe", {"mask.ratio": 0.75}, 9, "finished", float("nan"))]
    bad += [Trial(91, "finalist", {"mask.ratio": 0.01}, 9, "stopped", 99.0)]
    with_bad = answer(dataclasses.replace(sweep, trials=[*sweep.trials, *bad]))
    assert with_bad.finalists[0].values == (60, 61, 62) and with_bad.recipe.values == (50, 51, 52)


def test_under_pure_noise_five_percent_of_sweeps_differ(monkeypatch):
    """The intervals of all finalists together hold in 95 % of sweeps, although the search picked them from noise."""
    factor = critical_value([3, 3, 3], 3, 8)
    monkeypatch.setattr(module, "critical_value", lambda *_: factor)
    monkeypatch.setattr(module, "seeds_needed", lambda *_: 1)
    monkeypatch.setattr(module, "detectable", lambda *_: 1)
    monkeypatch.setattr(module, "_tukey", lambda *_: [0.0, 0.0, 0.0])
    found = [answer(simulate(flat, seed=seed)) for seed in range(1000)]
    differ = np.mean(
        [any(a.difference_interval[0] > 0 or a.difference_interval[1] < 0 for a in f.finalists) for f in found]
    )
    assert 0.03 < differ < 0.07
    assert np.mean([one.verdict == "better" for one in found]) < 0.04


def test_a_real_improvement_is_found():
    bad_recipe = {"target.weights.1": 3.0, "target.weights.2": 1.0, "target.weights.3": 0.1, "mask.ratio": 0.4}
    found = [answer(simulate(peaked, seed=seed, recipe=bad_recipe)) for seed in range(5)]
    assert all(one.verdict == "better" for one in found)


@pytest.mark.parametrize(
    ("searched", "said"),
    [
        ((14.0, 13.0), "#01 mask=0.01 with 14.00"),
        ((13.0, 14.0, 13.5, 14.0 + 1e-14), "(#02 is equal) with 14.00"),
        ((14.0, 14.0, 14.0), "#01 mask=0.01 (#02 and #03 are equal) with 14.00"),
        ((14.0,) * 6, "#01 mask=0.01 (5 others are equal) with 14.00"),
    ],
)
def test_a_tie_of_the_highest_trials_is_said(searched, said):
    found = answer(sweep_of(searched=searched))
    assert any(said in line for line in found.sentences), found.sentences
