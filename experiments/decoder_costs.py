"""Table: "What decoders cost" in benchmarks/RESULTS.md: forward GFLOP an image of decoders of ViT-B/16 at 224 px.

    python experiments/decoder_costs.py

Counted on the meta device: no data, no weights, ten seconds on any machine, and the numbers are exact (tolerance: their
rounding). The table's 6.9 and 0.8 for cross-attention at hidden positions alone are worked out by hand: what runs predicts
every position, which is the second number of those cells. `--quick` changes nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from harness import Call, Expected, Experiment, main

LINEAR = {"decoder.depth": 0, "encoder.sees": "masked"}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAE's": ("mae_vit_base", {}),
    "MAE's, cross-attention": ("mae_vit_base", {"decoder.attention": "cross"}),
    "wamim_vit_base": ("wamim_vit_base", {}),
    "wamim_vit_base, cross-attention": ("wamim_vit_base", {"decoder.attention": "cross"}),
    "linear": ("mae_vit_base", LINEAR),
}


def count(recipe: str, overrides: dict[str, Any]) -> dict[str, float]:
    """Forward GFLOP an image of decoder and encoder, and millions of parameters, of a recipe with other settings."""
    import torch

    from pipeline.config.load import load, with_overrides
    from pipeline.models.build import build_blank_model
    from wavemim.flops import cost_of

    with torch.device("meta"):
        cost = cost_of(build_blank_model(with_overrides(load(recipe), overrides)))
    flops = {"decoder": cost.decoder_flops / 1e9, "encoder": cost.encoder_flops / 1e9}
    return {**flops, "parameters": cost.parameters / 1e6}


def measure(call: Call) -> dict[str, Any]:
    """Count every decoder of the table, for all positions and for a quarter of them."""
    found: dict[str, Any] = {
        name: {str(share): count(recipe, {**changes, "decoder.predict": share}) for share in (1, 0.25)}
        for name, (recipe, changes) in DECODERS.items()
    }
    shared = count("wamim_vit_base", {"decoder.shared": True})
    saved = found["wamim_vit_base"]["1"]["parameters"] - shared["parameters"]
    return {**found, "shared": {"1": shared, "saved": saved}, "wamim_swin_base": {"1": count("wamim_swin_base", {})}}


def _row(name: str, every: float, quarter: float) -> tuple[Expected, Expected]:
    return (
        Expected(f"{name}: all positions", every, (name, "1", "decoder"), tolerance=0.05, exact=True),
        Expected(f"{name}: a quarter", quarter, (name, "0.25", "decoder"), tolerance=0.05, exact=True),
    )


EXPERIMENT = Experiment(
    tables=(("What decoders cost", "decoder"),),
    measure=measure,
    expected=(
        Expected("encoder", 8.8, ("MAE's", "1", "encoder"), tolerance=0.05, exact=True),
        *_row("MAE's", 10.7, 4.6),
        *_row("MAE's, cross-attention", 9.0, 2.1),
        *_row("wamim_vit_base", 1.5, 0.6),
        *_row("wamim_vit_base, cross-attention", 1.0, 0.3),
        Expected("linear: all positions", 0.2, ("linear", "1", "decoder"), tolerance=0.05, exact=True),
        Expected(
            "linear: a quarter",
            0.04,
            ("linear", "0.25", "decoder"),
            tolerance=0.005,
            exact=True,
        ),
        Expected("linear: encoder", 35, ("linear", "1", "encoder"), tolerance=0.5, exact=True),
        Expected("shared blocks: parameters saved, M", 2.4, ("shared", "saved"), tolerance=0.05, exact=True),
        Expected("wamim_swin_base: decoders", 17.7, ("wamim_swin_base", "1", "decoder"), tolerance=0.05, exact=True),
        Expected("wamim_swin_base: encoder", 30.9, ("wamim_swin_base", "1", "encoder"), tolerance=0.05, exact=True),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
