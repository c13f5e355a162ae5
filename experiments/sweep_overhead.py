"""Table: "What a sweep costs beyond its trials" in benchmarks/RESULTS.md: seconds between trials, bytes that they read.

    python experiments/sweep_overhead.py --shards SHARDS

SHARDS: a labelled shard set of 32-px or 64-px images; published for CIFAR-10 at 32 px. Published on two cores of an AMD EPYC
(24 GiB), otherwise idle, 2026-11-29, the tree after commit faa5b7f, medians of five trials. About 3 minutes there, and two with
--quick. Seconds are shown and not checked, as they depend on the machine; the ratio of bytes is.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from harness import Call, Expected, Experiment, benchmark, main, read_json


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    return [
        benchmark(
            *("sweep", "--shards", call.shards, "--json", call.out / "result.json"),
            *call.either(("--trials", 6), ("--trials", 3)),
        )
    ]


def read(out: Path) -> dict[str, Any]:
    """Medians and largest values of the overhead, and the ratio of bytes."""
    found = read_json(out)
    ways = {name: found[name] for name in ("reused", "new process")}
    return {
        **{
            name: {"median": statistics.median(way["between"]), "most": max(way["between"])}
            for name, way in ways.items()
        },
        "start": ways["reused"]["start"],
        "shared": found["shared"]["ratio"],
    }


EXPERIMENT = Experiment(
    tables=(("What a sweep costs beyond its trials: `benchmarks/sweep.py`", "name"),),
    inputs=("shards",),
    commands=commands,
    read=read,
    expected=(
        Expected("trials that reuse their process, s", 0.24, ("reused", "median")),
        Expected("at most, s", 0.26, ("reused", "most")),
        Expected("a new process for each trial, s", 6.42, ("new process", "median")),
        Expected("to the first trial, s", 14.8, ("start",)),
        Expected(
            "bytes of 8 readers over those of one", 1.00, ("shared",), tolerance=0.2, published="1.00", exact=True
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
