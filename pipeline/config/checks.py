"""Checks across settings, beyond the type and range of a single field.

Rules of the method (masks, taps, decoders) are those of `wavemim.constraints`; here they get the settings' names and what to
do about it.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.config.downstream import Finetune
from pipeline.config.model_settings import Encoder, Target
from pipeline.config.recipe import BEHAVIOURS, Recipe, behaviour_of, for_size
from pipeline.config.settings import Data, Train
from pipeline.errors import SettingError
from wavemim import constraints, registry


@contextlib.contextmanager
def named(setting: str, remedy: str = "") -> Iterator[None]:
    """Turn a ValueError of the method into a SettingError about `setting`, KEY=VALUE, with a remedy at its end."""
    try:
        yield
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"{setting}: {error}{remedy}") from None


def check_together(recipe: Recipe) -> None:
    """Check what follows from the settings alone, without building the model.

    Raises:
        SettingError: If settings are incompatible.
    """
    data, encoder = recipe.data, recipe.encoder
    _check_side("encoder.image_size", encoder.image_size, data.levels)
    patch = _patch(encoder)
    if patch is not None:
        with named(f"encoder.image_size={encoder.image_size}", f" (encoder.patch_size={patch})"):
            constraints.check_image_size(encoder.image_size, patch)
    if encoder.image_size > data.image_size:
        raise SettingError(
            f"encoder.image_size={encoder.image_size}: larger than the stored images, data.image_size={data.image_size}; "
            "use smaller images or store larger ones"
        )
    _check_target(recipe)
    drops = encoder.sees != "masked" and recipe.mask.kind != "frequency" and _has_patches(encoder)
    check_decoder(recipe, drops=drops)
    if recipe.mask.kind == "frequency" and encoder.sees == "visible":
        raise SettingError("mask.kind=frequency: the encoder sees the whole corrupted image; set encoder.sees=auto")
    if recipe.mask.kind == "frequency" or patch is not None or not _has_patches(encoder):
        check_mask(recipe, cell=patch or 4, default=patch or constraints.BLOCK)  # 4: the tokens of a first stage
    _check_train(recipe.train)
    check_sizes(recipe, data.image_size, data.levels)
    least = recipe.cluster.min_workers
    if least is not None and least > max(recipe.train.workers, recipe.finetune.workers):
        raise SettingError(f"cluster.min_workers={least}: more than train.workers={recipe.train.workers}; use fewer")
    _check_finetune(recipe.finetune)


def _has_patches(encoder: Encoder) -> bool:
    """Whether the encoder is a plain ViT, according to its name.

    timm, which knows the geometry of the others, takes seconds to import; with the model all of them are checked.
    """
    return encoder.name.startswith(("vit_", "deit"))


def _patch(encoder: Encoder) -> int | None:
    """Pixels per side of a token, where the settings alone determine it."""
    return encoder.patch_size if _has_patches(encoder) else None


def check_kind(target: Target) -> None:
    """Raise SettingError unless target.kind names a target, after importing target.module."""
    if target.module is not None:
        try:
            registry.load_module(target.module)
        except ValueError as error:
            raise SettingError(str(error)) from None
    known = registry.known_targets()
    if target.kind not in known:
        own = (
            f"{target.module} does not register it"
            if target.module
            else "for a target of your own, name its file in target.module"
        )
        raise SettingError(
            f"target.kind={target.kind}: no target of this name{nearest(target.kind, known, '')}; "
            f"allowed are {', '.join(known)}; {own}"
        )


def _check_target(recipe: Recipe) -> None:
    data, target, patch = recipe.data, recipe.target, _patch(recipe.encoder)
    for level in target.taps:
        if target.predicts_bands and level > data.levels:
            raise SettingError(
                f"target.taps.{level}: level {level} is deeper than the stored pyramid, data.levels={data.levels}; "
                f"allowed are 1 to {data.levels}"
            )
        if target.predicts_bands or target.kind == "hog":
            with named(f"target.taps.{level}", f" (target.kind={target.kind})"):
                constraints.check_level(level, 1)
    if patch is not None:
        check_cells(recipe, dict.fromkeys(target.taps, patch))
    for key, levels in (("weights", target.weights), ("bands", target.bands)):
        for level in levels:
            if level not in target.taps:
                taps = ", ".join(str(tap) for tap in sorted(target.taps))
                raise SettingError(f"target.{key}.{level}: level {level} has no tap; target.taps has levels {taps}")
    if target.bands and not target.predicts_bands:
        raise SettingError(
            f"target.bands: target.kind={target.kind} has no bands, only wavelet does; remove target.bands"
        )
    if target.kind == "fourier" and target.loss != "l2":
        raise SettingError(
            f"target.loss={target.loss}: target.kind=fourier has a loss of its own, set by target.gamma and target.focal"
        )
    if not target.predicts_bands and target.normalise == "contrast":
        raise SettingError(
            f"target.normalise=contrast: for target.kind=wavelet only, not {target.kind}; use patch, dataset or none"
        )
    if not target.predicts_bands and target.tilt is not None:
        raise SettingError(
            f"target.tilt={target.tilt}: for targets that predict bands, such as target.kind=wavelet, not {target.kind}; "
            "set target.tilt=null"
        )
    if target.kind != "wavelet" and target.band_scale != "auto":
        raise SettingError(
            f"target.band_scale={target.band_scale}: for target.kind=wavelet only, not {target.kind}; use auto"
        )
    if target.average != "image" and (target.kind != "fourier" or recipe.mask.kind != "frequency"):
        raise SettingError(
            f"target.average={target.average}: for target.kind=fourier with mask.kind=frequency only, not {target.kind} with "
            f"{recipe.mask.kind}; set target.average=image"
        )
    if not any(recipe.weights_by_level().values()):
        raise SettingError(
            "target.weights: the weight of every level is 0, so nothing would be trained; set at least one above 0"
        )


def check_cells(recipe: Recipe, tokens: Mapping[int, int]) -> None:
    """Check that the cells of all tapped levels fit the encoder.

    Args:
        recipe: All settings.
        tokens: Level → pixels per side of a token of the encoder at the tap.

    Raises:
        SettingError: If they do not.
    """
    size = recipe.encoder.image_size
    for level, token in tokens.items():
        with named(f"target.taps.{level}", f" (encoder.image_size={size})"):
            constraints.check_cells(level, token, size)


def check_decoder(recipe: Recipe, *, drops: bool) -> None:
    """Check the settings of the decoder.

    Args:
        recipe: All settings.
        drops: Whether the encoder drops hidden tokens.

    Raises:
        SettingError: If the decoder cannot be built.
    """
    decoder = recipe.decoder
    depth = decoder.depth
    with named(f"decoder.depth={depth}", "; set encoder.sees=masked or decoder.depth=1"):
        constraints.check_decoder_depth(depth, drops=drops)
    with named(f"decoder.width={decoder.width}", f" (decoder.heads={decoder.heads})"):
        constraints.check_decoder_width(decoder.width, decoder.heads)
    with named(f"decoder.attention={decoder.attention}", "; set decoder.depth=1"):
        constraints.check_decoder_depth(depth, attention=decoder.attention)
    with named(f"decoder.shared={str(decoder.shared).lower()}", "; set decoder.depth=1"):
        constraints.check_decoder_depth(depth, shared=decoder.shared)


def check_mask(recipe: Recipe, *, cell: int, default: int) -> int:
    """Check the settings of the masks.

    Args:
        recipe: All settings.
        cell: Pixels per side of the smallest part of an image that the encoder can hide.
        default: Pixels per side of what is hidden as a whole where `mask.unit` is null.

    Returns:
        Pixels per side of what is hidden as a whole.

    Raises:
        SettingError: If masks cannot be drawn.
    """
    mask, size = recipe.mask, recipe.encoder.image_size
    with named(f"mask.count={mask.count}", f" (mask.kind={mask.kind})"):
        constraints.check_mask_count(mask.count, mask.kind, mask.low_pass_share)
    unit = constraints.block_side(mask.unit, cell=cell, default=default, kind=mask.kind)
    if mask.kind == "frequency":
        with named(f"mask.radius={mask.radius:g}"):
            constraints.check_frequencies(mask.radius, mask.low_pass_share, size)
        return unit
    with named(f"mask.unit={unit}", f" (encoder.image_size={size}, patches of {cell} pixels)"):
        constraints.check_blocks(size, unit, cell)
    with named(f"mask.ratio={mask.ratio}", f" (blocks of {unit} pixels; mask.unit changes their size)"):
        constraints.check_ratio((size // unit) ** 2, mask.ratio)
    return unit


def _check_train(train: Train) -> None:
    if train.optimizer == "muon" and train.parallel == "fsdp":
        raise SettingError(
            "train.optimizer=muon: needs whole matrices, and train.parallel=fsdp shards them; set train.parallel=ddp or "
            "train.optimizer=adamw"
        )
    if train.workers > train.batch:
        raise SettingError(
            f"train.workers={train.workers}: more workers than images in a batch, train.batch={train.batch}"
        )
    share = -(-train.batch // train.workers)
    if share < train.accumulate:
        raise SettingError(
            f"train.accumulate={train.accumulate}: a worker's share of the batch is {share} images; use at most {share}"
        )
    if train.warmup_epochs >= train.epochs:
        raise SettingError(
            f"train.warmup_epochs={train.warmup_epochs:g}: must be less than train.epochs={train.epochs:g}; "
            f"set train.warmup_epochs={train.epochs / 10:g}, for example"
        )
    if train.crop_scale[0] > train.crop_scale[1]:
        raise SettingError(f"train.crop_scale={list(train.crop_scale)}: the first value must be the smaller one")


def _check_finetune(finetune: Finetune) -> None:
    if finetune.batch % finetune.workers:
        near = constraints.nearest_multiples(finetune.batch, finetune.workers)
        raise SettingError(
            f"finetune.batch={finetune.batch}: not a multiple of finetune.workers={finetune.workers}; nearest allowed: {near}"
        )
    if finetune.batch // finetune.workers < finetune.accumulate:
        raise SettingError(
            f"finetune.accumulate={finetune.accumulate}: a worker's share of the batch is "
            f"{finetune.batch // finetune.workers} images; use at most {finetune.batch // finetune.workers}"
        )
    if finetune.warmup_epochs >= finetune.epochs:
        raise SettingError(
            f"finetune.warmup_epochs={finetune.warmup_epochs:g}: must be less than finetune.epochs={finetune.epochs:g}; "
            f"set finetune.warmup_epochs={finetune.epochs / 10:g}, for example"
        )
    if finetune.crop_scale[0] > finetune.crop_scale[1]:
        raise SettingError(f"finetune.crop_scale={list(finetune.crop_scale)}: the first value must be the smaller one")


def check_sizes(recipe: Recipe, stored_size: int, stored_levels: int) -> None:
    """Check the sizes of progressive training.

    Args:
        recipe: All settings.
        stored_size: Pixels per side of the stored images.
        stored_levels: Levels of the stored pyramids.

    Raises:
        SettingError: If train.progressive has a size that cannot be trained on.
    """
    sizes = recipe.train.progressive
    if not sizes:
        return
    shown = f"train.progressive={sizes}"
    if list(sizes) != sorted(sizes) or max(sizes) != recipe.encoder.image_size:
        raise SettingError(f"{shown}: sizes must grow and end with encoder.image_size={recipe.encoder.image_size}")
    if not all(sizes.values()) or abs(sum(sizes.values()) - 1) > 0.001:
        raise SettingError(f"{shown}: shares must be above 0 and add up to 1, not to {sum(sizes.values()):g}")
    for size in sizes:
        try:
            check_together(for_size(recipe, size, stored_size, stored_levels)[0])
        except SettingError as error:
            raise SettingError(f"{shown}: images of {size} pixels do not fit the other settings; {error}") from None


def _check_side(key: str, size: int, levels: int) -> None:
    unit = 2**levels
    if size % unit:
        raise SettingError(
            f"{key}={size}: not a multiple of 2^levels = {unit} (data.levels={levels}); "
            f"nearest allowed: {constraints.nearest_multiples(size, unit)}"
        )


def check_data(data: Data) -> None:
    """Check the settings of a shard set.

    Raises:
        SettingError: If they are incompatible.
    """
    _check_side("data.image_size", data.image_size, data.levels)
    if data.wavelet != "haar":
        import pywt  # not needed for most commands

        known = pywt.wavelist(kind="discrete")
        if data.wavelet not in known:
            raise SettingError(
                f"data.wavelet={data.wavelet}: not a discrete wavelet of PyWavelets"
                f"{nearest(data.wavelet, known, '')}; allowed are {', '.join(pywt.families(short=True)[:7])} with their "
                "orders, such as db4, sym8 or bior2.2"
            )
        if data.steps == "lossless":
            raise SettingError(
                f"data.steps=lossless: only the haar wavelet has an exact integer transform, not data.wavelet={data.wavelet}; "
                "give steps as numbers, such as [0.5]"
            )
    if data.value_range is not None and data.value_range[0] >= data.value_range[1]:
        raise SettingError(f"data.value_range={list(data.value_range)}: the first value must be below the second")


def check_searchable(key: str, where: str) -> None:
    """Raise SettingError, with the nearest setting that may be, unless a sweep may vary the setting `key`.

    Args:
        key: Dotted key of a setting or of an entry of a mapping.
        where: What the message begins with.
    """
    behaviour = behaviour_of(key)
    if behaviour.searchable:
        return
    known = [name for name, other in BEHAVIOURS.items() if other.searchable]
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = [by_last[last] for last in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    near = near or difflib.get_close_matches(key, known, n=1)
    sections = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
    reason = ": it does not change what is trained" if behaviour.operational else ""
    hint = f"; nearest searchable setting: {near[0]}" if near else ""
    raise SettingError(
        f"{where} cannot be searched{reason}{hint}; allowed are model and training settings of {sections}"
    )


def nearest(name: str, known: Iterable[str], otherwise: str = "; --help lists the settings") -> str:
    """The part of a message that suggests what was meant.

    Args:
        name: The mistaken name.
        known: Names to choose from.
        otherwise: What to return where none is near.

    Returns:
        "; did you mean 'NAME'?", or `otherwise`.
    """
    known = [key for key in dict.fromkeys(known) if key != name]  # never what was written
    folded = {key.casefold(): key for key in reversed(known)}
    near = [folded[key] for key in difflib.get_close_matches(name.strip().casefold(), folded, n=1, cutoff=0.6)]
    if not near:  # a right name at a wrong place: "epochs" for "train.epochs"
        near = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean '{near[0]}'?" if near else otherwise


def check_out(recipe: Recipe) -> None:
    """Raise SettingError where results or copies of checkpoints cannot be written to where they are to go."""
    if re.match("https?://", recipe.out, re.IGNORECASE):
        raise SettingError(f"out={recipe.out}: nothing can be written there; give a folder, or s3://BUCKET/FOLDER")
    if recipe.home is None and Path(recipe.out).is_file():
        raise SettingError(f"out={recipe.out}: a file, not a folder")
    copies = recipe.train.checkpoints_at
    if copies is not None and "://" not in copies and recipe.home is not None:
        raise SettingError(
            f"train.checkpoints_at={copies}: with out={recipe.home} other nodes do not see a local folder; leave it out, then "
            "checkpoints are in the out folder, or give a URL"
        )
    if copies is not None and "://" not in copies:
        if Path(copies).expanduser().resolve() == recipe.run_dir.parent.resolve():
            raise SettingError(f"train.checkpoints_at={copies}: this is the run's own folder; give another one")
        if not copies or Path(copies).expanduser().is_file():
            raise SettingError(
                f"train.checkpoints_at={copies}: not a folder; give one, or a URL such as s3://BUCKET/RUNS"
            )
