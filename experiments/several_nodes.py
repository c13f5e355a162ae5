"""Table: "Several nodes" in benchmarks/RESULTS.md: stages on nodes that vanish, join or lack.

    python experiments/several_nodes.py --images IMAGES

IMAGES: 2,800 photos of CIFAR-10 (700 of each of four classes), 32 px, in class folders. Published on two cores of an AMD EPYC (24
GiB), 2026-11-29, the trees after commits 21a013e to 536ea92, one run each. About 9 minutes there, and one with --quick. Exit codes are
checked; seconds are shown and not checked, and images that are trained again have a tolerance of a checkpoint's interval.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main

SCENARIOS = (
    "prepare_spreads",
    "prepare_loses_a_node",
    "pretrain_loses_a_node",
    "finetune_loses_a_node",
    "evaluate_loses_a_node",
    "segment_loses_two_nodes",
    "tune_gains_a_node",
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
        _expected("fine-tuning, a node is killed: exit", 0, "finetune_loses_a_node", "exit", 1, tolerance=0),
        Expected(
            "images fine-tuned on again",
            1700,
            ("scenarios", "finetune_loses_a_node", "repeated"),
            tolerance=2520,
            published="1,700",
        ),
        _expected("seconds until both workers fine-tune again", 9.3, "finetune_loses_a_node", "resumed_s"),
        _expected("seconds until the lost node is named", 12.4, "finetune_loses_a_node", "noticed"),
        _expected("evaluation, a node is killed: exit", 0, "evaluate_loses_a_node", "exit", 2, tolerance=0),
        _expected("segmentation, two nodes are killed: exit", 0, "segment_loses_two_nodes", "exit", 1, tolerance=0),
        Expected(
            "segmentation: the result without a fault",
            True,
            ("scenarios", "segment_loses_two_nodes", "same"),
            published="the same result",
        ),
        _expected("sweep, a node joins: exit", 0, "tune_gains_a_node", "exit", 1, tolerance=0),
        _expected("seconds until it is used", 43.1, "tune_gains_a_node", "used_s"),
        _expected("never placed: exit", 2, "never_placed", "exit", 1, tolerance=0),
        _expected("never placed: seconds until it is said", 21.0, "never_placed", "noticed"),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
