"""Table: "What decoders gain" in benchmarks/RESULTS.md: small_wavelet with other decoders, after half an epoch.

    python experiments/decoder_gains.py --shards SHARDS

SHARDS: 50 classes of Tiny ImageNet at 64 px. Published on one core of an Intel Xeon for each run, 2026-11-23, commit
cc37a45, one seed, other work beside. About 10 minutes on two cores; --quick takes five.

Not the same run in one thing: the published probe was fitted to convergence, today's with at most 300 iterations, and it takes
its train images from all over the split. Hence the tolerance of 4 points, and what has to hold is their order: predicting a quarter of the positions is the worst. The batch
of 128 and targets normalised by the data set are as published.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import RECIPES_BATCH, ROOT, Call, Expected, Experiment, main, read_json

COMPARISON = "decoders_by_data_set"


def commands(call: Call) -> list[list[str]]:
    """Half an epoch of every decoder; a whole one of the first, with a probe in the middle."""
    script, shared = str(ROOT / "experiments" / "comparisons.py"), ("--shards", call.shards, "--compare", COMPARISON)
    settings = ("--seeds", "1", "--threads", "1", *RECIPES_BATCH)
    half = call.either(("--images-seen", 12500, "--points", 1), ("--images-seen", 1280, "--points", 1))
    whole = call.either(("--images-seen", 25000, "--points", 2), ("--images-seen", 1280, "--points", 2))
    first = ("--variants", "self, 1 block a tap")
    return [
        [sys.executable, script, *shared, *settings, *half, "--json", str(call.out / "result.json")],
        [sys.executable, script, *shared, *settings, *whole, *first, "--json", str(call.out / "whole.json")],
    ]


def read(out: Path) -> dict[str, Any]:
    """The curves of both calls, and the order of the decoders."""
    half, whole = (read_json(out, name)["results"][COMPARISON] for name in ("result.json", "whole.json"))
    ends = {name: curves[0][-1]["top1"] for name, curves in half.items()}
    worst = min(ends, key=ends.__getitem__)
    return {"half": half, "whole": whole, "a quarter is the worst": worst == "self, a quarter predicted"}


def _end(name: str, value: float) -> Expected:
    return Expected(f"{name}: top-1, %", value, ("half", name, 0, -1, "top1"), tolerance=4)


EXPERIMENT = Experiment(
    tables=(("What decoders gain: `benchmarks/evidence.py`, a beginning", "variant"),),
    inputs=("shards",),
    commands=commands,
    read=read,
    expected=(
        Expected("untrained: top-1, %", 15.7, ("half", "self, 1 block a tap", 0, 0, "top1"), tolerance=4),
        _end("self, 1 block a tap", 17.6),
        _end("self, shared", 17.5),
        _end("self, a quarter predicted", 13.6),
        Expected("a quarter predicted is the worst", True, ("a quarter is the worst",), published="was worse"),
        Expected("wavelet, half an epoch", 18.1, ("whole", "self, 1 block a tap", 0, 1, "top1"), tolerance=4),
        Expected("wavelet, an epoch", 19.5, ("whole", "self, 1 block a tap", 0, 2, "top1"), tolerance=4),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
