"""Masks in the frequency domain against numpy."""

import numpy as np
import pytest
import torch
from tiny_images import SIZE, images_of, normalised_of

from wavemim.masking import corrupt, frequency_numbers, hidden_frequencies


def hidden(rows, *, size=SIZE, radius=5, low_pass_share=0.5, seed=0, epoch=0):
    return hidden_frequencies(
        torch.as_tensor(rows), size, radius=radius, low_pass_share=low_pass_share, seed=seed, epoch=epoch
    )


def circle(size, radius):
    """Frequencies inside of the circle, in the layout of numpy.fft.fft2, by a loop over the centred spectrum."""
    inside = np.zeros((size, size), bool)
    for y in range(size):
        for x in range(size):
            inside[y, x] = (y - size // 2) ** 2 + (x - size // 2) ** 2 < radius**2
    return np.fft.ifftshift(inside)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_frequency_numbers_are_those_of_numpy(size):
    assert frequency_numbers(size).tolist() == np.rint(np.fft.fftfreq(size) * size).tolist()


@pytest.mark.parametrize(("size", "radius"), [(32, 5), (32, 15.9), (31, 4.5), (224, 16)])
def test_a_circle_is_kept_or_taken_away(size, radius):
    low, high = (hidden([3], size=size, radius=radius, low_pass_share=share)[0].numpy() for share in (1.0, 0.0))
    assert (high == circle(size, radius)).all()
    assert (low == ~circle(size, radius)).all()


def test_a_mask_depends_on_seed_row_and_epoch_alone():
    rows = np.arange(400)
    whole = hidden(rows)
    picked = [399, 7, 7, 120]
    assert torch.equal(hidden(picked), whole[picked])
    low = ~whole[:, 0, 0]  # the mean is kept by low-pass filters
    assert 0.4 < low.float().mean() < 0.6
    for other in (hidden(rows, seed=1), hidden(rows, epoch=1)):
        assert 0.3 < (~other[:, 0, 0] == low).float().mean() < 0.7
    assert 0.1 < (~hidden(rows, low_pass_share=0.2)[:, 0, 0]).float().mean() < 0.3


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_corrupted_images_are_those_of_numpy(channels):
    images = normalised_of(images_of(6, channels))
    mask = hidden(np.arange(6), seed=2)
    assert len({bool(value) for value in mask[:, 0, 0]}) == 2  # both kinds are among them
    found = corrupt(images, mask).numpy()
    for b in range(6):
        for c in range(channels):
            spectrum = np.fft.fft2(images[b, c].numpy())
            spectrum[mask[b].numpy()] = 0
            expected = np.fft.ifft2(spectrum)
            assert np.abs(expected.imag).max() < 1e-6
            np.testing.assert_allclose(found[b, c], expected.real, atol=1e-5)


def test_low_and_high_pass_add_up_to_the_image_and_share_its_energy():
    images = normalised_of(images_of())
    low, high = (corrupt(images, hidden([0, 1, 2], low_pass_share=share)) for share in (1.0, 0.0))
    torch.testing.assert_close(low + high, images, atol=1e-5, rtol=0)
    energy = [part.square().sum((1, 2, 3)) for part in (low, high, images)]
    torch.testing.assert_close(energy[0] + energy[1], energy[2])
    assert torch.allclose(high.mean((2, 3)), torch.zeros(3, 3), atol=1e-5)


def test_corruption_is_float32_and_in_one_graph():
    images, mask = normalised_of(images_of()), hidden([0, 1, 2])
    plain = corrupt(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(corrupt(images, mask), plain)
    assert corrupt(images.bfloat16(), mask).dtype == torch.float32
    assert torch.equal(torch.compile(corrupt, fullgraph=True, backend="eager")(images, mask), plain)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"radius": 0}, "radius of 0 is not within"),
        ({"radius": 17}, "radius of 17 .* ends at 16 cycles"),
        ({"low_pass_share": 1.5}, "low-pass share of 1.5"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hidden([0], **kwargs)
