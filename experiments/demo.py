"""Numbers: "`make demo`" in benchmarks/RESULTS.md: every stage on 2,500 procedural images.

    python experiments/demo.py

No data needed. Published on two cores of an Intel Xeon (AVX-512, no GPU), 24 GiB, 2026-11-23, the tree after commit
99f6a86, one run: 286 s; --quick takes one and a half minutes. The tolerance of an accuracy is the half-width of its 95 %
interval; raw pixels and the untrained encoder do not depend on training, but on the versions of the libraries.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import Call, Expected, Experiment, main, read_json, wavemim

REDUCED = (
    *("train.epochs=1", "train.warmup_epochs=0.1", "train.checkpoint_every=1", "evaluate.max_images=500"),
    *("evaluate.protocols=[linear]", "tune.trials=1", "tune.epochs=0.2", "tune.max_images=500"),
)


def commands(call: Call) -> list[list[str]]:
    """Draw the images and run all stages."""
    return [wavemim("demo", f"out={call.out}", *call.either((), REDUCED))]


def read(out: Path) -> Any:
    """What evaluation measured."""
    return read_json(out / "runs" / "demo" / "evaluate")["measured"]


EXPERIMENT = Experiment(
    tables=(("`make demo`", ""),),
    commands=commands,
    read=read,
    expected=(
        Expected("trained encoder: linear probe, %", 34.2, ("trained", "eval/linear_top1"), tolerance=4.2),
        Expected("untrained: linear probe, %", 18.8, ("untrained", "eval/linear_top1"), tolerance=3.5),
        Expected("raw pixels: linear probe, %", 14.6, ("pixels", "eval/linear_top1"), tolerance=3.2),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
