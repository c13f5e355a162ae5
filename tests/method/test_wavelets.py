"""The transform against PyWavelets, and its properties."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavemim.wavelets import bands_of, check_levels, coefficient_bound, decompose, haar_sums, reconstruct, window

EVERY_WAVELET = pywt.wavelist(kind="discrete")
WAVELETS = ["haar", "db2", "db4", "sym4", "coif1", "bior2.2", "rbio3.1"]


def images(height=64, width=96, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).integers(0, 256, (2, 3, height, width)).astype(dtype)


def reference(x, wavelet, levels):
    """PyWavelets' own multi-level transform as {level: (..., K, h, w)}."""
    approximation, *details = pywt.wavedec2(x, wavelet, mode="periodization", level=levels, axes=(-2, -1))
    pyramid = {levels - i: np.stack(bands, -3) for i, bands in enumerate(details)}
    pyramid[levels] = np.concatenate([approximation[..., None, :, :], pyramid[levels]], -3)
    return pyramid


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("kind", ["numpy64", "numpy32", "torch64", "torch32"])
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("wavelet", EVERY_WAVELET)
def test_equals_pywavelets(wavelet, levels, kind):
    x = images(32, 48)
    given_ = x.astype(np.float32) if kind.endswith("32") else x
    made = decompose(torch.from_numpy(given_) if kind.startswith("torch") else given_, levels, wavelet)
    expected = reference(x, wavelet, levels)
    tolerance = 255 * (1e-4 if kind.endswith("32") else 1e-10)
    for level in range(1, levels + 1):
        assert made[level].shape[-3] == len(bands_of(level, levels))
        assert np.abs(np.asarray(made[level]) - expected[level]).max() <= tolerance


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_reconstruction_is_perfect(wavelet):
    x = images()
    for pyramid in (decompose(x, 4, wavelet), decompose(torch.from_numpy(x), 4, wavelet)):
        assert np.abs(np.asarray(reconstruct(pyramid, wavelet)) - x).max() < 1e-9


def test_integer_haar_is_exact_and_scales_to_pywavelets():
    x = images(dtype=np.int32)
    sums, expected = haar_sums(x, 5), reference(x.astype(np.float64), "haar", 5)
    for level, bands in sums.items():
        assert bands.dtype == np.int32
        np.testing.assert_allclose(bands / 2**level, expected[level], atol=1e-9)


def test_partial_reconstruction_is_the_approximation():
    x = images()
    for wavelet in ("haar", "sym4"):
        whole = decompose(x, 4, wavelet)
        coarse = {level: bands for level, bands in whole.items() if level > 2}
        expected = pywt.wavedec2(x, wavelet, mode="periodization", level=2, axes=(-2, -1))[0]
        np.testing.assert_allclose(reconstruct(coarse, wavelet, to=2), expected, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    top=st.integers(0, 4), left=st.integers(0, 6), size=st.integers(1, 3), flip=st.booleans(), seed=st.integers(0, 99)
)
def test_window_and_flip_commute_with_haar(top, left, size, flip, seed):
    levels, unit = 3, 8
    x = images(56, 72, seed, np.int32)
    top, left, size = top * unit, min(left * unit, 72 - size * unit), size * unit
    top = min(top, 56 - size)
    cropped = x[..., top : top + size, left : left + size]
    cropped = cropped[..., ::-1] if flip else cropped
    expected = haar_sums(np.ascontiguousarray(cropped), levels)
    for made in (haar_sums(x, levels), haar_sums(torch.from_numpy(x), levels)):
        for level, bands in made.items():
            np.testing.assert_array_equal(np.asarray(window(bands, level, top, left, size, flip)), expected[level])


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
def test_bound_holds_for_extreme_images(wavelet):
    rng = np.random.default_rng(0)
    extreme = [rng.integers(0, 2, (32, 32)) * 255.0 for _ in range(20)]
    grid = np.indices((32, 32))
    extreme += [255.0 * ((grid[0] // 2**s + grid[1] // 2**s) % 2) for s in range(4)]
    extreme += [255.0 * ((grid[i] // 2**s) % 2) for s in range(4) for i in (0, 1)]
    largest = {}
    for image in extreme:
        for level, bands in reference(image, wavelet, 3).items():
            for name, band in zip(bands_of(level, 3), bands, strict=True):
                largest[level, name] = max(largest.get((level, name), 0), np.abs(band).max())
    for (level, band), value in largest.items():
        assert value <= coefficient_bound(level, band, wavelet) * (1 + 1e-9)
    if wavelet == "haar":  # the bound is tight: a checkerboard, stripes and white reach it
        assert largest[1, "D"] == pytest.approx(coefficient_bound(1, "D"))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="multiples of 2\\^4 = 16"):
        check_levels(64, 56, 4)
