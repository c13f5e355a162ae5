"""Perturbed points of a search space: they are in the space, near the old ones, and a function of the random numbers."""

import json
import random

import pytest
from loss_equality.cases import TWO_LEVELS

from pipeline.config.load import load
from pipeline.stages.tune_check import check_space
from pipeline.stages.tune_distributions import RandomTrial
from pipeline.stages.tune_perturb import perturbed
from pipeline.stages.tune_space import read_space

SPACE = """
space:
  target.weights: {simplex: [3, 4]}
  target.tilt: {grid: [0, 0.5, {0: 0, 1: 1}]}
  mask.ratio: {uniform: [0.4, 0.9]}
  mask.count: {int: [1, 3]}
  train.lr: {log_uniform: [1e-4, 1e-2]}
  train.weight_decay: {uniform: [0, 0.2], step: 0.05}
  train.flip: {choice: [true, false]}
"""
TILTS = [0, 0.5, {"0": 0, "1": 1}]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "mine.yaml"
    path.write_text(SPACE)
    recipe = load(TWO_LEVELS, [f"tune.space={path}", "tune.scheduler=pbt"])
    check_space(recipe)
    return read_space(recipe)


def walk(space, steps, seed=0):
    numbers, point = random.Random(seed), space.suggest(RandomTrial(seed))
    for _ in range(steps):
        before, point = point, perturbed(space, point, numbers)
        yield before, point


def test_every_perturbed_point_is_in_the_space_and_survives_json(space):
    """Would catch: a number beyond an end or off its steps, shares that do not sum to 1, a float where an int is needed."""
    for _, point in walk(space, 400):
        assert list(point) == list(space.settings) and json.loads(json.dumps(point)) == point
        shares = [point["target.weights.3"], point["target.weights.4"]]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert point["target.tilt"] in TILTS and 0.4 <= point["mask.ratio"] <= 0.9
        assert point["mask.count"] in (1, 2, 3) and isinstance(point["mask.count"], int)
        assert 1e-4 <= point["train.lr"] <= 1e-2 and isinstance(point["train.flip"], bool)
        assert point["train.weight_decay"] in (0, 0.05, 0.1, 0.15, 0.2)


def test_most_values_move_a_little_and_some_are_drawn_anew(space):
    """Would catch: values that never move or only in one direction, and a lost or constant drawing anew."""
    near = {"up": 0, "down": 0, "far": 0}
    for before, point in walk(space, 600):
        factor = point["train.lr"] / before["train.lr"]
        if factor == pytest.approx(1.25, rel=1e-3):
            near["up"] += 1
        elif factor == pytest.approx(0.8, rel=1e-3):
            near["down"] += 1
        elif point["train.lr"] not in (1e-4, 1e-2):
            near["far"] += 1
    assert min(near["up"], near["down"]) > 120 and 90 < near["far"] < 220
    moved = [abs(point["mask.ratio"] - before["mask.ratio"]) for before, point in walk(space, 300)]
    assert sum(gap == pytest.approx(0.1, abs=2e-4) for gap in moved) > 100 and min(moved) >= 0
    steps = [
        TILTS.index(point["target.tilt"]) - TILTS.index(before["target.tilt"]) for before, point in walk(space, 300)
    ]
    assert sum(abs(step) == 1 for step in steps) > 180
    kept = [point["train.flip"] == before["train.flip"] for before, point in walk(space, 300)]
    assert 230 < sum(kept) < 300


def test_perturbed_points_follow_from_the_random_numbers(space):
    point = space.suggest(RandomTrial(3))
    first = perturbed(space, point, random.Random("0 1 7"))
    random.seed(5)
    assert perturbed(space, point, random.Random("0 1 7")) == first
    assert len({str(perturbed(space, point, random.Random(f"0 1 {n}"))) for n in range(10)}) > 7


def test_conditions_that_the_recipe_decides_are_no_obstacle(tmp_path):
    """The space tilt has a condition on the target, which the recipe fulfils."""
    recipe = load("small", ["tune.space=tilt", "tune.scheduler=pbt"])
    space = read_space(recipe)
    assert set(perturbed(space, {"target.tilt": 0.5}, random.Random(0))) == {"target.tilt"}
