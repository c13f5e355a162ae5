"""Tables: "What grows with the number of images" in benchmarks/RESULTS.md: planning and reading ten million images; many GPUs.

    python experiments/many_images.py

Needs no data. Published on two cores of an AMD EPYC (24 GiB), nearly idle, 2026-11-29, the tree after commit 21a013e, one run.
About 3 minutes there, 2 GB of memory and 1 GB of disk; --quick has one million images, in 20 seconds. Memory has a tolerance of a
tenth; seconds are shown and not checked. The model is arithmetic, from rates of a GPU that are assumed, not measured.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    inputs = call.either((1_000_000, 10_000_000), (1_000_000,))
    return [benchmark("scale", "--inputs", *inputs, "--json", call.out / "result.json")]


MANY = ("phases", "10000000")
EXPERIMENT = Experiment(
    tables=(
        ("What grows with the number of images: `benchmarks/scale.py`", "phase"),
        ("What grows with the number of images: `benchmarks/scale.py`", "GPUs"),
    ),
    commands=commands,
    expected=(
        Expected("tree of 10 million, MiB", 1010, (*MANY, "tree", "memory_mib"), tolerance=100),
        Expected("tree of 10 million, s", 61, (*MANY, "tree", "seconds")),
        Expected("list of 10 million, MiB", 989, (*MANY, "plan", "memory_mib"), tolerance=100),
        Expected("list of 10 million, s", 34, (*MANY, "plan", "seconds")),
        Expected("reports of 10 million, MiB", 45, (*MANY, "resume", "memory_mib"), tolerance=20),
        Expected(
            "manifest of 10 million, bytes", 1983539, (*MANY, "merge", "bytes"), tolerance=0, published="1,983,539"
        ),
        Expected("order of 10 million, MiB", 30, (*MANY, "epoch", "memory_mib"), tolerance=15),
        Expected(
            "storage for 64 GPUs, GB/s",
            16.0,
            ("model", 1, "storage_gb_per_s"),
            tolerance=0.01,
            published="16.0",
            exact=True,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
