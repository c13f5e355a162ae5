"""Histograms of oriented gradients against scikit-image and numpy."""

import numpy as np
import pytest
import torch
from skimage.feature import hog
from tiny_images import SIZE, TOKEN, assert_float32_and_whole_graph, images_of, normalised_of, statistics_of

from wavemim.targets import HOGTarget, Tap
from wavemim.targets.base import from_positions
from wavemim.targets.hog import EPSILON

TAPS = [Tap(2, 1), Tap(3, 2), Tap(4, 3)]

WHOLE = torch.ones(1, 16, dtype=torch.bool)  # everything is hidden


def make(images, taps=TAPS, **kwargs):
    sizes = {tap.level: TOKEN for tap in taps}
    return HOGTarget(taps, statistics_of(images), image_size=SIZE, token_sizes=sizes, **kwargs)


def maps_of(target, vectors, level):
    return from_positions(vectors, target.channels, target.bins, target.cells(level)).numpy()


def literal(plane, cell, bins, period):
    """Mean magnitude a bin of each cell (bins, h, w), by numpy.histogram cell by cell."""
    plane = np.asarray(plane, np.float64)
    down, right = np.zeros_like(plane), np.zeros_like(plane)
    down[1:-1] = plane[2:] - plane[:-2]
    right[:, 1:-1] = plane[:, 2:] - plane[:, :-2]
    angle, magnitude = np.arctan2(down, right) % period, np.hypot(down, right)
    angle[angle >= period] = 0
    cells = len(plane) // cell
    found = np.zeros((bins, cells, cells))
    for y in range(cells):
        for x in range(cells):
            part = np.s_[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
            counts, _ = np.histogram(angle[part], bins, (0, period), weights=magnitude[part])
            found[:, y, x] = counts / cell**2
    return found


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_nine_bins_are_those_of_scikit_image(channels):
    """The whole picture, with its borders. Its epsilon is 1e-5, which shows in cells that are nearly flat."""
    images = images_of(channels=channels)
    inputs, target = normalised_of(images), make(images)
    made = target(inputs, {})
    for tap in TAPS:
        cell = 2**tap.level
        found = maps_of(target, made[tap.level], tap.level)
        for b in range(len(images)):
            for c in range(channels):
                expected = hog(
                    inputs[b, c].numpy(), 9, (cell, cell), (1, 1), block_norm="L2", feature_vector=False
                ).squeeze((2, 3))
                expected = expected.transpose(2, 0, 1)
                np.testing.assert_allclose(found[b, c], expected, atol=2e-3)
                length = np.sqrt((found[b, c] ** 2).sum(0)).clip(1e-9)
                np.testing.assert_allclose(found[b, c] / length, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("bins", "signed", "period"),
    [(9, None, np.pi), (18, None, 2 * np.pi), (18, False, np.pi), (10, None, np.pi), (9, True, 2 * np.pi)],
)
def test_histograms_are_those_of_numpy(bins, signed, period):
    images = images_of()
    inputs, target = normalised_of(images), make(images, bins=bins, signed=signed, normalise="none")
    made = target(inputs, {})
    for tap in TAPS:
        assert made[tap.level].shape == (3, target.positions(tap.level) ** 2, target.values(tap))
        found = maps_of(target, made[tap.level], tap.level)
        for b in range(3):
            for c in range(3):
                expected = literal(inputs[b, c], 2**tap.level, bins, period)
                np.testing.assert_allclose(found[b, c], expected, atol=1e-5)


@pytest.mark.parametrize(("bins", "turned"), [(9, 0), (18, 9), (12, 0), (36, 18)])
def test_gradients_along_an_axis_are_in_the_bin_that_begins_there(bins, turned):
    """Ramps to the right, to the left, down and up; rounding of π must not move them to the bin before."""
    ramp = np.arange(SIZE, dtype=np.float32)[None].repeat(SIZE, 0)
    images = np.stack([ramp, ramp[:, ::-1], ramp.T, ramp.T[::-1]])[:, None]
    target = make(images, [Tap(3, 1)], bins=bins, normalise="none")
    found = maps_of(target, target(normalised_of(images), {})[3], 3)[:, 0, :, 1, 1]  # a cell away from the border
    quarter = bins // 4 if bins >= 18 else bins // 2
    assert found.argmax(1).tolist() == [0, turned, quarter, (quarter + turned) % bins]
    assert ((found > 0).sum(1) == 1).all()


def test_normalisations_rescale_the_same_histograms():
    images = images_of()
    inputs = normalised_of(images)
    plain, unit, standard = (make(images, normalise=how)(inputs, {}) for how in ("none", "patch", "dataset"))
    target = make(images)
    haar, std = statistics_of(images).std[1], images.std((0, 2, 3))
    expected = 2 * np.hypot(haar["H"], haar["V"]) / std / 9
    for tap in TAPS:
        raw = maps_of(target, plain[tap.level], tap.level)
        norm = np.sqrt((raw**2).sum(2, keepdims=True) + EPSILON**2)
        np.testing.assert_allclose(maps_of(target, unit[tap.level], tap.level), raw / norm, atol=1e-5)
        scaled = maps_of(target, standard[tap.level], tap.level)
        np.testing.assert_allclose(scaled, raw / expected[:, None, None, None], rtol=1e-4)
        assert 0.3 < scaled.mean() < 2


def test_flat_images_are_all_zero():
    images = np.full((2, 3, SIZE, SIZE), 80, np.float32)
    for normalise in ("patch", "dataset", "none"):
        target = make(images, normalise=normalise)
        for values in target(torch.zeros(2, 3, SIZE, SIZE), {}).values():
            assert (values == 0).all()


def test_pictures_draw_strokes_along_edges():
    """A vertical edge: strokes that are long from top to bottom, in the cells of the edge alone."""
    images = np.zeros((1, 1, SIZE, SIZE), np.float32)
    images[..., 20:] = 200
    inputs = normalised_of(images)
    for normalise in ("patch", "dataset"):
        target = make(images, [Tap(3, 1)], normalise=normalise, bins=36)
        picture = target.picture(3, target(inputs, {})[3], inputs, {}, WHOLE)
        assert picture.shape == (1, 1, 64, 64) and picture.min() >= 0 and picture.max() <= 255
        lit = picture[0, 0, 16:32] > 100
        assert not lit[:, :32].any() and not lit[:, 48:].any()
        rows, columns = lit[:, 32:48].nonzero(as_tuple=True)
        assert rows.max() - rows.min() > 10 and columns.max() - columns.min() < 5
        assert target.rebuild({}, inputs, {}, torch.ones(1, 16)) is None


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"bins": 1}, "target.bins=1"), ({"taps": [Tap(0, 1)]}, "level 0 does not exist")]
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(images_of(), **kwargs)


@pytest.mark.parametrize("normalise", ["dataset", "patch", "none"])
def test_in_float32_and_in_one_graph(normalise):
    images = images_of(channels=5)
    assert_float32_and_whole_graph(make(images, normalise=normalise), normalised_of(images))
