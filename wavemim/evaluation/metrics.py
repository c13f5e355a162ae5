"""Metrics: accuracies with intervals, per-class results, confusion matrices, and label-free measures of features.

Legend: n images, F features, c classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)  # quantile of a two-sided 95 % interval


def wilson(correct: np.ndarray | float, n: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the 95 % Wilson score interval of a proportion (Wilson 1927).

    Args:
        correct: Successes, any number from 0 to n (a mean over several classifiers need not be whole).
        n: Trials. For n = 0 the interval is [0, 1].

    Returns:
        Lower and upper end, in [0, 1], of the broadcast shape of the arguments.
    """
    correct, n = np.asarray(correct, np.float64), np.asarray(n, np.float64)
    share = np.divide(correct, n, out=np.full(np.broadcast(correct, n).shape, 0.5), where=n > 0)
    spread = _Z**2 / np.maximum(n, 1e-12)
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # at the ends rounding would leave the interval outside of [0, 1] or slightly too narrow
    low = np.where((correct <= 0) | (n <= 0), 0.0, np.clip(centre - half, 0, 1))
    return low, np.where((correct >= n) | (n <= 0), 1.0, np.clip(centre + half, 0, 1))


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy with its 95 % Wilson interval, in percent."""

    top1: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, correct: np.ndarray) -> Accuracy:
        """Compute it from one boolean per image: whether the prediction is correct."""
        return cls.of_share(float(np.mean(correct)), len(correct))

    @classmethod
    def of_share(cls, share: float, n: int) -> Accuracy:
        """Compute it from the fraction `share` of `n` images, which may be a mean over several classifiers."""
        low, high = wilson(share * n, n)
        return cls(100 * share, 100 * float(low), 100 * float(high), n)

    def named(self, name: str) -> dict[str, float]:
        """Return it as metrics: `name`, `name`_low, `name`_high (percent) and `name`_n."""
        return {name: self.top1, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_n": float(self.n)}


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the images by true and predicted class.

    Args:
        labels: True classes (n,).
        predicted: Predicted classes (n,).
        classes: c.

    Returns:
        int64 (c, c): rows are true classes, columns predicted ones.
    """
    counts = np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


@dataclass(frozen=True)
class ClassLine:
    """Accuracy within one class, in percent, with its 95 % Wilson interval; NaN for a class without images."""

    name: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float


def class_table(matrix: np.ndarray, names: list[str]) -> Iterator[ClassLine]:
    """Yield the accuracy of each class from a confusion matrix.

    Args:
        matrix: (c, c), rows are true classes.
        names: The names of the c classes.

    Yields:
        One line per class, in the order of `names`.
    """
    n, correct = matrix.sum(1), matrix.diagonal()
    low, high = wilson(correct, n)
    for i, name in enumerate(names):
        if n[i]:
            share = float(correct[i] / n[i])
            yield ClassLine(name, int(n[i]), int(correct[i]), 100 * share, 100 * float(low[i]), 100 * float(high[i]))
        else:
            yield ClassLine(name, 0, 0, *[float("nan")] * 3)


def rankme(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """Compute RankMe, the effective rank of features (Garrido et al. 2023).

    Args:
        features: (n, F).
        epsilon: Added to the normalised singular values, as in the paper.

    Returns:
        exp of the entropy of the normalised singular values, from 1 to min(n, F).
    """
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = singular / max(singular.sum(), epsilon) + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))


def alpha_req(features: np.ndarray, first: int = 4, last: int = 100) -> float:
    """Compute the exponent α of the power law λ_j ∝ j^-α of the covariance's eigenvalues (α-ReQ, Agrawal et al. 2022).

    A line is fitted to log λ_j over log j by least squares, each eigenvalue weighted by 1/j, so that equal ranges of
    log j have equal weight. Range and weights are those of the authors' code, which follows Stringer et al. 2019; the
    paper gives no range.

    Args:
        features: (n, F).
        first: Number of the first eigenvalue of the fit, in descending order, from 1.
        last: Number of the last one. Eigenvalues below 10⁻⁹ of the largest are rounding errors and not used. If fewer
            than ten remain in the range, the fit starts at the first eigenvalue.

    Returns:
        α, or NaN if there are fewer than three eigenvalues.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    wide = centred.shape[1] > centred.shape[0]
    # the smaller of the two Gram matrices: in float64 its eigenvalues are exact to far below 10⁻⁹ of the largest
    values = np.linalg.eigvalsh(centred @ centred.T if wide else centred.T @ centred)[::-1]
    values = values[: int((values > 1e-9 * values[0]).sum())] if values.size and values[0] > 0 else values[:0]
    last = min(last, len(values))
    if last - first + 1 < 10:
        first = 1
    if last - first + 1 < 3:
        return float("nan")
    number = np.arange(first, last + 1, dtype=np.float64)
    # polyfit squares its weights
    return float(-np.polyfit(np.log(number), np.log(values[first - 1 : last]), 1, w=number**-0.5)[0])
