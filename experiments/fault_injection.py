"""Table: "Faults" in benchmarks/RESULTS.md: those of its rows that benchmarks/faults.py makes.

    python experiments/fault_injection.py --shards SHARDS

SHARDS: a local shard set of 50 classes of Tiny ImageNet at 64 px. Published on two cores of an Intel Xeon, 24 GiB,
2026-11-23, the tree after commit 682ea5d, one run each, beside other work. About 25 minutes on an idle machine; --quick
takes four, with a killed Ray alone. `disk_full` mounts a tmpfs (Linux, root), `clock_back` needs the package libfaketime,
`object_store_full` fills up to 34 GB of disk: where a fault cannot be made, its numbers are missing. The table's other rows are
tests, which the table names.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main

SAME, NOTHING = "the same weights", "nothing"
LOST = {  # images that may be trained again at most, and how the table says it
    "ray_killed": (100, "fewer than 100 images"),
    "hang_stopped": (100, "fewer than 100 images"),
    "hang_reading": (250, "fewer than 250 images"),
    "disk_full": (0, NOTHING),
    "clock_back": (0, NOTHING),
    "slow_worker": (0, NOTHING),
    "shard_away": (0, NOTHING),
    "object_store_full": (0, NOTHING),
    "shard_missing": (100, "100 images"),
    "shard_damaged": (250, "fewer than 250 images"),
}


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark; the undisturbed run is what the others are compared with."""
    names = call.either(list(LOST), ["ray_killed"])
    images = call.either((4000,), (2000,))
    return [
        benchmark(
            *("faults", "--shards", call.shards, "--json", call.out / "result.json", "--images", *images),
            *("undisturbed", *names),
        )
    ]


EXPERIMENT = Experiment(
    tables=(("Faults: `benchmarks/faults.py`, and tests", "fault"),),
    inputs=("shards",),
    commands=commands,
    expected=tuple(
        expected
        for name, (lost, words) in LOST.items()
        for expected in (
            Expected(f"{name}: images trained again", lost, ("faults", name, "lost"), published=words, at_most=True),
            Expected(f"{name}: {SAME}", True, ("faults", name, "same"), published=SAME),
        )
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
