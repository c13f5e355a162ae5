"""Evaluation protocols: each returns metrics and predictions, and logs nothing.

Metrics: ``eval/PROTOCOL_top1`` in percent, with ``_low`` and ``_high`` (95 % Wilson interval over the test images) and
``_n`` (their number); of a further pooling ``eval/PROTOCOL_POOL_top1``. Strengths, learning rates and the best block are chosen on a held-out fifth of the training set.

Legend: n images, F features, T tokens, E embedding width. A *set* is a pair of features (n, F) and labels (n,).
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

RANK_IMAGES = 10_000  # more would hardly change the spectrum, and take minutes


@dataclass(frozen=True)
class Evaluation:
    """The result of a protocol.

    Attributes:
        values: Metrics by name.
        predicted: Predicted classes (n,) of the test images, if the protocol makes one prediction per image.
    """

    values: dict[str, float]
    predicted: np.ndarray | None = None


def extract(
    encode: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Set:
    """Compute a model's own features.

    Args:
        encode: A model or function from normalised images (B, C, H, W) to features.
        batches: Images and labels (B,).

    Returns:
        Features (n, F), float32, and labels (n,).
    """
    return extract_taps(Taps(encode, blocks=False, tokens=False), batches).set


def evaluate_linear(
    train: Set,
    test: Set,
    *,
    strengths: Sequence[float],
    seed: int,
    max_iterations: int = ITERATIONS,
    pool: str = "",
) -> Evaluation:
    """Evaluate a linear probe of the features.

    Args:
        train: The training set.
        test: The test set.
        strengths: As for `wavemim.evaluation.probes.fit_probe`, and so are `seed` and `max_iterations`.
        seed: Decides all random choices.
        max_iterations: Largest number of solver steps.
        pool: The pooling of the features, for the metrics' names: ``eval/linear_POOL_top1``; empty: ``eval/linear_top1``.
    """
    probe = fit_probe(train, test[0], strengths=strengths, seed=seed, max_iterations=max_iterations)
    name = f"eval/linear_{pool}" if pool else "eval/linear"
    values = Accuracy.of(probe.predicted == test[1]).named(f"{name}_top1")
    values |= {f"{name}_strength": probe.strength, f"{name}_converged": float(probe.converged)}
    return Evaluation(values, probe.predicted)


def evaluate_block(
    train: Set, test: Set, *, number: int, strengths: Sequence[float], seed: int, max_iterations: int = ITERATIONS
) -> Evaluation:
    """Evaluate a linear probe of the pooled patch tokens of block `number`, on the test set and on the held-out part.

    Other arguments as for `wavemim.evaluation.probes.fit_probe`.
    """
    probe = fit_probe(train, test[0], strengths=strengths, seed=seed, max_iterations=max_iterations, compare=True)
    values = Accuracy.of(probe.predicted == test[1]).named(f"eval/linear_top1_block{number}")
    values[f"eval/linear_heldout_block{number}"] = probe.held_out
    values[f"eval/linear_converged_block{number}"] = float(probe.converged)
    return Evaluation(values, probe.predicted)


def best_block(values: Mapping[str, float]) -> dict[str, float]:
    """Choose the block with the best held-out accuracy, the deepest of equals.

    Args:
        values: Metrics of `evaluate_block` for all blocks.

    Returns:
        ``eval/best_block``; nothing if no block was evaluated.
    """
    start = "eval/linear_heldout_block"
    scores = [(score, int(name.removeprefix(start))) for name, score in values.items() if name.startswith(start)]
    return {"eval/best_block": float(max(scores)[1])} if scores else {}


def evaluate_knn(train: Set, test: Set, *, k: int, curve: Sequence[int] = CURVE, pool: str = "") -> Evaluation:
    """Evaluate k nearest neighbours.

    Args:
        train: The training set.
        test: The test set.
        k: The k of ``eval/knn_top1``.
        curve: Further values of k, up to the number of training images, for ``eval/knn_top1_kN``.
        pool: The pooling of the features: ``eval/knn_POOL_top1``; empty: ``eval/knn_top1``.
    """
    ks = sorted({k, *(other for other in curve if other <= len(train[1]))})
    predicted = knn_predictions(train, test[0], ks=ks)
    name = f"eval/knn_{pool}_top1" if pool else "eval/knn_top1"
    values = Accuracy.of(predicted[k] == test[1]).named(name)
    for other in ks:
        values |= Accuracy.of(predicted[other] == test[1]).named(f"{name}_k{other}")
    return Evaluation(values, predicted[k])


def evaluate_few_labels(
    train: Set,
    test: Set,
    *,
    shares: Sequence[float],
    draws: int,
    strengths: Sequence[float],
    seed: int,
    max_iterations: int = ITERATIONS,
) -> Evaluation:
    """Evaluate linear probes on a fraction of the training labels, stratified by class.

    ``eval/few1_top1`` is the mean over the draws of 1 %; ``_min``, ``_max`` and ``_std`` are their spread. The interval
    only covers the sampling of the test images.

    Args:
        train: The training set.
        test: The test set.
        shares: Fractions of the labels.
        draws: Draws for each fraction.
        strengths: As for `wavemim.evaluation.probes.fit_probe`.
        seed: Of the first draw; each further draw adds 1.
        max_iterations: As for `wavemim.evaluation.probes.fit_probe`.
    """
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
    return Evaluation(values)


def evaluate_attentive(
    tokens: np.ndarray,
    labels: np.ndarray,
    test: Iterable[Set],
    *,
    lrs: Sequence[float],
    epochs: int,
    seed: int,
    device: torch.device,
    batch: int = 256,
) -> Evaluation:
    """Evaluate an attentive probe.

    Args:
        tokens: Tokens (n, T, E) of the training images.
        labels: Their classes (n,).
        test: Parts of the test set: tokens and labels.
        lrs: As for `wavemim.evaluation.attentive.fit_attentive`, and so are the others.
        epochs: Passes over the training images.
        seed: Decides all random choices.
        device: The device to train on.
        batch: Images per step.
    """
    probe = fit_attentive(tokens, labels, lrs=lrs, epochs=epochs, seed=seed, device=device, batch=batch)
    predicted, truth = [], []
    for part, theirs in test:
        predicted.append(probe.predict(part, batch))
        truth.append(theirs)
    found = np.concatenate(predicted)
    values = Accuracy.of(found == np.concatenate(truth)).named("eval/attentive_top1")
    values |= {"eval/attentive_lr": probe.lr, "eval/attentive_loss": probe.loss}
    return Evaluation(values | {"eval/attentive_images": float(len(labels))}, found)


def evaluate_rank(features: np.ndarray) -> Evaluation:
    """Compute RankMe and the exponent of α-ReQ, which need no labels, of the first 10,000 images' features (n, F)."""
    features = features[:RANK_IMAGES]
    return Evaluation({"eval/rankme": rankme(features), "eval/alpha_req": alpha_req(features)})
