"""Tables: "A recipe that costs less than MAE" in benchmarks/RESULTS.md: the small recipe, pixels and MAE.

    python experiments/cheaper_than_mae.py --shards SHARDS

SHARDS: CIFAR-10 at 32 px, made by `wavemim prepare --recipe small32 images=cifar10 out=OUT`; the second table is made by the same
call with 50 classes of Tiny ImageNet at 64 px. 100,000 images a run, seeds 0 to 2, one core each. Published on two cores of an AMD
EPYC, 2026-11-29, by the tree of commit ad0e950 with the comparison of commit f72ce6c, beside other work. About 100 minutes there;
--quick takes five. An interrupted call resumes. The tolerance of an accuracy is the half-width of its 95 % interval.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    sizes = call.either(("--seeds", 3), ("--images-seen", 1280, "--points", 2, "--seeds", 1))
    return [
        benchmark(
            *("evidence", "--shards", call.shards, "--screen", "--compare", "claims", *sizes),
            *("--json", call.out / "result.json"),
        )
    ]


def _runs(variant: str, *seeds: tuple[float, float]) -> tuple[Expected, ...]:
    return tuple(
        Expected(
            f"{variant}, seed {seed}, {images} images: top-1, %",
            value,
            ("results", "claims", variant, seed, point, "top1"),
            tolerance=1.0,
            published=f"{value:.1f}",
        )
        for seed, values in enumerate(seeds)
        for point, (images, value) in enumerate(zip(("50,000", "100,000"), values, strict=True), 1)
    )


EXPERIMENT = Experiment(
    tables=(
        ("A recipe that costs less than MAE: `benchmarks/evidence.py`", "CIFAR-10"),
        ("A recipe that costs less than MAE: `benchmarks/evidence.py`", "Tiny ImageNet, 50 classes"),
    ),
    inputs=("shards",),
    commands=commands,
    expected=(
        *_runs("wavelet", (55.5, 57.1), (55.1, 56.9), (54.8, 56.5)),
        *_runs("pixels", (55.1, 56.9), (54.8, 56.5), (55.1, 56.6)),
        *_runs("mae", (52.4, 54.1), (53.9, 54.7), (52.5, 54.0)),
        Expected("MAE's accuracy, share of its FLOPs", 0.24, ("goals", "recipe_flops_share"), tolerance=0.1),
        Expected("MAE's accuracy, share of its process time", 0.26, ("goals", "recipe_time_share"), tolerance=0.1),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
