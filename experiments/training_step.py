"""Tables: the two under "A training step" in benchmarks/RESULTS.md: the step of two recipes, and the cost of targets.

    python experiments/training_step.py

Synthetic input, no data needed. Published on one core of an Intel Xeon (AVX-512, no GPU), float32, batch 4, 2026-11-23,
commit 5263bb8. About 5 minutes there on an idle machine, 3 GB of memory; --quick takes two. Speeds depend on the machine
and are shown; checked are counted FLOPs, peak memory and ratios. The MFU on an H200 is not published: there was no GPU.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    full = ("--threads", 1, "--batch", 4, "--seconds", 2, "--repeats", 5)
    quick = ("--threads", 1, "--batch", 1, "--seconds", 0.1, "--repeats", 1)
    return [benchmark("step", "--json", call.out / "result.json", *call.either(full, quick))]


def _recipe(name: str, rate: float, peak: float, gflop: float, mfu: float) -> tuple[Expected, ...]:
    found = ("recipes", name)
    return (
        Expected(f"{name}: images/s", rate, (*found, "images_per_second")),
        Expected(f"{name}: peak GiB", peak, (*found, "peak_memory_bytes"), tolerance=0.2, scale=2**-30),
        Expected(
            f"{name}: training GFLOP an image", gflop, (*found, "training_gflop_per_image"), tolerance=0.05, exact=True
        ),
        Expected(f"{name}: MFU", mfu, (*found, "mfu")),
    )


EXPERIMENT = Experiment(
    tables=(("A training step: `benchmarks/step.py`", "recipe"), ("A training step: `benchmarks/step.py`", "name")),
    commands=commands,
    expected=(
        *_recipe("wamim_vit_base", 2.81, 2.26, 30.9, 0.57),
        *_recipe("mae_vit_base", 1.59, 2.72, 58.7, 0.61),
        Expected("wamim_vs_mae_step", 1.77, ("numbers", "wamim_vs_mae_step"), tolerance=0.2),
        Expected(
            "target_share_stored (goal)", 0.01, ("numbers", "target_share_stored"), at_most=True, published="≤ 0.01"
        ),
        Expected(
            "target_share_device (goal)", 0.02, ("numbers", "target_share_device"), at_most=True, published="≤ 0.02"
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
