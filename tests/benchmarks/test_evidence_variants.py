"""The comparisons of evidence.py: recipes that exist, settings that are allowed, and what changes with the testbed."""

from importlib import import_module

import pytest

from pipeline.config.load import load, with_overrides
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError


@pytest.fixture
def variants(benchmarks):
    return import_module("evidence_variants")


def missing(chosen):
    """Recipes and settings that this version does not have."""
    found = set()
    for variant in chosen.values():
        try:
            load(variant.recipe)
        except SettingError:
            found.add(variant.recipe)
        for key in variant.overrides:
            section, _, name = key.partition(".")
            if name not in Recipe.model_fields[section].annotation.model_fields:
                found.add(key)
    return found


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("name", ["tilts", "cheaper", "targets", "claims", "levers", "wavelets", "decoders", "masks"])
def test_every_variant_is_a_recipe_that_differs_from_the_others(variants, name, size):
    assert name in variants.COMPARISONS
    chosen = variants.settled(variants.COMPARISONS[name], variants.TESTBEDS[size])
    assert not missing(chosen)
    recipes = []
    for variant in chosen.values():
        overrides = {**variants.SIZES["screen"].settings, **variants.resetting(variant.overrides)}
        recipe = with_overrides(load(variant.recipe), overrides).dump()
        recipe.pop("name")
        assert recipe["data"]["image_size"] == size
        recipes.append((recipe, variant.images, variant.warmup))
    assert all(recipes.count(recipe) == 1 for recipe in recipes)


def test_every_baseline_is_in_its_comparison(variants):
    for comparison in variants.COMPARISONS.values():
        for testbed in variants.TESTBEDS.values():
            chosen = variants.settled(comparison, testbed)
            assert {variant.baseline for variant in chosen.values()} <= set(chosen)


def test_on_small_images_levels_are_one_finer_and_sizes_half(variants):
    overrides = {
        "target.taps": {0: 8, 1: 2, 2: 4, 4: 8},
        "target.weights": {1: 0.1, 2: 0.3, 4: 3.0},
        "target.bands": {4: "AHVD"},
        "mask.unit": 16,
        "train.progressive": {32: 0.5, 64: 0.5},
        "decoder.depth": 2,
    }
    comparison = {"a": variants.Variant("wavelet", overrides, images=0.5, warmup=0.2)}
    small, large = (variants.settled(comparison, variants.TESTBEDS[size])["a"] for size in (32, 64))
    assert large.overrides == overrides
    assert (large.recipe, small.recipe) == ("small_wavelet", "small32_wavelet")
    assert small.overrides == {
        "target.taps": {0: 8, 1: 4, 3: 8},
        "target.weights": {1: 0.3, 3: 3.0},
        "target.bands": {3: "AHVD"},
        "mask.unit": 8,
        "train.progressive": {16: 0.5, 32: 0.5},
        "decoder.depth": 2,
    }
    assert (small.images, small.warmup, small.baseline) == (0.5, 0.2, "a")


def test_of_variants_that_become_the_same_the_first_is_kept(variants):
    comparison = {
        "levels 2 to 4": variants.Variant("wavelet", {"target.taps": {2: 4, 3: 6, 4: 8}}),
        "levels 1 to 4": variants.Variant("wavelet", {"target.taps": {1: 2, 2: 4, 3: 6, 4: 8}}),
        "shorter": variants.Variant("wavelet", {"target.taps": {2: 4, 3: 6, 4: 8}}, images=0.5),
    }
    assert list(variants.settled(comparison, variants.TESTBEDS[32])) == ["levels 2 to 4", "shorter"]
    assert list(variants.settled(comparison, variants.TESTBEDS[64])) == list(comparison)


def test_a_recipe_in_a_file_has_no_prefix(variants):
    comparison = {"a": variants.Variant("/somewhere/own.yaml")}
    assert variants.settled(comparison, variants.TESTBEDS[32])["a"].recipe == "/somewhere/own.yaml"


@pytest.mark.parametrize("kind", ["hog", "fourier"])
def test_targets_without_a_small32_recipe_are_those_of_the_64_px_recipe(variants, kind):
    chosen = variants.settled(variants.COMPARISONS["targets"], variants.TESTBEDS[64])[kind]
    assert with_overrides(load(chosen.recipe), chosen.overrides).target == load(f"small_{kind}").target


def test_a_vit_small_keeps_the_place_of_taps_and_the_share_of_decoders(variants):
    small = load("small_wavelet")
    grown = with_overrides(small, variants.grown("small_wavelet", {"target.loss": "l1"}))
    assert (grown.encoder.width, grown.encoder.depth, grown.encoder.heads) == (384, 12, 6)
    assert grown.target.taps == {level: block * 3 // 2 for level, block in small.target.taps.items()}
    assert grown.decoder.width / grown.encoder.width == small.decoder.width / small.encoder.width
    assert grown.decoder.width / grown.decoder.heads == small.decoder.width / small.decoder.heads
    assert (grown.target.loss, grown.target.bands) == ("l1", small.target.bands)
    single = with_overrides(small, variants.grown("small_wavelet", {"target.taps": {3: 6}}))
    assert single.target.taps == {3: 9}


def test_new_taps_reset_bands_and_weights_unless_these_are_given(variants):
    assert variants.resetting({"target.loss": "l1"}) == {"target.loss": "l1"}
    assert variants.resetting({"target.taps": {3: 8}}) == {
        "target.bands": {},
        "target.weights": {},
        "target.taps": {3: 8},
    }
    given = {"target.taps": {3: 8}, "target.weights": {3: 2.0}}
    assert variants.resetting(given) == {"target.bands": {}, **given}
