"""Weights of levels: fixed, moving over training, learned."""

import math

import pytest
import torch
from tiny import make_step, photos, stored

from wavemim.level_weights import LevelWeights

LOSSES = torch.tensor([0.9, 0.5, 0.1])
ONE = torch.tensor(1.0)


def test_fixed_weights_are_the_weighted_sum():
    weights = LevelWeights([1.0, 0.0, 4.0])
    for progress in (0.0, 0.4, 1.0):
        assert weights(LOSSES, weights.at(progress), ONE).item() == pytest.approx(0.9 + 0.4)
        assert weights.effective(progress).tolist() == [1.0, 0.0, 4.0]
    assert not list(weights.parameters())


def test_levels_come_in_from_coarse_to_fine_and_back():
    down, up = LevelWeights([1.0, 2.0, 4.0], "coarse_to_fine"), LevelWeights([1.0, 2.0, 4.0], "fine_to_coarse")
    assert down.at(0).tolist() == [0, 0, 4]
    assert up.at(0).tolist() == [1, 0, 0]
    assert down.at(1 / 6).tolist() == pytest.approx([0, 1, 4])
    assert down.at(1 / 2).tolist() == pytest.approx([0.5, 2, 4])
    for progress in (2 / 3, 0.9, 1.0):
        assert down.at(progress).tolist() == pytest.approx([1, 2, 4]) == up.at(progress).tolist()
    for kind in ("coarse_to_fine", "fine_to_coarse"):
        assert LevelWeights([3.0], kind).at(0).tolist() == [3]


def test_learned_weights_settle_where_the_uncertainty_is_the_loss():
    """The minimum of (exp(-s)·loss + s)/2 is at s = log(loss), so that each level counts by 1/(2·loss)."""
    weights = LevelWeights([1.0, 1.0, 1.0], "learned")
    optimizer = torch.optim.LBFGS(weights.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = weights(LOSSES, weights.at(0), ONE)
        total.backward()
        return total

    optimizer.step(closure)
    assert weights.log_variance.tolist() == pytest.approx([math.log(loss) for loss in LOSSES.tolist()], abs=1e-3)
    assert weights.effective(0).tolist() == pytest.approx([0.5 / loss for loss in LOSSES.tolist()], rel=1e-3)


def test_workers_and_padding_add_up_in_learned_weights():
    """Two halves of a batch, each with its share of the weight, sum to the whole."""
    weights = LevelWeights([1.0, 2.0, 3.0], "learned")
    with torch.no_grad():
        weights.log_variance.copy_(torch.tensor([0.3, -0.2, 0.1]))
    whole = weights(LOSSES, weights.at(0), ONE)
    halves = weights(LOSSES * 0.75, weights.at(0), ONE * 0.75) + weights(LOSSES * 0.25, weights.at(0), ONE * 0.25)
    assert halves.item() == pytest.approx(whole.item())


def test_training_learns_them_without_decay():
    images = photos(8)
    step = make_step(images, weighting="learned")
    (group,) = [
        group
        for group in step.optimizer.param_groups
        if any(p is step.model.level_weights.log_variance for p in group["params"])
    ]
    assert group["weight_decay"] == 0
    for i in range(8):
        step(stored(images), torch.arange(8), torch.ones(8), 8.0, epoch=0, step=i)
    assert (step.model.level_weights.log_variance != 0).all()


def test_a_level_of_no_weight_yet_trains_nothing_of_its_own():
    images = photos(8)
    step = make_step(images, weighting="coarse_to_fine", steps=90)
    before = step.model.decoders["1"].head.weight.clone()
    step.backward(stored(images), torch.arange(8), torch.ones(8), 8.0, epoch=0, progress=0.0)
    assert (step.model.decoders["1"].head.weight.grad == 0).all()
    assert (step.model.decoders["3"].head.weight.grad != 0).any()
    step.backward(stored(images), torch.arange(8), torch.ones(8), 8.0, epoch=0, progress=1.0)
    assert (step.model.decoders["1"].head.weight.grad != 0).any()
    assert torch.equal(before, step.model.decoders["1"].head.weight)
