"""Table: "Level weights and mask ratio" in benchmarks/RESULTS.md: a sweep with seeds of the recipe and of its finalists.

    python experiments/level_weights_sweep.py --shards SHARDS

SHARDS: CIFAR-10 at 32 px, made by `wavemim prepare --recipe small32 images=cifar10 out=OUT`. Published on two cores of an AMD
EPYC (24 GiB) beside other work, 2026-11-29, the engine of commit a539f05 and later; interrupted three times, and begun with
tune.trials=12, which was raised to 15 at the end. About 120 minutes on idle cores; --quick trains two points for a hundredth of
the time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import Call, Expected, Experiment, main, read_json, wavemim

SETTINGS = (
    *("target.taps={1: 8, 2: 8, 3: 8}", "target.bands={}", "target.normalise=contrast", "decoder.per=block"),
    *(
        "target.weights={1: 0.75, 2: 0.19, 3: 0.06}",
        "target.tilt=null",
        "train.optimizer=muon",
        "train.batch=128",
        "train.lr=6e-3",
    ),
    *("train.precision=bfloat16", "tune.concurrent=2", "cluster.cpus_per_worker=1", "name=sweep"),
)
FULL = ("tune.trials=15", "tune.epochs=0.6")
QUICK = ("tune.trials=2", "tune.epochs=0.006", "tune.recipe_seeds=2", "tune.finalists=1", "tune.fresh_seeds=2")


def commands(call: Call) -> list[list[str]]:
    """The sweep."""
    places = (f"shards={call.shards}", f"out={call.out}")
    sweep = ("tune", "--recipe", "small32_wavelet", "--space", "level_weights_and_mask_ratio")
    return [wavemim(*sweep, *places, *SETTINGS, *call.either(FULL, QUICK))]


def read(out: Path) -> dict[str, Any]:
    """Mean objective of the recipe's seeds and of each finalist's, the best first."""
    trials = read_json(out, "runs/sweep/tune/result.json")["trials"]
    values: dict[str, list[float]] = {}
    for trial in trials:
        if trial["role"] in ("recipe", "finalist"):
            values.setdefault(trial["role"] + str(sorted(trial["point"].items())), []).append(
                trial["eval/linear_top1_heldout"]
            )
    means = {name: sum(found) / len(found) for name, found in values.items()}
    finalists = sorted((mean for name, mean in means.items() if name.startswith("finalist")), reverse=True)
    recipe = next(mean for name, mean in means.items() if name.startswith("recipe"))
    return {"recipe": recipe, "finalists": finalists, "difference": finalists[0] - recipe}


EXPERIMENT = Experiment(
    tables=(("Level weights and mask ratio: `wavemim tune`", "settings"),),
    inputs=("shards",),
    commands=commands,
    read=read,
    expected=(
        Expected("recipe, mean of three seeds, %", 51.95, ("recipe",), tolerance=1.0),
        Expected("best finalist, mean of three seeds, %", 52.70, ("finalists", 0), tolerance=1.0, published="52.70"),
        Expected("second finalist, %", 52.57, ("finalists", 1), tolerance=1.0),
        Expected("third finalist, %", 52.42, ("finalists", 2), tolerance=1.0),
        Expected("difference, points", 0.75, ("difference",), tolerance=1.7),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
