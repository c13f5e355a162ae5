"""What an encoder is worth, by protocol: each gives names, numbers and predictions, and logs nothing.

Names: ``eval/PROTOCOL_top1`` in percent, with ``_low`` and ``_high`` (95 % Wilson interval over the test images) and
``_n`` (how many those are). Strengths, learning rates and the best block are chosen on a held-out fifth of train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wavemim.evaluation.attentive import fit_attentive
from wavemim.evaluation.features import Taps, extract_taps
from wavemim.evaluation.metrics import Accuracy, alpha_req, rankme
from wavemim.evaluation.probes import (
    CURVE,
    ITERATIONS,
    Set,
    few_labels,
    fit_probe,
    held_out,
    knn,
    knn_predictions,
    linear_probe,
)

__all__ = ["Accuracy", "alpha_req", "extract", "held_out", "knn", "linear_probe", "rankme"]

RANK_IMAGES = 10_000  # more would not change the spectrum, and take minutes


@dataclass(frozen=True)
class Judgement:
    """What a protocol came to."""

    values: dict[str, float]
    predicted: np.ndarray | None = None  # classes of the test images, where there is one prediction an image


def extract(
    encode: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Set:
    """Features (n, F) float32 and labels (n,) from batches of normalised images (B, C, H, W) and labels (B,)."""
    return extract_taps(Taps(encode, blocks=False, tokens=False), batches).set


def judge_linear(
    train: Set, test: Set, *, strengths: Sequence[float], seed: int, max_iterations: int = ITERATIONS
) -> Judgement:
    """Linear probe of the model's own features."""
    probe = fit_probe(train, test[0], strengths=strengths, seed=seed, max_iterations=max_iterations)
    values = Accuracy.of(probe.predicted == test[1]).named("eval/linear_top1")
    values |= {"eval/linear_strength": probe.strength, "eval/linear_converged": float(probe.converged)}
    return Judgement(values, probe.predicted)


def judge_block(
    train: Set, test: Set, *, number: int, strengths: Sequence[float], seed: int, max_iterations: int = ITERATIONS
) -> Judgement:
    """Linear probe of the pooled patch tokens of a block, and its accuracy on the held-out part of train."""
    probe = fit_probe(train, test[0], strengths=strengths, seed=seed, max_iterations=max_iterations, compare=True)
    values = Accuracy.of(probe.predicted == test[1]).named(f"eval/linear_top1_block{number}")
    values[f"eval/linear_heldout_block{number}"] = probe.held_out
    values[f"eval/linear_converged_block{number}"] = float(probe.converged)
    return Judgement(values, probe.predicted)


def best_block(values: Mapping[str, float]) -> dict[str, float]:
    """The block that is best on the held-out part of train, the deepest of equals; {} where blocks were not judged."""
    start = "eval/linear_heldout_block"
    scores = [(score, int(name.removeprefix(start))) for name, score in values.items() if name.startswith(start)]
    return {"eval/best_block": float(max(scores)[1])} if scores else {}


def judge_knn(train: Set, test: Set, *, k: int, curve: Sequence[int] = CURVE) -> Judgement:
    """kNN at `k`, and its accuracy at every k of the curve that train has images for (``eval/knn_top1_kN``)."""
    ks = sorted({k, *(other for other in curve if other <= len(train[1]))})
    predicted = knn_predictions(train, test[0], ks=ks)
    values = Accuracy.of(predicted[k] == test[1]).named("eval/knn_top1")
    for other in ks:
        values |= Accuracy.of(predicted[other] == test[1]).named(f"eval/knn_top1_k{other}")
    return Judgement(values, predicted[k])


def judge_few_labels(
    train: Set,
    test: Set,
    *,
    shares: Sequence[float],
    draws: int,
    strengths: Sequence[float],
    seed: int,
    max_iterations: int = ITERATIONS,
) -> Judgement:
    """Linear probes on a share of the train labels, drawn class by class: ``eval/few1_top1`` is the mean over `draws`
    of 1 %, ``_min``, ``_max`` and ``_std`` their spread. The interval is that of the test images alone."""
    values: dict[str, float] = {}
    for share in shares:
        name = f"eval/few{100 * share:g}_top1"
        found, count = [], 0
        for draw in range(draws):
            chosen = few_labels(train[1], share, seed + draw)
            part = (train[0][chosen], train[1][chosen])
            probe = fit_probe(part, test[0], strengths=strengths, seed=seed + draw, max_iterations=max_iterations)
            found.append(float((probe.predicted == test[1]).mean()))
            count = len(chosen)
        values |= Accuracy.of_share(float(np.mean(found)), len(test[1])).named(name)
        values |= {f"{name}_min": 100 * min(found), f"{name}_max": 100 * max(found)}
        values |= {f"{name}_std": 100 * float(np.std(found, ddof=1 if draws > 1 else 0))}
        values |= {f"{name}_labels": float(count)}
    return Judgement(values)


def judge_attentive(
    tokens: np.ndarray,
    labels: np.ndarray,
    test: Iterable[Set],
    *,
    lrs: Sequence[float],
    epochs: int,
    seed: int,
    device: torch.device,
    batch: int = 256,
) -> Judgement:
    """Attentive probe, fitted to tokens (n, T, E) and labels (n,); `test` gives parts of the test set, tokens for x."""
    probe = fit_attentive(tokens, labels, lrs=lrs, epochs=epochs, seed=seed, device=device, batch=batch)
    predicted, truth = [], []
    for part, theirs in test:
        predicted.append(probe.predict(part, batch))
        truth.append(theirs)
    found = np.concatenate(predicted)
    values = Accuracy.of(found == np.concatenate(truth)).named("eval/attentive_top1")
    values |= {"eval/attentive_lr": probe.lr, "eval/attentive_loss": probe.loss}
    return Judgement(values | {"eval/attentive_images": float(len(labels))}, found)


def judge_rank(features: np.ndarray) -> Judgement:
    """What needs no labels: RankMe and the exponent of α-ReQ, of the first 10,000 images' features (n, F)."""
    features = features[:RANK_IMAGES]
    return Judgement({"eval/rankme": rankme(features), "eval/alpha_req": alpha_req(features)})
