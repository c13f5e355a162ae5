"""Protocols on frozen features against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wavemim.evaluation.probes import few_labels, fit_probe, held_out, knn, linear_probe
from wavemim.evaluation.protocols import (
    best_block,
    evaluate_attentive,
    evaluate_block,
    evaluate_few_labels,
    evaluate_knn,
    evaluate_linear,
    evaluate_rank,
)


def blobs(n, seed=0, classes=4, width=16, spread=1.6):
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 1, (classes, width))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (centres[y] + rng.normal(0, spread, (n, width))).astype(np.float32), y


def reference(strength):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))


def test_linear_probe_equals_scikit_learn_on_the_same_features():
    train, test = blobs(600), blobs(300, seed=2)
    accuracy, strength = linear_probe(train, test, strengths=(0.1,), seed=0)
    assert strength == 0.1 and accuracy.n == 300
    result = evaluate_linear(train, test, strengths=(0.1,), seed=0)
    expected = reference(0.1).fit(*train).predict(test[0])
    assert (result.predicted != expected).mean() <= 0.004
    assert result.values["eval/linear_top1"] == accuracy.top1
    assert accuracy.top1 == pytest.approx(100 * (expected == test[1]).mean(), abs=0.4)
    assert result.values["eval/linear_converged"] == 1
    again = evaluate_linear(train, test, strengths=(0.1,), seed=0, pool="token").values
    assert again == {key.replace("/linear", "/linear_token"): value for key, value in result.values.items()}


def test_what_did_not_converge_is_said():
    train, test = blobs(600), blobs(300, seed=2)
    assert (
        evaluate_linear(train, test, strengths=(10.0,), seed=0, max_iterations=2).values["eval/linear_converged"] == 0
    )


def test_strength_is_the_best_on_the_held_out_fifth_of_train():
    train, test = blobs(200, width=64), blobs(300, seed=2, width=64)
    strengths = (100.0, 1e-4, 0.1)
    probe = fit_probe(train, test[0], strengths=strengths, seed=0)
    out = held_out(200, 0)
    assert out.sum() == 40
    x, y = (train[0] - train[0].mean(0)) / train[0].std(0), train[1]
    scores = {c: LogisticRegression(C=c, max_iter=5000).fit(x[~out], y[~out]).score(x[out], y[out]) for c in strengths}
    assert probe.strength == min(c for c in strengths if scores[c] == max(scores.values()))
    assert probe.held_out == pytest.approx(100 * max(scores.values()))
    scrambled = np.random.default_rng(0).normal(size=test[0].shape).astype(np.float32)
    assert fit_probe(train, scrambled, strengths=strengths, seed=0).strength == probe.strength


def test_knn_and_its_curve_equal_scikit_learn():
    train, test = blobs(500), blobs(200, seed=3)
    result = evaluate_knn(train, test, k=15, curve=(1, 50, 1000)).values
    for k in (1, 15, 50):
        classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = 100 * classifier.fit(*train).score(*test)
        assert result[f"eval/knn_top1_k{k}"] == pytest.approx(expected, abs=0.51)
        assert knn(train, test, k=k).top1 == result[f"eval/knn_top1_k{k}"]
    again = evaluate_knn(train, test, k=15, curve=(), pool="token").values
    assert again["eval/knn_token_top1"] == result["eval/knn_top1"] and not any("knn_top1" in key for key in again)
    assert result["eval/knn_top1"] == result["eval/knn_top1_k15"]
    assert "eval/knn_top1_k1000" not in result  # train has fewer images
    assert knn(train, test, k=1000).top1 == knn(train, test, k=500).top1


def test_few_labels_are_drawn_class_by_class():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 10, 1])
    chosen = few_labels(labels, 0.1, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1, 1]
    assert np.array_equal(chosen, few_labels(labels, 0.1, seed=0))
    assert not np.array_equal(chosen, few_labels(labels, 0.1, seed=1))
    assert len(set(chosen)) == len(chosen)


def test_few_labels_are_the_mean_and_the_spread_of_draws():
    train, test = blobs(400), blobs(200, seed=2)
    result = evaluate_few_labels(train, test, shares=(0.1, 0.005), draws=3, strengths=(0.1,), seed=7).values
    found = []
    for draw in range(3):
        chosen = few_labels(train[1], 0.1, 7 + draw)
        found.append(100 * reference(0.1).fit(train[0][chosen], train[1][chosen]).score(*test))
    name = "eval/few10_top1"
    assert result[name] == pytest.approx(np.mean(found), abs=0.4)
    assert result[f"{name}_std"] == pytest.approx(np.std(found, ddof=1), abs=0.5)
    assert result[f"{name}_min"] <= result[name] <= result[f"{name}_max"]
    assert result[f"{name}_low"] < result[name] < result[f"{name}_high"]
    assert result["eval/few0.5_top1_labels"] == 4  # one per class


def test_the_best_block_is_chosen_on_train():
    values = {}
    for number, spread in ((1, 3.0), (2, 0.8), (3, 3.0)):
        train, test = blobs(300, spread=spread), blobs(200, seed=2, spread=spread)
        values |= evaluate_block(train, test, number=number, strengths=(0.1,), seed=0).values
    assert best_block(values) == {"eval/best_block": 2}
    assert best_block(values | {"eval/linear_top1_block1": 100.0}) == {"eval/best_block": 2}
    assert best_block({"eval/linear_top1": 3.0}) == {}
    equal = {"eval/linear_heldout_block2": 5.0, "eval/linear_heldout_block11": 5.0}
    assert best_block(equal) == {"eval/best_block": 11}


def test_without_labels_there_is_the_spectrum():
    values = evaluate_rank(np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)).values
    assert set(values) == {"eval/rankme", "eval/alpha_req"} and values["eval/rankme"] > 20


@pytest.mark.parametrize("strengths", [(0.1,), (0.1, 1)])
def test_a_single_class_is_no_crash(strengths):
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    accuracy, _ = linear_probe(
        (x, np.array([0, 0, 0, 0, 0, 0])), (x, np.array([0, 0, 0, 1, 1, 1])), strengths=strengths, seed=0
    )
    assert accuracy.top1 == 50


def hidden_signs(n, seed):
    """Tokens (n, 8, 16): one marked token holds the class, another its opposite, so that their mean holds nothing."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    tokens = rng.normal(0, 0.3, (n, 8, 16)).astype(np.float32)
    places = np.array([rng.permutation(8)[:2] for _ in range(n)])
    signal = np.where(np.arange(4) == y[:, None], 2.0, 0.0)
    every = np.arange(n)
    tokens[every, places[:, 0], :4] += signal
    tokens[every, places[:, 1], :4] -= signal
    tokens[every, places[:, 0], 8] += 4  # the mark, taken back by the other
    tokens[every, places[:, 1], 8] -= 4
    return tokens.astype(np.float16), y


def test_attention_finds_what_the_mean_of_tokens_does_not_hold():
    train, test = hidden_signs(800, 0), hidden_signs(200, 1)
    pooled = [(tokens.astype(np.float32).mean(1), y) for tokens, y in (train, test)]
    assert linear_probe(*pooled, strengths=(0.1,), seed=0)[0].high < 45  # chance is 25
    parts = [(test[0][:90], test[1][:90]), (test[0][90:], test[1][90:])]
    settled = {"epochs": 15, "batch": 64, "seed": 0, "device": torch.device("cpu")}
    result = evaluate_attentive(*train, parts, lrs=(1e-7, 3e-3), **settled)
    assert result.values["eval/attentive_top1"] > 90
    assert result.values["eval/attentive_lr"] == 3e-3
    assert result.values["eval/attentive_top1_n"] == 200 and result.values["eval/attentive_images"] == 800
    assert 100 * (result.predicted == test[1]).mean() == result.values["eval/attentive_top1"]
    again = evaluate_attentive(*train, parts, lrs=(3e-3,), **settled)
    assert np.array_equal(again.predicted, result.predicted)  # seeded, and the choice leaves no trace


def test_a_feature_that_never_varies_in_train_says_nothing_of_val():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 400)
    x = np.full((400, 60), 0.1, np.float32)
    x[:, :10] = generator.normal(size=(400, 10)) + 2 * y[:, None]
    test = (x[200:].copy(), y[200:])
    test[0][generator.random((200, 60)) < 0.02] += 0.5
    accuracy, _ = linear_probe((x[:200], y[:200]), test, strengths=(1.0,), seed=0)
    assert accuracy.top1 > 95
