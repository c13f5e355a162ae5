"""Several masks for each image: their mean loss, disjoint visible parts, and the target computed once."""

from collections import Counter

import pytest
import torch
from tiny import make_step, photos, stored

from pipeline.config.load import load
from pipeline.errors import SettingError
from wavemim.masking import Masking, hidden_frequencies
from wavemim.model import DecoderSettings
from wavemim.wavelets import decompose

KINDS = {
    "plain": {},
    "partial": {"decoder": DecoderSettings(16, 1, 2, predict=0.4)},
    "partial cross-attention": {"decoder": DecoderSettings(16, 1, 2, attention="cross", predict=0.4)},
    "mask tokens": {"sees": "masked"},
    "learned weights": {"weighting": "learned"},
}
ROWS, WEIGHT = torch.tensor([3, 8, 2, 5]), torch.tensor([1.0, 1.0, 0.0, 1.0])  # the third only fills up the batch


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_of_those_of_the_masks_by_themselves(kind):
    images = photos(4)
    step = make_step(images, masks=2, **KINDS[kind])
    model, views = step.model, step.views
    found = step.backward(stored(images), ROWS, WEIGHT, 3.0, epoch=5)
    together = gradients(model)
    model.zero_grad(set_to_none=True)
    view = views(stored(images), ROWS, epoch=5)
    index = model.chosen(view.mask, ROWS, seed=0, epoch=5)
    losses = []
    for number, part in enumerate((slice(0, 4), slice(4, 8))):
        mask = views.masking(ROWS, view.pyramid, seed=0, epoch=5, number=number)
        chosen = {level: places[part] for level, places in index.items()}
        assert all(mask.gather(1, chosen[2]).all() for _ in chosen)
        targets = model.target(view.images, view.pyramid)
        loss, parts = model(view.images, targets, mask, WEIGHT / 3, model.level_weights.at(0), chosen)
        (loss / 2).backward()
        losses.append(parts.detach())
    torch.testing.assert_close(found, torch.stack(losses).mean(0))
    assert not torch.allclose(losses[0], losses[1])
    for name, expected in gradients(model).items():
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    first = make_step(images, **KINDS[kind]).model.chosen(view.mask[:4], ROWS, seed=0, epoch=5)
    assert all(torch.equal(first[level], places[:4]) for level, places in index.items())  # as with a single mask
    assert all(not torch.equal(places[:4], places[4:]) for places in index.values())


@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(count):
    images = photos(4)
    whole, split = (make_step(images, masks=3) for _ in range(2))
    split.accumulate = count
    losses = [step.backward(stored(images), ROWS, WEIGHT, 3.0, epoch=1) for step in (whole, split)]
    torch.testing.assert_close(*losses)
    for name, expected in gradients(whole.model).items():
        torch.testing.assert_close(gradients(split.model)[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_targets_are_computed_once_for_each_image(monkeypatch):
    images = photos(4)
    step = make_step(images, masks=3)
    asked, forward = [], step.model.target.forward
    monkeypatch.setattr(
        step.model.target, "forward", lambda seen, pyramid: asked.append(len(seen)) or forward(seen, pyramid)
    )
    step.backward(stored(images), ROWS, WEIGHT, 3.0, epoch=0)
    assert asked == [4]


@pytest.mark.parametrize(("ratio", "fit"), [(0.75, 4), (0.6, 2), (0.9, 10), (0.4, 1), (0.5, 2)])
@pytest.mark.parametrize("unit", [1, 2])
def test_visible_parts_are_disjoint_as_far_as_they_can_be(ratio, fit, unit):
    masking = Masking("block", ratio, 10 * unit, unit)
    rows = torch.arange(6)
    masks = [masking(rows, {}, seed=2, epoch=1, number=number) for number in range(2 * fit)]
    assert all((mask.sum(1) == masking.hidden).all() for mask in masks)
    for start in (0, fit):
        seen = sum((~mask).int() for mask in masks[start : start + fit])
        assert seen.max() == 1 and (seen.sum(1) == fit * (100 * unit**2 - masking.hidden)).all()
    assert len({mask.numpy().tobytes() for mask in masks}) == 2 * fit  # after as many as fit, new ones
    alone = [masking(rows[4:5], {}, seed=2, epoch=1, number=number)[0] for number in range(2 * fit)]
    assert all(torch.equal(mask[4], one) for mask, one in zip(masks, alone, strict=True))
    overlap = (~masks[0] & ~masks[fit]).sum(1).float().mean() / (100 * unit**2 - masking.hidden)
    assert 0.3 * (1 - ratio) < overlap < min(1.7 * (1 - ratio), 0.9)  # independent of those before


def test_energy_masks_all_prefer_detail():
    images = torch.from_numpy(photos(32, size=64)).float()
    images[:, :, :, :32] = images[:, :, :, :32].mean((2, 3), keepdim=True)  # the left half is flat
    pyramid, masking = decompose(images, 3), Masking("energy", 0.5, 8, 1, 1.0)
    masks = [masking(torch.arange(32), pyramid, seed=0, epoch=0, number=number) for number in range(3)]
    for mask in masks:
        assert (mask.sum(1) == 32).all() and mask.reshape(32, 8, 8)[:, :, 4:].float().mean() > 0.9
    assert len({mask.numpy().tobytes() for mask in masks}) == 3


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
def test_spectra_are_complements_as_often_as_they_can_be(share):
    rows = torch.arange(4000)
    low = [
        ~hidden_frequencies(rows, 8, radius=2, low_pass_share=share, seed=0, epoch=0, number=number)[:, 0, 0]
        for number in range(2)
    ]
    for one in low:
        assert abs(one.float().mean() - share) < 0.03
    same = Counter(zip(low[0].tolist(), low[1].tolist(), strict=True))
    assert same[True, True] == 0 if share <= 0.5 else same[False, False] == 0
    assert share != 0.5 or same[False, False] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mask.count=3"], "mask.count=3: a low-pass share of 0.5 allows 2 different masks of an image; use at most 2"),
        (
            ["mask.count=2", "mask.low_pass_share=0"],
            "mask.count=2: a low-pass share of 0 allows 1 different mask of an",
        ),
    ],
)
def test_more_spectra_than_there_are_is_refused(settings, message):
    recipe = ["mask.kind=frequency", "mask.radius=8"]
    with pytest.raises(SettingError) as caught:
        load("small", [*recipe, *settings])
    assert str(caught.value).startswith(message)
    load("small", [*recipe, "mask.count=2"])
    load("small", ["mask.count=9"])
