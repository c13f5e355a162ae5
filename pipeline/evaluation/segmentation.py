"""Tokens and masks of a segmentation set: made beside each other, kept in files, read back in any order.

What runs in Ray's workers is here, and knows no Ray: decoding (a function of a batch), encoding (an object that lives in
an actor), fitting a head (a function).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.load import validate
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.pairs import Pair, Pairs, find_pairs, read_pair
from pipeline.models.encoder_source import Subject, subject_of
from pipeline.storage.folder import Folder
from wavemim.encoders.pretrained import one_line
from wavemim.evaluation.segmentation import IGNORED, Fitting, Scores, choose, fit, predict, score, tokens_of

SUBJECTS = {"trained": "trained encoder", "untrained": "same encoder, untrained"}
MOST_OPEN = 256  # files of one split
VALUES = 2**16  # a mask's value is below


@dataclass(frozen=True)
class Decoding:
    """Reads and decodes pairs, a batch at a time."""

    images: Folder
    masks: Folder
    wanted: Pixels
    allowed: frozenset[int] | None  # values that a mask may hold; None: any

    def decode(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows with `image` and `mask` → with `pixels` (B, C, S, S), `values` (B, S, S) and a `reason`, empty if well."""
        size = self.wanted.size
        count = len(batch["row"])
        pixels = np.zeros((count, self.wanted.channels, size, size), np.uint8)
        values = np.zeros((count, size, size), np.uint16)
        reasons = [""] * count
        for i, (image, mask) in enumerate(zip(batch["image"], batch["mask"], strict=True)):
            try:
                pixels[i], values[i] = read_pair(self.images, self.masks, Pair(str(image), str(mask)), self.wanted)
                self._check(values[i])
            except RejectedImage as error:
                reasons[i] = str(error)
        return {"row": batch["row"], "pixels": pixels, "values": values, "reason": np.array(reasons, object)}

    def _check(self, values: np.ndarray) -> None:
        unknown = [] if self.allowed is None else sorted(set(np.unique(values).tolist()) - self.allowed)
        if unknown:
            raise RejectedImage(
                f"mask holds the value {unknown[0]}, which is none of segment.classes or segment.ignore"
            )


class Encoding:
    """Holds the encoders, and writes the tokens of each batch of images to files."""

    def __init__(
        self,
        subject: Subject,
        folder: str,
        size: int,
        blocks: Sequence[int],
        use_gpu: bool,
        write: Callable[[Encoding, str, np.ndarray, np.ndarray], None] | None = None,
    ) -> None:
        """`write`: the method of this name, where somebody wants to measure it."""
        if not use_gpu:
            torch.set_num_threads(1)
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.folder, self.blocks, self._write = Path(folder), blocks, write or Encoding.write
        self.models = {
            "trained": sized(subject.model(), subject, size).to(self.device).eval(),
            "untrained": sized(subject.beginning(), subject, size).to(self.device).eval(),
        }
        self.mean, self.std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (subject.pixel_mean, subject.pixel_std)
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write what is well of a batch; rows with the name of the part, the place in it, and the mask's values (JSON)."""
        kept = np.flatnonzero(batch["reason"] == "")
        part = uuid.uuid4().hex if len(kept) else ""
        if len(kept):
            self._write(self, part, batch["pixels"][kept], batch["values"][kept])
        places = np.zeros(len(batch["row"]), np.int64)
        places[kept] = np.arange(len(kept))
        return {
            "row": batch["row"],
            "reason": batch["reason"],
            "part": np.array([part if reason == "" else "" for reason in batch["reason"]], object),
            "place": places,
            "values": np.array([json.dumps(np.unique(values).tolist()) for values in batch["values"]], object),
        }

    def write(self, part: str, pixels: np.ndarray, values: np.ndarray) -> None:
        """Masks, and the tokens of each encoder and block, of one batch."""
        np.save(self.folder / f"{part}.masks.npy", values)
        limit = torch.finfo(torch.float16).max
        images = (torch.from_numpy(pixels).to(self.device).float() - self.mean) / self.std
        with torch.inference_mode():
            for name, model in self.models.items():
                for i, tokens in enumerate(tokens_of(model, images, self.blocks)):
                    half = tokens.float().clamp(-limit, limit).half()
                    np.save(self.folder / f"{part}.{name}-{i}.npy", half.cpu().numpy())


def sized(model: nn.Module, subject: Subject, size: int) -> nn.Module:
    """The model for images of this size: those that are bound to one have their positions resampled."""
    if size != subject.image_size and hasattr(model, "set_input_size"):
        model.set_input_size((size, size))  # type: ignore[operator]
    return model


def table_of(classes: Mapping[int, int]) -> np.ndarray:
    """The class's number of every value that a mask may hold, int64; IGNORED of those that are no class."""
    table = np.full(VALUES, IGNORED, np.int64)
    table[list(classes)] = list(classes.values())
    return table


@dataclass(frozen=True)
class Row:
    """Where an image's tokens are."""

    part: str
    place: int


class StoredTokens:
    """Tokens of one encoder in the files of `Encoding`, mapped into memory: what is read is the system's to forget."""

    def __init__(self, folder: str, subject: str, rows: Sequence[Row], blocks: int, classes: Mapping[int, int]) -> None:
        """`classes` are their numbers by their values in the masks; every other value is IGNORED."""
        self.rows, self.blocks = rows, blocks
        self._folder, self._subject = Path(folder), subject
        self._table = table_of(classes)
        self._open: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As `wavemim.evaluation.segmentation.Tokens` says."""
        chosen = [self.rows[int(row)] for row in rows]
        tokens = [
            torch.from_numpy(np.stack([self._of(f"{row.part}.{self._subject}-{i}")[row.place] for row in chosen]))
            for i in range(self.blocks)
        ]
        masks = np.stack([self._of(f"{row.part}.masks")[row.place] for row in chosen])
        return tokens, torch.from_numpy(self._table[masks])

    def _of(self, name: str) -> np.ndarray:
        """A file; those longest unused are closed, for a process may not have many open."""
        values = self._open.pop(name, None)
        if values is None:
            values = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        self._open[name] = values
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open)))
        return values


@dataclass(frozen=True)
class Judged:
    """What fitting a head to one encoder's tokens gave."""

    scores: Scores
    lr: float
    weight_decay: float
    tried: list[dict[str, float]]
    shown: np.ndarray  # predictions of the val images that are drawn, (n, S, S)


def judge_tokens(
    train: StoredTokens,
    val: StoredTokens,
    how: Fitting,
    settings: Mapping[str, Any],
    shown: Sequence[int],
) -> Judged:
    """Choose and fit a head on train, and score it on val."""
    if how.device == "cpu":
        torch.set_num_threads(1)
    lr, weight_decay, tried = choose(train, how, settings["lrs"], settings["weight_decays"])
    head = fit(train, np.arange(len(train)), how, lr=lr, weight_decay=weight_decay)
    scores = score(head, val, np.arange(len(val)), how)
    return Judged(scores, lr, weight_decay, tried, predict(head, val, np.array(shown), how))


ALWAYS_ALLOWED_REJECTS = 10
# What timm and torch raise where a model does not take the images, or gives no tokens.
_UNFIT = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError, IndexError, ZeroDivisionError)


@dataclass(frozen=True)
class SegmentPlan:
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


def plan_segmentation(recipe: Recipe) -> SegmentPlan:
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
    return SegmentPlan(
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


def check_disk(plan: SegmentPlan, folder: Path) -> None:
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
