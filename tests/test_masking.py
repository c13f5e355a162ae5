"""Masks: exact in ratio, a pure function of (seed, epoch, row), and right at every grid."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavemim.masking import hidden_count, random_mask, share_at, visible_indices_of
from wavemim.randomness import uniform


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
