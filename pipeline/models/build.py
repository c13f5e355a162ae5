"""Builds models, targets, masks and inputs from settings and a shard set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config.checks import check_cells, check_decoder, check_mask, check_sizes, named
from pipeline.config.load import validate
from pipeline.config.model_settings import Encoder as EncoderSettings
from pipeline.config.recipe import BEHAVIOURS, Recipe, for_size
from pipeline.errors import SettingError
from pipeline.shards.shard_set import ShardSet
from wavemim.encoders.base import Encoder, is_plain_vit
from wavemim.encoders.factory import make_encoder
from wavemim.inputs import Inputs
from wavemim.level_weights import LevelWeights
from wavemim.masking import Frequencies, Masking
from wavemim.model import DecoderSettings, MaskedImageModel, check_taps
from wavemim.optim import hidden_matrices
from wavemim.registry import arguments_of, target_class
from wavemim.targets import Statistics, Tap, Target
from wavemim.views import Augment, Views
from wavemim.weights import checkpoint

_VIT_ONLY = [key.removeprefix("encoder.") for key, behaviour in BEHAVIOURS.items() if behaviour.vit_only]


def statistics_of(shards: ShardSet) -> Statistics:
    """The means and deviations that a shard set stores, of coefficients and pixels."""
    by_level = shards.statistics
    return Statistics(
        mean={level: {band: values["mean"] for band, values in bands.items()} for level, bands in by_level.items()},
        std={level: {band: values["std"] for band, values in bands.items()} for level, bands in by_level.items()},
        pixel_mean=list(shards.pixel_mean),
        pixel_std=list(shards.pixel_std),
    )


def build_encoder(recipe: Recipe, *, start: bool = False) -> Encoder:
    """Build the encoder of a recipe.

    Args:
        recipe: All settings.
        start: Load the pretrained weights that `encoder.pretrained` names, if any.

    Returns:
        The encoder, float32, on the current device.

    Raises:
        SettingError: If timm has no such model, or it cannot be built with these settings.
    """
    settings = recipe.encoder
    sees = "whole" if recipe.mask.kind == "frequency" else settings.sees
    vit_only = {key: getattr(settings, key) for key in _VIT_ONLY}
    if not is_plain_vit(settings.name):  # defaults do not apply; what was set is refused by name
        vit_only = {key: v for key, v in vit_only.items() if v != EncoderSettings.model_fields[key].default and v}
    try:
        return make_encoder(
            settings.name,
            image_size=settings.image_size,
            channels=recipe.data.channels,
            sees=None if sees == "auto" else sees,
            options=settings.options,
            pretrained=settings.pretrained if start else False,
            **vit_only,
        )
    except ValueError as error:
        message, where = str(error), f"encoder.name={settings.name} with encoder.image_size={settings.image_size}"
        raise SettingError(message if message.startswith("encoder.") else f"{where}: {message}") from None


def build_model(recipe: Recipe, shards: ShardSet, *, start: bool = False) -> MaskedImageModel:
    """Build the masked image model of a recipe for a shard set.

    Args:
        recipe: All settings. Weights are drawn from its seed.
        shards: The shard set, whose statistics and wavelet the target needs.
        start: Load the encoder's pretrained weights, if the recipe names any: for the first step of training.

    Returns:
        The model, float32, on the current device.

    Raises:
        SettingError: If it cannot be built.
    """
    return _model(recipe, statistics_of(shards), shards.layout.wavelet, start=start)


def statistics_in(state: Mapping[str, Any]) -> Statistics:
    """The statistics of the shard set that a checkpoint was trained on, from its state."""
    by_level = {
        key: {int(level): bands for level, bands in state["statistics"][key].items()} for key in ("mean", "std")
    }
    return Statistics(**by_level, pixel_mean=state["pixel_mean"], pixel_std=state["pixel_std"])


def model_of_checkpoint(path: Path) -> tuple[MaskedImageModel, Inputs, Recipe]:
    """Load a trained model without its shard set.

    Args:
        path: Folder of a checkpoint.

    Returns:
        The model with its weights, the inputs for images normalised by the statistics of its shard set, and its
        settings.

    Raises:
        SettingError: If its settings are not valid any more.
        CheckpointError: If the checkpoint is damaged.
    """
    state = checkpoint.read_state(path)
    recipe = validate(state["recipe"])
    statistics = statistics_in(state)
    model = _model(recipe, statistics, state["wavelet"])
    checkpoint.load_trained(path, model)
    return model, Inputs(recipe.steps_by_level(), statistics, state["wavelet"]), recipe


def _model(recipe: Recipe, statistics: Statistics, wavelet: str, *, start: bool = False) -> MaskedImageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe, start=start)
        check_decoder(recipe, drops=encoder.drops)
        try:
            target = _target(recipe, encoder, statistics, wavelet)
            weights = recipe.weights_by_level()
            return MaskedImageModel(
                encoder,
                target,
                hidden=build_masking(recipe, encoder).hidden,
                decoder=DecoderSettings(**recipe.decoder.model_dump()),
                level_weights=LevelWeights(
                    [weights[tap.level] for tap in target.taps],
                    recipe.target.weighting,
                    tilt=recipe.target.tilt,
                    coefficients=[target.positions(tap.level) ** 2 * target.values(tap) for tap in target.taps],
                ),
            )
        except SettingError:
            raise
        except ValueError as error:
            raise SettingError(str(error)) from None


def _target(recipe: Recipe, encoder: Encoder, statistics: Statistics, wavelet: str) -> Target:
    """The target of a recipe. Raises SettingError where its levels do not fit the encoder."""
    settings, bands = recipe.target, recipe.bands_by_level()
    taps = [Tap(level, block, bands[level]) for level, block in settings.taps.items()]
    with named("target.taps"):  # before a tap's token size is asked for
        check_taps(encoder, taps)
    token_sizes = {tap.level: encoder.token_size(tap.block) for tap in taps}
    check_cells(recipe, token_sizes)
    common: dict[str, Any] = {
        "image_size": recipe.encoder.image_size,
        "token_sizes": token_sizes,
        "normalise": settings.normalise,
    }
    offered: dict[str, Any] = {
        "loss": settings.loss,
        "wavelet": wavelet,
        "on_device": settings.source == "device",
        "band_scale": settings.band_scale,
        "bins": settings.bins,
        "gamma": settings.gamma,
        "focal": settings.focal,
        "average": settings.average,
        "frequencies": _frequencies(recipe),
    }
    cls: type[Target] = target_class(settings.kind, settings.module)
    takes = arguments_of(cls)
    for key in settings.options:
        if key in common or key in offered:
            raise SettingError(f"target.options.{key}: cannot be set here; other settings decide it")
        if key not in takes:
            further = ", ".join(sorted(takes - common.keys() - offered.keys())) or "no options"
            raise SettingError(f"target.options.{key}: target.kind={settings.kind} takes {further}")
    if "loss" not in takes and settings.loss != "l2":
        raise SettingError(f"target.loss={settings.loss}: target.kind={settings.kind} defines its own loss")
    given = {key: value for key, value in offered.items() if key in takes}
    return cls(taps, statistics, **common, **given, **settings.options)


def _frequencies(recipe: Recipe) -> Frequencies | None:
    """How frequencies are removed; None where patches are hidden."""
    mask = recipe.mask
    return Frequencies(mask.radius, mask.low_pass_share) if mask.kind == "frequency" else None


def build_masking(recipe: Recipe, encoder: Encoder) -> Masking:
    """Build the masks of a recipe on the grid of its encoder.

    Raises:
        SettingError: If they do not fit the grid.
    """
    settings = recipe.mask
    unit = check_mask(recipe, cell=encoder.cell, default=encoder.default_unit)
    return Masking(
        kind=settings.kind,
        ratio=settings.ratio,
        grid=encoder.grid,
        unit=unit // encoder.cell,
        strength=settings.strength,
    )


def build_inputs(shards: ShardSet, trained: Mapping[str, Any] | None = None, *, depth: int | None = None) -> Inputs:
    """Build what turns batches of a shard set into images and coefficients.

    Args:
        shards: The shard set.
        trained: State of a checkpoint. Images are then normalised by the pixel statistics of its own shard set.
        depth: Least number of levels of the pyramids; None: as stored.
    """
    statistics = statistics_of(shards)
    if trained is not None:
        statistics = replace(statistics, pixel_mean=trained["pixel_mean"], pixel_std=trained["pixel_std"])
    return Inputs(shards.steps, statistics, shards.layout.wavelet, depth)


def build_views(recipe: Recipe, model: MaskedImageModel, inputs: Inputs, *, augment: bool) -> Views:
    """Build what makes the network's input of a batch: crops, flips and masks.

    Args:
        recipe: All settings.
        model: The model, whose encoder has the grid of the masks.
        inputs: What turns a batch into images and coefficients.
        augment: Whether images are augmented, and masked as often as in training. Figures and measurements are made
            without, with one mask for each image.
    """
    cropped = None
    if augment and recipe.train.augment == "rrc":
        cropped = Augment(recipe.encoder.image_size, scale=recipe.train.crop_scale, flip=recipe.train.flip)
    masking = build_masking(recipe, model.encoder)
    masks, frequencies = recipe.mask.count if augment else 1, _frequencies(recipe)
    return Views(inputs, masking, seed=recipe.seed, augment=cropped, frequencies=frequencies, masks=masks)


def check_model(recipe: Recipe) -> None:
    """Check that the model of a recipe can be built and trained: on the meta device, without data and at no cost.

    Raises:
        SettingError: If it cannot.
    """
    given = recipe.encoder.pretrained
    if isinstance(given, str) and not Path(given).exists():
        raise SettingError(f"encoder.pretrained={given}: no such folder or file; use true for timm's own weights")
    if isinstance(given, str):  # read here, before anything is started
        build_encoder(recipe, start=True)
    data = recipe.data
    for size in recipe.train.progressive or [recipe.encoder.image_size]:
        part, _ = for_size(recipe, size, data.image_size, data.levels)
        with torch.device("meta"):
            model = build_blank_model(part)
            _check_forward(part, model)
        if recipe.train.optimizer == "muon":
            with named("train.optimizer=muon", "; set train.optimizer=adamw"):
                hidden_matrices(model)


def _check_forward(recipe: Recipe, model: MaskedImageModel) -> None:
    """Run the encoder once in training mode: this finds options that timm accepts but its layers do not."""
    channels, size = recipe.data.channels, recipe.encoder.image_size
    mask = torch.zeros(2, model.encoder.grid**2, dtype=torch.bool)
    try:
        model.train().predict(torch.zeros(2, channels, size, size), mask)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError, AttributeError) as error:
        raise SettingError(
            f"encoder.name={recipe.encoder.name} with encoder.options={recipe.encoder.options} cannot train on images of "
            f"{channels}×{size}×{size}: {' '.join(str(error).split())[:200]}"
        ) from None


def build_blank_model(recipe: Recipe) -> MaskedImageModel:
    """Build the model of a recipe without a shard set: with the same weights, but targets that are not normalised."""
    levels = range(1, max(recipe.data.levels, *recipe.target.taps) + 1)
    flat = {level: dict.fromkeys("AHVD", [1.0] * recipe.data.channels) for level in levels}
    ones = [1.0] * recipe.data.channels
    return _model(recipe, Statistics(flat, flat, ones, ones), recipe.data.wavelet)


def check_shards(recipe: Recipe, shards: ShardSet) -> None:
    """Check that a shard set has what training by a recipe needs.

    Raises:
        SettingError: If its images are too small or have other channels, or it lacks levels.
    """
    unit = 2**shards.levels
    if recipe.encoder.image_size > shards.image_size or recipe.encoder.image_size % unit:
        raise SettingError(
            f"encoder.image_size={recipe.encoder.image_size}: {shards.url} stores images of {shards.image_size} pixels "
            f"in {shards.levels} levels; allowed are multiples of {unit} up to {shards.image_size}"
        )
    if recipe.data.channels != shards.layout.channels:
        raise SettingError(
            f"data.channels={recipe.data.channels}: {shards.url} stores images of {shards.layout.channels} channels; "
            f"set data.channels={shards.layout.channels}"
        )
    deepest = max(recipe.target.taps)
    if recipe.target.predicts_bands and deepest > shards.levels:
        raise SettingError(f"target.taps.{deepest}: {shards.url} stores levels 1 to {shards.levels}")
    check_sizes(recipe, shards.image_size, shards.levels)
