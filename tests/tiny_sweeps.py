"""Simulated sweeps: a known response, known noise."""

import numpy as np

from pipeline.sweeps.trials import Sweep, Trial

OBJECTIVE = "eval/linear_top1_heldout"
WEIGHTS = [f"target.weights.{level}" for level in (1, 2, 3)]
RECIPE = {**dict.fromkeys(WEIGHTS, 1.0), "mask.ratio": 0.75}


def flat(point):
    return 50.0


def peaked(point):
    """Best where level 1 has 0.35 of level 3's weight, and at a mask ratio of 0.65; level 2's weight has no effect."""
    ratio = point["target.weights.1"] / point["target.weights.3"]
    return 50 - 80 * (point["mask.ratio"] - 0.65) ** 2 - 4 * np.log10(ratio / 0.35) ** 2


def drawn(random):
    return {
        **{key: float(10 ** random.uniform(-1.5, 0.5)) for key in WEIGHTS},
        "mask.ratio": float(random.uniform(0.4, 0.9)),
    }


def simulate(response, *, seed=0, searched=24, seeds=3, finalists=3, noise=1.0, recipe=RECIPE, draw=drawn):
    """A sweep: the recipe's seeds, the search, and fresh seeds of its best points."""
    random = np.random.default_rng(seed)
    trials = []

    def run(role, point, its_seed):
        value = float(response(point) + noise * random.standard_normal())
        number = len(trials) + 1
        curve = [(1000, value - 5), (2000, value)]
        trials.append(
            Trial(number, role, point, its_seed, "finished", value, curve=curve, cost={"cost/flops": 1e12 * number})
        )

    for its_seed in range(seeds):
        run("recipe", recipe, its_seed)
    for _ in range(searched):
        run("search", draw(random), 0)
    found = sorted((trial for trial in trials if trial.role == "search"), key=lambda trial: -trial.objective)
    for best in found[:finalists]:
        for its_seed in range(seeds):
            run("finalist", best.point, 10 + its_seed)
    log = [key for key in recipe if key in WEIGHTS]
    return Sweep(OBJECTIVE, list(recipe), trials, question="which?", log=log, relative=log)
