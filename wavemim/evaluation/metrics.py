"""What is counted: accuracies with intervals, a line a class, confusion matrices; and label-free measures of features.

Legend: n images, F features, c classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)  # of a two-sided interval of 95 %


def wilson(correct: np.ndarray | float, n: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95 % interval of `correct` out of `n`, as shares (Wilson 1927). `correct` may be any
    number from 0 to n; of n = 0 it is all of [0, 1]."""
    correct, n = np.asarray(correct, np.float64), np.asarray(n, np.float64)
    share = np.divide(correct, n, out=np.full(np.broadcast(correct, n).shape, 0.5), where=n > 0)
    spread = _Z**2 / np.maximum(n, 1e-12)
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # at the ends rounding would leave [0, 1] or a little gap
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
        """From one bool an image."""
        return cls.of_share(float(np.mean(correct)), len(correct))

    @classmethod
    def of_share(cls, share: float, n: int) -> Accuracy:
        """From a share of n images, which may be a mean over several classifiers of the same images."""
        low, high = wilson(share * n, n)
        return cls(100 * share, 100 * float(low), 100 * float(high), n)

    def named(self, name: str) -> dict[str, float]:
        """{`name`, `name`_low, `name`_high, `name`_n: numbers}."""
        return {name: self.top1, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_n": float(self.n)}


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class (row) were taken for each class (column): int64 (c, c)."""
    counts = np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


@dataclass(frozen=True)
class ClassLine:
    """Accuracy within one class, in percent with its 95 % Wilson interval; without images they are not numbers."""

    name: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float


def class_table(matrix: np.ndarray, names: list[str]) -> Iterator[ClassLine]:
    """One line a class out of a confusion matrix (c, c)."""
    n, correct = matrix.sum(1), matrix.diagonal()
    low, high = wilson(correct, n)
    for i, name in enumerate(names):
        if n[i]:
            share = float(correct[i] / n[i])
            yield ClassLine(name, int(n[i]), int(correct[i]), 100 * share, 100 * float(low[i]), 100 * float(high[i]))
        else:
            yield ClassLine(name, 0, 0, *[float("nan")] * 3)


def rankme(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """Effective rank of features (n, F): exp of the entropy of their normalised singular values (Garrido et al. 2023)."""
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = singular / max(singular.sum(), epsilon) + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))


def alpha_req(features: np.ndarray, first: int = 4, last: int = 100) -> float:
    """Exponent α of the power law λ_j ∝ j^-α of the covariance's eigenvalues (α-ReQ, Agrawal et al. 2022).

    `features` (n, F). The line through log λ_j over log j is fitted by least squares to the eigenvalues number `first`
    to `last` of the descending ones, each weighted by 1/j, so that every stretch of log j counts alike: the range and
    the weights of the authors' code, which takes them from Stringer et al. 2019; the paper names no range. Of fewer than `last` eigenvalues that are more than rounding errors (10⁻⁹ of the largest) those that
    there are count; where that leaves less than ten, all from the first on. NaN where there are fewer than three.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    wide = centred.shape[1] > centred.shape[0]
    # those of the smaller of the two products: in float64 they are exact to far below 10⁻⁹ of the largest
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
