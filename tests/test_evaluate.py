"""Measures of frozen features against scikit-learn and literal formulas."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wavemim.evaluate import Accuracy, judge, knn, linear_probe, rankme


def blobs(n, seed=0, classes=4, width=16, spread=1.6):
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 1, (classes, width))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (centres[y] + rng.normal(0, spread, (n, width))).astype(np.float32), y


def test_linear_probe_equals_scikit_learn_on_the_same_features():
    train, test = blobs(600), blobs(300, seed=2)
    accuracy, strength = linear_probe(train, test, strengths=(0.1,), seed=0)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(*train)
    assert strength == 0.1
    assert accuracy.top1 == pytest.approx(100 * reference.score(*test), abs=0.4)
    assert accuracy.n == 300


def test_strength_is_chosen_without_looking_at_test():
    train, test = blobs(200, width=64), blobs(300, seed=2, width=64)
    strengths = (1e-4, 0.1, 100.0)
    _, chosen = linear_probe(train, test, strengths=strengths, seed=0)
    scrambled = (np.random.default_rng(0).normal(size=test[0].shape).astype(np.float32), test[1][::-1])
    assert linear_probe(train, scrambled, strengths=strengths, seed=0)[1] == chosen
    assert chosen != 100.0  # of 200 noisy points in 64 dimensions nearly none can be fitted freely


def test_interval_is_wilsons():
    accuracy = Accuracy.of(np.array([True] * 80 + [False] * 20))
    z, p, n = 1.959964, 0.8, 100
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    assert (accuracy.low, accuracy.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)), abs=1e-3)


def test_knn_equals_scikit_learn():
    train, test = blobs(500), blobs(200, seed=3)
    reference = KNeighborsClassifier(15, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = 100 * reference.fit(*train).score(*test)
    assert knn(train, test, k=15).top1 == pytest.approx(expected, abs=0.51)


def test_rankme_counts_directions():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.normal(size=(200, 10)))[0]
    assert rankme(orthogonal) == pytest.approx(10, rel=1e-3)
    assert rankme(orthogonal[:, :3] @ rng.normal(size=(3, 10))) < 3.01
    assert rankme(np.ones((50, 8))) == pytest.approx(1, abs=0.01)


def test_without_labels_only_what_needs_none():
    train, test = blobs(100), blobs(50, seed=2)
    settings = {"strengths": (0.1,), "k": 5, "seed": 0}
    assert [name for name, _ in judge(train, test, labelled=False, **settings)] == ["eval/rankme"]
    assert dict(judge(train, test, labelled=True, **settings))["eval/linear_top1"] > 25


def test_a_single_class_is_no_crash():
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    accuracy, _ = linear_probe(
        (x, np.array([0, 0, 0, 0, 0, 0])), (x, np.array([0, 0, 0, 1, 1, 1])), strengths=(0.1, 1), seed=0
    )
    assert accuracy.top1 == 50
