"""From settings and a shard set to the objects of the method: the one place where the two packages' words meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pipeline.config import Recipe, SettingError
from pipeline.shards import ShardSet
from wavemim.encoders import ViTEncoder
from wavemim.inputs import Inputs
from wavemim.model import MaskedImageModel
from wavemim.targets import Statistics, Tap, WaveletTarget


def statistics_of(shards: ShardSet) -> Statistics:
    """Statistics of a shard set."""
    by_level = shards.statistics
    return Statistics(
        mean={level: {band: values["mean"] for band, values in bands.items()} for level, bands in by_level.items()},
        std={level: {band: values["std"] for band, values in bands.items()} for level, bands in by_level.items()},
        pixel_mean=list(shards.pixel_mean),
        pixel_std=list(shards.pixel_std),
    )


def build_encoder(recipe: Recipe) -> ViTEncoder:
    """The encoder that a recipe names. Raises SettingError."""
    settings = recipe.encoder
    try:
        return ViTEncoder(
            settings.name,
            positions=settings.positions,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            channels=recipe.data.channels,
            width=settings.width,
            depth=settings.depth,
            heads=settings.heads,
            class_token=settings.class_token,
        )
    except ValueError as error:
        raise SettingError(f"encoder.name={settings.name}: {error}") from None


def build_model(recipe: Recipe, shards: ShardSet) -> MaskedImageModel:
    """The masked image model of a recipe for a shard set, with weights drawn from its seed. Raises SettingError."""
    return _model(recipe, statistics_of(shards), shards.layout.wavelet)


def _model(recipe: Recipe, statistics: Statistics, wavelet: str) -> MaskedImageModel:
    bands = recipe.bands_by_level()
    taps = [Tap(level, block, bands[level]) for level, block in recipe.target.taps.items()]
    target = WaveletTarget(
        taps,
        statistics,
        image_size=recipe.encoder.image_size,
        patch_size=recipe.encoder.patch_size,
        wavelet=wavelet,
        normalise=recipe.target.normalise,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe)
        try:
            return MaskedImageModel(
                encoder,
                target,
                mask_ratio=recipe.mask.ratio,
                decoder_width=recipe.decoder.width,
                decoder_depth=recipe.decoder.depth,
                decoder_heads=recipe.decoder.heads,
            )
        except ValueError as error:
            raise SettingError(str(error)) from None


def build_inputs(shards: ShardSet, trained: Mapping[str, Any] | None = None) -> Inputs:
    """What turns a batch of this shard set into images and coefficients.

    Images are normalised by this set's pixels, or by those of the set that a checkpoint with state `trained` has seen.
    """
    statistics = statistics_of(shards)
    if trained is not None:
        statistics = replace(statistics, pixel_mean=trained["pixel_mean"], pixel_std=trained["pixel_std"])
    return Inputs(shards.steps, statistics, shards.layout.wavelet)


def check_model(recipe: Recipe) -> None:
    """Raise SettingError where the recipe's model cannot be built: on the meta device, so at no cost and without data."""
    with torch.device("meta"):
        build_blank_model(recipe)


def build_blank_model(recipe: Recipe) -> MaskedImageModel:
    """The model of a recipe without a shard set: the same weights, targets that are not standardised."""
    levels = range(1, recipe.data.levels + 1)
    flat = {level: dict.fromkeys("AHVD", [1.0] * recipe.data.channels) for level in levels}
    ones = [1.0] * recipe.data.channels
    return _model(recipe, Statistics(flat, flat, ones, ones), recipe.data.wavelet)


def check_shards(recipe: Recipe, shards: ShardSet) -> None:
    """Raise SettingError where a shard set lacks what the recipe's training needs."""
    unit = 2**shards.levels
    if recipe.encoder.image_size > shards.image_size or recipe.encoder.image_size % unit:
        raise SettingError(
            f"encoder.image_size={recipe.encoder.image_size}: {shards.url} stores images of {shards.image_size} pixels "
            f"in {shards.levels} levels; allowed are multiples of {unit} up to {shards.image_size}"
        )
    deepest = max(recipe.target.taps)
    if deepest > shards.levels:
        raise SettingError(f"target.taps.{deepest}: {shards.url} stores levels 1 to {shards.levels}")
