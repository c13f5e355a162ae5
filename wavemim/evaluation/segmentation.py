"""Segmentation with a linear head on frozen tokens: fitting, and mean IoU with its interval. Logs nothing.

Legend: n images in all, B images of a batch, c classes, D channels of a token, h·w tokens, S pixels per side.
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

IGNORED = -1  # class of a pixel that is ignored everywhere
DRAWS = 1000  # bootstrap samples
MOST_TO_CHOOSE = 1000  # images, at most, on which learning rates and weight decays are tried


class Tokens(Protocol):
    """Frozen tokens with the classes of the pixels, wherever they are stored."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def fetch(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the tokens (B, D, h, w) of some images for each block, and classes (B, S, S), int64, or IGNORED."""
        ...


def tokens_of(model: nn.Module, images: torch.Tensor, blocks: Sequence[int] | None) -> list[torch.Tensor]:
    """Compute patch tokens of a timm model.

    They go through the model's final norm if timm applies it to intermediate features.

    Args:
        model: A timm model with ``forward_intermediates``.
        images: Normalised images (B, C, H, W).
        blocks: Blocks (or stages), counted from 1; None: all.

    Returns:
        Tokens (B, D, h, w) after each block.
    """
    indices = None if blocks is None else [block - 1 for block in blocks]
    found: list[torch.Tensor] = model.forward_intermediates(  # type: ignore[operator]
        images, indices=indices, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return found


class LinearHead(nn.Module):
    """Linear classifier of tokens: standardised channels, one linear map, bilinear upsampling to pixels.

    The logits of several blocks are added on the finest of their grids, which equals one linear map of the
    concatenation. Weights start at zero: the loss is convex.
    """

    def __init__(self, means: Sequence[torch.Tensor], stds: Sequence[torch.Tensor], classes: int) -> None:
        """Create the head.

        Args:
            means: Mean (D,) of each block's channels.
            stds: Standard deviation (D,) of each block's channels.
            classes: c.
        """
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(len(mean), classes, 1, bias=not i) for i, mean in enumerate(means))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
            self.register_buffer(f"mean{i}", mean[:, None, None])
            self.register_buffer(f"std{i}", std[:, None, None])

    def forward(self, tokens: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """Return logits (B, c, size, size) of each block's tokens (B, D, h, w)."""
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
    """Compute the mean cross-entropy over the pixels that are not ignored.

    Args:
        logits: (B, c, S, S).
        truth: Classes (B, S, S), int64, or IGNORED.

    Returns:
        The loss (), 0 if all pixels are ignored.
    """
    total = functional.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
    return total / (truth != IGNORED).sum().clamp_min(1)


@dataclass(frozen=True)
class Fitting:
    """How a head is fitted."""

    classes: int
    size: int  # S, pixels per side
    steps: int
    batch: int
    seed: int
    device: str = "cpu"


def statistics_of_tokens(
    data: Tokens, rows: np.ndarray, batch: int = 64
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compute statistics of each block's channels over all tokens.

    Args:
        data: Tokens and classes.
        rows: The images to use.
        batch: Images per read.

    Returns:
        Means and standard deviations: a float32 (D,) per block each.
    """
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
    """Fit a head with AdamW. The order of images is a function of (seed, epoch).

    Args:
        data: Tokens and classes.
        rows: The images to fit to.
        how: Steps, batch size, seed and device.
        lr: Initial learning rate; it falls to 0 along a cosine.
        weight_decay: Weight decay of weights; biases have none.

    Returns:
        The head, in evaluation mode.

    Raises:
        FloatingPointError: If the loss is not finite at the end.
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
    """Choose the learning rate and weight decay with the best mIoU on a held-out fifth of `data`.

    At most MOST_TO_CHOOSE images are used, drawn by the seed. A pair whose loss is not finite is never preferred.

    Args:
        data: Tokens and classes of the training images.
        how: How heads are fitted.
        lrs: Learning rates to try.
        weight_decays: Weight decays to try.

    Returns:
        The learning rate, the weight decay, and {lr, weight_decay, miou} of each pair that was tried.
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
    """Pixel counts of predictions, per image and class. Ignored pixels are not counted.

    Attributes:
        confusion: int64 (c, c): true class, predicted class.
        hits: int64 (n, c): pixels of the class that are predicted as it.
        truth: int64 (n, c): pixels of the class.
        predicted: int64 (n, c): pixels predicted as the class.
    """

    confusion: np.ndarray
    hits: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, predicted: np.ndarray, classes: int) -> Scores:
        """Count pixels.

        Args:
            truth: True classes (n, …), or IGNORED.
            predicted: Predicted classes (n, …).
            classes: c.

        Returns:
            The counts.
        """
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
        """Concatenate the scores of several sets of images."""
        arrays = ([getattr(part, name) for part in parts] for name in ("hits", "truth", "predicted"))
        return cls(np.sum([part.confusion for part in parts], 0), *(np.concatenate(array) for array in arrays))

    def iou(self) -> np.ndarray:
        """Return intersection over union (c,) over all pixels; NaN for a class that is neither true nor predicted."""
        return _iou(self.hits.sum(0), self.truth.sum(0), self.predicted.sum(0))

    def miou(self) -> float:
        """Return the mean IoU, in [0, 1], of the classes that are true or predicted anywhere; NaN if none is."""
        return float(_mean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Return the fraction of pixels that are predicted correctly; NaN if all are ignored."""
        total = int(self.truth.sum())
        return float(self.hits.sum()) / total if total else math.nan

    def resampled(self, seed: int, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
        """Return IoU (draws, c) and pixel accuracy (draws,) of bootstrap samples of the images."""
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
    """Evaluate the predictions of a head at every pixel.

    Args:
        head: The head.
        data: Tokens and classes.
        rows: The images to use.
        how: Size, batch size and device.

    Returns:
        The counts of these images.
    """
    parts = []
    for part in _parts(rows, how.batch):
        truth = data.fetch(part)[1]
        parts.append(Scores.of(truth.numpy(), predict(head, data, part, how), how.classes))
    return Scores.joined(parts)


def predict(head: LinearHead, data: Tokens, rows: np.ndarray, how: Fitting) -> np.ndarray:
    """Predict the classes of pixels.

    Args:
        head: The head.
        data: Tokens.
        rows: The images (B,).
        how: Size and device.

    Returns:
        int64 (B, S, S).
    """
    with torch.inference_mode():
        tokens, _ = _on(how.device, data.fetch(rows))
        return head(tokens, how.size).argmax(1).cpu().numpy()


def measures(scores: Scores, seed: int) -> Iterator[tuple[str, float]]:
    """Yield mIoU and pixel accuracy in percent with 95 % intervals, the percentiles of a bootstrap over images.

    Pixels of an image are not independent: an interval that treats them so would be far too narrow. A class that a
    bootstrap sample lacks does not count in that sample's mean.

    Args:
        scores: Counts of the test images.
        seed: Of the bootstrap.

    Yields:
        (metric, value).
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
    """Return the central 95 % interval (2, …) of values (draws, …); NaN where no draw has a value."""
    filled = np.where(np.isnan(drawn).all(0), 0.0, drawn)
    found: np.ndarray = np.where(np.isnan(drawn).all(0), np.nan, np.nanquantile(filled, (0.025, 0.975), axis=0))
    return found


def _iou(hits: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    union = truth + predicted - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def _mean(ious: np.ndarray) -> np.ndarray:
    """Mean over the last axis, ignoring NaN; NaN if nothing is left."""
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
