"""The error of spectra against numpy.fft."""

import numpy as np
import pytest
import torch
from tiny_images import SIZE, TOKEN, assert_float32_and_whole_graph, images_of, normalised_of, statistics_of

from wavemim.masking import Frequencies, corrupt, hidden_frequencies, share_at
from wavemim.targets import FourierTarget, PixelTarget, Tap
from wavemim.targets.base import from_positions

ONE = [Tap(0, 1)]
FOUR = [Tap(1, 1), Tap(2, 1), Tap(3, 2), Tap(4, 3)]
GRID = SIZE // TOKEN

WHOLE = torch.ones(1, 16, dtype=torch.bool)  # everything is hidden


def make(images, taps=ONE, **kwargs):
    sizes = {tap.level: TOKEN for tap in taps}
    return FourierTarget(taps, statistics_of(images), image_size=SIZE, token_sizes=sizes, **kwargs)


def octave(level, coarsest, finest):
    """Frequencies of a tap, by a loop over signed frequency numbers."""
    numbers = np.rint(np.fft.fftfreq(SIZE) * SIZE)
    found = np.zeros((SIZE, SIZE), bool)
    for i, u in enumerate(numbers):
        for j, v in enumerate(numbers):
            largest = max(abs(u), abs(v))
            above = level == coarsest or largest > SIZE / 2 ** (level + 1)
            below = level == finest or largest <= SIZE / 2**level
            found[i, j] = above and below
    return found


def literal(predicted, truth, counted, *, gamma=1.0, focal=0.0, scaled_by=None):
    """Error of one image: predicted and true (C, H, W) as the network sees them, `counted` (H, W)."""
    errors = []
    for guess, plane in zip(predicted, truth, strict=True):
        spectra = [np.fft.fft2(values.astype(np.float64)) / SIZE for values in (guess, plane)]
        amplitude = np.abs(spectra[0] - spectra[1])
        if scaled_by is not None:
            amplitude = amplitude / np.sqrt((np.abs(spectra[1][scaled_by]) ** 2).mean())
        weight = amplitude[counted] ** focal
        errors.append(amplitude[counted] ** gamma * weight / (weight.max() if focal else 1))
    return np.concatenate(errors).mean()


def random_predictions(target, images, seed=0):
    torch.manual_seed(seed)
    return {level: torch.randn_like(values) for level, values in target(images, {}).items()}


def pixels_of(vectors, channels, side):
    return from_positions(vectors, channels, 1, side)[:, :, 0].numpy()


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("gamma", "focal"), [(1.0, 0.0), (2.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_predictions_are_put_into_the_image_and_compared_by_spectrum(channels, gamma, focal):
    images = images_of(channels=channels)
    inputs, target = normalised_of(images), make(images, gamma=gamma, focal=focal)
    prediction, truth = random_predictions(target, inputs)[0], target(inputs, {})[0]
    hidden = torch.rand(3, GRID**2) < 0.6
    found = target.error(0, prediction, truth, hidden.float())
    everywhere = np.ones((SIZE, SIZE), bool)
    guess = pixels_of(prediction, channels, TOKEN)
    at = hidden.reshape(3, GRID, GRID).numpy().repeat(TOKEN, 1).repeat(TOKEN, 2)[:, None]
    composite = np.where(at, guess, inputs.numpy())
    for b in range(3):
        expected = literal(composite[b], inputs[b].numpy(), everywhere, gamma=gamma, focal=focal)
        assert float(found[b]) == pytest.approx(expected, rel=1e-4)


def test_with_hidden_frequencies_everything_is_predicted_and_these_are_compared():
    images = images_of(6)
    inputs, target = normalised_of(images), make(images)
    prediction, truth = random_predictions(target, inputs)[0], target(inputs, {})[0]
    spectrum = hidden_frequencies(torch.arange(6), SIZE, radius=5, low_pass_share=0.5, seed=2, epoch=0)
    assert len({bool(value) for value in spectrum[:, 0, 0]}) == 2
    share = torch.rand(6, GRID**2)  # not looked at
    found = target.error(0, prediction, truth, share, spectrum=spectrum)
    guess = pixels_of(prediction, 3, TOKEN)
    for b in range(6):
        assert float(found[b]) == pytest.approx(literal(guess[b], inputs[b].numpy(), spectrum[b].numpy()), rel=1e-4)
    # what was kept may be answered by anything
    kept = corrupt(torch.from_numpy(guess), spectrum)
    answer = torch.from_numpy(guess) - kept + 3 * kept
    vectors = PixelTarget(ONE, statistics_of(images), image_size=SIZE, token_sizes={0: TOKEN})(answer, {})[0]
    again = target.error(0, vectors, truth, share, spectrum=spectrum)
    torch.testing.assert_close(again, found, atol=1e-5, rtol=1e-5)


def batch_mean(predicted, truth, spectrum):
    """MFM's loss of a batch, literally: the mean of |F(prediction) − F(truth)| over all removed frequencies of all images."""
    total, count = 0.0, 0
    for guess, true, removed in zip(predicted, truth, spectrum, strict=True):
        for plane, its in zip(guess, true, strict=True):
            total = total + torch.fft.fft2(plane - its, norm="ortho").abs()[removed].sum()
            count += int(removed.sum())
    return total / count


def kinds_of(number, *, radius, low_pass_share=0.5):
    """Images without the circle, images reduced to it, and their hidden frequencies (2 · number, H, W)."""
    low, high = (
        hidden_frequencies(torch.arange(number), SIZE, radius=radius, low_pass_share=share, seed=0, epoch=0)
        for share in (1.0, 0.0)
    )
    return torch.cat((high, low))


def gradients(loss, prediction):
    return torch.autograd.grad(loss, prediction)[0]


def test_over_frequencies_loss_and_gradient_shares_are_those_of_mfm():
    images, radius = images_of(6), 3
    inputs, spectrum = normalised_of(images), kinds_of(3, radius=radius)  # as many of one kind as of the other
    each, all_ = (make(images, average=kind, frequencies=Frequencies(radius)) for kind in ("image", "frequency"))
    truth, share = each(inputs, {})[0], torch.ones(6, GRID**2)
    prediction = (truth + torch.randn_like(truth)).requires_grad_()  # white: errs alike at all frequencies
    planes = from_positions(prediction, 3, 1, TOKEN)[:, :, 0]
    literal_loss = batch_mean(planes, inputs, spectrum)
    found = all_.error(0, prediction, truth, share, spectrum=spectrum).mean()
    torch.testing.assert_close(found, literal_loss)
    expected = gradients(literal_loss, prediction)
    torch.testing.assert_close(gradients(found, prediction), expected)

    def share_of_high_pass(gradient):
        squares = gradient.square().sum((1, 2))
        return float(squares[:3].sum() / squares.sum())

    inside, outside = int(spectrum[0].sum()), int(spectrum[-1].sum())
    per_image = gradients(each.error(0, prediction, truth, share, spectrum=spectrum).mean(), prediction)
    # |∂|d|/∂d| is 1 at every frequency: a sum over n of them has a gradient of squared norm n, a mean one of 1 / n.
    assert share_of_high_pass(expected) == pytest.approx(inside / (inside + outside), rel=1e-3)
    assert share_of_high_pass(per_image) == pytest.approx(outside / (inside + outside), rel=1e-3)
    weights = (expected[:3] / per_image[:3]).median() / (expected[3:] / per_image[3:]).median()
    assert float(weights) == pytest.approx(inside / outside, rel=1e-3)


@pytest.mark.parametrize("low_pass_share", [0.2, 1.0])
def test_over_frequencies_the_divisor_is_the_expected_number_whatever_the_batch(low_pass_share):
    images = images_of(4)
    frequencies = Frequencies(5, low_pass_share)
    inputs, target = normalised_of(images), make(images, FOUR, average="frequency", frequencies=frequencies)
    predictions, truth = random_predictions(target, inputs), target(inputs, {})
    many = hidden_frequencies(torch.arange(4000), SIZE, radius=5, low_pass_share=low_pass_share, seed=1, epoch=0)
    torch.testing.assert_close(frequencies.probability(SIZE).float(), many.float().mean(0), atol=0.03, rtol=0)
    for tap in FOUR:
        level, share = tap.level, torch.ones(truth[tap.level].shape[:2])
        errors = target.error(level, predictions[level], truth[level], share, spectrum=many[:4])
        ring = octave(level, 4, 1)
        expected = float(frequencies.probability(SIZE).numpy()[ring].sum())
        guess = pixels_of(predictions[level], 3, max(TOKEN, 2**level))
        for b in range(4):
            counted = ring & many[b].numpy()
            total = literal(guess[b], inputs[b].numpy(), counted) * counted.sum() if counted.any() else 0.0
            assert float(errors[b]) == pytest.approx(total / max(expected, 1), rel=1e-4)
        # parts of a batch, of gradient accumulation or of several workers, add up to the batch
        parts = [
            target.error(level, predictions[level][[b]], truth[level][[b]], share[[b]], spectrum=many[[b]])
            for b in range(4)
        ]
        torch.testing.assert_close(torch.cat(parts), errors)


def test_with_hidden_patches_both_averages_are_the_same():
    images = images_of()
    inputs, hidden = normalised_of(images), (torch.rand(3, GRID**2) < 0.5).float()
    each, all_ = (make(images, FOUR, average=kind) for kind in ("image", "frequency"))
    predictions, truth = random_predictions(each, inputs), each(inputs, {})
    for level in truth:
        share = share_at(hidden, GRID, each.positions(level))
        assert torch.equal(*(t.error(level, predictions[level], truth[level], share) for t in (each, all_)))


def test_squared_distances_are_squared_pixel_errors():
    """Parseval: with gamma 2 over all frequencies, the error is the mean squared error of the completed image."""
    images = images_of()
    inputs, target = normalised_of(images), make(images, gamma=2.0)
    prediction, truth = random_predictions(target, inputs)[0], target(inputs, {})[0]
    share = (torch.rand(3, GRID**2) < 0.5).float()
    expected = ((prediction - truth).square() * share[:, :, None]).mean((1, 2))
    torch.testing.assert_close(target.error(0, prediction, truth, share), expected)


@pytest.mark.parametrize("levels", [[1, 2, 3, 4], [2, 3, 4], [1, 3], [4, 1]])
def test_every_frequency_has_one_tap(levels):
    target = make(images_of(), [Tap(level, 1) for level in levels])
    rings = {level: target.frequencies(level).numpy() for level in levels}
    assert (sum(ring.astype(int) for ring in rings.values()) == 1).all()
    assert all(ring.any() for ring in rings.values())
    assert rings[max(levels)][0, 0]
    for level in levels:
        own = octave(level, max(levels), min(levels))
        assert rings[level][own].all()  # and with taps at neighbouring levels nothing else
        assert sorted(levels) != list(range(min(levels), max(levels) + 1)) or (rings[level] == own).all()


@pytest.mark.parametrize("normalise", ["dataset", "patch", "none"])
def test_each_tap_is_compared_in_its_octave(normalise):
    images = images_of()
    inputs, target = normalised_of(images), make(images, FOUR, normalise=normalise)
    predictions, truth = random_predictions(target, inputs), target(inputs, {})
    std = images.std((0, 2, 3))
    unit = std / std.mean() if normalise == "none" else np.ones(3)
    for tap in FOUR:
        ring = octave(tap.level, 4, 1)
        share = torch.ones(truth[tap.level].shape[:2])
        found = target.error(tap.level, predictions[tap.level], truth[tap.level], share)
        guess = pixels_of(predictions[tap.level], 3, max(TOKEN, 2**tap.level))
        for b in range(3):
            true = inputs[b].numpy() * unit[:, None, None]
            expected = literal(guess[b], true, ring, scaled_by=ring if normalise == "patch" else None)
            assert float(found[b]) == pytest.approx(expected, rel=1e-4)


def test_the_focal_weight_is_relative_to_the_frequencies_that_count_and_constant():
    images = images_of()
    inputs, target = normalised_of(images), make(images, FOUR, focal=1.0)
    truth = target(inputs, {})
    spectrum = hidden_frequencies(torch.arange(3), SIZE, radius=14, low_pass_share=1.0, seed=0, epoch=0)
    counted = octave(1, 4, 1) & spectrum[0].numpy()
    # an answer of 0 errs most at low frequencies, which do not count
    guess = torch.zeros_like(truth[1]).requires_grad_()
    found = target.error(1, guess, truth[1], torch.ones(truth[1].shape[:2]), spectrum=spectrum)
    for b in range(3):
        expected = literal(np.zeros_like(inputs[b]), inputs[b].numpy(), counted, focal=1.0)
        assert float(found[b].detach()) == pytest.approx(expected, rel=1e-4)
    # its derivative along some direction, by differences of Σ w·|d| in which w stays as it is
    found.sum().backward()
    along = torch.randn_like(guess)
    true, step = inputs.numpy().astype(np.float64), 1e-4 * pixels_of(along, 3, TOKEN).astype(np.float64)
    here, before, after = (
        np.abs(np.fft.fft2(values) / SIZE)[..., counted] for values in (true, true + step, true - step)
    )
    weight = here / here.max(-1, keepdims=True)
    expected = ((weight * (after - before)).mean((1, 2)) / 2e-4).sum()
    assert float((guess.grad * along).sum()) == pytest.approx(expected, rel=1e-3)


def test_an_octave_of_which_nothing_is_hidden_has_no_error():
    images = images_of()
    inputs, target = normalised_of(images), make(images, FOUR)
    predictions, truth = random_predictions(target, inputs), target(inputs, {})
    inside = hidden_frequencies(torch.arange(3), SIZE, radius=4, low_pass_share=0.0, seed=0, epoch=0)
    share = torch.ones(truth[1].shape[:2])
    assert target.error(1, predictions[1], truth[1], share, spectrum=inside).tolist() == [0, 0, 0]
    assert (target.error(4, predictions[4], truth[4], torch.ones(truth[4].shape[:2]), spectrum=inside) > 0).all()


def test_gradients_reach_hidden_positions_alone():
    images = images_of()
    inputs, target = normalised_of(images), make(images, focal=1.0)
    prediction, truth = random_predictions(target, inputs)[0].requires_grad_(), target(inputs, {})[0]
    hidden = torch.rand(3, GRID**2) < 0.5
    target.error(0, prediction, truth, hidden.float()).sum().backward()
    assert torch.equal((prediction.grad != 0).any(-1), hidden)
    # where the prediction is the truth, the distance has no direction, but its gradient is a number
    exact = truth.clone().requires_grad_()
    target.error(0, exact, truth, hidden.float()).sum().backward()
    assert torch.isfinite(exact.grad).all()


def test_a_part_of_the_positions_is_predicted_and_the_others_keep_the_truth():
    images = images_of()
    inputs, target = normalised_of(images), make(images)
    prediction, truth = random_predictions(target, inputs)[0], target(inputs, {})[0]
    index = torch.stack([torch.randperm(GRID**2)[:5] for _ in range(3)])
    share = torch.rand(3, GRID**2)
    found = target.error(0, torch.stack([prediction[b, index[b]] for b in range(3)]), truth, share, index)
    completed = truth.clone()
    for b in range(3):
        for position in index[b]:
            part = share[b, position]
            completed[b, position] = part * prediction[b, position] + (1 - part) * truth[b, position]
    image = pixels_of(completed, 3, TOKEN)
    for b in range(3):
        expected = literal(image[b], inputs[b].numpy(), np.ones((SIZE, SIZE), bool))
        assert float(found[b]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalise", ["dataset", "patch", "none"])
def test_pictures_of_the_truth_add_up_to_the_images(normalise):
    images = images_of()
    inputs = normalised_of(images)
    one, four = make(images, normalise=normalise), make(images, FOUR, normalise=normalise)
    np.testing.assert_allclose(one.picture(0, one(inputs, {})[0], inputs, {}, WHOLE), images, atol=0.01)
    truth = four(inputs, {})
    mean = images.mean((0, 2, 3))[:, None, None]
    parts = [four.picture(level, truth[level], inputs, {}, WHOLE).numpy() - mean for level in truth]
    np.testing.assert_allclose(sum(parts) + mean, images, atol=0.02)
    for part, tap in zip(parts, FOUR, strict=True):
        spectrum = np.abs(np.fft.fft2(part))
        assert spectrum[..., ~octave(tap.level, 4, 1)].max() < 1e-3 * spectrum.max()


def test_rebuilt_images_keep_what_is_visible():
    images = images_of()
    inputs, target = normalised_of(images), make(images, FOUR)
    predictions = random_predictions(target, inputs)
    whole = torch.ones(3, GRID**2, dtype=torch.bool)
    everything = target.rebuild(predictions, inputs, {}, whole).numpy()
    mean = images.mean((0, 2, 3))[:, None, None]
    parts = [target.picture(level, predictions[level], inputs, {}, WHOLE).numpy() - mean for level in predictions]
    np.testing.assert_allclose(everything, sum(parts) + mean, atol=0.02)
    mask = torch.rand(3, GRID**2) < 0.5
    at = mask.reshape(3, 1, GRID, GRID).repeat_interleave(TOKEN, 2).repeat_interleave(TOKEN, 3)
    rebuilt = target.rebuild(predictions, inputs, {}, mask).numpy()
    visible = np.broadcast_to(~at.numpy(), images.shape)
    np.testing.assert_allclose(rebuilt[visible], images[visible], atol=0.02)
    # Predictions that are right where they are asked for give the image, whatever they are elsewhere: as in the error.
    right = {}
    for level, true in target(inputs, {}).items():
        hidden = share_at(mask, GRID, target.positions(level))[:, :, None]
        right[level] = torch.where(hidden > 0, true, torch.randn_like(true))
        assert target.error(level, right[level], true, hidden[:, :, 0]).max() < 1e-4
    if all(target.positions(level) >= GRID for level in right):
        np.testing.assert_allclose(target.rebuild(right, inputs, {}, mask), images, atol=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 0}, "target.gamma=0"),
        ({"focal": -1}, "target.focal=-1"),
        ({"taps": [Tap(0, 1), Tap(2, 2)]}, "target.taps.0"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(images_of(), **kwargs)


@pytest.mark.parametrize("normalise", ["dataset", "patch", "none"])
def test_in_float32_and_in_one_graph(normalise):
    images = images_of(channels=5)
    inputs = normalised_of(images)
    assert_float32_and_whole_graph(make(images, FOUR, normalise=normalise, focal=1.0), inputs)
    spectrum = hidden_frequencies(torch.arange(3), SIZE, radius=5, low_pass_share=0.5, seed=0, epoch=0)
    assert_float32_and_whole_graph(make(images, normalise=normalise), inputs, spectrum=spectrum)
