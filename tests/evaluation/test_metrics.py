"""Accuracies, tables and label-free measures against scikit-learn, SciPy and spectra that are known."""

import csv

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import classification_report, confusion_matrix

from pipeline.evaluation.tables import evaluation_tables, write_tables
from wavemim.evaluation.metrics import Accuracy, alpha_req, class_table, confusion, rankme, wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (7, 7), (80, 100), (1, 3), (2499, 50_000)])
def test_interval_is_wilsons(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert [float(end) for end in wilson(correct, n)] == pytest.approx([expected.low, expected.high], abs=1e-9)
    accuracy = Accuracy.of(np.arange(n) < correct)
    assert (accuracy.top1, accuracy.n) == (pytest.approx(100 * correct / n), n)
    assert (accuracy.low, accuracy.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-7)


def test_interval_of_nothing_is_everything():
    low, high = wilson(np.array([0, 1]), np.array([0, 2]))
    assert (low[0], high[0]) == (0, 1) and 0 < low[1] < 0.5 < high[1] < 1


def predictions(classes=5, n=400):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes - 1, n)  # the last class has no image
    return labels, np.where(rng.random(n) < 0.6, labels, rng.integers(0, classes, n))


def test_confusion_and_class_lines_equal_scikit_learn():
    labels, predicted = predictions()
    matrix = confusion(labels, predicted, 5)
    assert np.array_equal(matrix, confusion_matrix(labels, predicted, labels=range(5)))
    report = classification_report(labels, predicted, labels=range(5), output_dict=True, zero_division=0)
    lines = list(class_table(matrix, list("abcde")))
    for number, line in enumerate(lines[:4]):
        assert line.n == report[str(number)]["support"]
        assert line.accuracy == pytest.approx(100 * report[str(number)]["recall"])
        expected = binomtest(line.correct, line.n).proportion_ci(method="wilson")
        assert (line.low, line.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert (lines[4].n, lines[4].correct) == (0, 0) and np.isnan(lines[4].accuracy)


@pytest.mark.parametrize("classes", [5, 300])
def test_tables_and_picture_are_written(tmp_path, classes):
    labels, predicted = predictions(classes)
    matrix, names = confusion(labels, predicted, classes), [f"class, {i}" for i in range(classes)]
    titles = {"trained": "trained encoder", "pixels": "raw pixels", "untrained": "not evaluated"}
    files = write_tables(tmp_path, {"linear": {"pixels": matrix.T, "trained": matrix}}, names, titles)
    assert [path.name for path in files] == ["classes_linear.csv", "confusion_linear.csv", "confusion_linear.png"]
    with open(files[0], newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == names * 2
    assert {line["encoder"] for line in lines[:classes]} == {"trained"}
    assert float(lines[0]["accuracy"]) == pytest.approx(100 * matrix[0, 0] / matrix[0].sum(), abs=0.006)
    assert lines[classes - 1]["n"] == "0" and lines[classes - 1]["accuracy"] == ""
    with open(files[1], newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", *names]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], int), matrix)
    assert min(Image.open(files[2]).size) > 300


@pytest.mark.parametrize(
    ("pools", "rows"),
    [
        (["mean", "token"], {"linear probe, mean of the patch tokens": "40.0", "linear probe, class token": "30.0"}),
        (["token"], {"linear probe, class token": "40.0"}),
        (None, {"linear probe": "40.0"}),  # encoders with features of their own, and results of earlier versions
    ],
)
def test_the_report_has_a_row_for_each_pooling(pools, rows):
    def accuracy(name, value):
        return {name: value, f"{name}_low": value - 5, f"{name}_high": value + 5}

    trained = accuracy("eval/linear_top1", 40.0) | accuracy("eval/linear_token_top1", 30.0)
    result = {
        "titles": {"trained": "trained encoder", "pixels": "raw pixels"},
        "measured": {"trained": trained, "pixels": accuracy("eval/linear_top1", 20.0)},
        "labelled": True,
        "classes": 3,
        "train_images": 10,
        "val_images": 5,
    }
    text = evaluation_tables(result if pools is None else result | {"pools": pools})
    lines = [line for line in text.splitlines() if "linear probe" in line]
    assert len(lines) == len(rows) and "no image in val" not in text
    missing = evaluation_tables(result | {"classes_without_val": ["cat"]})
    assert "33% of the classes have no image in val, and are not evaluated: cat." in missing
    for line, (name, value) in zip(lines, rows.items(), strict=True):
        assert name in line and f"{value} (" in line
    assert ("20.0 (" in lines[0]) and all("–" in line for line in lines[1:])  # pixels have no tokens
    assert "did not converge" in evaluation_tables(
        result | {"measured": {**result["measured"], "trained": trained | {"eval/linear_token_converged": 0.0}}}
    )


def test_rankme_counts_directions():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.normal(size=(200, 10)))[0]
    assert rankme(orthogonal) == pytest.approx(10, rel=1e-3)
    assert rankme(orthogonal[:, :3] @ rng.normal(size=(3, 10))) < 3.01
    assert rankme(np.ones((50, 8))) == pytest.approx(1, abs=0.01)


def with_spectrum(eigenvalues, n=600):
    """Features (n, F) whose covariance has exactly these eigenvalues, in a random basis, and a mean."""
    rng = np.random.default_rng(0)
    width = len(eigenvalues)
    left = rng.normal(size=(n, width))
    left = np.linalg.qr(left - left.mean(0))[0]
    right = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return ((left * np.sqrt(eigenvalues)) @ right + 3).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("width", [8, 32, 256])
def test_alpha_req_is_the_exponent_of_the_spectrum(alpha, width):
    number = np.arange(1, width + 1, dtype=np.float64)
    assert alpha_req(with_spectrum(number**-alpha)) == pytest.approx(alpha, rel=0.01)


def test_alpha_req_looks_at_eigenvalues_4_to_100_weighted_by_their_number():
    number = np.arange(1, 201, dtype=np.float64)
    spectrum = np.where(number < 4, 50.0, np.where(number <= 100, number**-1.5, 1e-6))
    assert alpha_req(with_spectrum(spectrum)) == pytest.approx(1.5, rel=0.01)
    bent = number**-1.0 * np.where(number > 30, (number / 30) ** -1.0, 1)  # α = 1, then 2
    x, w = np.log(number[3:100]), 1 / number[3:100]
    y = np.log(bent[3:100])
    expected = -(np.average(x * y, weights=w) - np.average(x, weights=w) * np.average(y, weights=w)) / (
        np.average(x * x, weights=w) - np.average(x, weights=w) ** 2
    )
    assert alpha_req(with_spectrum(bent)) == pytest.approx(expected, rel=0.01)


def test_alpha_req_of_next_to_nothing_is_no_number():
    assert np.isnan(alpha_req(np.ones((50, 8), np.float32)))
    assert np.isnan(alpha_req(np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)))
