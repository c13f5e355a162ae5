"""Fitted responses and their sentences on simulated sweeps: never stronger than the data."""

import dataclasses
import re

import numpy as np
import pytest
from tiny_sweeps import OBJECTIVE, WEIGHTS, drawn, flat, peaked, simulate

from pipeline.sweeps.axes import axes_of
from pipeline.sweeps.importance import importance
from pipeline.sweeps.response import _runs, _up, number, responses
from pipeline.sweeps.trials import Sweep, Trial


def of(found, *keys):
    return next(curve for curve in found.curves if curve.axis.keys == keys)


def test_a_peak_is_found_and_said():
    found = responses(simulate(peaked, searched=60, noise=0.3), resolution=1.0)
    ratio, mask = of(found, WEIGHTS[0], WEIGHTS[2]), of(found, "mask.ratio")
    wanted = np.array(ratio.values)[ratio.kept]
    assert wanted.min() < 0.35 < wanted.max() and wanted.max() / wanted.min() < 8
    assert ratio.sentence.startswith("level 1 wants 0.") and "of level 3's weight: a ratio of" in ratio.sentence
    wanted = np.array(mask.values)[mask.kept]
    assert 0.5 < wanted.min() < 0.65 < wanted.max() < 0.8
    assert mask.sentence.startswith("mask.ratio wants 0.") and "costs about" in mask.sentence
    assert "it makes no difference above" in mask.sentence
    level2 = of(found, WEIGHTS[1], WEIGHTS[2])
    assert level2.kept.all() and level2.cost is None
    assert found.explained > 0.9 and found.residual == pytest.approx(0.3, rel=0.5)


def test_a_flat_response_makes_no_difference():
    found = responses(simulate(flat, searched=80, noise=0.1), resolution=0.5)
    assert [curve.cost for curve in found.curves] == [None] * 3
    mask = of(found, "mask.ratio")
    assert mask.sentence.startswith("mask.ratio between 0.4 and 0.9 makes no difference above 0.")
    assert mask.within < 0.5


def test_what_the_noise_cannot_resolve_is_not_called_no_difference():
    mask = of(responses(simulate(flat, noise=3.0), resolution=0.5), "mask.ratio")
    assert "makes no difference" not in mask.sentence
    assert "the sweep does not say which value is best; differences of up to" in mask.sentence


def test_under_pure_noise_at_most_five_percent_of_sweeps_prefer_a_value():
    found = [responses(simulate(flat, seed=seed)) for seed in range(200)]
    assert all(len(one.curves) == 3 for one in found)
    assert np.mean([any(curve.cost for curve in one.curves) for one in found]) < 0.05


@pytest.mark.parametrize("slope", [1.0, 4.0])
def test_bounds_hold(slope):
    """The bound of the difference between kept values, and of the cost of others, is right in at least 95 % of sweeps."""
    right, found = [], []
    for seed in range(100):
        mask = of(responses(simulate(lambda point: 50 + slope * point["mask.ratio"] / 0.5, seed=seed)), "mask.ratio")
        kept = np.array(mask.values)[mask.kept]
        true = slope * (kept.max() - kept.min()) / 0.5
        least = slope * (max(mask.values) - mask.values[mask.cost[2]]) / 0.5 if mask.cost else np.inf
        right.append(mask.within >= true and (mask.cost is None or mask.cost[1] <= least))
        found.append(mask.cost is not None)
    assert np.mean(right) >= 0.95
    assert slope < 4 or np.mean(found) > 0.5  # and it is not silent where there is something to say


def test_categories_lists_and_mappings():
    def draw(random):
        point = drawn(random)
        taps = [{"2": 4, "3": 8}, {"2": 2, "3": 8}][random.integers(2)]
        return {
            "mask.ratio": point["mask.ratio"],
            "target.kind": ["pixels", "wavelet"][random.integers(2)],
            "target.taps": taps,
        }

    sweep = simulate(
        lambda point: 50 + 3 * (point["target.kind"] == "wavelet"),
        searched=40, noise=0.3, recipe={"mask.ratio": 0.75, "target.kind": "pixels", "target.taps": {"2": 4, "3": 8}}, draw=draw,
    )  # fmt: skip
    found = responses(sweep, resolution=1.0)
    kind = of(found, "target.kind")
    assert re.match(r"target.kind wants wavelet: pixels costs about (3|2.9|3.1) points \(at least 2", kind.sentence)
    assert kind.mean[1] - kind.mean[0] == pytest.approx(3, abs=0.4)
    taps = of(found, "target.taps")
    assert taps.sentence.startswith("target.taps makes no difference above 0.")
    assert taps.sentence.endswith("between {2:2,3:8} and {2:4,3:8}.")


def test_a_setting_that_does_not_apply_everywhere():
    def draw(random):
        kind = ["pixels", "wavelet"][random.integers(2)]
        point = {"target.kind": kind, "mask.ratio": float(random.uniform(0.4, 0.9))}
        return {**point, "decoder.depth": float(random.uniform(1, 5))} if kind == "wavelet" else point

    def response(point):
        return 50 - 3 * abs(point.get("decoder.depth", 3) - 2) + 2 * (point["target.kind"] == "pixels")

    recipe = {"target.kind": "pixels", "mask.ratio": 0.75}
    sweep = simulate(response, searched=60, noise=0.3, recipe=recipe, draw=draw)
    sweep = dataclasses.replace(sweep, settings=[*recipe, "decoder.depth"])
    found = responses(sweep)
    depth = of(found, "decoder.depth")
    assert depth.cost is not None and min(depth.values) >= 1
    wanted = np.array(depth.values)[depth.kept]
    assert wanted.min() < 2.3 and wanted.max() < 4
    shares = importance(sweep)
    assert shares.counts["decoder.depth"] == sum(
        "decoder.depth" in t.point for t in {id(t.point): t for t in sweep.trials}.values()
    )


def test_too_few_trials_and_too_many_values_are_said():
    found = responses(simulate(peaked, searched=8))
    assert not found.curves and found.residual is None
    assert found.notes == (
        "9 finished points are too few to say how the objective depends on 3 settings; 14 would do.",
    )
    trials = [Trial(i, "search", {"a.name": f"x{i}"}, 0, "finished", float(i)) for i in range(20)]
    assert responses(Sweep(OBJECTIVE, ["a.name"], trials)).notes[0].startswith("a.name has 20 values in 20 points")


def test_settings_that_vary_together_are_not_told_apart():
    random = np.random.default_rng(0)
    trials = []
    for i in range(40):
        x = float(random.uniform(0, 1))
        trials.append(
            Trial(i, "search", {"a.x": x, "a.y": 2 * x, "mask.ratio": float(random.uniform())}, 0, "finished", 10 * x)
        )
    found = responses(Sweep(OBJECTIVE, ["a.x", "a.y", "mask.ratio"], trials))
    assert [curve.axis.name for curve in found.curves] == ["mask.ratio"]
    assert [note.partition(" ")[0] for note in found.notes] == ["a.x", "a.y"]


def test_axes_are_ratios_only_where_only_ratios_matter():
    sweep = simulate(peaked)
    assert [axis.name for axis in axes_of(sweep)] == [
        "weight of level 1 / weight of level 3", "weight of level 2 / weight of level 3", "mask.ratio",
    ]  # fmt: skip
    raw = dataclasses.replace(sweep, relative=())
    assert [axis.name for axis in axes_of(raw)] == [*WEIGHTS, "mask.ratio"]
    zero = dataclasses.replace(sweep.trials[5], point={**sweep.trials[5].point, WEIGHTS[2]: 0})
    with_zero = axes_of(dataclasses.replace(sweep, trials=[*sweep.trials, zero]))
    assert [axis.name for axis in with_zero] == [*WEIGHTS, "mask.ratio"]
    assert not next(axis for axis in with_zero if axis.name == WEIGHTS[2]).log


def test_importance_is_of_what_matters_and_silent_about_noise():
    found = importance(simulate(peaked, searched=60, noise=0.3))
    assert next(iter(found.shares)) == "weight of level 1 / weight of level 3"
    assert found.shares["weight of level 2 / weight of level 3"] < 0.03 < found.shares["mask.ratio"]
    noise = [importance(simulate(flat, seed=seed, searched=30)) for seed in range(4)]
    assert sum(bool(one.shares) for one in noise) <= 1
    one = dataclasses.replace(simulate(peaked, searched=30), settings=["mask.ratio"])
    assert "Only mask.ratio varied" in importance(one).note
    few = importance(simulate(peaked, searched=8))
    assert not few.shares and few.note == "9 finished points are too few to estimate importance; 15 would do."


def test_numbers_in_sentences():
    assert [number(value) for value in (0.0123, 0.6, 11.4, 234.0, 0, 2e-5)] == [
        "0.012",
        "0.6",
        "11",
        "230",
        "0",
        "0.00002",
    ]
    assert [_up(value) for value in (0.41, 0.411, 2.31, 0.0, 9.99)] == ["0.41", "0.42", "2.4", "0", "10"]
    assert _runs(np.array([1, 1, 0, 1], bool)) == [(0, 1), (3, 3)]
