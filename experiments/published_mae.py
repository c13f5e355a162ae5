"""Table: "Beside published numbers" in benchmarks/RESULTS.md: what published runs of MAE with small ViTs have cost.

    python experiments/published_mae.py

Accuracies are those of the sources and are not measured here, and neither are the settings in the second table. FLOPs and
budgets are counted from the recipes `mae_vit_tiny_cifar10` and `mae_vit_lite_tiny_imagenet` on the meta device: no data,
no weights, 30 seconds on any machine, and the numbers are exact (tolerance: their rounding). `--quick` changes nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from decoder_costs import count
from harness import Call, Expected, Experiment, main

IMAGES = {"mae_vit_tiny_cifar10": 50_000, "mae_vit_lite_tiny_imagenet": 100_000}  # of the train split
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {  # recipe, what differs from it, epochs of pretraining
    "ViT-T/2, decoder 1 × 192": ("mae_vit_tiny_cifar10", {"decoder.depth": 1}, 150),
    "ViT-T/2, decoder 2 × 192": ("mae_vit_tiny_cifar10", {"decoder.depth": 2}, 150),
    "ViT-T/2, decoder 4 × 192": ("mae_vit_tiny_cifar10", {}, 150),
    "ViT-T/2, decoder 8 × 192": ("mae_vit_tiny_cifar10", {"decoder.depth": 8}, 150),
    "ViT-T/2, 2000 epochs": ("mae_vit_tiny_cifar10", {}, 2000),
    "ViT-Lite, 200 epochs": ("mae_vit_lite_tiny_imagenet", {}, 200),
    "ViT-Lite, 400 epochs": ("mae_vit_lite_tiny_imagenet", {}, 400),
}


def measure(call: Call) -> dict[str, Any]:
    """Count each run: GFLOP an image of the forward pass, millions of images, PFLOP of training (three times forward)."""
    found = {}
    for name, (recipe, changes, epochs) in RUNS.items():
        cost = count(recipe, changes)
        forward, images = cost["encoder"] + cost["decoder"], IMAGES[recipe] * epochs / 1e6
        found[name] = {"forward": forward, "images": images, "training": 3 * forward * images}
    return found


def _row(name: str, forward: float, images: float, training: float) -> tuple[Expected, ...]:
    return (
        Expected(f"{name}: forward, GFLOP", forward, (name, "forward"), tolerance=0.005, exact=True),
        Expected(f"{name}: million images", images, (name, "images"), tolerance=0.05, exact=True),
        Expected(f"{name}: training, PFLOP", training, (name, "training"), tolerance=0.05, exact=True),
    )


EXPERIMENT = Experiment(
    tables=(("Beside published numbers", "published run"), ("Beside published numbers", "source")),
    measure=measure,
    expected=(
        *_row("ViT-T/2, decoder 1 × 192", 1.01, 7.5, 22.8),
        *_row("ViT-T/2, decoder 2 × 192", 1.29, 7.5, 29.1),
        *_row("ViT-T/2, decoder 4 × 192", 1.85, 7.5, 41.6),
        *_row("ViT-T/2, decoder 8 × 192", 2.96, 7.5, 66.6),
        *_row("ViT-T/2, 2000 epochs", 1.85, 100.0, 554.6),
        *_row("ViT-Lite, 200 epochs", 0.79, 20.0, 47.4),
        *_row("ViT-Lite, 400 epochs", 0.79, 40.0, 94.9),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
