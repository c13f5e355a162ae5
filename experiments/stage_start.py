"""Table: "What a stage costs beside its work" in benchmarks/RESULTS.md: seconds of a stage that are not training, by part.

    python experiments/stage_start.py --shards SHARDS

SHARDS: a shard set of 32-px or 64-px images; published for 50 classes of Tiny ImageNet at 64 px. Published on two cores of an AMD
EPYC (24 GiB), otherwise idle, 2026-11-30, commit ec8c93c, medians of five runs. About 2 minutes there, and one with --quick.
Seconds are shown and not checked, as they depend on the machine.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    repeats = call.either(("--repeats", 5), ("--repeats", 1))
    return [benchmark("start", "--shards", call.shards, "--json", call.out / "result.json", *repeats)]


EXPERIMENT = Experiment(
    tables=(("What a stage costs beside its work: `benchmarks/start.py`", "name"),),
    inputs=("shards",),
    commands=commands,
    expected=(
        Expected("stage_overhead_s", 9.4, ("stage_overhead_s",)),
        Expected("imports and checks, s", 2.9, ("parts", "imports and checks")),
        Expected("the start of Ray, s", 1.5, ("parts", "Ray")),
        Expected("the worker, s", 3.1, ("parts", "worker")),
        Expected("the end, s", 2.0, ("parts", "end"), published="2.0"),
        Expected("CPU seconds until training", 10.2, ("stage_cpu_s",)),
        Expected("help_s", 0.05, ("help_s",)),
        Expected("cli_start_s", 0.15, ("cli_start_s",)),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
