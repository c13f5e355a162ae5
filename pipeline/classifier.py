"""From an encoder and a labelled shard set to a classifier that can be fine-tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.build import build_encoder
from pipeline.config import SettingError, validate
from pipeline.settings_finetune import Finetune
from pipeline.shards import ShardSet
from wavemim.finetune import freeze_encoder, make_classifier
from wavemim.pretrained import CONFIG

if TYPE_CHECKING:
    from pipeline.subjects import Subject  # which loads Ray


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
