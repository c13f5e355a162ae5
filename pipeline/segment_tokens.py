"""Tokens and masks of a segmentation set: made beside each other, kept in files, read back in any order.

What runs in Ray's workers is here, and knows no Ray: decoding (a function of a batch), encoding (an object that lives in
an actor), fitting a head (a function).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.array_decoding import Pixels, RejectedImage
from pipeline.segmentation_folder import Pair, read_pair
from pipeline.storage import Folder
from pipeline.subjects import Subject
from wavemim.segmentation import IGNORED, Fitting, Scores, choose, fit, predict, score, tokens_of

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
        """As `wavemim.segmentation.Tokens` says."""
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
