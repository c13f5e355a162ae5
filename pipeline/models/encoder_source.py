"""Encoders to evaluate or fine-tune, by where they come from: a checkpoint, timm's weights, or a folder in timm's format."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from pipeline.checkpoints.find import fetched, located
from pipeline.config.checks import named
from pipeline.config.downstream import Finetune
from pipeline.config.load import validate
from pipeline.config.places import cache_of
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.models.build import build_blank_model, build_encoder, statistics_of
from pipeline.models.timm_config import TIMM, create_arguments, fitting_size, pixel_statistics, read_config, timm_config
from pipeline.shards.shard_set import ShardSet
from pipeline.storage.object_stores import masked
from wavemim.encoders.pretrained import CONFIG, one_line
from wavemim.finetune import freeze_encoder, make_classifier, resize_input
from wavemim.inputs import Inputs
from wavemim.targets import STD_FLOOR
from wavemim.weights import checkpoint

# What timm and torch raise where a model cannot be built or does not accept the images.
_UNFIT = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError, IndexError, ZeroDivisionError)


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder comes from, and how images are prepared for it. Plain values, so that it can be sent to workers.

    Attributes:
        source: Absolute folder of a checkpoint or of a timm folder, or "timm:NAME".
        kind: "checkpoint" (of this project), "timm" (timm's own weights) or "folder" (in timm's format).
        fingerprint: SHA-256 of the weights; for timm's weights "NAME, timm VERSION".
        image_size: Pixels per side of the images that it receives.
        channels: Channels of the images.
        pixel_mean: Mean of each channel that images are normalised by, for pixels in [0, 255].
        pixel_std: Deviation of each channel that images are normalised by.
        images_seen: Images seen in pretraining; None if unknown.
        recipe: Settings it was pretrained with, for checkpoints; otherwise None.
        value_range: data.value_range of pretraining, for folders that this project exported; otherwise None.
        url: Of a checkpoint in a store: where another node than that of `source` fetches it; otherwise "".
    """

    source: str
    kind: Literal["checkpoint", "timm", "folder"]
    fingerprint: str
    image_size: int
    channels: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    images_seen: int | None
    recipe: dict[str, Any] | None
    value_range: tuple[float, float] | None = None
    url: str = ""

    def __post_init__(self) -> None:
        # A constant channel is divided by the same floor as in pretraining.
        object.__setattr__(self, "pixel_std", tuple(max(value, STD_FLOOR) for value in self.pixel_std))

    def model(self, *, trained: bool = True, seed: int = 0, **arguments: Any) -> nn.Module:
        """Build the plain timm model, without a classifier, float32, on the CPU.

        Args:
            trained: Load the weights. Otherwise the same architecture gets random ones.
            seed: Seed of everything that is drawn: random weights, and what `arguments` add, such as a classifier.
            arguments: Further arguments of ``timm.create_model``: num_classes, drop_path_rate, img_size, …. Position
                embeddings are resampled for another image size.

        Returns:
            The model.

        Raises:
            ValueError: If the model cannot be built with these arguments.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.kind == "checkpoint":
                return self._checkpoint_model(trained, arguments)
            name = self.source if self.kind == "timm" else f"local-dir:{self.source}"
            given = {**create_arguments(self._config(), self.image_size, self.channels), **arguments}
            return timm.create_model(name.removeprefix(TIMM), pretrained=trained, **given)

    @property
    def place(self) -> str:
        """Where it is for people, on whatever machine: the URL, the absolute folder, or "timm:NAME"."""
        return masked(self.url) or self.source

    @property
    def starts_pretrained(self) -> bool:
        """Whether pretraining started from the weights that its recipe names."""
        return self.recipe is not None and bool(self.recipe["encoder"]["pretrained"])

    def beginning(self) -> nn.Module:
        """Build the model as it was before pretraining: with the weights that its recipe names, otherwise random ones."""
        if self.recipe is not None and self.starts_pretrained:
            return build_encoder(validate(self.recipe), start=True).model
        return self.model(trained=False, seed=self.recipe["seed"] if self.recipe else 0)

    def inputs(self, shards: ShardSet) -> Inputs:
        """Build what turns stored coefficients into images, normalised as this encoder expects them."""
        mean, std = list(self.pixel_mean), list(self.pixel_std)
        return Inputs(
            shards.steps, replace(statistics_of(shards), pixel_mean=mean, pixel_std=std), shards.layout.wavelet
        )

    def _checkpoint_model(self, trained: bool, arguments: Mapping[str, Any]) -> nn.Module:
        assert self.recipe is not None
        recipe = validate(self.recipe)
        if trained:
            whole = build_blank_model(recipe)
            checkpoint.load_trained(self._here(), whole)
            encoder = whole.encoder
        else:
            encoder = build_encoder(recipe)
        if not arguments:
            return encoder.model
        # Loaded as timm's own weights are: the missing classifier is dropped, position embeddings are resampled.
        known: Any = encoder.model.pretrained_cfg
        weights = {
            "state_dict": encoder.model.state_dict(),
            "num_classes": 0,
            "source": "",
            "custom_load": False,
            "input_size": (self.channels, self.image_size, self.image_size),
            "classifier": known["classifier"],
            "first_conv": known["first_conv"],
        }
        given = {**encoder.arguments, **arguments}
        return timm.create_model(encoder.name, pretrained=True, pretrained_cfg_overlay=weights, **given)

    def _here(self) -> Path:
        """The checkpoint's folder on this node."""
        path = Path(self.source)
        if not self.url:
            return path
        with contextlib.suppress(OSError, checkpoint.CheckpointError):
            if _fingerprint(checkpoint.read_state(path, verify=False)["files"]) == self.fingerprint:
                return path
        return fetched(self.url, cache_of(self.url))[0]

    def _config(self) -> Mapping[str, Any]:
        """timm's description of the pretrained weights."""
        if self.kind == "folder":
            return read_config(Path(self.source))["pretrained_cfg"]
        return timm_config(self.source.removeprefix(TIMM))


def find_encoder(recipe: Recipe, shards: ShardSet | None) -> EncoderSource:
    """Find the encoder that `checkpoint=` names, or else the latest checkpoint of the run.

    timm's weights are downloaded here, which shows whether they are available and accept the images.

    Args:
        recipe: All settings.
        shards: The shard set whose images it will receive; None for images of its own size.

    Returns:
        Where the encoder comes from.

    Raises:
        SettingError: If there is no such encoder, or it does not accept the images.
        StageError: If there is no checkpoint, or timm's weights cannot be downloaded.
    """
    named = recipe.checkpoint or ""
    if named.startswith(TIMM):
        return _from_timm(named.removeprefix(TIMM), shards)
    folder = Path(named).expanduser()
    if named and (folder / CONFIG).is_file() and not (folder / checkpoint.STATE).is_file():
        return _from_folder(folder.absolute(), shards)
    path, url = located(recipe)
    return _from_checkpoint(path.absolute(), shards, url)


def _fingerprint(files: Mapping[str, str]) -> str:
    return files.get(checkpoint.AVERAGED, files[checkpoint.MODEL])


def _from_checkpoint(path: Path, shards: ShardSet | None, url: str = "") -> EncoderSource:
    state = checkpoint.read_state(path)
    files, recipe = state["files"], validate(state["recipe"])
    origin = EncoderSource(
        source=str(path),
        kind="checkpoint",
        fingerprint=_fingerprint(files),
        image_size=recipe.encoder.image_size,
        channels=recipe.data.channels,
        pixel_mean=tuple(state["pixel_mean"]),
        pixel_std=tuple(state["pixel_std"]),
        images_seen=int(state["images"]),
        recipe=recipe.dump(),
        url=url,
    )
    if shards is not None:
        _check_fits(origin, shards)
    return origin


def _check_fits(origin: EncoderSource, shards: ShardSet) -> None:
    """Raise SettingError unless a shard set has images of the size and channels that a checkpoint needs."""
    unit, size = 2**shards.levels, origin.image_size
    if size > shards.image_size or size % unit:
        raise SettingError(
            f"checkpoint={origin.place} needs images of {size} pixels, but {shards.url} stores images of "
            f"{shards.image_size} pixels in {shards.levels} levels, which allows multiples of {unit} up to "
            f"{shards.image_size}; prepare the images with data.image_size={size} and fewer data.levels"
        )
    if origin.channels != shards.channels:
        raise SettingError(
            f"checkpoint={origin.place} needs images of {origin.channels} channels, but {shards.url} stores "
            f"{shards.channels}; prepare the images with data.channels={origin.channels}"
        )


def _from_timm(name: str, shards: ShardSet | None) -> EncoderSource:
    config = timm_config(name)
    size, channels = fitting_size(config, shards), config["input_size"][0] if shards is None else shards.channels
    mean, std = pixel_statistics(config, channels, shards)
    fingerprint = f"{name}, timm {timm.__version__}"
    origin = EncoderSource(TIMM + name, "timm", fingerprint, size, channels, mean, std, None, None)
    _check_builds(origin)
    return origin


def _from_folder(folder: Path, shards: ShardSet | None) -> EncoderSource:
    content = read_config(folder)
    config = content["pretrained_cfg"]
    size, channels = fitting_size(config, shards), config["input_size"][0] if shards is None else shards.channels
    mean, std = pixel_statistics(config, channels, shards)
    about = content.get("wavemim")
    about = about if isinstance(about, dict) else {}
    limits = about.get("value_range")
    limits = tuple(map(float, limits)) if isinstance(limits, list) and len(limits) == 2 else None
    weights = checkpoint.checksum(folder / checkpoint.MODEL)
    origin = EncoderSource(
        str(folder), "folder", weights, size, channels, mean, std, about.get("images_seen"), None, limits
    )
    _check_builds(origin)
    return origin


def _check_builds(origin: EncoderSource) -> None:
    """Build the model, run it once and load its weights.

    Raises:
        SettingError: If the model does not accept the images, or the weights do not fit it.
        StageError: If timm's weights cannot be downloaded.
    """
    named = f"checkpoint={origin.place}"
    try:
        model = origin.model(trained=False)
        with torch.inference_mode():
            model.eval()(torch.zeros(1, origin.channels, origin.image_size, origin.image_size))
    except _UNFIT as error:
        raise SettingError(
            f"{named} does not accept images of {origin.channels}×{origin.image_size}×{origin.image_size}: "
            f"{one_line(error)}; prepare the images with another data.image_size"
        ) from None
    hub = logging.getLogger("huggingface_hub")  # it logs each attempt; what matters is said once, below
    level = hub.level
    try:
        hub.setLevel(logging.ERROR)
        origin.model()
    except Exception as error:  # the hub, the network and timm raise many kinds
        if origin.kind == "folder" or "loading state_dict" in str(error):
            raise SettingError(f"{named}: the weights do not fit the model: {one_line(error)}") from None
        raise StageError(
            f"{named}: timm's weights cannot be downloaded ({one_line(error)}); download them on a machine with network "
            "access into the folder that HF_HOME names, or give a folder in timm's format as checkpoint="
        ) from None
    finally:
        hub.setLevel(level)


def check_labels(shards: ShardSet) -> list[str]:
    """Check that a shard set has the labels that fine-tuning needs.

    Args:
        shards: The shard set.

    Returns:
        Names of the classes.

    Raises:
        SettingError: If it has no labels, a single class, or no train or val images.
    """
    if shards.classes is None:
        raise SettingError(
            f"{shards.url} has no labels, which fine-tuning needs; prepare images that are sorted into folders by class, "
            "or a list with a label column (data.label_column)"
        )
    if len(shards.classes) < 2:
        raise SettingError(f"{shards.url} has the single class '{shards.classes[0]}'; fine-tuning needs at least two")
    for split in ("train", "val"):
        if not shards.rows.get(split):
            raise SettingError(
                f"{shards.url} has no {split} images, which fine-tuning needs; prepare images that are sorted into "
                "train/CLASS and val/CLASS, or with another data.val_share"
            )
    return shards.classes


def finetune_size(finetune: Finetune, origin: EncoderSource) -> int:
    """Side in pixels of the images that an encoder is fine-tuned on."""
    return finetune.image_size or origin.image_size


def build_classifier(
    finetune: Finetune, origin: EncoderSource, shards: ShardSet
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Build an encoder with a classifier for the classes of a shard set.

    Args:
        finetune: Settings of fine-tuning.
        origin: The encoder.
        shards: The shard set.

    Returns:
        The model, its name in timm, and its arguments of ``timm.create_model``.

    Raises:
        SettingError: If the shard set is not labelled, or the encoder cannot be fine-tuned with these settings.
    """
    classes = check_labels(shards)
    if finetune.rand_augment and origin.channels not in (1, 3):
        raise SettingError(
            f"finetune.rand_augment={finetune.rand_augment}: RandAugment needs images of 1 or 3 channels, "
            f"but {shards.url} stores {origin.channels}; set finetune.rand_augment=null"
        )
    size = finetune_size(finetune, origin)
    if size > shards.image_size:
        raise SettingError(
            f"finetune.image_size={size}: larger than the images of {shards.image_size} pixels that {shards.url} stores; "
            "use smaller images or store larger ones"
        )
    encoder = origin.model()
    name, arguments = _described(origin, encoder)
    try:
        model, arguments = make_classifier(
            encoder,
            name,
            arguments,
            classes=len(classes),
            drop_path=0.0 if finetune.freeze else finetune.drop_path,
            head=finetune.head,
        )
    except ValueError as error:
        raise SettingError(f"checkpoint={origin.place} cannot be fine-tuned: {error}") from None
    if size != origin.image_size:
        with named(f"finetune.image_size={size}"):
            arguments = resize_input(model, arguments, channels=origin.channels, size=size)
    if finetune.freeze:
        freeze_encoder(model)
    return model, name, arguments


def _described(origin: EncoderSource, encoder: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's name of the encoder's architecture, and the arguments that it was built with."""
    if origin.recipe is not None:
        known = build_encoder(validate(origin.recipe))
        return known.name, dict(known.arguments)
    config: Any = encoder.pretrained_cfg
    arguments: dict[str, Any] = {"in_chans": origin.channels}
    if config.get("fixed_input_size"):
        arguments["img_size"] = origin.image_size
    if origin.kind == "folder":
        own = json.loads((Path(origin.source) / CONFIG).read_text(encoding="utf-8")).get("model_args")
        arguments = {**(own or {}), **arguments}
    return str(config["architecture"]), arguments
