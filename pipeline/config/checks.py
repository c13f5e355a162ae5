"""Settings that do not go together: what the type of a single field cannot see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pipeline.config.downstream import Finetune
from pipeline.config.recipe import Recipe, for_size
from pipeline.config.settings import Data, Encoder, Train
from pipeline.errors import SettingError


def check_together(recipe: Recipe) -> None:
    """Raise SettingError where settings do not go together."""
    data, encoder = recipe.data, recipe.encoder
    _check_side("encoder.image_size", encoder.image_size, data.levels)
    patch = _patch(encoder)
    if patch is not None and encoder.image_size % patch:
        near = _nearest_multiple(encoder.image_size, patch)
        raise SettingError(
            f"encoder.image_size={encoder.image_size}: no multiple of encoder.patch_size={patch}; "
            f"nearest allowed: {near}"
        )
    if encoder.image_size > data.image_size:
        raise SettingError(
            f"encoder.image_size={encoder.image_size}: larger than the stored images, data.image_size={data.image_size}; "
            "make it smaller or store larger images"
        )
    _check_target(recipe)
    _check_mask(recipe)
    if recipe.decoder.width % recipe.decoder.heads or recipe.decoder.width % 4:
        raise SettingError(
            f"decoder.width={recipe.decoder.width}: has to be a multiple of 4 and of decoder.heads={recipe.decoder.heads}"
        )
    if recipe.decoder.attention == "cross" and recipe.decoder.depth == 0:
        raise SettingError(
            "decoder.attention=cross: a linear decoder (decoder.depth=0) has no attention; set decoder.depth=1"
        )
    if recipe.decoder.shared and recipe.decoder.depth == 0:
        raise SettingError("decoder.shared=true: a linear decoder (decoder.depth=0) has no blocks to share")
    _check_train(recipe.train)
    check_sizes(recipe, data.image_size, data.levels)
    least = recipe.cluster.min_workers
    if least is not None and least > max(recipe.train.workers, recipe.finetune.workers):
        raise SettingError(f"cluster.min_workers={least}: more than train.workers={recipe.train.workers}; use fewer")
    _check_finetune(recipe.finetune)


def _has_patches(encoder: Encoder) -> bool:
    """Whether the encoder is a plain ViT by its name; of others timm knows the geometry, and the model is checked later."""
    return encoder.name.startswith(("vit_", "deit"))


def _patch(encoder: Encoder) -> int | None:
    """Pixels a side of a token, where they are known from the settings alone."""
    return encoder.patch_size if _has_patches(encoder) else None


def _check_target(recipe: Recipe) -> None:
    data, encoder, target, patch = recipe.data, recipe.encoder, recipe.target, _patch(recipe.encoder)
    for level in target.taps:
        if target.kind == "wavelet" and level > data.levels:
            raise SettingError(
                f"target.taps.{level}: level {level} is deeper than the stored pyramid, data.levels={data.levels}; "
                f"allowed are 1 to {data.levels}"
            )
        if level == 0 and target.kind in ("wavelet", "hog"):
            raise SettingError(
                f"target.taps.0: level 0, the patch itself, is for pixels and fourier, not {target.kind}"
            )
        if patch is None or level == 0:
            continue
        cell = 2**level
        if patch % cell and cell % patch:
            raise SettingError(
                f"target.taps.{level}: cells of {cell} pixels and patches of encoder.patch_size={patch} "
                "pixels do not divide each other; use a patch size that is a power of two"
            )
        if cell > patch and (encoder.image_size // patch) % (cell // patch):
            raise SettingError(
                f"target.taps.{level}: cells of {cell} pixels do not divide encoder.image_size={encoder.image_size}"
            )
    for key, named in (("weights", target.weights), ("bands", target.bands)):
        for level in named:
            if level not in target.taps:
                taps = ", ".join(str(tap) for tap in sorted(target.taps))
                raise SettingError(f"target.{key}.{level}: level {level} has no tap; target.taps names levels {taps}")
    if target.bands and target.kind != "wavelet":
        raise SettingError(f"target.bands: bands are of wavelets, not of target.kind={target.kind}; leave them out")
    if target.kind == "fourier" and target.loss != "l2":
        raise SettingError(
            f"target.loss={target.loss}: the loss of target.kind=fourier is set by target.gamma and focal"
        )
    if target.kind != "wavelet" and target.normalise == "contrast":
        raise SettingError(
            f"target.normalise=contrast: is of target.kind=wavelet, not {target.kind}; use patch, dataset or none"
        )
    if not any(recipe.weights_by_level().values()):
        raise SettingError("target.weights: every level weighs 0, so nothing is trained; give one a weight above 0")


def _check_mask(recipe: Recipe) -> None:
    encoder, mask = recipe.encoder, recipe.mask
    sees_tokens = encoder.sees == "masked" or mask.kind == "frequency" or not _has_patches(encoder)
    if recipe.decoder.depth == 0 and not sees_tokens:
        raise SettingError(
            "decoder.depth=0: a linear decoder needs tokens of hidden patches, which this encoder drops; "
            "set encoder.sees=masked or decoder.depth=1"
        )
    if mask.kind == "frequency":
        if encoder.sees == "visible":
            raise SettingError("mask.kind=frequency: the whole corrupted image is seen; set encoder.sees=auto")
        if mask.radius >= encoder.image_size / 2:
            raise SettingError(
                f"mask.radius={mask.radius:g}: a spectrum of {encoder.image_size} pixels ends at "
                f"{encoder.image_size // 2} cycles; use a smaller one"
            )
        return
    patch = _patch(encoder)
    if patch is None and _has_patches(encoder):
        return  # timm knows the patch: the masks are checked with the model
    token = patch or 4
    unit = mask.unit or (patch if patch and mask.kind != "block" else 32)
    if unit % token or encoder.image_size % unit:
        raise SettingError(
            f"mask.unit={unit}: has to be a multiple of {token} pixels (the encoder's patches) and to divide "
            f"encoder.image_size={encoder.image_size}"
        )
    blocks = (encoder.image_size // unit) ** 2
    hidden = round(blocks * mask.ratio)
    if not 0 < hidden < blocks:
        what = "patches" if unit == token else f"blocks of {unit} pixels"
        raise SettingError(
            f"mask.ratio={mask.ratio}: hides {hidden} of {blocks} {what}; at least one has to be hidden and one seen"
        )


def _check_train(train: Train) -> None:
    if train.workers > train.batch:
        raise SettingError(f"train.workers={train.workers}: more than images in a batch, train.batch={train.batch}")
    share = -(-train.batch // train.workers)
    if share < train.accumulate:
        raise SettingError(
            f"train.accumulate={train.accumulate}: a worker's part of the batch is {share} images; "
            "allowed are as many parts at most"
        )
    if train.warmup_epochs >= train.epochs:
        raise SettingError(
            f"train.warmup_epochs={train.warmup_epochs:g}: has to be less than train.epochs={train.epochs:g}; "
            f"set train.warmup_epochs={train.epochs / 10:g}, for example"
        )
    if train.crop_scale[0] > train.crop_scale[1]:
        raise SettingError(f"train.crop_scale={list(train.crop_scale)}: the first value has to be the smaller one")


def _check_finetune(finetune: Finetune) -> None:
    if finetune.batch % finetune.workers:
        near = _nearest_multiple(finetune.batch, finetune.workers)
        raise SettingError(
            f"finetune.batch={finetune.batch}: no multiple of finetune.workers={finetune.workers}; nearest allowed: {near}"
        )
    if finetune.batch // finetune.workers < finetune.accumulate:
        raise SettingError(
            f"finetune.accumulate={finetune.accumulate}: a worker's part of the batch is "
            f"{finetune.batch // finetune.workers} images; allowed are as many parts at most"
        )
    if finetune.warmup_epochs >= finetune.epochs:
        raise SettingError(
            f"finetune.warmup_epochs={finetune.warmup_epochs:g}: has to be less than finetune.epochs={finetune.epochs:g}; "
            f"set finetune.warmup_epochs={finetune.epochs / 10:g}, for example"
        )
    if finetune.crop_scale[0] > finetune.crop_scale[1]:
        raise SettingError(
            f"finetune.crop_scale={list(finetune.crop_scale)}: the first value has to be the smaller one"
        )


def check_sizes(recipe: Recipe, stored_size: int, stored_levels: int) -> None:
    """Raise SettingError where train.progressive names what cannot be trained on, out of images that are stored so."""
    sizes = recipe.train.progressive
    if not sizes:
        return
    shown = f"train.progressive={sizes}"
    if list(sizes) != sorted(sizes) or max(sizes) != recipe.encoder.image_size:
        raise SettingError(
            f"{shown}: sizes have to grow, and to end with encoder.image_size={recipe.encoder.image_size}"
        )
    if not all(sizes.values()) or abs(sum(sizes.values()) - 1) > 0.001:
        raise SettingError(f"{shown}: shares have to be above 0 and to add up to 1, not to {sum(sizes.values()):g}")
    for size in sizes:
        try:
            check_together(for_size(recipe, size, stored_size, stored_levels)[0])
        except SettingError as error:
            raise SettingError(f"{shown}: images of {size} pixels do not go with the rest; {error}") from None


def _check_side(key: str, size: int, levels: int) -> None:
    unit = 2**levels
    if size % unit:
        raise SettingError(
            f"{key}={size}: no multiple of 2^levels = {unit} (data.levels={levels}); "
            f"nearest allowed: {_nearest_multiple(size, unit)}"
        )


def check_data(data: Data) -> None:
    """Raise SettingError where settings of the shard set do not go together."""
    _check_side("data.image_size", data.image_size, data.levels)
    if data.wavelet != "haar":
        import pywt  # not needed for most commands

        known = pywt.wavelist(kind="discrete")
        if data.wavelet not in known:
            raise SettingError(
                f"data.wavelet={data.wavelet}: no discrete wavelet of PyWavelets"
                f"{nearest(data.wavelet, known, '')}; allowed are {', '.join(pywt.families(short=True)[:7])} with their "
                "orders, such as db4, sym8 or bior2.2"
            )
        if data.steps == "lossless":
            raise SettingError(
                f"data.steps=lossless: other wavelets than haar have no exact integers (data.wavelet={data.wavelet}); "
                "give steps as numbers, such as [0.5]"
            )
    if data.value_range is not None and data.value_range[0] >= data.value_range[1]:
        raise SettingError(f"data.value_range={list(data.value_range)}: the first value has to be below the second")


def _nearest_multiple(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def nearest(name: str, known: Iterable[str], otherwise: str = "; --help lists the settings") -> str:
    """Words that name the known name nearest to a mistaken one, or `otherwise`."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # a right name at a wrong place: "epochs" for "train.epochs"
        near = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean '{near[0]}'?" if near else otherwise
