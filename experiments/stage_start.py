"""Table: "What a stage costs beside its work" in benchmarks/RESULTS.md: seconds of a stage that are not training, by part.

    python experiments/stage_start.py --shards SHARDS

SHARDS: a shard set of 32-px or 64-px images; published for CIFAR-10 at 32 px. Published on two cores of an AMD EPYC (24 GiB),
otherwise idle, 2026-11-29, commit d8dfc1a, medians of three runs. About 2 minutes there, and one with --quick. Seconds are
shown and not checked, as they depend on the machine.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    repeats = call.either(("--repeats", 3), ("--repeats", 1))
    return [benchmark("start", "--shards", call.shards, "--json", call.out / "result.json", *repeats)]


EXPERIMENT = Experiment(
    tables=(("What a stage costs beside its work: `benchmarks/start.py`", "name"),),
    inputs=("shards",),
    commands=commands,
    expected=(
        Expected("stage_overhead_s", 13.2, ("stage_overhead_s",)),
        Expected("imports and checks, s", 4.0, ("parts", "imports and checks"), published="4.0"),
        Expected("the start of Ray, s", 2.2, ("parts", "Ray")),
        Expected("the worker, s", 4.4, ("parts", "worker")),
        Expected("the end, s", 2.5, ("parts", "end")),
        Expected("CPU seconds until training", 14.6, ("stage_cpu_s",)),
        Expected("help_s", 0.07, ("help_s",)),
        Expected("cli_start_s", 0.2, ("cli_start_s",), published="0.20"),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
