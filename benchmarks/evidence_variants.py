"""What evidence.py compares, as data: testbeds, sizes of a comparison, and the variants of each comparison.

Variants are written for images of 64 px in patches of 8 px. On 32-px images in patches of 4 px every level is one finer, and
every size in pixels is half as large (`settled`). The same list thus runs on both testbeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Testbed:
    """A kind of data. Recipes of the same name differ only in what the size of the images demands.

    Attributes:
        prefix: Of its recipes.
        halvings: How often 64 px must be halved to give its images.
    """

    prefix: str
    halvings: int


TESTBEDS = {64: Testbed("small", 0), 32: Testbed("small32", 1)}  # by image size: tiny-imagenet-50, cifar10


@dataclass(frozen=True)
class Size:
    """How much is trained: images a run, seeds, probes during training, and settings of every variant."""

    images: int
    seeds: int
    points: int
    settings: Mapping[str, Any]


# Short runs need many steps more than large batches: with the recipes' batch of 128, HOG learnt nothing from 20,000 images.
_CPU = {"train.optimizer": "adamw", "train.batch": 32, "train.lr": 6e-3, "train.precision": "bfloat16"}
_GPU = {**_CPU, "train.batch": 128, "train.lr": 2e-3, "train.compile": True}
SIZES = {
    "screen": Size(100_000, 1, 2, _CPU),
    "finals": Size(800_000, 3, 8, _CPU),
    "full": Size(300_000, 3, 4, _GPU),
}
VIT_SMALL = {"encoder.name": "vit_small_patch16_224", "encoder.width": 384, "encoder.depth": 12, "encoder.heads": 6}


@dataclass(frozen=True)
class Variant:
    """One variant of a comparison.

    Attributes:
        recipe: Name of a recipe without the prefix of the testbed, "" for the one that all are based on, or a YAML file.
        overrides: Settings to override in it, for 64-px images. `target.taps` resets the bands and weights of the recipe.
        images: Its training length as a share of the comparison's.
        warmup: Share of its training that the learning rate rises.
        baseline: The variant that it is compared with; default: the first of the comparison.
    """

    recipe: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    images: float = 1.0
    warmup: float = 0.1
    baseline: str | None = None


Comparison = Mapping[str, Variant]

FOUR_LEVELS = {1: 2, 2: 4, 3: 6, 4: 8}
# The recipes' target until November 2026, which most comparisons vary: two levels, or patches of two sizes, at two blocks.
TWO_BLOCKS = {"target.taps": {3: 6, 4: 8}, "target.normalise": "patch", "decoder.per": "tap"}
TWO_LEVELS = {**TWO_BLOCKS, "target.tilt": None}
# Every lever of efficiency alone: for both targets, and those of one of them.
LEVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("growing images", {"train.progressive": {32: 0.5, 64: 0.5}}),
    ("2 masks an image", {"mask.count": 2}),
    ("4 masks an image", {"mask.count": 4}),
    ("a quarter predicted, by cross-attention", {"decoder.attention": "cross", "decoder.predict": 0.25}),
    ("all predicted, by cross-attention", {"decoder.attention": "cross"}),
    ("decoders of 2 blocks", {"decoder.depth": 2}),
    ("decoders twice as wide", {"decoder.width": 128}),
    ("a decoder for each block of the encoder", {"decoder.per": "block"}),
    ("L1", {"target.loss": "l1"}),
    ("Muon", {"train.optimizer": "muon"}),
    ("cosine after the warm-up", {"train.warmup_prefix": True}),
)
WAVELET_LEVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("tilt 0", {"target.tilt": 0.0}),
    ("tilt 0.5", {"target.tilt": 0.5}),
    ("tilt 1", {"target.tilt": 1.0}),
    ("tilt 1.5", {"target.tilt": 1.5}),
    ("tilt from 0 to 1", {"target.tilt": {0.0: 0.0, 1.0: 1.0}}),
    (
        "tilt from 0 to 1, growing images",
        {"target.tilt": {0.0: 0.0, 1.0: 1.0}, "train.progressive": {32: 0.5, 64: 0.5}},
    ),
    ("scale between bands kept", {"target.band_scale": "kept"}),
    ("scale between bands erased", {"target.band_scale": "erased"}),
    ("all levels at block 8", {"target.taps": {1: 8, 2: 8, 3: 8, 4: 8}}),
    ("levels 1 to 4, a block each", {"target.taps": FOUR_LEVELS}),
    ("A at all levels", {"target.bands": {3: "AHVD", 4: "AHVD"}}),
    ("no A", {"target.bands": {3: "HVD", 4: "HVD"}}),
)
PIXEL_LEVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("last block alone", {"target.taps": {0: 8}}),
    ("both scales at block 8", {"target.taps": {3: 8, 4: 8}}),
)


def _levers() -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for target, base, own in (("wavelet", TWO_LEVELS, WAVELET_LEVERS), ("pixels", TWO_BLOCKS, PIXEL_LEVERS)):
        found[target] = Variant(target, base, baseline=target)
        found |= {
            f"{target}, {name}": Variant(target, {**base, **more}, baseline=target) for name, more in (*LEVERS, *own)
        }
        found[f"{target}, warm-up of 2 %"] = Variant(target, base, warmup=0.02, baseline=target)
    return found


def _wavelet(**settings: Any) -> Variant:
    return Variant("wavelet", {**TWO_LEVELS, **{f"target.{name}": value for name, value in settings.items()}})


def _tilted(tilt: Any, **settings: Any) -> Variant:
    """All levels at the last block, by contrast and with one decoder: at tilt 1 the loss of MAE, but for the coarsest level."""
    found = _wavelet(taps=dict.fromkeys(FOUR_LEVELS, 8), normalise="contrast", tilt=tilt)
    return replace(found, overrides={**found.overrides, "decoder.per": "block", **settings})


# Muon in batches in which it costs hardly more than AdamW, at the best of the rates that were tried.
MUON = {"train.optimizer": "muon", "train.batch": 128, "train.lr": 6e-3}
# The target of the recipe: levels that fit into a patch; coarser ones lost at every tilt, and coarser tilts too.
WITHIN = _tilted(1.5, **{"target.taps": {1: 8, 2: 8, 3: 8}, **MUON})

WIDER = {"decoder.width": 96, "decoder.depth": 2, "decoder.heads": 3}
TILTS: dict[str, Comparison] = {
    "tilts": {
        "pixels, last block alone": Variant("pixels", {"target.taps": {0: 8}}),
        "tilt 1": _tilted(1.0),
        "tilt 1.5": _tilted(1.5),
        "tilt from 0 to 1": _tilted({0.0: 0.0, 1.0: 1.0}),
        "tilt 0.5": _tilted(0.5),
        "tilt 0.5, blocks 6, 6, 6, 8": _tilted(0.5, **{"target.taps": {1: 6, 2: 6, 3: 6, 4: 8}}),
        "tilt 0.5, levels within a patch": _tilted(0.5, **{"target.taps": {1: 8, 2: 8, 3: 8}}),
        "tilt 0": _tilted(0.0),
        "tilt 0.75": _tilted(0.75),
        "tilt 0.5, scale erased": _tilted(0.5, **{"target.band_scale": "erased"}),
        "tilt 0.5, vectors by themselves": _tilted(0.5, **{"target.normalise": "patch"}),
    },
    "cheaper": {
        "tilt 0.5": _tilted(0.5),
        "Muon": _tilted(0.5, **{"train.optimizer": "muon"}),
        "Muon, batch 128": _tilted(0.5, **{"train.optimizer": "muon", "train.batch": 128, "train.lr": 3e-3}),
        "pixels, Muon, batch 128": Variant(
            "pixels", {"target.taps": {0: 8}, "train.optimizer": "muon", "train.batch": 128, "train.lr": 3e-3}
        ),
        "growing images": _tilted(0.5, **{"train.progressive": {32: 0.5, 64: 0.5}}),
        "tilt 0 to 1, growing images": _tilted({0.0: 0.0, 1.0: 1.0}, **{"train.progressive": {32: 0.5, 64: 0.5}}),
        "2 masks an image": _tilted(0.5, **{"mask.count": 2}),
        "85 % hidden": _tilted(0.5, **{"mask.ratio": 0.85}),
        "cross-attention": _tilted(0.5, **{"decoder.attention": "cross"}),
        "a quarter predicted, by cross-attention": _tilted(
            0.5, **{"decoder.attention": "cross", "decoder.predict": 0.25}
        ),
        "a decoder of 2 × 96": _tilted(0.5, **WIDER),
        "cosine after the warm-up": _tilted(0.5, **{"train.warmup_prefix": True}),
        "L1": _tilted(0.5, **{"target.loss": "l1"}),
        "pixels, last block alone": Variant("pixels", {"target.taps": {0: 8}}),
        "pixels, a decoder of 2 × 96": Variant("pixels", {"target.taps": {0: 8}, **WIDER}),
        "pixels, growing images": Variant("pixels", {"target.taps": {0: 8}, "train.progressive": {32: 0.5, 64: 0.5}}),
        "pixels, 85 % hidden": Variant("pixels", {"target.taps": {0: 8}, "mask.ratio": 0.85}),
        "mae": Variant("mae"),
    },
}

COMPARISONS: dict[str, Comparison] = {
    **TILTS,
    "targets": {
        "wavelet": Variant("wavelet"),
        "wavelet, levels 3 and 4": Variant("wavelet", TWO_LEVELS),
        "pixels": Variant("pixels"),
        "pixels, two scales": Variant("pixels", TWO_BLOCKS),
        "hog": Variant("hog"),
        "fourier": Variant("fourier"),
    },
    "claims": {
        "wavelet": WITHIN,
        "pixels": Variant("pixels", {"target.taps": {0: 8}, **MUON}),
        "mae": Variant("mae"),
    },
    "levers": _levers(),
    "wavelets": {
        "levels 3, 4, per patch": _wavelet(),
        "by the data set": _wavelet(normalise="dataset"),
        "by the data set, L1": _wavelet(normalise="dataset", loss="l1"),
        "by contrast": _wavelet(normalise="contrast"),
        "by contrast, all bands": _wavelet(normalise="contrast", bands={3: "AHVD", 4: "AHVD"}),
        "not normalised": _wavelet(normalise="none"),
        "level 4 alone": _wavelet(taps={4: 8}),
        "level 3 alone": _wavelet(taps={3: 8}),
        "levels 2, 3, 4, equal weights": _wavelet(taps={2: 4, 3: 6, 4: 8}),
        "levels 1 to 4, equal weights": _wavelet(taps=FOUR_LEVELS),
        "levels 1 to 4 at block 8": _wavelet(taps={1: 8, 2: 8, 3: 8, 4: 8}),
        "levels 1 to 3 at block 6": _wavelet(taps={1: 6, 2: 6, 3: 6, 4: 8}),
        "levels 1 to 4, weights 0.1, 0.3, 1, 3": _wavelet(taps=FOUR_LEVELS, weights={1: 0.1, 2: 0.3, 3: 1, 4: 3}),
        "details alone": _wavelet(bands={3: "HVD", 4: "HVD"}),
        "all bands": _wavelet(bands={3: "AHVD", 4: "AHVD"}),
        "learned weights": _wavelet(weighting="learned"),
        "coarse to fine": _wavelet(weighting="coarse_to_fine"),
    },
    "decoders": {
        "self, 1 block a tap": Variant("wavelet", TWO_LEVELS),
        "self, shared": Variant("wavelet", {**TWO_LEVELS, "decoder.shared": True}),
        "self, a quarter predicted": Variant("wavelet", {**TWO_LEVELS, "decoder.predict": 0.25}),
        "cross": Variant("wavelet", {**TWO_LEVELS, "decoder.attention": "cross"}),
        "cross, a quarter predicted": Variant(
            "wavelet", {**TWO_LEVELS, "decoder.attention": "cross", "decoder.predict": 0.25}
        ),
        "self, 2 blocks a tap": Variant("wavelet", {**TWO_LEVELS, "decoder.depth": 2}),
        "linear, masked tokens": Variant("wavelet", {**TWO_LEVELS, "decoder.depth": 0, "encoder.sees": "masked"}),
    },
    "masks": {
        "random": Variant("wavelet", TWO_LEVELS),
        "blocks of 16 px": Variant("wavelet", {**TWO_LEVELS, "mask.kind": "block", "mask.unit": 16}),
        "energy, detail hidden": Variant("wavelet", {**TWO_LEVELS, "mask.kind": "energy", "mask.strength": 0.5}),
        "energy, detail seen": Variant("wavelet", {**TWO_LEVELS, "mask.kind": "energy", "mask.strength": -0.5}),
    },
}

# Comparisons that decide the claims: in the others, variants of a target differ in more than the target.
DECISIVE = ("targets", "claims")

BY_LEVEL = ("target.taps", "target.weights", "target.bands")
FROM_TOKEN = 0  # the level of `target.taps` that means the size of a token, whatever that is


def settled(comparison: Comparison, testbed: Testbed) -> dict[str, Variant]:
    """The variants of a comparison for a testbed.

    Args:
        comparison: The variants, for 64-px images.
        testbed: What they are to be run on.

    Returns:
        The variants with the recipes and settings of the testbed. A level that its images are too small for is dropped,
        and of variants that thereby become the same only the first is kept.
    """
    found: dict[str, Variant] = {}
    for name, variant in comparison.items():
        own = {key: _scaled(key, value, testbed.halvings) for key, value in variant.overrides.items()}
        named = "_".join(filter(None, (testbed.prefix, variant.recipe)))
        recipe = variant.recipe if is_file(variant.recipe) else named
        new = replace(variant, recipe=recipe, overrides=own, baseline=variant.baseline or next(iter(comparison)))
        if new not in found.values():
            found[name] = new
    return found


def is_file(recipe: str) -> bool:
    """Whether a recipe is given as a YAML file and not by name."""
    return recipe.endswith((".yaml", ".yml"))


def _scaled(key: str, value: Any, halvings: int) -> Any:
    if key in BY_LEVEL:
        levels = {level: level if level == FROM_TOKEN else level - halvings for level in value}
        return {levels[level]: entry for level, entry in value.items() if level == FROM_TOKEN or levels[level] > 0}
    if key == "train.progressive":
        return {size >> halvings: share for size, share in value.items()}
    return value >> halvings if key == "mask.unit" else value


def grown(recipe: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make of a small recipe one for a ViT-S: 12 blocks instead of 8, twice as wide.

    Blocks of taps keep their place in the depth of the encoder, and decoders their width relative to it.

    Args:
        recipe: Name of the recipe.
        overrides: Those of the variant.

    Returns:
        All overrides, those of the variant included.
    """
    from pipeline.config.load import load, with_overrides

    small = with_overrides(load(recipe), resetting(overrides))
    taps = {level: round(block * 12 / 8) for level, block in small.target.taps.items()}
    decoder = {"decoder.width": 2 * small.decoder.width, "decoder.heads": 2 * small.decoder.heads}
    kept = {"target.bands": small.target.bands, "target.weights": small.target.weights}
    return {**overrides, **VIT_SMALL, "target.taps": taps, **kept, **decoder}


def resetting(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, of which new taps also reset the bands and weights of the old ones."""
    if "target.taps" not in overrides:
        return dict(overrides)
    return {"target.bands": {}, "target.weights": {}, **overrides}
