"""Paired statistics of evidence.py: coverage by simulation, exact values by hand, and curves at equal budgets."""

import base64
import math
from importlib import import_module

import numpy as np
import pytest


@pytest.fixture
def statistics(benchmarks):
    return import_module("evidence_statistics")


def point(images, correct, seconds=None, flops=None):
    correct = np.asarray(correct, bool)
    return {
        "images": images,
        "seconds": float(images if seconds is None else seconds),
        "flops": float(images if flops is None else flops),
        "top1": 100 * correct.mean(),
        "n": len(correct),
        "correct": base64.b64encode(np.packbits(correct).tobytes()).decode(),
    }


def coverage(interval, draw, truth, repeats=1000):
    generator = np.random.default_rng(0)
    ends = [interval(draw(generator)) for _ in range(repeats)]
    return np.mean([low <= truth <= high for low, high in ends])


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.0), (2, 0.1), (3, 0.0), (3, 0.04), (3, 0.3), (5, 0.2)])
def test_the_interval_over_images_and_seeds_covers(statistics, seeds, spread):
    def draw(generator):
        parts = generator.normal(0, spread, (seeds, 1)), generator.normal(0, 1, (1, 200))
        return 0.5 + sum(parts) + generator.normal(0, 1, (seeds, 200))

    assert 0.91 < coverage(statistics.over_images_and_seeds, draw, 0.5) < 0.975
    if spread >= 0.1:  # other images alone do not explain what other seeds do
        assert coverage(statistics.over_images, draw, 0.5) < 0.88


def test_the_interval_over_images_covers_for_correct_or_not(statistics):
    """Two classifiers with 60 % and 55 % that mostly agree: differences of -1, 0 and 1."""

    def draw(generator):
        both = generator.random((1, 2000))
        return (both < 0.6).astype(float) - ((both > 0.03) & (both < 0.58))

    assert 0.93 < coverage(statistics.over_images, draw, 0.05, 2000) < 0.97


def test_mcnemar_is_the_binomial_tail_by_hand(statistics):
    """8 images only the first gets right, 2 only the second: twice the sum of C(10, k) / 2^10 over k = 0, 1, 2."""
    first = np.array([1] * 8 + [0] * 2 + [1] * 5 + [0] * 5, bool)
    second = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5, bool)
    expected = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert statistics.mcnemar(first, second) == pytest.approx(expected) == statistics.mcnemar(second, first)
    found = statistics.difference(first[None], second[None])
    assert found.p_value == pytest.approx(expected)
    assert found.points == pytest.approx(30)


def test_identical_runs_differ_by_nothing(statistics):
    same = np.random.default_rng(0).random((1, 50)) < 0.5
    for seeds in (1, 3):
        found = statistics.difference(same.repeat(seeds, 0), same.repeat(seeds, 0))
        assert (found.points, found.low, found.high, found.images_low, found.images_high) == (0, 0, 0, 0, 0)
    assert statistics.difference(same, same).p_value == 1
    assert statistics.difference(same.repeat(3, 0), same.repeat(3, 0)).p_value is None


def test_one_seed_has_the_interval_over_images_by_hand(statistics):
    first, second = np.array([[1, 1, 1, 0, 0, 1, 0, 0]]), np.array([[1, 0, 0, 0, 1, 1, 0, 0]])
    change = 100 * (first[0] - second[0])
    half = 1.959964 * change.std(ddof=1) / math.sqrt(8)
    found = statistics.difference(first, second)
    assert (found.points, found.seeds, found.images) == (12.5, 1, 8)
    assert (found.low, found.high) == pytest.approx((12.5 - half, 12.5 + half), abs=1e-4)
    assert (found.low, found.high) == (found.images_low, found.images_high)


def test_variance_over_images_and_seeds_by_hand(statistics):
    """An orthogonal design: seed effects ±1, image effects ±2, residuals ±0.5."""
    change = np.add.outer([-1.0, 1.0], [-2.0, 2.0, -2.0, 2.0]) + 0.5 * np.array([[1, 1, -1, -1], [-1, -1, 1, 1]])
    ms_seed, ms_image, ms_rest = 8.0, 2 * 16 / 3, 8 * 0.25 / 3
    variance = (ms_seed + ms_image - ms_rest) / 8
    freedom = (8 * variance) ** 2 / (ms_seed**2 / 1 + ms_image**2 / 3 + ms_rest**2 / 3)
    low, high = statistics.over_images_and_seeds(change)
    from scipy.stats import t

    assert high == pytest.approx(-low) == pytest.approx(t.ppf(0.975, freedom) * math.sqrt(variance))


def test_seeds_that_differ_widen_the_interval(statistics):
    generator = np.random.default_rng(0)
    first = generator.random((3, 1000)) < np.array([[0.5], [0.6], [0.7]])
    found = statistics.difference(first, generator.random((3, 1000)) < 0.5)
    assert found.high - found.low > 3 * (found.images_high - found.images_low)


def test_what_cannot_be_paired_is_refused(statistics):
    with pytest.raises(ValueError, match="paired"):
        statistics.difference(np.zeros((2, 9)), np.zeros((3, 9)))


def test_between_probes_every_image_is_interpolated(statistics):
    curve = [point(0, [0, 0, 1, 1]), point(100, [0, 1, 0, 1], seconds=10), point(200, [1, 1, 1, 1], seconds=30)]
    assert statistics.correct_at(curve, "images", 25).tolist() == [0, 0.25, 0.75, 1]
    assert statistics.correct_at(curve, "seconds", 15).tolist() == [0.25, 1, 0.25, 1]
    assert statistics.correct_at(curve, "images", 100).tolist() == [0, 1, 0, 1]
    assert statistics.correct_at(curve, "images", 999).tolist() == [1, 1, 1, 1]
    assert statistics.correct_at(curve, "images", 0).tolist() == [0, 0, 1, 1]
    for images, top1 in ((50, 50), (150, 75)):
        assert 100 * statistics.correct_at(curve, "images", images).mean() == top1


def test_equal_budgets_are_the_largest_that_both_have_reached(statistics):
    """The second variant costs twice as many FLOPs an image: at equal FLOPs it is taken after half of its images."""
    cheap = [point(0, [0, 0, 0, 0]), point(100, [1, 0, 0, 0]), point(200, [1, 1, 0, 0])]
    dear = [point(0, [0] * 4, flops=0), point(100, [1, 1, 0, 0], flops=200), point(200, [1, 1, 1, 0], flops=400)]
    images, flops = (statistics.compare([cheap], [dear], key) for key in ("images", "flops"))
    assert (images.points, images.at) == (-25, 200)
    assert (flops.points, flops.at) == (0, 200)
    assert statistics.compare([cheap], [dear], value=50).points == pytest.approx(-12.5)


def test_seeds_that_only_one_variant_has_are_left_out(statistics):
    good, bad = [point(0, [0, 0]), point(9, [1, 1])], [point(0, [0, 0]), point(9, [0, 1])]
    found = statistics.compare([good, None, good], [bad, bad, good])
    assert (found.seeds, found.points) == (2, 25)
    assert statistics.compare([good, None], [None, good]) is None
    assert statistics.compare([], [good]) is None


def test_training_to_reach_is_where_the_mean_line_crosses(statistics):
    def curve(*top1, seconds=None):
        return [{"images": 100 * i, "seconds": float((seconds or range(9))[i]), "top1": t} for i, t in enumerate(top1)]

    reach = statistics.training_to_reach
    assert reach([curve(10, 20, 40)], 30) == 150
    assert reach([curve(10, 20, 40), None, curve(10, 40, 40)], 30) == 100
    assert reach([curve(10, 20, 40)], 10) == 0
    assert reach([curve(10, 20, 40)], 41) is None
    assert reach([curve(10, 20, 40, seconds=[0, 5, 7])], 30, "seconds") == 6
    assert reach([None], 30) is None
