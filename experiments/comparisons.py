"""benchmarks/evidence.py with the comparisons of published tables whose variants it no longer has by itself.

    python experiments/comparisons.py --shards SHARDS --compare half_budget [options of benchmarks/evidence.py]

The experiments call it; results have the form of evidence.py. The settings are those of the published runs, written out
in full where a default has changed since.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harness import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from evidence_variants import TWO_BLOCKS, TWO_LEVELS, Comparison, Variant

FOUR_LEVELS, THREE_LEVELS = {1: 2, 2: 4, 3: 6, 4: 8}, {2: 4, 3: 6, 4: 8}
ALL_BANDS, DETAILS = {3: "AHVD", 4: "AHVD"}, {3: "HVD", 4: "HVD"}


def _wavelet(normalise: str, **target: Any) -> Variant:
    settings = {"target.normalise": normalise} | {f"target.{key}": value for key, value in target.items()}
    return Variant("wavelet", {**TWO_LEVELS, **settings})


def _with(variant: Variant, settings: Mapping[str, Any]) -> Variant:
    return replace(variant, overrides={**variant.overrides, **settings})


# The first variant's untrained encoder begins every curve.
COMPARISONS: dict[str, Comparison] = {
    "targets": {
        "wavelet": _wavelet("patch"),
        "pixels": Variant("pixels", TWO_BLOCKS),
        "hog": Variant("hog", TWO_BLOCKS),
        "fourier": Variant("fourier", {**TWO_BLOCKS, "target.normalise": "dataset"}),
    },
    "half_budget": {
        "pixels": Variant("pixels", TWO_BLOCKS),
        "HOG": Variant("hog", TWO_BLOCKS),
        "data set": _wavelet("dataset"),
        "data set, L1": _wavelet("dataset", loss="l1"),
        "patch": _wavelet("patch"),
        "patch, A at both levels": _wavelet("patch", bands=ALL_BANDS),
        "patch, both at block 8": _wavelet("patch", taps={3: 8, 4: 8}),
        "patch, levels 2 to 4": _wavelet("patch", taps=THREE_LEVELS),
        "patch, levels 2 to 4, weights": _wavelet("patch", taps=THREE_LEVELS, weights={2: 0.3, 3: 1, 4: 3}),
        "patch, levels 1 to 4": _wavelet("patch", taps=FOUR_LEVELS),
        "contrast": _wavelet("contrast"),
        "contrast, A at both levels": _wavelet("contrast", bands=ALL_BANDS),
        "contrast, details alone": _wavelet("contrast", bands=DETAILS),
        "contrast, levels 2 to 4": _wavelet("contrast", taps=THREE_LEVELS),
        "contrast, levels 1 to 4": _wavelet("contrast", taps=FOUR_LEVELS),
        "contrast, levels 1 to 4, weights": _wavelet(
            "contrast", taps=FOUR_LEVELS, weights={1: 0.1, 2: 0.3, 3: 1, 4: 3}
        ),
        "contrast, level 3 alone": _wavelet("contrast", taps={3: 8}),  # with A: a single tap is the coarsest
    },
    "decoders_by_data_set": {
        "self, 1 block a tap": _wavelet("dataset"),
        "self, shared": _with(_wavelet("dataset"), {"decoder.shared": True}),
        "self, a quarter predicted": _with(_wavelet("dataset"), {"decoder.predict": 0.25}),
    },
}


def main() -> None:
    """Call evidence.py with these comparisons added to its own."""
    import evidence

    evidence.COMPARISONS.update(COMPARISONS)
    evidence.main()


if __name__ == "__main__":
    main()
