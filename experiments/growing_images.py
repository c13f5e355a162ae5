"""Table: "Growing images" in benchmarks/RESULTS.md: training that begins at 32 px against 64 px throughout.

    python experiments/growing_images.py --shards SHARDS

SHARDS: 50 classes of Tiny ImageNet at 64 px. 10,000 images, seed 0. Published on two cores of an Intel Xeon, one for each
run, 2026-11-23, the tree after commit e6fba52. About 5 minutes there; --quick takes three. The tolerance of an accuracy is
the half-width of its 95 % interval. FLOPs are counted; times are those of the process, so that other work disturbs them
little.

Defaults have changed since: the published command now trains in batches of 32, in bfloat16, with targets normalised per patch,
and its probe has more train images. Batches of 128, float32 and targets normalised by the data set are those of the published run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import RECIPES_BATCH, ROOT, Call, Expected, Experiment, benchmark, main, read_json

RECIPE = ROOT / "experiments" / "recipes" / "small_wavelet_by_data_set.yaml"
FIXED, GROWING = "64 px", "32 px for a half"


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    return [
        benchmark(
            *("progressive", "--shards", call.shards, "--json", call.out / "result.json"),
            *call.either(("--images-seen", 10000), ("--images-seen", 1280)),
            *(*RECIPES_BATCH, "--recipe", RECIPE, "--points", 2, "--seeds", 1, "--schedules", GROWING),
        )
    ]


def read(out: Path) -> dict[str, Any]:
    """The curves, and the ends of the growing schedule as shares of the fixed one's."""
    found = read_json(out)
    fixed, growing = (found["results"]["schedules"][name][0] for name in (FIXED, GROWING))
    shares = {key: growing[-1][key] / fixed[-1][key] for key in ("seconds", "flops")}
    rates = {name: c[-1]["images"] / c[-1]["seconds"] for name, c in ((FIXED, fixed), (GROWING, growing))}
    return {"fixed": fixed, "growing": growing, "shares": shares, "rates": rates}


EXPERIMENT = Experiment(
    tables=(("Growing images: `benchmarks/progressive.py`", "schedule"),),
    inputs=("shards",),
    commands=commands,
    read=read,
    expected=(
        Expected("untrained: top-1, %", 12.3, ("fixed", 0, "top1"), tolerance=1.5),
        Expected("64 px: top-1, %", 14.4, ("fixed", -1, "top1"), tolerance=1.5),
        Expected("32 px, then 64 px: top-1, %", 15.6, ("growing", -1, "top1"), tolerance=1.5),
        Expected("time, share of the fixed size's", 0.69, ("shares", "seconds"), tolerance=0.1),
        Expected("FLOPs, share of the fixed size's", 0.64, ("shares", "flops"), tolerance=0.01, exact=True),
        Expected("64 px: images/s", 140, ("rates", FIXED)),
        Expected("32 px, then 64 px: images/s", 205, ("rates", GROWING)),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
