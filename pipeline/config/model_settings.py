"""Settings of the model: encoder, target, decoder and masks; type, range, default and meaning of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.behaviour import setting
from pipeline.config.settings import Positive, Section, Share, number_like
from wavemim import registry

Bands = Annotated[str, Field(pattern="^A?H?V?D?$", min_length=1)]


def _options(value: Any) -> Any:
    """Arguments of timm by name. Texts such as 1e-5 become numbers; null is refused, since timm would silently drop it."""
    if not isinstance(value, dict):
        return value
    for key, inner in value.items():
        if inner is None:
            raise ValueError(f"{key} has no value; give it one after a colon and a space, such as {{reg_tokens: 4}}")
    return {key: number_like(inner) if isinstance(inner, str) else inner for key, inner in value.items()}


def _tilt(value: Any) -> Any:
    """A tilt, or a schedule of tilts as floats by floats."""
    if isinstance(value, str):
        value = number_like(value)
    if value is None:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= 4:  # NaN is refused too
            raise ValueError("must be from -4 to 4")
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError("must be a number, or {share of training: tilt} such as {0: 0, 1: 1}")
    points = {number_like(str(at)): number_like(str(tilt)) for at, tilt in value.items()}
    if any(isinstance(number, str) for point in points.items() for number in point):
        raise ValueError("must be a number, or {share of training: tilt} such as {0: 0, 1: 1}")
    if any(not 0 <= at <= 1 for at in points) or any(not abs(tilt) <= 4 for tilt in points.values()):
        raise ValueError("shares of training are from 0 to 1, tilts from -4 to 4")
    return points


Tilt = Annotated[float | dict[float, float] | None, BeforeValidator(_tilt)]


class Encoder(Section):
    """The backbone, a timm model."""

    name: str = setting(
        "vit_base_patch16_224",
        "Name of the timm model: a plain ViT, or a backbone with stages whose tokens cover 4, 8, 16 and 32 pixels.",
    )
    image_size: Positive = setting(
        224, "Side of the training images in pixels. Must be a multiple of encoder.patch_size and of 2^data.levels."
    )
    patch_size: Positive | None = setting(
        16, "Side of a patch in pixels. null: that of the timm model. Plain ViTs only.", vit_only=True
    )
    width: Positive | None = setting(
        None, "Embedding width. null: that of the timm model. Plain ViTs only.", vit_only=True
    )
    depth: Positive | None = setting(
        None, "Number of transformer blocks. null: that of the timm model. Plain ViTs only.", vit_only=True
    )
    heads: Positive | None = setting(
        None, "Number of attention heads. null: that of the timm model. Plain ViTs only.", vit_only=True
    )
    class_token: bool = setting(True, "Whether there is a class token. Plain ViTs only.", vit_only=True)
    positions: Literal["sincos", "learned"] = setting(
        "sincos", "Position embeddings: fixed sine-cosine, or learned. Plain ViTs only.", vit_only=True
    )
    init: Literal["timm", "mae", "beit"] = setting(
        "timm",
        "How random initial weights are drawn. timm: as the timm model does. mae: as in MAE and LocalMIM, Xavier's uniform "
        "rule. beit: as in BEiT and MFM, a truncated normal distribution, smaller towards the last block. No effect with "
        "encoder.pretrained. Plain ViTs only.",
        vit_only=True,
        added=True,
    )
    sees: Literal["auto", "visible", "masked"] = setting(
        "auto",
        "How the encoder treats hidden patches. visible: they are dropped (plain ViTs only). masked: they are replaced by "
        "a learned mask token. auto: visible for plain ViTs, masked for other backbones.",
    )
    pretrained: Annotated[bool | str, BeforeValidator(lambda value: False if value is None else value)] = setting(
        False,
        "Initial weights: false for random ones, true for timm's pretrained weights of this model, or the path of a "
        "folder in timm's format or of a .safetensors file.",
        place=True,
    )
    options: Annotated[dict[str, Any], BeforeValidator(_options)] = setting(
        {}, "Further arguments of timm.create_model, such as {reg_tokens: 4} or {window_size: 6}."
    )


class Target(Section):
    """The prediction target of each tap. Mappings have levels as keys: level n has cells of 2^n pixels, 1 is the finest."""

    kind: str = setting(
        "wavelet",
        "Prediction target: wavelet (coefficients), pixels, hog (histograms of oriented gradients) or fourier (the spectrum); "
        "or a target of your own by its registered name.",
    )
    module: str | None = setting(
        None,
        "Python file, or module, that registers a target of your own. null: none.",
        operational=True,
        place=True,
    )
    options: Annotated[dict[str, Any], BeforeValidator(_options)] = setting(
        {}, "Further arguments of the target's class, such as {signed: true} for hog.", added=True
    )
    taps: dict[Annotated[int, Field(ge=0)], Positive] = setting(
        {2: 2, 3: 4, 4: 10, 5: 12},
        "For each level, the encoder block or stage (counted from 1) that predicts it. Level 0 is the patch itself "
        "(pixels and fourier only).",
        min_length=1,
    )
    weights: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]] = setting(
        {}, "For each level, the weight of its loss in the sum. Levels that are not named weigh 1.", resumable=True
    )
    weighting: Literal["fixed", "coarse_to_fine", "fine_to_coarse", "learned"] = setting(
        "fixed",
        "fixed: target.weights hold throughout. coarse_to_fine, fine_to_coarse: levels are phased in over training in this "
        "order. learned: weighted by learned uncertainty.",
    )
    tilt: Tilt = setting(
        None,
        "Tilt of the weights between coarse and fine levels: each is in addition multiplied by the level's share of the "
        "predicted coefficients to this power, scaled so that these factors sum to 1. 0: all levels weigh the same. 1: as in "
        "a loss on pixels. Above 1: finer than pixels. A mapping such as {0: 0, 1: 1} makes a schedule: share of training "
        "that is done to tilt, linear in between. null: no tilt, the factors are 1. Targets with bands only.",
        resumable=True,
        added=True,
    )
    bands: dict[Positive, Bands] = setting(
        {},
        "wavelet: for each level, the predicted bands out of A, H, V and D. Levels that are not named: AHVD at the coarsest "
        "tap, HVD elsewhere.",
    )
    normalise: Literal["dataset", "patch", "contrast", "none"] = setting(
        "patch",
        "How targets are normalised. dataset: by the shard set's statistics. patch: by each patch's own mean and deviation "
        "(hog: per cell). contrast (wavelet only): by the mean and deviation of each patch's pixels. none: not at all.",
    )
    band_scale: Literal["auto", "kept", "erased"] = setting(
        "auto",
        "wavelet: the scale between levels and bands. kept: that of the images. erased: each level, band and channel in units "
        "of its standard deviation over the shard set. auto: erased for target.normalise=dataset and patch, kept for contrast "
        "and none.",
        added=True,
    )
    loss: Literal["l2", "l1", "smooth_l1"] = setting("l2", "Loss of each predicted value. Not for fourier.")
    source: Literal["stored", "device"] = setting(
        "stored", "wavelet: use the stored coefficients, or compute them from the images on the training device."
    )
    bins: Literal[9, 18] = setting(9, "hog: number of orientation bins, 9 unsigned or 18 signed.")
    gamma: float = setting(1.0, "fourier: exponent of the distance between spectra.", gt=0, le=4)
    focal: float = setting(
        0.0, "fourier: exponent of the focal weight of large errors. 0: no focal weight.", ge=0, le=4
    )
    average: Literal["image", "frequency"] = setting(
        "image",
        "fourier with mask.kind=frequency: what weighs the same in the loss. image: every image, by the mean over its removed "
        "frequencies. frequency: every removed frequency of all images, as in MFM.",
        added=True,
    )

    @property
    def predicts_bands(self) -> bool:
        """Whether taps predict bands of wavelet levels: `wavelet`, and custom targets that declare it."""
        return registry.predicts_bands(self.kind, self.module)


class Decoder(Section):
    """The light decoder of each tap."""

    width: Positive = setting(256, "Embedding width. Must be a multiple of 4 and of decoder.heads.")
    depth: int = setting(
        1, "Number of transformer blocks. 0: a linear decoder, for encoders that see mask tokens.", ge=0
    )
    heads: Positive = setting(8, "Number of attention heads.")
    attention: Literal["self", "cross"] = setting(
        "self", "self: attention among all tokens. cross: from the predicted positions to the encoder's tokens only."
    )
    shared: bool = setting(False, "Use the same transformer blocks for all taps.")
    predict: float = setting(1.0, "Share of the hidden positions that is predicted in each step.", gt=0, le=1)
    per: Literal["tap", "block"] = setting(
        "tap",
        "tap: each tap has a decoder. block: taps at the same block share one decoder and have a linear head each; taps whose "
        "positions differ share only with decoder.attention=self and decoder.predict=1.",
        added=True,
    )


class Mask(Section):
    """What is hidden from the encoder."""

    kind: Literal["random", "block", "energy", "frequency"] = setting(
        "random",
        "random: patches at random. block: larger blocks at random. energy: patches drawn by their wavelet energy. "
        "frequency: a part of the image's spectrum.",
    )
    ratio: float = setting(0.75, "Share of the image that is hidden. Not for frequency.", gt=0, lt=1, resumable=True)
    count: Positive = setting(
        1,
        "Masks for each image that is read. The network computes each image with all of them, which takes that many times the "
        "computation and memory; the target is computed once. What they leave visible is disjoint as far as possible, "
        "except for energy. frequency: at most 2.",
        resumable=True,
        added=True,
    )
    unit: Positive | None = setting(
        None,
        "Side in pixels of the squares that are hidden as a whole. null: a patch; 32 for mask.kind=block and for backbones "
        "with stages.",
    )
    strength: float = setting(
        1.0,
        "energy: exponent of the energy. Above 0, regions with more detail are hidden more often; below 0, less often.",
        ge=-10,
        le=10,
    )
    radius: float = setting(16, "frequency: radius of the circle in the spectrum, in cycles per image.", gt=0)
    low_pass_share: Share = setting(
        0.5, "frequency: share of images that keep only the frequencies inside the circle; the others keep the rest."
    )
