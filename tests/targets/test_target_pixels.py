"""Pixels against a literal loop."""

import numpy as np
import pytest
import torch
from tiny_images import SIZE, TOKEN, assert_float32_and_whole_graph, images_of, normalised_of, statistics_of

from wavemim.targets import PixelTarget, Tap

# level 0: the token itself; 2: cells finer than a token; 3: equal; 4: coarser
TAPS = [Tap(0, 3), Tap(2, 1), Tap(3, 2), Tap(4, 3)]
NORMALISE = ["dataset", "patch", "none"]

WHOLE = torch.ones(1, 16, dtype=torch.bool)  # everything is hidden


def make(images, taps=TAPS, **kwargs):
    sizes = {tap.level: TOKEN for tap in taps}
    return PixelTarget(taps, statistics_of(images), image_size=SIZE, token_sizes=sizes, **kwargs)


def literal(images, level, normalise):
    """Vectors (B, P², D) in float64, one position and one cell at a time, straight from the pixels."""
    cell = 2**level if level else TOKEN
    side = max(cell, TOKEN)
    mean, std = images.astype(np.float64).mean((0, 2, 3)), images.astype(np.float64).std((0, 2, 3))
    found = []
    for image in images.astype(np.float64):
        planes = [(image[c] - mean[c]) / (std.mean() if normalise == "none" else std[c]) for c in range(len(image))]
        if normalise == "patch":
            for y in range(0, SIZE, cell):
                for x in range(0, SIZE, cell):
                    values = np.concatenate([plane[y : y + cell, x : x + cell].ravel() for plane in planes])
                    for plane in planes:
                        patch = plane[y : y + cell, x : x + cell]
                        patch[:] = (patch - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
        found.append(
            [
                np.concatenate([plane[y : y + side, x : x + side].ravel() for plane in planes])
                for y in range(0, SIZE, side)
                for x in range(0, SIZE, side)
            ]
        )
    return np.array(found)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("normalise", NORMALISE)
def test_targets_equal_a_literal_loop(normalise, channels):
    images = images_of(channels=channels)
    target = make(images, normalise=normalise)
    made = target(normalised_of(images), {})
    for tap in TAPS:
        expected = literal(images, tap.level, normalise)
        assert made[tap.level].shape == (3, target.positions(tap.level) ** 2, target.values(tap)) == expected.shape
        np.testing.assert_allclose(made[tap.level].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("loss", ["l2", "l1", "smooth_l1"])
def test_the_error_is_that_of_hidden_patches(loss):
    """MAE's loss: the mean over a patch's values, then over hidden patches alone."""
    images = images_of()
    target = make(images, [Tap(0, 1)], normalise="patch", loss=loss)
    truth = literal(images, 0, "patch")
    rng = np.random.default_rng(0)
    guess, hidden = rng.normal(size=truth.shape), rng.random(truth.shape[:2]) < 0.6
    found = target.error(
        0, torch.from_numpy(guess), target(normalised_of(images), {})[0], torch.from_numpy(hidden).float()
    )
    for b in range(len(images)):
        errors = []
        for position in np.flatnonzero(hidden[b]):
            off = np.abs(guess[b, position] - truth[b, position])
            each = {"l2": off**2, "l1": off, "smooth_l1": np.where(off < 1, off**2 / 2, off - 0.5)}[loss]
            errors.append(each.mean())
        assert float(found[b]) == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_pictures_of_the_truth_are_the_images(normalise):
    images = images_of()
    target, inputs = make(images, normalise=normalise), normalised_of(images)
    made = target(inputs, {})
    for tap in TAPS:
        np.testing.assert_allclose(
            target.picture(tap.level, made[tap.level], inputs, {}, WHOLE).numpy(), images, atol=0.02
        )


def test_rebuilt_images_mix_the_input_with_the_deepest_prediction():
    images = images_of()
    taps = [Tap(2, 1), Tap(3, 3), Tap(4, 3)]
    target, inputs = make(images, taps), normalised_of(images)
    torch.manual_seed(0)
    predictions = {level: torch.randn_like(values) for level, values in target(inputs, {}).items()}
    mask = torch.rand(3, (SIZE // TOKEN) ** 2) < 0.5
    rebuilt = target.rebuild(predictions, inputs, {}, mask).numpy()
    guess = target.picture(3, predictions[3], inputs, {}, WHOLE).numpy()
    hidden = mask.reshape(3, SIZE // TOKEN, SIZE // TOKEN).numpy().repeat(TOKEN, 1).repeat(TOKEN, 2)
    for c in range(3):
        np.testing.assert_allclose(rebuilt[:, c], np.where(hidden, guess[:, c], images[:, c]), atol=0.01)
    shallow = target.rebuild({2: predictions[2]}, inputs, {}, torch.ones_like(mask))
    np.testing.assert_allclose(shallow, target.picture(2, predictions[2], inputs, {}, WHOLE), atol=0.01)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_in_float32_and_in_one_graph(normalise):
    images = images_of(channels=5)
    assert_float32_and_whole_graph(make(images, normalise=normalise), normalised_of(images))
