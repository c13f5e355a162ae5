"""What segmentation is going to do, found out before Ray starts: the encoder, the pairs, the sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.array_decoding import Pixels
from pipeline.config import Recipe, SettingError, identity, validate
from pipeline.errors import StageError
from pipeline.segment_tokens import VALUES, sized
from pipeline.segmentation_folder import Pairs, find_pairs
from pipeline.storage import Folder
from pipeline.subjects import Subject, subject_of
from wavemim.pretrained import one_line
from wavemim.segmentation import tokens_of

ALWAYS_ALLOWED_REJECTS = 10
# What timm and torch raise where a model does not take the images, or gives no tokens.
_UNFIT = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError, IndexError, ZeroDivisionError)


@dataclass(frozen=True)
class Plan:
    """All that is settled before anything is decoded."""

    subject: Subject
    pairs: Pairs
    images: Folder
    masks: Folder
    wanted: Pixels  # what every image becomes
    blocks: tuple[int, ...]  # from 1
    bytes_per_image: int  # of the tokens of both encoders and the mask
    names: tuple[str, ...] | None  # of the classes, from value 0 on; None: the values that train holds

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.wanted.size

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """What decides the result."""
        return {
            **identity(recipe, "segment"),
            "segment.images": str(self.images),
            "segment.masks": str(self.masks),
            "segment.classes": None if self.names is None else list(self.names),
            "segment.image_size": self.size,
            "segment.blocks": list(self.blocks),
            "encoder": self.subject.fingerprint,
            "pairs": self.pairs.digest(self.images, self.masks),
        }

    def allowed(self, ignore: tuple[int, ...]) -> frozenset[int] | None:
        """Values that a mask may hold; None: any."""
        return None if self.names is None else frozenset((*range(len(self.names)), *ignore))


def plan_segmentation(recipe: Recipe) -> Plan:
    """Settle what `recipe` asks for. Raises SettingError and StageError."""
    settings = recipe.segment
    if not settings.images or not settings.masks:
        missing = "images" if not settings.images else "masks"
        raise SettingError(
            f"segment.{missing} is not set; give a folder of images and one of masks: "
            "wavemim segment segment.images=FOLDER segment.masks=FOLDER"
        )
    names = _names(settings.classes)
    pairs = find_pairs(
        settings.images,
        settings.masks,
        image_ending=settings.image_ending,
        mask_ending=settings.mask_ending,
        val_share=settings.val_share,
        max_images=settings.max_images,
        seed=recipe.seed,
    )
    check_rejects(recipe, pairs.rejects, pairs.inputs)
    subject = subject_of(recipe, None)
    size = settings.image_size or subject.image_size
    blocks, count = _dry_run(recipe, subject, size)
    # what 16-bit values mean to an encoder of ours is what they meant in its pretraining
    value_range = validate(subject.recipe).data.value_range if subject.recipe else recipe.data.value_range
    return Plan(
        subject=subject,
        pairs=pairs,
        images=Folder.at(settings.images),
        masks=Folder.at(settings.masks),
        wanted=Pixels(size, subject.channels, recipe.data.max_pixels, 1, value_range),
        blocks=blocks,
        bytes_per_image=2 * 2 * count + 2 * size**2,
        names=names,
    )


def check_rejects(recipe: Recipe, rejects: list[tuple[str, str]], inputs: int) -> None:
    """Raise StageError where more are rejected than segment.max_rejected allows."""
    allowed = max(ALWAYS_ALLOWED_REJECTS, recipe.segment.max_rejected * inputs)
    if len(rejects) > allowed:
        shown = "; ".join(f"{path}: {reason}" for path, reason in rejects[:5])
        raise StageError(
            f"{len(rejects)} of {inputs} images and masks are rejected, segment.max_rejected="
            f"{recipe.segment.max_rejected:g} allows {int(allowed)}; raise it to go on without them. The first: {shown}"
        )


def _names(classes: int | str | None) -> tuple[str, ...] | None:
    """Names of the classes from value 0 on: their numbers, or the lines of a file."""
    if classes is None:
        return None
    if isinstance(classes, int):
        if classes > VALUES:
            raise SettingError(f"segment.classes={classes}: a 16-bit mask has {VALUES} values at most")
        return tuple(str(value) for value in range(classes))
    path = Path(classes).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(
            f"segment.classes={classes}: {reason}; give a number of classes, or a text file with a name a line"
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not all(line.strip() for line in lines):
        raise SettingError(f"segment.classes={classes}: an empty line; give a name a line, the first for the value 0")
    return tuple(line.strip() for line in lines)


def _dry_run(recipe: Recipe, subject: Subject, size: int) -> tuple[tuple[int, ...], int]:
    """The blocks that are used, from 1, and how many numbers their tokens of one image are. Raises SettingError."""
    try:
        model = sized(subject.model(trained=False), subject, size).eval()
        with torch.inference_mode():
            tokens = tokens_of(model, torch.zeros(1, subject.channels, size, size), None)
    except _UNFIT as error:
        raise SettingError(
            f"segment.image_size={size}: the encoder gives no patch tokens of such images ({one_line(error)}); "
            f"it was trained on {subject.image_size} pixels"
        ) from None
    blocks = tuple(sorted(recipe.segment.blocks or (len(tokens),)))
    for block in blocks:
        if block > len(tokens):
            raise SettingError(
                f"segment.blocks={list(blocks)}: block {block} does not exist, the encoder has blocks (or stages) 1 to "
                f"{len(tokens)}"
            )
    if len(set(blocks)) < len(blocks):
        raise SettingError(f"segment.blocks={list(blocks)}: names a block twice")
    known: Any = getattr(model, "feature_info", None) or ()
    pixels = [int(entry["reduction"]) for entry in known] if len(known) == len(tokens) else [1] * len(tokens)
    coarsest = max(pixels[block - 1] for block in blocks)
    if size % coarsest:
        raise SettingError(
            f"segment.image_size={size}: no multiple of the {coarsest} pixels of a token, so a margin would not be seen; "
            f"nearest allowed: {max(1, size // coarsest) * coarsest}"
        )
    return blocks, sum(tokens[block - 1][0].numel() for block in blocks)


def check_disk(plan: Plan, folder: Path) -> None:
    """Raise StageError where the tokens do not fit on the disk."""
    images = sum(len(pairs) for pairs in plan.pairs.splits.values())
    stats = os.statvfs(folder)
    needed, free = images * plan.bytes_per_image, stats.f_bavail * stats.f_frsize
    if needed > 0.9 * free:
        raise StageError(
            f"tokens of {images:,} images take {needed / 2**30:.1f} GiB in {folder} while heads are fitted, "
            f"{free / 2**30:.1f} GiB are free; set segment.max_images={max(1, int(images * 0.4 * free / needed))} or fewer "
            "segment.blocks"
        )
