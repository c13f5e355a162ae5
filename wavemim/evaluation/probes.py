"""Classifiers on frozen features: logistic regression, on all labels or few, and k nearest neighbours.

Legend: n images, F features, c classes. A *set* is a pair of features (n, F), float32, and labels (n,).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wavemim.evaluation.metrics import Accuracy

Set = tuple[np.ndarray, np.ndarray]
ITERATIONS = 1000  # of the solver, at most: far more than it needs on standardised features
CURVE = (1, 5, 10, 20, 50, 100, 200)  # values of k


@dataclass(frozen=True)
class Probe:
    """The result of a linear probe.

    Attributes:
        predicted: Predicted classes (n,) of the test images.
        strength: The value of scikit-learn's C that was chosen.
        held_out: Its accuracy on the held-out part of the training images, in percent; NaN if it was not measured.
        converged: Whether the solver converged in the last fit, which makes the predictions.
    """

    predicted: np.ndarray
    strength: float
    held_out: float
    converged: bool


def held_out(n: int, seed: int, share: float = 0.2) -> np.ndarray:
    """Choose the images that are held out.

    Args:
        n: Number of images.
        seed: Decides which.
        share: The fraction of the images.

    Returns:
        bool (n,), True for the held-out images, at least one.
    """
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[: max(1, round(n * share))]] = True
    return chosen


def fit_probe(
    train: Set,
    test: np.ndarray,
    *,
    strengths: Sequence[float],
    seed: int,
    max_iterations: int = ITERATIONS,
    compare: bool = False,
) -> Probe:
    """Fit multinomial logistic regression to standardised features by L-BFGS, and predict test images.

    The strength is chosen on a held-out fifth of `train` (of equals, the stronger regularisation), then fitted to all
    of `train`.

    Args:
        train: The training set.
        test: Test features (n, F).
        strengths: Values of scikit-learn's C, the inverse of the regularisation, to choose from.
        seed: Decides which images are held out.
        max_iterations: Iterations of the solver, at most.
        compare: Measure the accuracy on the held-out part even if there is only one strength.

    Returns:
        Predictions, the chosen strength and its accuracy on the held-out part.
    """
    x, y = train
    x, test = _standardised(x, test)
    best, score = strengths[0], float("nan")
    if (compare or len(strengths) > 1) and len(y) > 1:
        out = held_out(len(y), seed)  # of a handful of images this may leave a single class
        # Strong regularisation first: it converges fast, and the next fits start from its solution.
        solver = _Solver(x[~out], y[~out], max_iterations)
        scores = [(float((solver.fit(c)(x[out]) == y[out]).mean()), -c) for c in sorted(strengths)]
        score, best = 100 * max(scores)[0], -max(scores)[1]
    solver = _Solver(x, y, max_iterations)
    return Probe(solver.fit(best)(test), float(best), score, solver.converged)


def _standardised(x: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardise by the mean and deviation of `x`. A feature that hardly varies there becomes 0 in both."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale = np.where(std > 1e-4 * std.max(initial=0), 1 / np.maximum(std, 1e-30), 0)
    return tuple(((values - mean) * scale).astype(np.float32) for values in (x, test))


def linear_probe(
    train: Set, test: Set, *, strengths: Sequence[float], seed: int, max_iterations: int = ITERATIONS
) -> tuple[Accuracy, float]:
    """Fit a linear probe and evaluate it.

    Args:
        train: The training set. The strength is chosen on a held-out fifth of it.
        test: The test set. Classes that `train` lacks count as wrong.
        strengths: As for `fit_probe`.
        seed: As for `fit_probe`.
        max_iterations: As for `fit_probe`.

    Returns:
        Accuracy on `test`, and the strength that was chosen.
    """
    probe = fit_probe(train, test[0], strengths=strengths, seed=seed, max_iterations=max_iterations)
    return Accuracy.of(probe.predicted == test[1]), probe.strength


def few_labels(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw a random fraction of the images of each class, at least one of each.

    Args:
        labels: Classes (n,).
        share: The fraction, in (0, 1].
        seed: Decides which.

    Returns:
        Indices of the drawn images, ascending.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        mine = generator.permutation(np.flatnonzero(labels == label))
        chosen.append(mine[: max(1, round(share * len(mine)))])
    return np.sort(np.concatenate(chosen))


def knn_predictions(
    train: Set, test: np.ndarray, *, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, np.ndarray]:
    """Classify by weighted k nearest neighbours with cosine similarity (Wu et al., CVPR 2018).

    Args:
        train: The training set.
        test: Test features (n, F).
        ks: Values of k; one above the number of training images means all of them.
        temperature: A neighbour's vote has the weight exp(similarity / temperature).

    Returns:
        {k: predicted classes (n,)}.
    """
    x, y = torch.from_numpy(train[0]), torch.from_numpy(train[1]).long()
    x = torch.nn.functional.normalize(x, dim=1)
    classes, most = int(y.max()) + 1, min(max(ks), len(y))
    found: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for part in torch.from_numpy(test).split(512):
        similarity = torch.nn.functional.normalize(part, dim=1) @ x.T
        values, neighbours = similarity.topk(most, 1)
        # Relative to the nearest neighbour: with weights up to e^(1/0.07), rounding would lose the small ones.
        weights, votes = ((values - values[:, :1]) / temperature).exp(), y[neighbours]
        for k in ks:
            counted = torch.zeros(len(part), classes).scatter_add_(1, votes[:, :k], weights[:, :k])
            found[k].append(counted.argmax(1))
    return {k: torch.cat(parts).numpy() for k, parts in found.items()}


def knn(train: Set, test: Set, *, k: int, temperature: float = 0.07) -> Accuracy:
    """Evaluate `knn_predictions` for one k.

    Args:
        train: The training set.
        test: The test set.
        k: Neighbours.
        temperature: As for `knn_predictions`.

    Returns:
        Accuracy on `test`.
    """
    return Accuracy.of(knn_predictions(train, test[0], ks=(k,), temperature=temperature)[k] == test[1])


class _Solver:
    """scikit-learn's logistic regression on standardised features; each fit starts from the last solution."""

    def __init__(self, x: np.ndarray, y: np.ndarray, max_iterations: int) -> None:
        # imported here: scikit-learn loads pandas, which loads pyarrow where it is installed
        from sklearn.dummy import DummyClassifier
        from sklearn.linear_model import LogisticRegression

        self._x, self._y, self.converged = x, y, True
        self._classifier: Any = (
            DummyClassifier(strategy="most_frequent")
            if len(np.unique(y)) < 2
            else LogisticRegression(max_iter=max_iterations, warm_start=True)
        )

    def fit(self, strength: float) -> Any:
        """Fit with this C; return the function that predicts."""
        from sklearn.exceptions import ConvergenceWarning

        if "C" in self._classifier.get_params():
            self._classifier.set_params(C=strength)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            self._classifier.fit(self._x, self._y)
        self.converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)
        return self._classifier.predict
