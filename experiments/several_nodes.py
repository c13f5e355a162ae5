"""Table: "Several nodes" in benchmarks/RESULTS.md: stages on nodes that vanish, join or lack.

    python experiments/several_nodes.py --images IMAGES

IMAGES: 2,800 photos of CIFAR-10 (700 of each of four classes), 32 px, in class folders. Published on two cores of an AMD EPYC (24
GiB), 2026-11-29, the tree after commit 21a013e, one run each. About 4 minutes there, and one with --quick. Exit codes are checked;
seconds are shown and not checked, and images that are trained again have a tolerance of a checkpoint's interval.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main

SCENARIOS = (
    "prepare_spreads",
    "prepare_loses_a_node",
    "pretrain_loses_a_node",
    "evaluate_loses_a_node",
    "never_placed",
)


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark."""
    names = call.either(SCENARIOS, ("prepare_spreads", "never_placed"))
    return [benchmark("cluster", *names, "--images", call.images, "--json", call.out / "result.json")]


def _expected(name: str, value: float, scenario: str, *where: str | int, tolerance: float | None = None) -> Expected:
    return Expected(name, value, ("scenarios", scenario, *where), tolerance=tolerance, published=f"{value:g}")


EXPERIMENT = Experiment(
    tables=(("Several nodes: `benchmarks/cluster.py`", "what happens"),),
    inputs=("images",),
    commands=commands,
    expected=(
        _expected("prepare, a node joins: exit", 0, "prepare_spreads", "exit", 0, tolerance=0),
        _expected("prepare, a node is killed: exit", 0, "prepare_loses_a_node", "exit", 0, tolerance=0),
        _expected("pretraining, a node is killed: exit", 0, "pretrain_loses_a_node", "exit", 1, tolerance=0),
        _expected("images trained again", 100, "pretrain_loses_a_node", "repeated", tolerance=200),
        _expected("seconds until both workers are there again", 9.4, "pretrain_loses_a_node", "resumed_s"),
        _expected("evaluation, a node is killed: exit", 0, "evaluate_loses_a_node", "exit", 2, tolerance=0),
        _expected("never placed: exit", 2, "never_placed", "exit", 1, tolerance=0),
        _expected("never placed: seconds until it is said", 21.0, "never_placed", "noticed"),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
