"""Evaluation by semantic segmentation: plan, patch tokens in files, and fitting a head to them.

The parts run in Ray's workers, but do not use Ray themselves: decoding and encoding (functions of a batch), and fitting a
head.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.load import validate
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.left_out import counted
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.observed import Observed
from pipeline.images.pairs import Pair, Pairs, find_pairs, read_pair
from pipeline.models.encoder_source import EncoderSource, find_encoder
from pipeline.storage.folder import Folder
from wavemim.encoders.pretrained import one_line
from wavemim.evaluation.segmentation import IGNORED, Fitting, Scores, choose, fit, predict, score, tokens_of

SUBJECTS = {"trained": "trained encoder", "untrained": "same encoder, untrained"}
MOST_OPEN = 256  # open files of one split
VALUES = 2**16  # number of values that a mask can have


@dataclass(frozen=True)
class Decoding:
    """Reads and decodes image-mask pairs in batches."""

    images: Folder
    masks: Folder
    wanted: Pixels
    allowed: frozenset[int] | None  # values allowed in a mask; None for all

    def decode(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Decode a batch of B pairs.

        Args:
            batch: `row`, and the paths `image` and `mask`.

        Returns:
            `row`, `pixels` (B, C, S, S), uint8, `values` of the masks (B, S, S), uint16, and the `reason` why a pair is
            rejected, empty if it is not.
        """
        size = self.wanted.size
        count = len(batch["row"])
        pixels = np.zeros((count, self.wanted.channels, size, size), np.uint8)
        values = np.zeros((count, size, size), np.uint16)
        reasons, cropped = np.full(count, "", object), np.zeros(count)
        wanted = replace(self.wanted, observed=(observed := Observed()))
        for i, (image, mask) in enumerate(zip(batch["image"], batch["mask"], strict=True)):
            try:
                pixels[i], values[i] = read_pair(self.images, self.masks, Pair(str(image), str(mask)), wanted)
                cropped[i] = observed.cropped
                self._check(values[i])
            except RejectedImage as error:
                reasons[i] = str(error)
        return {"row": batch["row"], "pixels": pixels, "values": values, "reason": reasons, "cropped": cropped}

    def _check(self, values: np.ndarray) -> None:
        unknown = [] if self.allowed is None else sorted(set(np.unique(values).tolist()) - self.allowed)
        if unknown:
            raise RejectedImage(f"mask holds the value {unknown[0]}, not in segment.classes nor in segment.ignore")


@dataclass(frozen=True)
class Encoding:
    """Runs the trained and the untrained encoder, and writes their patch tokens to files, a batch at a time."""

    subject: EncoderSource
    folder: str  # of the files
    size: int  # side of the images in pixels
    blocks: Sequence[int]  # whose tokens are kept
    use_gpu: bool

    def encode(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the tokens of the images of a batch that are not rejected.

        Returns:
            For each row `row`, `reason`, the file `part` with its tokens (empty if rejected), its `place` in the file,
            and the number of pixels of each value of its mask, `values` (JSON).
        """
        kept = np.flatnonzero(batch["reason"] == "")
        part = uuid.uuid4().hex if len(kept) else ""
        if len(kept):
            self._write(part, batch["pixels"][kept], batch["values"][kept])
        places = np.zeros(len(batch["row"]), np.int64)
        places[kept] = np.arange(len(kept))
        return {
            "row": batch["row"],
            "reason": batch["reason"],
            "part": np.array([part if reason == "" else "" for reason in batch["reason"]], object),
            "place": places,
            "values": np.array([counted(values) for values in batch["values"]], object),
            "cropped": batch["cropped"],
        }

    def _write(self, part: str, pixels: np.ndarray, values: np.ndarray) -> None:
        """Write masks (B, S, S), and the tokens of pixels (B, C, S, S) by each encoder and block, to files."""
        if not self.use_gpu:
            torch.set_num_threads(1)
        device, folder = torch.device("cuda" if self.use_gpu else "cpu"), Path(self.folder)
        np.save(folder / f"{part}.masks.npy", values)
        limit = torch.finfo(torch.float16).max
        mean, std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (self.subject.pixel_mean, self.subject.pixel_std)
        )
        images = (torch.from_numpy(pixels).to(device).float() - mean) / std
        with torch.inference_mode():
            for name, model in _models_of(self.subject, self.size, device).items():
                for i, tokens in enumerate(tokens_of(model, images, self.blocks)):
                    half = tokens.float().clamp(-limit, limit).half()
                    np.save(folder / f"{part}.{name}-{i}.npy", half.cpu().numpy())


_models: dict[str, dict[str, nn.Module]] = {}  # the last encoders of this process, which has many batches


def _models_of(subject: EncoderSource, size: int, device: torch.device) -> dict[str, nn.Module]:
    key = f"{subject.source} {subject.fingerprint} {size}"
    if key not in _models:
        _models.clear()
        made = {"trained": subject.model(), "untrained": subject.beginning()}
        _models[key] = {name: sized(model, subject, size).to(device).eval() for name, model in made.items()}
    return _models[key]


def sized(model: nn.Module, subject: EncoderSource, size: int) -> nn.Module:
    """Adapt a model to images of this size in pixels: position embeddings for a fixed size are resampled."""
    if size != subject.image_size and hasattr(model, "set_input_size"):
        model.set_input_size((size, size))  # type: ignore[operator]
    return model


def table_of(classes: Mapping[int, int]) -> np.ndarray:
    """Map every value of a mask to its class index: (65536,), int64, IGNORED for values that are not a class."""
    table = np.full(VALUES, IGNORED, np.int64)
    table[list(classes)] = list(classes.values())
    return table


@dataclass(frozen=True)
class Row:
    """Where the tokens of an image are stored: a file, and the place in it."""

    part: str
    place: int


class StoredTokens:
    """Tokens of one encoder in memory-mapped files, written by `Encoding`; the system can evict them from memory."""

    def __init__(self, folder: str, subject: str, rows: Sequence[Row], blocks: int, classes: Mapping[int, int]) -> None:
        """`classes` maps values of masks to class indices; all other values become IGNORED."""
        self.rows, self.blocks = rows, blocks
        self._folder, self._subject = Path(folder), subject
        self._table = table_of(classes)
        self._open: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Tokens and masks of some images, as in `wavemim.evaluation.segmentation.Tokens`."""
        chosen = [self.rows[int(row)] for row in rows]
        tokens = [
            torch.from_numpy(np.stack([self._of(f"{row.part}.{self._subject}-{i}")[row.place] for row in chosen]))
            for i in range(self.blocks)
        ]
        masks = np.stack([self._of(f"{row.part}.masks")[row.place] for row in chosen])
        return tokens, torch.from_numpy(self._table[masks])

    def _of(self, name: str) -> np.ndarray:
        """An open file; the least recently used ones are closed, since the number of open files is limited."""
        values = self._open.pop(name, None)
        if values is None:
            values = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        self._open[name] = values
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open)))
        return values


@dataclass(frozen=True)
class FittedHead:
    """The result of fitting a head to the tokens of one encoder."""

    scores: Scores  # on val
    lr: float  # chosen, like the weight decay
    weight_decay: float
    tried: list[dict[str, float]]  # all combinations, with their scores
    shown: np.ndarray  # predictions (n, S, S) for the val images in the figure


def fit_head(
    train: StoredTokens,
    val: StoredTokens,
    how: Fitting,
    settings: Mapping[str, Any],
    shown: Sequence[int],
) -> FittedHead:
    """Choose the hyperparameters of a head on train, fit it, and score it on val.

    Args:
        train: Tokens and masks of train.
        val: Tokens and masks of val.
        how: How heads are fitted.
        settings: `lrs` and `weight_decays` to try.
        shown: Indices of the val images whose predictions are returned.
    """
    _models.clear()  # of the encoding that this process did before
    if how.device == "cpu":
        torch.set_num_threads(1)
    lr, weight_decay, tried = choose(train, how, settings["lrs"], settings["weight_decays"])
    head = fit(train, np.arange(len(train)), how, lr=lr, weight_decay=weight_decay)
    scores = score(head, val, np.arange(len(val)), how)
    return FittedHead(scores, lr, weight_decay, tried, predict(head, val, np.array(shown), how))


ALWAYS_ALLOWED_REJECTS = 10
# What timm and torch raise if a model does not accept the images, or has no patch tokens.
_UNSUITABLE = (
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    KeyError,
    AttributeError,
    IndexError,
    ZeroDivisionError,
)


@dataclass(frozen=True)
class SegmentPlan:
    """Everything that is decided before anything is decoded."""

    subject: EncoderSource
    pairs: Pairs
    images: Folder
    masks: Folder
    wanted: Pixels  # size and channels of the decoded images
    blocks: tuple[int, ...]  # from 1
    bytes_per_image: int  # for the tokens of both encoders and the mask
    names: tuple[str, ...] | None  # class names, from value 0 on; None for the values found in train

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.wanted.size

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """All settings and inputs that determine the result."""
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
        """Values allowed in a mask; None for all."""
        return None if self.names is None else frozenset((*range(len(self.names)), *ignore))


def plan_segmentation(recipe: Recipe) -> SegmentPlan:
    """Plan the segmentation that a recipe asks for.

    Raises:
        SettingError: A setting does not fit the images, the masks or the encoder.
        StageError: Too many files are rejected.
    """
    settings = recipe.segment
    if not settings.images or not settings.masks:
        missing = "images" if not settings.images else "masks"
        what = f"segment.{missing} is not set; give a folder of images and a folder of masks: "
        raise SettingError(f"{what}wavemim segment segment.images=FOLDER segment.masks=FOLDER")
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
    subject = find_encoder(recipe, None)
    size = settings.image_size or subject.image_size
    blocks, count = _dry_run(recipe, subject, size)
    # Encoders of this project expect the range of values of their pretraining.
    data = validate(subject.recipe).data if subject.recipe else recipe.data
    return SegmentPlan(
        subject=subject,
        pairs=pairs,
        images=Folder.at(settings.images),
        masks=Folder.at(settings.masks),
        wanted=Pixels(size, subject.channels, recipe.data.max_pixels, 1, data.value_range, data.nodata),
        blocks=blocks,
        bytes_per_image=2 * 2 * count + 2 * size**2,
        names=names,
    )


def check_rejects(recipe: Recipe, rejects: list[tuple[str, str]], inputs: int) -> None:
    """Raise StageError if more files are rejected than segment.max_rejected allows."""
    allowed = max(ALWAYS_ALLOWED_REJECTS, recipe.segment.max_rejected * inputs)
    if len(rejects) > allowed:
        shown = "; ".join(f"{path}: {reason}" for path, reason in rejects[:5])
        raise StageError(
            f"{len(rejects)} of {inputs} images and masks are rejected, segment.max_rejected="
            f"{recipe.segment.max_rejected:g} allows {int(allowed)}; raise it to continue without them. "
            f"The first: {shown}"
        )


def _names(classes: int | str | None) -> tuple[str, ...] | None:
    """Class names from value 0 on: the values themselves, or the lines of a file. Raises SettingError."""
    if classes is None:
        return None
    if isinstance(classes, int):
        if classes > VALUES:
            raise SettingError(f"segment.classes={classes}: a 16-bit mask has at most {VALUES} values")
        return tuple(str(value) for value in range(classes))
    path = Path(classes).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(
            f"segment.classes={classes}: {reason}; give the number of classes, or a text file with one name per line"
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not all(line.strip() for line in lines):
        raise SettingError(
            f"segment.classes={classes}: an empty line; give one name per line, the first for the value 0"
        )
    return tuple(line.strip() for line in lines)


def _dry_run(recipe: Recipe, subject: EncoderSource, size: int) -> tuple[tuple[int, ...], int]:
    """The blocks to use, from 1, and the number of values in their tokens of one image. Raises SettingError."""
    try:
        model = sized(subject.model(trained=False), subject, size).eval()
        with torch.inference_mode():
            tokens = tokens_of(model, torch.zeros(1, subject.channels, size, size), None)
    except _UNSUITABLE as error:
        raise SettingError(
            f"segment.image_size={size}: the encoder has no patch tokens for images of this size ({one_line(error)}); "
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
        raise SettingError(f"segment.blocks={list(blocks)}: a block is repeated")
    known: Any = getattr(model, "feature_info", None) or ()
    pixels = [int(entry["reduction"]) for entry in known] if len(known) == len(tokens) else [1] * len(tokens)
    coarsest = max(pixels[block - 1] for block in blocks)
    if size % coarsest:
        raise SettingError(
            f"segment.image_size={size}: not a multiple of the token size, {coarsest} pixels, so a margin would "
            f"be ignored; nearest allowed: {max(1, size // coarsest) * coarsest}"
        )
    return blocks, sum(tokens[block - 1][0].numel() for block in blocks)


def check_disk(plan: SegmentPlan, folder: Path) -> None:
    """Raise StageError if the tokens do not fit on the disk of `folder`."""
    images = sum(len(pairs) for pairs in plan.pairs.splits.values())
    stats = os.statvfs(folder)
    needed, free = images * plan.bytes_per_image, stats.f_bavail * stats.f_frsize
    if needed > 0.9 * free:
        raise StageError(
            f"the tokens of {images:,} images need {needed / 2**30:.1f} GiB in {folder} while heads are fitted, but "
            f"{free / 2**30:.1f} GiB are free; set segment.max_images={max(1, int(images * 0.4 * free / needed))} "
            "or fewer segment.blocks"
        )
