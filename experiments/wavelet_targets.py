"""Table: the third one under "Which target?" in benchmarks/RESULTS.md: the wavelet target by normalisation and levels.

    python experiments/wavelet_targets.py --shards SHARDS

SHARDS: 50 classes of Tiny ImageNet at 64 px. 40,000 images in batches of 32, seed 0; the second seed of the table's first
row is made by reconstruction_targets.py. Published on two cores of an Intel Xeon, one for each run, 2026-11-23, the trees
up to commit c6bca7a; the last two rows had two probes. About 50 minutes there; --quick takes five. An interrupted call
resumes. The tolerance of an accuracy is the half-width of its 95 % interval.
"""

from __future__ import annotations

import sys

from harness import FLOAT32, Call, Expected, Experiment, benchmark, curves, main

FIRST = "levels 3, 4, per patch"
ROWS = {
    FIRST: (18.0, 20.8, 20.8, 20.0),
    "by the data set": (16.5, 18.0, 18.1, 18.7),
    "levels 1 to 4, equal weights": (18.8, 20.2, 20.9, 20.8),
    "by contrast, all bands": (19.8, 20.2, 20.7, 18.9),
}
TWO_PROBES = {"levels 1 to 4 at block 8": (19.8, 20.8), "levels 1 to 3 at block 6": (20.0, 20.9)}


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    full = ("--images-seen", 40000, "--points", 4, "--seeds", 1)
    return [
        benchmark(
            *("evidence", "--shards", call.shards, "--compare", "wavelets", "--json", call.out / "result.json"),
            *call.either(full, ("--images-seen", 640, "--points", 1, "--seeds", 1)),
            *("--threads", 1, *FLOAT32, "--variants", *ROWS, *TWO_PROBES),
        )
    ]


def _two_probes(name: str, values: tuple[float, float]) -> tuple[Expected, ...]:
    return tuple(
        Expected(
            f"{name}, point {point} of 4: top-1, %",
            value,
            ("results", "wavelets", name, 0, point, "top1"),
            tolerance=1.6,
        )
        for point, value in zip((2, 4), values, strict=True)
    )


EXPERIMENT = Experiment(
    tables=(("Which target? `benchmarks/evidence.py`", "wavelet target"),),
    inputs=("shards",),
    commands=commands,
    expected=(
        *(one for name, values in ROWS.items() for one in curves("wavelets", name, *values)),
        *(one for name, values in TWO_PROBES.items() for one in _two_probes(name, values)),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
