"""What frozen features are worth: linear probe, kNN, RankMe. Yields names and numbers, logs nothing.

Legend: n images, F features, c classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy with its 95 % Wilson interval, in percent."""

    top1: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, correct: np.ndarray) -> Accuracy:
        """From one bool an image."""
        interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
        return cls(100 * float(correct.mean()), 100 * float(interval.low), 100 * float(interval.high), len(correct))


def extract(
    encode: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, F) float32 and labels (n,) from batches of normalised images (B, C, H, W) and labels (B,)."""
    features, labels = [], []
    with torch.inference_mode():
        for images, label in batches:
            features.append(encode(images).flatten(1).float().cpu().numpy())
            labels.append(label.cpu().numpy())
    return np.concatenate(features), np.concatenate(labels)


def held_out(n: int, seed: int, share: float = 0.2) -> np.ndarray:
    """A bool (n,) that is True for a seeded random `share` of the images."""
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[: max(1, round(n * share))]] = True
    return chosen


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    strengths: Sequence[float],
    seed: int,
    max_iterations: int = 300,
) -> tuple[Accuracy, float]:
    """Multinomial logistic regression on standardised features; accuracy on `test` and the strength that was chosen.

    `strengths` are scikit-learn's C (inverse regularisation). It is chosen on a held-out fifth of `train`, never on
    `test`. A class that train lacks counts as wrong.
    """
    x, y = train
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = (x - mean) / std, (test[0] - mean) / std
    best = strengths[0]
    if len(strengths) > 1:
        out = held_out(len(y), seed)  # of a handful of images it may leave a single class
        scores = [(_fit(x[~out], y[~out], c, max_iterations).score(x[out], y[out]), -c) for c in strengths]
        best = -max(scores)[1]  # the stronger regularisation of equals
    predicted = _fit(x, y, best, max_iterations).predict(test_x)
    return Accuracy.of(predicted == test[1]), float(best)


def knn(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *, k: int, temperature: float = 0.07
) -> Accuracy:
    """Weighted kNN by cosine similarity, weights exp(similarity / temperature) (Wu et al., CVPR 2018)."""
    x, y = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    x = torch.nn.functional.normalize(x, dim=1)
    k, classes = min(k, len(y)), int(y.max()) + 1
    correct = []
    for part, labels in zip(torch.from_numpy(test[0]).split(512), torch.from_numpy(test[1]).split(512), strict=True):
        similarity = torch.nn.functional.normalize(part, dim=1) @ x.T
        values, neighbours = similarity.topk(k, 1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, y[neighbours], (values / temperature).exp())
        correct.append(votes.argmax(1) == labels)
    return Accuracy.of(torch.cat(correct).numpy())


def rankme(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """Effective rank of features (n, F): exp of the entropy of their normalised singular values (Garrido et al. 2023)."""
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = singular / max(singular.sum(), epsilon) + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))


def judge(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    labelled: bool,
    strengths: Sequence[float],
    k: int,
    seed: int,
) -> Iterator[tuple[str, float]]:
    """All measures of one encoder's features: (name, value), accuracies in percent."""
    if labelled:
        probe, strength = linear_probe(train, test, strengths=strengths, seed=seed)
        yield "eval/linear_top1", probe.top1
        yield "eval/linear_top1_low", probe.low
        yield "eval/linear_top1_high", probe.high
        yield "eval/linear_strength", strength
        yield "eval/knn_top1", knn(train, test, k=k).top1
    yield "eval/rankme", rankme(train[0][:10_000])


def _fit(x: np.ndarray, y: np.ndarray, strength: float, max_iterations: int) -> Any:
    # imported here: scikit-learn loads pandas, which loads pyarrow where it is installed
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y)) < 2:
        return DummyClassifier(strategy="most_frequent").fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # early stopping of the solver is a setting, not news
        return LogisticRegression(C=strength, max_iter=max_iterations).fit(x, y)
