"""The integer Haar against PyWavelets and against the general transform: exact both ways."""

import numpy as np
import pytest
import pywt
from hypothesis import given
from hypothesis import strategies as st

from wavemim.integer_haar import HaarPixels, HaarSums
from wavemim.wavelets import reconstruct


def random_image(seed: int, channels: int, size: int) -> np.ndarray:
    """Noise, and halves of black and white, so that every coefficient can be as large as it gets."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (channels, size, size), np.uint8)
    kind = seed % 3
    if kind == 1:
        image[...] = np.where(image < 128, 0, 255)
    elif kind == 2:
        image[:, : size // 2] = 255
        image[:, size // 2 :] = 0
    return image


@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([(32, 5), (64, 6), (48, 4), (6, 1), (256, 8)]))
def test_sums_are_pywavelets_coefficients_times_two_to_the_level(seed, channels, shape):
    size, levels = shape
    image = random_image(seed, channels, size)
    transform = HaarSums(channels, size, levels)
    transform(255 - image)  # what an earlier image left must not matter
    sums = transform(image)
    approximation, *details = pywt.wavedec2(image.astype(np.float64), "haar", "periodization", levels)
    for level, bands in zip(range(levels, 0, -1), details, strict=True):
        wanted = np.stack(bands, 1) if level < levels else np.stack((approximation, *bands), 1)
        np.testing.assert_allclose(sums[level], wanted * 2**level, atol=1e-6)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 4))
def test_lossless_integers_give_the_very_pixels(seed, channels, levels):
    image = random_image(seed, channels, 32)
    steps = {level: 2.0**-level for level in range(1, levels + 1)}
    np.testing.assert_array_equal(HaarPixels(channels, 32, steps)(HaarSums(channels, 32, levels)(image)), image)


@pytest.mark.parametrize("finest", [1, 2, 3])
@pytest.mark.parametrize("steps", [(4, 4, 4, 4), (5, 3, 2, 1), (0.3, 0.7, 1.1, 2), (8, 16, 32, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_pixels_are_the_rounded_float_inverse(steps, finest, seed):
    image = random_image(seed, 3, 64)
    chosen = dict(enumerate(steps, 1))
    stored = {
        level: np.rint(values / 2**level / chosen[level]).astype(np.int16)
        for level, values in HaarSums(3, 64, 4)(image).items()
        if level >= finest
    }
    used = {level: chosen[level] for level in stored}
    inverse = HaarPixels(3, 64, used)
    found = inverse(stored)
    pyramid = {level: values.astype(np.float64) * chosen[level] for level, values in stored.items()}
    exact = np.clip(reconstruct(pyramid, to=finest - 1) / 2 ** (finest - 1), 0, 255)
    # Whole multiples of 1/64 of a pixel are exact, other steps are rounded to it once a coefficient and level.
    assert np.abs(found - exact).max() <= 0.5 + (0 if steps[0] != 0.3 else 4 * 4 / 128)
    into = np.empty_like(found)
    assert inverse(stored, out=into) is into and np.array_equal(into, found)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples"):
        HaarSums(3, 24, 4)
    with pytest.raises(ValueError, match="multiples"):
        HaarPixels(3, 24, {1: 1, 2: 1, 3: 1, 4: 1})
