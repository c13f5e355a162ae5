"""Encoders to be judged, by where they come from: a checkpoint of ours, timm's own weights, a folder in timm's format."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from pipeline.checkpoints.find import checkpoint_of
from pipeline.config.downstream import Finetune
from pipeline.config.load import validate
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.models.build import build_blank_model, build_encoder, statistics_of
from pipeline.shards.shard_set import ShardSet
from wavemim.encoders.base import check_name
from wavemim.encoders.pretrained import CONFIG, one_line
from wavemim.finetune import freeze_encoder, make_classifier
from wavemim.inputs import Inputs
from wavemim.targets import STD_FLOOR
from wavemim.weights import checkpoint

if TYPE_CHECKING:
    pass  # which loads Ray

TIMM = "timm:"  # of checkpoint=timm:NAME
# What timm and torch raise where a model cannot be built or does not take the images.
_UNFIT = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError, IndexError, ZeroDivisionError)


@dataclass(frozen=True)
class Subject:
    """An encoder to be judged: plain values, so that it travels to Ray workers."""

    source: str  # absolute folder of a checkpoint of ours | "timm:NAME" | absolute folder in timm's format
    kind: str  # "checkpoint" | "timm" | "folder"
    fingerprint: str  # SHA-256 of the weights; of timm's: "NAME, timm VERSION"
    image_size: int  # pixels a side that it is given
    channels: int
    pixel_mean: tuple[float, ...]  # of pixels in [0, 255], as is pixel_std: what images are normalised by
    pixel_std: tuple[float, ...]
    images_seen: int | None  # in pretraining; None where it is not known
    recipe: dict[str, Any] | None  # settings it was pretrained with, of a checkpoint of ours
    value_range: tuple[float, float] | None = None  # data.value_range of pretraining, of a folder of ours

    def __post_init__(self) -> None:
        # A channel that never varies: divided by what pretraining divided it by.
        object.__setattr__(self, "pixel_std", tuple(max(value, STD_FLOOR) for value in self.pixel_std))

    def model(self, *, trained: bool = True, seed: int = 0, **arguments: Any) -> nn.Module:
        """The plain timm model, without a classifier, float32, on the CPU.

        With `trained=False` the same architecture with fresh weights, drawn from `seed`. `arguments` are further ones
        of ``timm.create_model`` (num_classes, drop_path_rate, img_size, …): what they add, such as a classifier, is
        drawn from `seed`, and positions are resampled. Raises ValueError where the model cannot be built so.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.kind == "checkpoint":
                return self._of_checkpoint(trained, arguments)
            name = self.source if self.kind == "timm" else f"local-dir:{self.source}"
            given = {**_arguments(self._config(), self.image_size, self.channels), **arguments}
            return timm.create_model(name.removeprefix(TIMM), pretrained=trained, **given)

    @property
    def starts_pretrained(self) -> bool:
        """Whether pretraining began with weights that its recipe names."""
        return self.recipe is not None and bool(self.recipe["encoder"]["pretrained"])

    def beginning(self) -> nn.Module:
        """As `model`, as pretraining began: with the weights that its recipe names, otherwise with fresh ones."""
        if self.recipe is not None and self.starts_pretrained:
            return build_encoder(validate(self.recipe), start=True).model
        return self.model(trained=False, seed=self.recipe["seed"] if self.recipe else 0)

    def inputs(self, shards: ShardSet) -> Inputs:
        """From stored coefficients to images normalised as this encoder expects them."""
        mean, std = list(self.pixel_mean), list(self.pixel_std)
        return Inputs(
            shards.steps, replace(statistics_of(shards), pixel_mean=mean, pixel_std=std), shards.layout.wavelet
        )

    def _of_checkpoint(self, trained: bool, arguments: Mapping[str, Any]) -> nn.Module:
        assert self.recipe is not None
        recipe = validate(self.recipe)
        if trained:
            whole = build_blank_model(recipe)
            checkpoint.load_trained(Path(self.source), whole)
            encoder = whole.encoder
        else:
            encoder = build_encoder(recipe)
        if not arguments:
            return encoder.model
        # timm drops the missing classifier and resamples positions as it does with weights of its own
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

    def _config(self) -> Mapping[str, Any]:
        """timm's description of the pretrained weights."""
        if self.kind == "folder":
            return _read_config(Path(self.source))["pretrained_cfg"]
        return _timm_config(self.source.removeprefix(TIMM))


def subject_of(recipe: Recipe, shards: ShardSet | None) -> Subject:
    """The encoder that `checkpoint=` names, or the last checkpoint of the run, for judging on `shards`.

    Weights of timm's are fetched here, so that it is known that they can be had and take the images. Raises
    SettingError and StageError.
    """
    named = recipe.checkpoint or ""
    if named.startswith(TIMM):
        return _of_timm(named.removeprefix(TIMM), shards)
    folder = Path(named).expanduser()
    if named and (folder / CONFIG).is_file() and not (folder / checkpoint.STATE).is_file():
        return _of_folder(folder.absolute(), shards)
    return _of_ours(checkpoint_of(recipe).absolute(), shards)


def _of_ours(path: Path, shards: ShardSet | None) -> Subject:
    state = checkpoint.read_state(path)
    files, recipe = state["files"], validate(state["recipe"])
    subject = Subject(
        source=str(path),
        kind="checkpoint",
        fingerprint=files.get(checkpoint.AVERAGED, files[checkpoint.MODEL]),
        image_size=recipe.encoder.image_size,
        channels=recipe.data.channels,
        pixel_mean=tuple(state["pixel_mean"]),
        pixel_std=tuple(state["pixel_std"]),
        images_seen=int(state["images"]),
        recipe=recipe.dump(),
    )
    if shards is not None:
        _check_fits(subject, shards)
    return subject


def _check_fits(subject: Subject, shards: ShardSet) -> None:
    """Raise SettingError where a shard set has no images of the size and channels of a checkpoint of ours."""
    unit, size = 2**shards.levels, subject.image_size
    if size > shards.image_size or size % unit:
        raise SettingError(
            f"checkpoint={subject.source} takes images of {size} pixels, {shards.url} stores images of "
            f"{shards.image_size} pixels in {shards.levels} levels: allowed are multiples of {unit} up to "
            f"{shards.image_size}; prepare the images with data.image_size={size} and fewer data.levels"
        )
    if subject.channels != shards.channels:
        raise SettingError(
            f"checkpoint={subject.source} takes images of {subject.channels} channels, {shards.url} stores "
            f"{shards.channels}; prepare the images with data.channels={subject.channels}"
        )


def _of_timm(name: str, shards: ShardSet | None) -> Subject:
    config = _timm_config(name)
    size, channels = _size(config, shards), config["input_size"][0] if shards is None else shards.channels
    mean, std = _pixels(config, channels, shards)
    fingerprint = f"{name}, timm {timm.__version__}"
    subject = Subject(TIMM + name, "timm", fingerprint, size, channels, mean, std, None, None)
    _check_builds(subject)
    return subject


def _of_folder(folder: Path, shards: ShardSet | None) -> Subject:
    content = _read_config(folder)
    config = content["pretrained_cfg"]
    size, channels = _size(config, shards), config["input_size"][0] if shards is None else shards.channels
    mean, std = _pixels(config, channels, shards)
    about = content.get("wavemim")
    about = about if isinstance(about, dict) else {}
    limits = about.get("value_range")
    limits = tuple(map(float, limits)) if isinstance(limits, list) and len(limits) == 2 else None
    weights = checkpoint.checksum(folder / checkpoint.MODEL)
    subject = Subject(str(folder), "folder", weights, size, channels, mean, std, about.get("images_seen"), None, limits)
    _check_builds(subject)
    return subject


def _timm_config(name: str) -> dict[str, Any]:
    """timm's description of its weights of this name. Raises SettingError."""
    try:
        check_name(name)
    except ValueError as error:
        raise SettingError(f"checkpoint={TIMM}{name}: {str(error).removeprefix('encoder.name: ')}") from None
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        config = None
    if config is None or not config.has_weights:
        tags = timm.list_pretrained(name.partition(".")[0] + ".*")
        hint = f"; it has {', '.join(tags[:4])}" if tags else ""
        raise SettingError(f"checkpoint={TIMM}{name}: timm has no weights of this name{hint}")
    return config.to_dict()


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in timm's format. Raises SettingError."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        described = content["pretrained_cfg"]
        values = [*described["input_size"], *described["mean"], *described["std"]]
        whole = isinstance(content["architecture"], str) and len(described["input_size"]) == 3
        whole &= all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise SettingError(
            f"checkpoint={folder}: its {CONFIG} is none of timm's, with architecture and pretrained_cfg "
            "(input_size, mean, std); give a checkpoint, timm:NAME, or a folder that wavemim export wrote"
        )
    if not (folder / checkpoint.MODEL).is_file():
        raise SettingError(f"checkpoint={folder}: lacks {checkpoint.MODEL}; other files of weights are not read")
    return dict(content)


def _size(config: Mapping[str, Any], shards: ShardSet | None) -> int:
    """Pixels a side: as the weights were trained, or less where the shard set stores less."""
    own = int(config["input_size"][-1])
    if shards is None:
        return own
    unit = 2**shards.levels
    return max(unit, min(own, shards.image_size) // unit * unit)


def _pixels(
    config: Mapping[str, Any], channels: int, shards: ShardSet | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What images are normalised by: the weights' own values, for grey images their mean, otherwise the shard set's."""
    mean, std = ([255.0 * float(value) for value in config[key]] for key in ("mean", "std"))
    if channels == 1:
        mean, std = [math.fsum(mean) / len(mean)], [math.fsum(std) / len(std)]
    if len(mean) != channels:
        if shards is None:
            raise SettingError(f"the encoder's config names {len(mean)} pixel means for {channels} channels")
        mean, std = shards.pixel_mean, shards.pixel_std
    return tuple(mean), tuple(std)


def _arguments(config: Mapping[str, Any], size: int, channels: int) -> dict[str, Any]:
    """Arguments of timm.create_model: an image size for models that take it and are bound to one."""
    sized = {"img_size": size} if config.get("fixed_input_size") else {}
    return {"num_classes": 0, "in_chans": channels, **sized}


def _check_builds(subject: Subject) -> None:
    """Fetch, load and try the weights. Raises StageError where they cannot be had, SettingError where they do not fit."""
    named = f"checkpoint={subject.source}"
    try:
        model = subject.model(trained=False)
        with torch.inference_mode():
            model.eval()(torch.zeros(1, subject.channels, subject.image_size, subject.image_size))
    except _UNFIT as error:
        raise SettingError(
            f"{named} does not take images of {subject.channels}×{subject.image_size}×{subject.image_size}: "
            f"{one_line(error)}; prepare the images in another data.image_size"
        ) from None
    hub = logging.getLogger("huggingface_hub")  # it tells of each of its tries; what counts is said once, below
    level = hub.level
    try:
        hub.setLevel(logging.ERROR)
        subject.model()
    except Exception as error:  # of the hub's, the network's and timm's own many kinds
        if subject.kind == "folder" or "loading state_dict" in str(error):
            raise SettingError(f"{named}: the weights do not fit the model: {one_line(error)}") from None
        raise StageError(
            f"{named}: timm's weights cannot be had ({one_line(error)}); fetch them where there is a network into "
            "the folder that HF_HOME names, or give a folder in timm's format as checkpoint="
        ) from None
    finally:
        hub.setLevel(level)


def check_labels(shards: ShardSet) -> list[str]:
    """Names of the classes. Raises SettingError where a shard set is not one to fine-tune on."""
    if shards.classes is None:
        raise SettingError(
            f"{shards.url} has no labels of two or more classes, which fine-tuning needs; prepare images that are sorted "
            "into folders by class, or a list with a column of labels (data.label_column)"
        )
    if len(shards.classes) < 2:
        raise SettingError(f"{shards.url} has the single class '{shards.classes[0]}'; fine-tuning needs two at least")
    for split in ("train", "val"):
        if not shards.rows.get(split):
            raise SettingError(
                f"{shards.url} has no {split} images, which fine-tuning needs; prepare images that are sorted into "
                "train/CLASS and val/CLASS, or with another data.val_share"
            )
    return shards.classes


def build_classifier(finetune: Finetune, subject: Subject, shards: ShardSet) -> tuple[nn.Module, str, dict[str, Any]]:
    """The encoder with a head for the classes of `shards`; its name and arguments in timm. Raises SettingError."""
    classes = check_labels(shards)
    if finetune.rand_augment and subject.channels not in (1, 3):
        raise SettingError(
            f"finetune.rand_augment={finetune.rand_augment}: works on images of 1 or 3 channels, "
            f"{shards.url} stores {subject.channels}; set finetune.rand_augment=null"
        )
    encoder = subject.model()
    name, arguments = _described(subject, encoder)
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
        raise SettingError(f"checkpoint={subject.source} cannot be fine-tuned: {error}") from None
    if finetune.freeze:
        freeze_encoder(model)
    return model, name, arguments


def _described(subject: Subject, encoder: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's name of the encoder's architecture, and the arguments that it was made with."""
    if subject.recipe is not None:
        known = build_encoder(validate(subject.recipe))
        return known.name, dict(known.arguments)
    config: Any = encoder.pretrained_cfg
    arguments: dict[str, Any] = {"in_chans": subject.channels}
    if config.get("fixed_input_size"):
        arguments["img_size"] = subject.image_size
    if subject.kind == "folder":
        own = json.loads((Path(subject.source) / CONFIG).read_text(encoding="utf-8")).get("model_args")
        arguments = {**(own or {}), **arguments}
    return str(config["architecture"]), arguments
