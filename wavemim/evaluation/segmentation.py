"""Segmentation by a linear head on frozen tokens: fitting it, and mean IoU with its interval. Logs nothing.

Legend: n images, B images of a batch, c classes, D channels of a token, h·w tokens, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional

from wavemim.evaluation.probes import held_out

IGNORED = -1  # of a pixel that counts nowhere
DRAWS = 1000  # of the bootstrap
MOST_TO_CHOOSE = 1000  # images that rates and decays are tried on


class Tokens(Protocol):
    """Frozen tokens with the classes of their pixels, wherever they are stored."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def fetch(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Tokens of some images, a (B, D, h, w) for each block, and classes (B, S, S), int64, or IGNORED."""
        ...


def tokens_of(model: nn.Module, images: torch.Tensor, blocks: Sequence[int] | None) -> list[torch.Tensor]:
    """Patch tokens (B, D, h, w) of a timm model after each of `blocks` (or stages), counted from 1; None: all.

    They pass the model's last norm where timm applies it to intermediate features. Whatever order of axes the model
    computes in, the channels come second.
    """
    indices = None if blocks is None else [block - 1 for block in blocks]
    found: list[torch.Tensor] = model.forward_intermediates(  # type: ignore[operator]
        images, indices=indices, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return found


class LinearHead(nn.Module):
    """Tokens of each block → logits: standardised channels, one linear map, and bilinear upsampling to the pixels.

    The maps of several blocks are added on the finest of their grids, which is one linear map of the concatenation.
    It starts at zero: the loss is convex, so there is nothing to draw.
    """

    def __init__(self, means: Sequence[torch.Tensor], stds: Sequence[torch.Tensor], classes: int) -> None:
        """`means` and `stds` (D,) of each block's channels."""
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(len(mean), classes, 1, bias=not i) for i, mean in enumerate(means))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
            self.register_buffer(f"mean{i}", mean[:, None, None])
            self.register_buffer(f"std{i}", std[:, None, None])

    def forward(self, tokens: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """Logits (B, c, size, size)."""
        grid = max((tuple(values.shape[-2:]) for values in tokens), key=math.prod)
        parts = []
        for i, (linear, values) in enumerate(zip(self.maps, tokens, strict=True)):
            standard = (values.float() - self.get_buffer(f"mean{i}")) / self.get_buffer(f"std{i}")
            parts.append(_resized(linear(standard), grid))
        return _resized(torch.stack(parts).sum(0), (size, size))


def _resized(values: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    if values.shape[-2:] == size:
        return values
    return functional.interpolate(values, size=size, mode="bilinear", align_corners=False)


def pixel_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (B, c, S, S) over the pixels of truth (B, S, S) that are not IGNORED; 0 of none."""
    total = functional.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
    return total / (truth != IGNORED).sum().clamp_min(1)


@dataclass(frozen=True)
class Fitting:
    """How a head is fitted."""

    classes: int
    size: int  # pixels a side
    steps: int
    batch: int
    seed: int
    device: str = "cpu"


def statistics_of_tokens(
    data: Tokens, rows: np.ndarray, batch: int = 64
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Mean and deviation (D,) of each block's channels over all tokens of `rows`, float32."""
    sums: list[torch.Tensor] = []
    count = 0
    for part in _parts(rows, batch):
        tokens, _ = data.fetch(part)
        count += len(part)
        moments = [
            torch.stack((v.double().mean((2, 3)).sum(0), v.double().square().mean((2, 3)).sum(0))) for v in tokens
        ]
        sums = [old + new for old, new in zip(sums, moments, strict=True)] if sums else moments
    means = [total[0] / count for total in sums]
    variances = [total[1] / count - mean.square() for total, mean in zip(sums, means, strict=True)]
    return [mean.float() for mean in means], [(v.clamp_min(0).sqrt() + 1e-6).float() for v in variances]


def fit(data: Tokens, rows: np.ndarray, how: Fitting, *, lr: float, weight_decay: float) -> LinearHead:
    """A head fitted to `rows` by AdamW, its rate on a cosine from `lr` to 0; weights decay, biases do not.

    The order of images is a function of (seed, epoch). Raises FloatingPointError if the loss is not finite.
    """
    means, stds = statistics_of_tokens(data, rows)
    head = LinearHead(means, stds, how.classes).to(how.device)
    weights = [p for p in head.parameters() if p.ndim > 1]
    biases = [p for p in head.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}], lr=lr
    )
    batches = _endless(rows, how.batch, how.seed)
    schedule = CosineLRScheduler(optimizer, t_initial=how.steps, t_in_epochs=False)
    for step in range(how.steps):
        schedule.step_update(step)
        tokens, truth = _on(how.device, data.fetch(next(batches)))
        loss = pixel_loss(head(tokens, how.size), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the head's loss is not finite (lr={lr:g}, weight_decay={weight_decay:g})")
    return head.eval()


def choose(
    data: Tokens, how: Fitting, lrs: Sequence[float], weight_decays: Sequence[float]
) -> tuple[float, float, list[dict[str, float]]]:
    """The rate and decay with the best mIoU on a held-out fifth of `data`, and the mIoU of each that was tried.

    Tried on at most MOST_TO_CHOOSE images, drawn by the seed. Those whose loss is not finite lose.
    """
    candidates = [(lr, decay) for lr in lrs for decay in weight_decays]
    if len(candidates) == 1 or len(data) < 2:
        return *candidates[0], []
    drawn = np.random.default_rng(how.seed).permutation(len(data))[:MOST_TO_CHOOSE]
    out = held_out(len(drawn), how.seed)
    tried = []
    for lr, decay in candidates:
        try:
            head = fit(data, drawn[~out], how, lr=lr, weight_decay=decay)
            miou = score(head, data, drawn[out], how).miou()
        except FloatingPointError:
            miou = math.nan
        tried.append({"lr": lr, "weight_decay": decay, "miou": miou})
    best = max(tried, key=lambda entry: np.nan_to_num(entry["miou"], nan=-1.0))
    return best["lr"], best["weight_decay"], tried


@dataclass(frozen=True)
class Scores:
    """What was predicted, counted in pixels of each image and class; pixels without a class are left out."""

    confusion: np.ndarray  # int64 (c, c): true class, predicted class
    hits: np.ndarray  # int64 (n, c): of the class and predicted as it
    truth: np.ndarray  # int64 (n, c): of the class
    predicted: np.ndarray  # int64 (n, c): predicted as the class

    @classmethod
    def of(cls, truth: np.ndarray, predicted: np.ndarray, classes: int) -> Scores:
        """From classes (n, …) of pixels, IGNORED in the truth alone."""
        total = np.zeros((classes, classes), np.int64)
        counts = np.zeros((3, len(truth), classes), np.int64)
        for i, (true, found) in enumerate(zip(truth, predicted, strict=True)):
            counted = true != IGNORED
            pairs = true[counted].astype(np.int64) * classes + found[counted]
            confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
            total += confusion
            counts[:, i] = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        return cls(total, *counts)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Of several sets of images, in this order."""
        arrays = ([getattr(part, name) for part in parts] for name in ("hits", "truth", "predicted"))
        return cls(np.sum([part.confusion for part in parts], 0), *(np.concatenate(array) for array in arrays))

    def iou(self) -> np.ndarray:
        """Intersection over union of each class (c,) over all pixels; NaN of one that is neither true nor predicted."""
        return _iou(self.hits.sum(0), self.truth.sum(0), self.predicted.sum(0))

    def miou(self) -> float:
        """Mean IoU of the classes that are true or predicted somewhere, in [0, 1]; NaN where nothing counts."""
        return float(_mean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Share of pixels whose class is predicted; NaN where nothing counts."""
        total = int(self.truth.sum())
        return float(self.hits.sum()) / total if total else math.nan

    def resampled(self, seed: int, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
        """IoU of the classes (draws, c) and pixel accuracy (draws,) of images drawn anew with replacement."""
        images = len(self.hits)
        generator = np.random.default_rng(seed)
        ious, accuracies = [], []
        for _ in range(draws):
            weights = np.bincount(generator.integers(0, images, images), minlength=images)
            hits, truth, predicted = weights @ self.hits, weights @ self.truth, weights @ self.predicted
            ious.append(_iou(hits, truth, predicted))
            accuracies.append(hits.sum() / max(truth.sum(), 1))
        return np.stack(ious), np.array(accuracies)


def score(head: LinearHead, data: Tokens, rows: np.ndarray, how: Fitting) -> Scores:
    """What the head predicts of `rows`, at every pixel."""
    parts = []
    for part in _parts(rows, how.batch):
        truth = data.fetch(part)[1]
        parts.append(Scores.of(truth.numpy(), predict(head, data, part, how), how.classes))
    return Scores.joined(parts)


def predict(head: LinearHead, data: Tokens, rows: np.ndarray, how: Fitting) -> np.ndarray:
    """Predicted classes (B, S, S), int64."""
    with torch.inference_mode():
        tokens, _ = _on(how.device, data.fetch(rows))
        return head(tokens, how.size).argmax(1).cpu().numpy()


def measures(scores: Scores, seed: int) -> Iterator[tuple[str, float]]:
    """(name, value) in percent, with 95 % intervals: percentiles of a bootstrap over images.

    Pixels of an image are not independent, so an interval that counted them one by one would be far too narrow. A class
    that a draw lacks is left out of that draw's mean, as one that the set lacks is.
    """
    ious, accuracies = scores.resampled(seed)
    for name, value, drawn in (
        ("miou", scores.miou(), _mean(ious)),
        ("pixel_accuracy", scores.pixel_accuracy(), accuracies),
    ):
        low, high = interval(drawn)
        yield f"eval/segment_{name}", 100 * value
        yield f"eval/segment_{name}_low", 100 * float(low)
        yield f"eval/segment_{name}_high", 100 * float(high)


def interval(drawn: np.ndarray) -> np.ndarray:
    """The middle 95 % (2, …) of values (draws, …); NaN of what occurs in no draw."""
    filled = np.where(np.isnan(drawn).all(0), 0.0, drawn)
    found: np.ndarray = np.where(np.isnan(drawn).all(0), np.nan, np.nanquantile(filled, (0.025, 0.975), axis=0))
    return found


def _iou(hits: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    union = truth + predicted - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def _mean(ious: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    there = ~np.isnan(ious)
    count = there.sum(-1)
    return np.where(count > 0, np.where(there, ious, 0).sum(-1) / np.maximum(count, 1), np.nan)


def _parts(rows: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch]


def _endless(rows: np.ndarray, batch: int, seed: int) -> Iterator[np.ndarray]:
    epoch = 0
    while True:
        yield from _parts(np.random.default_rng((seed, epoch)).permutation(rows), batch)
        epoch += 1


def _on(device: str, fetched: tuple[list[torch.Tensor], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    tokens, truth = fetched
    return [values.to(device) for values in tokens], truth.to(device)
