"""Table: the last one under "Which target?" in benchmarks/RESULTS.md: seventeen targets with half of the images.

    python experiments/half_budget_targets.py --shards SHARDS

SHARDS: 50 classes of Tiny ImageNet at 64 px. 20,096 images in the recipes' batches of 128 (157 steps), seed 0, one probe at
the end. Published on two cores of an Intel Xeon, one for each run, 2026-11-23. About 45 minutes there; --quick takes
three, with two targets. An interrupted call resumes. The tolerance of an accuracy is the half-width of its 95 % interval. The variants are
those of comparisons.py.
"""

from __future__ import annotations

import sys

from harness import RECIPES_BATCH, ROOT, Call, Expected, Experiment, main

ROWS = {
    "pixels": 19.1,
    "HOG": 11.4,
    "data set": 14.2,
    "data set, L1": 15.7,
    "patch": 18.5,
    "patch, A at both levels": 18.8,
    "patch, both at block 8": 18.2,
    "patch, levels 2 to 4": 19.1,
    "patch, levels 2 to 4, weights": 18.2,
    "patch, levels 1 to 4": 18.9,
    "contrast": 18.3,
    "contrast, A at both levels": 18.7,
    "contrast, details alone": 16.6,
    "contrast, levels 2 to 4": 17.6,
    "contrast, levels 1 to 4": 18.7,
    "contrast, levels 1 to 4, weights": 18.9,
    "contrast, level 3 alone": 15.8,
}


def commands(call: Call) -> list[list[str]]:
    """One call of evidence.py with the comparison added, and with the recipes' batches."""
    budget = call.either(("--images-seen", 20000), ("--images-seen", 640, "--variants", "pixels", "patch"))
    return [
        [
            *(sys.executable, str(ROOT / "experiments" / "comparisons.py"), "--shards", call.shards),
            *("--compare", "half_budget", *RECIPES_BATCH, *budget, "--points", "1", "--seeds", "1", "--threads", "1"),
            *("--json", str(call.out / "result.json")),
        ]
    ]


EXPERIMENT = Experiment(
    tables=(("Which target? `benchmarks/evidence.py`", "target"),),
    inputs=("shards",),
    commands=commands,
    expected=tuple(
        Expected(f"{name}: top-1, %", value, ("results", "half_budget", name, 0, -1, "top1"), tolerance=1.6)
        for name, value in ROWS.items()
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
