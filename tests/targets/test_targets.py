"""Targets against PyWavelets and a literal loop."""

import numpy as np
import pytest
import pywt
import torch
from tiny import LEVELS, PATCH, SIZE, STEPS, TAPS, photos, statistics, stored

from wavemim.inputs import Inputs
from wavemim.masking import random_mask, share_at
from wavemim.targets import Tap, WaveletTarget

TOKENS = {tap.level: PATCH for tap in TAPS}
BAND = {"H": 0, "V": 1, "D": 2}


def coefficients(image, level, band):
    """One band of one level of a 2-D array, by PyWavelets."""
    approximation, *details = pywt.wavedec2(image.astype(np.float64), "haar", mode="periodization", level=level)
    return approximation if band == "A" else details[0][BAND[band]]


KINDS = [
    *(("dataset", "auto"), ("patch", "auto"), ("contrast", "auto"), ("none", "auto")),
    *(("dataset", "kept"), ("patch", "kept"), ("contrast", "erased"), ("none", "erased")),
]


@pytest.mark.parametrize(("normalise", "band_scale"), KINDS)
def test_target_equals_a_literal_loop_over_pywavelets(normalise, band_scale):
    images = photos(3)
    stats = statistics(images)
    target = WaveletTarget(TAPS, stats, image_size=SIZE, token_sizes=TOKENS, normalise=normalise, band_scale=band_scale)
    kept = band_scale == "kept" or (band_scale == "auto" and normalise in ("contrast", "none"))
    made = target(*Inputs(STEPS, stats)(stored(images)))
    scale = np.mean(stats.pixel_std)
    for tap in TAPS:
        cell = 2**tap.level
        side, cells = SIZE // max(PATCH, cell), max(PATCH // cell, 1)
        for b in range(3):
            for position in range(side * side):
                y, x = divmod(position, side)
                vector = []
                for c in range(3):
                    for band in tap.bands:
                        plane = coefficients(images[b, c], tap.level, band)
                        part = plane[y * cells : (y + 1) * cells, x * cells : (x + 1) * cells]
                        mean, std = stats.mean[tap.level][band][c], stats.std[tap.level][band][c]
                        if normalise == "none":
                            mean = mean if band == "A" else 0.0
                        std = scale if kept else std
                        vector.append((part.ravel() - mean) / std)
                vector = np.concatenate(vector)
                if normalise == "patch":
                    vector = (vector - vector.mean()) / np.sqrt(vector.var(ddof=1) + 1e-6)
                if normalise == "contrast":  # the patch as MAE normalises it, and its coefficients
                    s = max(PATCH, cell)
                    window = images[b, :, y * s : (y + 1) * s, x * s : (x + 1) * s].astype(np.float64)
                    pixel_std = np.array(stats.pixel_std)[:, None, None]
                    window = (window - np.array(stats.pixel_mean)[:, None, None]) / pixel_std
                    window = (window - window.mean()) / np.sqrt(window.var(ddof=1) + 1e-6) * pixel_std
                    vector = np.concatenate([
                        coefficients(window[c], tap.level, band).ravel()
                        / (stats.pixel_std[c] if kept else stats.std[tap.level][band][c])
                        for c in range(3) for band in tap.bands
                    ])  # fmt: skip
                np.testing.assert_allclose(made[tap.level][b, position].numpy(), vector, atol=2e-3)


@pytest.mark.parametrize(("normalise", "band_scale"), KINDS)
def test_coefficients_undo_the_target(normalise, band_scale):
    images = photos(4)
    stats = statistics(images)
    target = WaveletTarget(TAPS, stats, image_size=SIZE, token_sizes=TOKENS, normalise=normalise, band_scale=band_scale)
    normalised, pyramid = Inputs(STEPS, stats)(stored(images))
    back = target.coefficients(target(normalised, pyramid), normalised, pyramid)
    for tap in TAPS:
        for c in range(3):
            for index, band in enumerate(tap.bands):
                expected = coefficients(images[2, c], tap.level, band)
                np.testing.assert_allclose(back[tap.level][2, c, index].numpy(), expected, atol=0.05)


@pytest.mark.parametrize("bands", ["AHVD", "HVD"])
def test_a_rebuilt_image_is_the_inputs_where_it_is_visible_and_knows_nothing_of_what_is_hidden(bands):
    images = photos(3)
    stats = statistics(images)
    taps = [Tap(2, 2, "HVD"), Tap(3, 3, bands)]  # a cell of level 3 is four tokens, partly hidden
    target = WaveletTarget(taps, stats, image_size=SIZE, token_sizes={2: PATCH, 3: PATCH})
    inputs = Inputs(STEPS, stats)
    mask = random_mask(torch.arange(3), SIZE // PATCH, 0.6, seed=0, epoch=0)
    hidden = share_at(mask, SIZE // PATCH, SIZE).reshape(3, 1, SIZE, SIZE).bool().expand(-1, 3, -1, -1).numpy()
    other = np.where(hidden, 255 - images, images)
    normalised, pyramid = inputs(stored(images))
    predictions = {level: torch.randn_like(values) for level, values in target(normalised, pyramid).items()}
    rebuilt = target.rebuild(predictions, normalised, pyramid, mask).numpy()
    np.testing.assert_allclose(rebuilt[~hidden], images[~hidden], atol=1e-3)
    again = target.rebuild(predictions, *inputs(stored(other)), mask).numpy()
    np.testing.assert_allclose(again, rebuilt, atol=1e-2)


def test_standardised_targets_have_zero_mean_and_unit_deviation():
    images = photos(32)
    stats = statistics(images)
    target = WaveletTarget(TAPS, stats, image_size=SIZE, token_sizes=TOKENS)
    for values in target(*Inputs(STEPS, stats)(stored(images))).values():
        assert abs(float(values.mean())) < 1e-3
        assert abs(float(values.std()) - 1) < 1e-3


def test_images_come_back_exactly_from_lossless_integers():
    images = photos(4)
    inputs = Inputs(STEPS, statistics(images))
    assert torch.equal(inputs.pixels(inputs.pyramid(stored(images))), torch.from_numpy(images).float())


def test_a_band_that_never_varies_is_no_infinity():
    images = np.full((4, 3, SIZE, SIZE), 80, np.uint8)
    stats = statistics(images)
    target = WaveletTarget([Tap(3, 1, "AHVD")], stats, image_size=SIZE, token_sizes=TOKENS)
    values = target(*Inputs(STEPS, stats)(stored(images)))[3]
    assert torch.isfinite(values).all()
    assert LEVELS >= 3
