"""Masks: exact in ratio, a pure function of (seed, epoch, row), and right at every grid."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import photos

from wavemim.constraints import hidden_count
from wavemim.masking import Masking, detail_energy, energy_mask, random_mask, share_at, visible_indices_of
from wavemim.randomness import uniform
from wavemim.wavelets import decompose


def patchy(n=8, seed=0, size=64):
    """Photo-like images (n, 3, size, size), float32, whose left half has more detail; a corner is flat."""
    images = photos(n, seed, size).astype(np.float32)
    rng = np.random.default_rng(seed + 1)
    images[:, :, :, : size // 2] = np.clip(
        images[:, :, :, : size // 2] + rng.normal(0, 30, (n, 3, size, size // 2)), 0, 255
    )
    images[:, :, -size // 4 :, -size // 4 :] = 128
    return torch.from_numpy(images)


@settings(max_examples=30, deadline=None)
@given(grid=st.integers(2, 14), ratio=st.floats(0.05, 0.95), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**40))
def test_ratio_is_exact(grid, ratio, epoch, seed):
    mask = random_mask(torch.arange(9), grid, ratio, seed=seed, epoch=epoch)
    assert (mask.sum(1) == hidden_count(grid * grid, ratio)).all()


def test_mask_of_an_image_does_not_depend_on_its_batch():
    rows = torch.tensor([5, 900, 17, 3])
    together = random_mask(rows, 8, 0.75, seed=1, epoch=4)
    for row, mask in zip(rows, together, strict=True):
        assert torch.equal(random_mask(row[None], 8, 0.75, seed=1, epoch=4)[0], mask)
    assert not torch.equal(random_mask(rows, 8, 0.75, seed=1, epoch=5), together)
    assert not torch.equal(random_mask(rows, 8, 0.75, seed=2, epoch=4), together)


def test_numbers_are_uniform_and_uncorrelated():
    u = uniform(3, "mask", 0, torch.arange(4000), 64).double().numpy()
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    expected = u.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-square, 49 degrees of freedom: 99.998 %
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:]), (u, uniform(3, "window", 0, torch.arange(4000), 64).numpy())):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_every_token_is_hidden_equally_often():
    share = random_mask(torch.arange(20000), 4, 0.5, seed=0, epoch=0).float().mean(0)
    assert (share - 0.5).abs().max() < 0.02


def test_visible_indices_are_the_complement():
    mask = random_mask(torch.arange(50), 6, 0.7, seed=0, epoch=0)
    visible = visible_indices_of(mask, 36 - hidden_count(36, 0.7))
    for line, indices in zip(mask, visible, strict=True):
        assert indices.tolist() == (~line).nonzero().flatten().tolist()


def test_share_at_other_grids():
    mask = random_mask(torch.arange(5), 8, 0.6, seed=0, epoch=0)
    grid = mask.reshape(5, 8, 8).double().numpy()
    assert np.array_equal(share_at(mask, 8, 8).reshape(5, 8, 8).numpy(), grid)
    assert np.array_equal(share_at(mask, 8, 16).reshape(5, 16, 16).numpy(), np.kron(grid, np.ones((1, 2, 2))))
    pooled = grid.reshape(5, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(share_at(mask, 8, 4).reshape(5, 4, 4).numpy(), pooled, atol=1e-7)


def blocks_of(mask, grid, unit):
    """Masks (B, G²) as (B, blocks, unit²)."""
    side = grid // unit
    return mask.reshape(-1, side, unit, side, unit).permute(0, 1, 3, 2, 4).reshape(len(mask), side**2, unit**2)


masks = st.tuples(
    st.sampled_from(["random", "block", "energy"]), st.integers(1, 4), st.integers(2, 6), st.floats(0.05, 0.95)
).filter(lambda drawn: 0 < hidden_count(drawn[2] ** 2, drawn[3]) < drawn[2] ** 2)


@settings(max_examples=60, deadline=None)
@given(drawn=masks, strength=st.floats(-3, 3), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_every_kind_is_exact_in_ratio_and_hides_whole_blocks(drawn, strength, seed, epoch):
    kind, unit, side, ratio = drawn
    grid = unit * side
    masking = Masking(kind, ratio, grid, unit, strength)
    noise = np.random.default_rng(seed).normal(size=(5, 2, 4 * grid, 4 * grid))
    pyramid = decompose(torch.from_numpy(noise).float(), 2)
    mask = masking(torch.arange(5), pyramid, seed=seed, epoch=epoch)
    assert mask.shape == (5, grid * grid) and mask.dtype == torch.bool
    blocks = blocks_of(mask, grid, unit)
    assert torch.equal(blocks.all(2), blocks.any(2))
    assert (blocks.all(2).sum(1) == hidden_count(side**2, ratio)).all()
    assert (mask.sum(1) == masking.hidden).all()


def test_a_unit_of_one_hides_the_same_as_ever():
    """Bit for bit: a run that was started earlier goes on with its masks."""
    mask = random_mask(torch.tensor([0, 7, 123456789]), 4, 0.75, seed=3, epoch=11)
    noise = uniform(3, "mask", 11, torch.tensor([0, 7, 123456789]), 16).numpy()
    expected = np.zeros((3, 16), bool)
    np.put_along_axis(expected, noise.argsort(1, kind="stable")[:, :12], True, 1)
    assert np.array_equal(mask.numpy(), expected)
    visible = [[7, 9, 12, 14], [0, 4, 6, 12], [4, 7, 11, 15]]
    assert (~mask).nonzero()[:, 1].reshape(3, 4).tolist() == visible


@pytest.mark.parametrize("kind", ["block", "energy"])
def test_a_mask_is_a_function_of_seed_epoch_row_and_its_own_image(kind):
    images = patchy(6)
    rows = torch.tensor([5, 900, 17, 3, 10**9, 44])
    masking = Masking(kind, 0.5, 16, 2, 1.5)
    together = masking(rows, decompose(images, 5), seed=1, epoch=4)
    for image, row, mask in zip(images, rows, together, strict=True):
        assert torch.equal(masking(row[None], decompose(image[None], 5), seed=1, epoch=4)[0], mask)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(masking(rows[order], decompose(images[order], 5), seed=1, epoch=4), together[order])
    assert not torch.equal(masking(rows, decompose(images, 5), seed=1, epoch=5), together)
    assert not torch.equal(masking(rows, decompose(images, 5), seed=2, epoch=4), together)
    other = masking(rows, decompose(images.flip(-1), 5), seed=1, epoch=4)
    assert torch.equal(other, together) == (kind == "block")


def deviations(images, cells):
    """Sum of squared deviations from the mean of each cell and channel, summed over channels: (B, cells²)."""
    side = images.shape[-1] // cells
    out = np.zeros((len(images), cells * cells))
    for b, image in enumerate(np.asarray(images, np.float64)):
        for i in range(cells):
            for j in range(cells):
                patch = image[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
                out[b, i * cells + j] = ((patch - patch.mean((1, 2), keepdims=True)) ** 2).sum()
    return out


@pytest.mark.parametrize("cells", [4, 8, 16])
@pytest.mark.parametrize("levels", [4, 5])
def test_haar_energy_is_the_deviation_from_the_mean_of_a_cell(cells, levels):
    images = patchy(3)
    energy = detail_energy(decompose(images, levels), cells)
    np.testing.assert_allclose(energy.numpy(), deviations(images, cells), rtol=1e-5, atol=1e-2)
    # A pyramid whose levels all hold their A, as of windows that are cut on the device.
    whole = {}
    for level in range(1, levels + 1):
        top = decompose(images, level)
        whole[level] = top[level]
    assert torch.equal(detail_energy(whole, cells), energy)


def test_levels_with_larger_cells_than_the_masks_do_not_count():
    images = patchy(2)
    pyramid = decompose(images, 5)
    for level in (4, 5):
        pyramid[level] = pyramid[level] * 0 + 1e6
    np.testing.assert_allclose(detail_energy(pyramid, 8).numpy(), deviations(images, 8), rtol=1e-5, atol=1e-2)
    # Cells of 16 pixels hold three levels and the fourth; without the finest only what is left of it.
    coarse = {level: values for level, values in decompose(images, 5).items() if level > 1}
    small = images.reshape(2, 3, 32, 2, 32, 2).mean((3, 5)) * 2
    np.testing.assert_allclose(detail_energy(coarse, 4).numpy(), deviations(small, 4), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("wavelet", ["db2", "bior2.2", "sym4"])
def test_energy_of_other_wavelets_is_where_the_detail_is(wavelet):
    rng = np.random.default_rng(0)
    amplitude = np.kron(rng.uniform(0, 1, (6, 1, 8, 8)) ** 2, np.ones((8, 8)))
    images = 128 + 60 * amplitude * rng.normal(size=(6, 3, 64, 64))
    bands = pywt.wavedec2(images, wavelet, "periodization", level=3)
    pyramid = {3 - i: torch.from_numpy(np.stack(details, 2)).float() for i, details in enumerate(bands[1:])}
    energy, expected = detail_energy(pyramid, 8).double().numpy(), deviations(images, 8)
    assert np.corrcoef(energy.ravel(), expected.ravel())[0, 1] > 0.95
    if pywt.Wavelet(wavelet).orthogonal:  # Parseval over the whole image
        total = sum((np.stack(details) ** 2).sum() for details in bands[1:])
        assert energy.sum() == pytest.approx(total, rel=1e-5)


def test_cells_that_do_not_meet_the_coefficients_share_them():
    """Patches of 14 pixels: 4 of them across 56 pixels, on levels of 28 and 14 coefficients a side."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.uniform(0, 255, (2, 3, 56, 56))).float()
    pyramid = decompose(images, 3)
    expected = np.zeros((2, 4, 4))
    for level, side in ((1, 28), (2, 14), (3, 7)):
        energy = (pyramid[level][:, :, -3:].double().numpy() ** 2).sum((1, 2))
        edges = np.arange(side + 1) * 2**level
        overlap = np.zeros((4, side))
        for cell in range(4):
            low, high = np.maximum(edges[:-1], cell * 14), np.minimum(edges[1:], cell * 14 + 14)
            overlap[cell] = np.maximum(high - low, 0) / 2**level
        expected += np.einsum("ci,bij,dj->bcd", overlap, energy, overlap)
    np.testing.assert_allclose(detail_energy(pyramid, 4).reshape(2, 4, 4).numpy(), expected, rtol=1e-5)


def chi_square(counts, probabilities):
    """The statistic over its degrees of freedom: about 1 where the counts come from the probabilities."""
    expected = counts.sum() * probabilities / probabilities.sum()
    return ((counts - expected) ** 2 / expected).sum() / (len(counts) - 1)


@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.0, 2.0])
def test_a_block_is_drawn_in_proportion_to_a_power_of_its_energy(strength):
    n = 40000
    energy = torch.linspace(1, 9, 9).repeat(n, 1)
    mask = energy_mask(energy, torch.arange(n), 3, 1 / 9, strength=strength, seed=0, epoch=0, floor=1e-6)
    counts = mask.sum(0).double().numpy()
    assert chi_square(counts, np.arange(1, 10.0) ** strength) < 3  # 8 degrees of freedom: 99.8 %
    assert chi_square(counts, np.arange(1, 10.0) ** (strength + 0.3)) > 10
    # The second of two is drawn in proportion among those that are left: inclusion of i is p_i (1 + Σ_j p_j / (1 - p_j)).
    pairs = energy_mask(energy, torch.arange(n), 3, 2 / 9, strength=strength, seed=0, epoch=0, floor=1e-6)
    p = np.arange(1, 10.0) ** strength
    p /= p.sum()
    odds = p / (1 - p)
    np.testing.assert_allclose(pairs.double().mean(0).numpy(), p * (1 + odds.sum() - odds), atol=0.01)


@pytest.mark.parametrize("energy", [0.0, 1e-3, 1e8])
def test_equal_energies_are_drawn_uniformly(energy):
    n = 20000
    mask = energy_mask(torch.full((n, 16), energy), torch.arange(n), 4, 0.5, strength=2.0, seed=0, epoch=0)
    assert chi_square(mask.sum(0).double().numpy(), np.ones(16)) < 3
    together = (mask[:, :1] & mask[:, 1:]).double().mean(0)
    assert (together - 8 / 16 * 7 / 15).abs().max() < 0.015


def test_strength_zero_is_the_random_mask():
    energy = torch.rand(50, 64) * 1e5
    mask = energy_mask(energy, torch.arange(50), 8, 0.6, strength=0.0, seed=4, epoch=2, unit=2)
    assert torch.equal(mask, random_mask(torch.arange(50), 8, 0.6, seed=4, epoch=2, unit=2))


def test_blocks_are_hidden_uniformly():
    mask = random_mask(torch.arange(20000), 8, 0.25, seed=0, epoch=0, unit=2)
    counts = blocks_of(mask, 8, 2).all(2).sum(0).double().numpy()
    assert chi_square(counts, np.ones(16)) < 3


@pytest.mark.parametrize("unit", [1, 2])
def test_the_sign_of_the_strength_says_where_the_detail_goes(unit):
    images = patchy(32)
    blocks = 8 // unit  # what is weighed is the energy of a block, of all levels as coarse as it
    pyramid, energy = decompose(images, 5), deviations(images, blocks)

    def hidden_energy(kind, strength=0.0):
        mask = Masking(kind, 0.5, 8, unit, strength)(torch.arange(32), pyramid, seed=0, epoch=0)
        return (energy * share_at(mask, 8, blocks).numpy()).sum() / energy.sum()

    shares = [hidden_energy("energy", strength) for strength in (-4, -1, 0, 1, 4)]
    assert shares == sorted(shares) and shares[2] == hidden_energy("random")
    most = np.sort(energy, 1)[:, blocks**2 // 2 :].sum() / energy.sum()  # no mask of half of the cells hides more
    assert abs(shares[2] - 0.5) < 0.03
    gained = [(share - 0.5) / (most - 0.5) for share in shares]  # of what a mask could gain
    assert -1 < gained[0] < -0.5 and gained[1] < -0.2 and gained[3] > 0.2 and 0.5 < gained[4] < 1


def test_flat_images_are_masked_at_random():
    pyramid = decompose(torch.full((4, 3, 32, 32), 77.0), 4)
    mask = Masking("energy", 0.5, 8, 1, 5.0)(torch.arange(4), pyramid, seed=0, epoch=0)
    assert torch.equal(mask, random_mask(torch.arange(4), 8, 0.5, seed=0, epoch=0))


@settings(max_examples=25, deadline=None)
@given(drawn=masks, to=st.sampled_from([0.5, 1, 2, 4]))
def test_the_share_at_every_grid_keeps_the_mean(drawn, to):
    kind, unit, side, ratio = drawn
    grid = 2 * unit * side
    pyramid = decompose(torch.from_numpy(np.random.default_rng(0).normal(size=(3, 1, 2 * grid, 2 * grid))).float(), 1)
    mask = Masking(kind, ratio, grid, 2 * unit)(torch.arange(3), pyramid, seed=0, epoch=0)
    share = share_at(mask, grid, int(grid * to))
    assert share.shape == (3, int(grid * to) ** 2)
    torch.testing.assert_close(share.mean(1), mask.float().mean(1))
    assert ((share == 0) | (share == 1)).all()  # the unit is two cells: whole at half of the grid


def test_frequency_asks_for_everything():
    masking = Masking("frequency", 0.75, 7, 2)  # neither ratio nor unit mean anything
    mask = masking(torch.arange(3), {}, seed=0, epoch=0)
    assert mask.shape == (3, 49) and mask.all() and masking.hidden == 49


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("random", 0.75, 14, 3), ["hidden block, 3,", "divisor of 14", "allowed are 1, 2, 7, 14"]),
        (("block", 0.6, 8, 0), ["hidden block, 0,", "divisor of 8"]),
        (("random", 0.01, 4, 1), ["ratio of 0.01", "0 of 16 blocks"]),
        (("energy", 0.9, 8, 4), ["ratio of 0.9", "4 of 4 blocks"]),
    ],
)
def test_a_mask_that_cannot_be_says_why(arguments, names):
    with pytest.raises(ValueError, match=r"hides|hidden") as raised:
        Masking(*arguments)
    assert all(name in str(raised.value) for name in names) and "\n" not in str(raised.value)


def test_energy_without_a_level_that_is_fine_enough_says_so():
    pyramid = decompose(torch.zeros(1, 1, 32, 32), 4)
    with pytest.raises(
        ValueError, match=r"finest level that is read, 4, has cells of 16 pixels, .* mask's cells have 4;"
    ):
        Masking("energy", 0.5, 8)(torch.arange(1), {4: pyramid[4]}, seed=0, epoch=0)


def test_low_precision_around_it_does_not_change_a_mask():
    pyramid = decompose(patchy(8), 4)
    masking = Masking("energy", 0.5, 16, 1, 1.0)
    plain = masking(torch.arange(8), pyramid, seed=0, epoch=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masking(torch.arange(8), pyramid, seed=0, epoch=0), plain)


def test_energy_masks_compile_to_one_graph(monkeypatch):
    # The noise is drawn from Python's integers, which a graph would hold as constants.
    noise = uniform(0, "mask", 0, torch.arange(8), 64)
    monkeypatch.setattr("wavemim.masking._noise", lambda *_: noise)
    masking, pyramid = Masking("energy", 0.5, 16, 2, 1.0), decompose(patchy(8), 4)

    def draw(rows, pyramid):
        return masking(rows, pyramid, seed=0, epoch=0)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.arange(8), pyramid), draw(torch.arange(8), pyramid))


@pytest.mark.parametrize("kind", ["random", "energy", "frequency"])
def test_nothing_waits_for_the_device(kind):
    """Tensors without values: whatever reads one of them on the host raises."""
    pyramid = {level: values.to("meta") for level, values in decompose(patchy(4), 4).items()}
    rows = torch.empty(4, dtype=torch.int64, device="meta")
    mask = Masking(kind, 0.75, 16, 2)(rows, pyramid, seed=0, epoch=3)
    assert mask.shape == (4, 256) and mask.device.type == "meta"
