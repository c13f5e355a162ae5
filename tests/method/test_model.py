"""The model and its step: what may and what may not influence what."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import PATCH, SIZE, TAPS, make, make_step, photos, statistics, stored

from wavemim.masking import random_mask, share_at
from wavemim.targets import Tap, WaveletTarget


def batch_of(images, model, inputs, ratio=0.5):
    normalised, pyramid = inputs(stored(images))
    mask = random_mask(torch.arange(len(images)), model.encoder.grid, ratio, seed=0, epoch=0)
    return normalised, pyramid, model.target(normalised, pyramid), mask


def losses_of(model, images, targets, mask, weight):
    return model(images, targets, mask, weight, model.level_weights.at(0))[1]


def test_visible_targets_do_not_change_the_loss():
    images = photos(4)
    model, inputs = make(images)
    normalised, _, targets, mask = batch_of(images, model, inputs)
    weight = torch.full((4,), 0.25)
    with torch.no_grad():
        before = losses_of(model, normalised, targets, mask, weight)
        for tap in TAPS:
            visible = share_at(mask, model.encoder.grid, model.target.positions(tap.level)) == 0
            assert visible.any()
            changed = {level: values.clone() for level, values in targets.items()}
            changed[tap.level][visible] += 100
            assert torch.equal(losses_of(model, normalised, changed, mask, weight), before)
            changed[tap.level][~visible] += 1
            assert not torch.equal(losses_of(model, normalised, changed, mask, weight), before)


def test_hidden_pixels_do_not_reach_the_model():
    images = photos(4)
    model, inputs = make(images)
    normalised, _, targets, mask = batch_of(images, model, inputs)
    normalised.requires_grad_()
    losses_of(model, normalised, targets, mask, torch.full((4,), 0.25)).sum().backward()
    hidden = share_at(mask, model.encoder.grid, SIZE).reshape(4, 1, SIZE, SIZE).bool().expand(-1, 3, -1, -1)
    assert (normalised.grad[hidden] == 0).all()
    assert (normalised.grad[~hidden] != 0).float().mean() > 0.99


def test_gradients_reach_every_block_and_no_target():
    images = photos(4)
    model, inputs = make(images)
    normalised, _, targets, mask = batch_of(images, model, inputs)
    for values in targets.values():
        assert not values.requires_grad
    losses_of(model, normalised, targets, mask, torch.full((4,), 0.25)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []  # also what DDP without unused parameters needs


@pytest.mark.parametrize("loss", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("chosen", [False, True])
def test_the_error_is_a_literal_loop(loss, chosen):
    def of(difference):
        if loss == "smooth_l1":
            return 0.5 * difference**2 if difference < 1 else difference - 0.5
        return difference**2 if loss == "l2" else difference

    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 9, 5, generator=generator)
    share = torch.rand(3, 9, generator=generator)
    index = torch.tensor([[0, 4, 8], [1, 2, 3], [5, 6, 8]]) if chosen else torch.arange(9).expand(3, -1)
    prediction = torch.randn(3, index.shape[1], 5, generator=generator)
    tap = Tap(2, 3, "HVD")
    errors = WaveletTarget([tap], statistics(photos(2)), image_size=SIZE, token_sizes={2: PATCH}, loss=loss).error(
        2, prediction, target, share, index if chosen else None
    )
    for b in range(3):
        total = weight = 0.0
        for s, p in enumerate(index[b].tolist()):
            differences = [abs(float(prediction[b, s, d]) - float(target[b, p, d])) for d in range(5)]
            total += float(share[b, p]) * np.mean([of(difference) for difference in differences])
            weight += float(share[b, p])
        assert errors[b].item() == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"class_token": False}, {"positions": "learned"}])
def test_encoder_with_everything_visible_equals_timm(arguments):
    images = photos(2)
    model, inputs = make(images, **arguments)
    normalised = inputs(stored(images))[0]
    encoder = model.encoder.eval()
    everything = torch.arange(encoder.grid**2).expand(2, -1)
    nothing = torch.zeros(2, encoder.grid**2, dtype=torch.bool)
    with torch.no_grad():
        tokens = encoder(normalised, nothing, everything, [1, 3])
        tokens = {block: values[:, encoder.prefix :] for block, values in tokens.items()}
        assert torch.allclose(tokens[3].mean(1), encoder.model(normalised), atol=1e-5)
        outputs = encoder.model.forward_intermediates(
            normalised, indices=[0], intermediates_only=True, output_fmt="NLC"
        )
        assert torch.allclose(tokens[1], outputs[0], atol=1e-5)


def test_one_batch_can_be_overfitted():
    images = photos(8)
    step = make_step(images, lr=1e-2, steps=300)
    rows, weight = torch.arange(8), torch.ones(8)
    losses = [step(stored(images), rows, weight, 8.0, epoch=0, step=i).losses for i in range(300)]
    assert (losses[-1] < 0.4 * losses[0]).all(), (losses[0], losses[-1])
    assert losses[-1].sum() < 0.15 * losses[0].sum()  # level 1 is noise, which takes longest to learn by heart


def test_same_seed_same_run():
    images = photos(8)
    ends = []
    for _ in range(2):
        step = make_step(images)
        for i in range(4):
            last = step(stored(images), torch.arange(8), torch.ones(8), 8.0, epoch=i, step=i)
        ends.append((last.losses, [p.detach().clone() for p in step.model.parameters()]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_padding_counts_nothing():
    images = photos(8)
    padded = make_step(images)
    plain = copy.deepcopy(padded)
    weight = torch.tensor([1.0] * 6 + [0.0] * 2)
    padded.backward(stored(images), torch.arange(8), weight, 6.0, epoch=0)
    plain.backward({k: v[:6] for k, v in stored(images).items()}, torch.arange(6), torch.ones(6), 6.0, epoch=0)
    for a, b in zip(padded.model.parameters(), plain.model.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(count):
    images = photos(8)
    whole = make_step(images, weighting="learned")
    parts = copy.deepcopy(whole)
    parts.accumulate = count
    weight = torch.tensor([1.0] * 7 + [0.0])
    losses = [s.backward(stored(images), torch.arange(8), weight, 7.0, epoch=0, progress=0.2) for s in (whole, parts)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-4)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradients():
    images = photos(4)
    plain = make_step(images)
    again = copy.deepcopy(plain)
    again.model.encoder.recompute_activations()
    for step in (plain, again):
        step.backward(stored(images), torch.arange(4), torch.ones(4), 4.0, epoch=0)
    for a, b in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)


def test_the_average_is_a_literal_one():
    images = photos(4)
    step = make_step(images, ema=0.9)
    weights = step.model.encoder.model.blocks[0].mlp.fc1.weight
    expected = weights.detach().double().clone()
    for number in range(4):
        step(stored(images), torch.arange(4), torch.ones(4), 4.0, epoch=0, step=number)
        now = weights.detach().double()
        expected = 0.9 * expected + 0.1 * now
    found = step.averaged.module.encoder.model.blocks[0].mlp.fc1.weight.double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found, weights.double())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("done", [0, 2])  # with and without moments from earlier steps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_training_goes_on(value, done, optimizer):
    images = photos(4)
    step, clean = (make_step(images, clip=1.0, optimizer=optimizer) for _ in range(2))
    rows, one = torch.arange(4), torch.ones(4)
    for number in range(done):
        step(stored(images), rows, one, 4.0, epoch=number, step=number)
        clean(stored(images), rows, one, 4.0, epoch=number, step=number)
    hooks = [
        layer.weight.register_hook(lambda grad: torch.full_like(grad, value))
        for layer in (step.model.decoders["2"].head, step.model.encoder.model.blocks[1].mlp.fc1)
    ]
    result = step(stored(images), rows, one, 4.0, epoch=2, step=2)
    for hook in hooks:
        hook.remove()
    assert not result.grad_norm.isfinite() and result.losses.isfinite().all()
    for a, b in zip(step.model.parameters(), clean.model.parameters(), strict=True):
        assert torch.equal(a, b)
    after = [s(stored(images), rows, one, 4.0, epoch=3, step=3) for s in (step, clean)]
    assert torch.equal(after[0].losses, after[1].losses)
    for a, b in zip(step.model.parameters(), clean.model.parameters(), strict=True):
        assert torch.equal(a, b)  # the moments were left alone too, and do not know of the step


def _ddp_worker(rank, world, port, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    images = photos(8)
    step = make_step(images, wrap=torch.nn.parallel.DistributedDataParallel, world=world, weighting="learned")
    step.accumulate = 2  # each of them in two parts: gradients are exchanged once
    mine = slice(rank * 4, rank * 4 + 4)
    part = {level: values[mine] for level, values in stored(images).items()}
    losses = step.backward(part, torch.arange(8)[mine], torch.ones(4), 8.0, epoch=0)
    dist.all_reduce(losses)
    if rank == 0:
        torch.save([losses / world, *[p.grad for p in step.model.parameters() if p.grad is not None]], path)
    dist.destroy_process_group()


def test_two_workers_at_half_the_batch_give_the_gradients_of_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_ddp_worker, (2, port, str(tmp_path / "two.pt")), nprocs=2, start_method="forkserver")
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    images = photos(8)
    step = make_step(images, weighting="learned")
    losses = step.backward(stored(images), torch.arange(8), torch.ones(8), 8.0, epoch=0)
    one = [losses, *[p.grad for p in step.model.parameters() if p.grad is not None]]
    assert len(one) == len(two) > 30
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("taps", "message"),
    [([Tap(3, 4, "HVD")], "blocks 1 to 3"), ([Tap(3, 2, "HVD")], "the last block, 3, has no tap")],
)
def test_taps_that_do_not_fit_are_named(taps, message):
    with pytest.raises(ValueError, match=message):
        make(photos(2), taps=taps)


def test_sizes_follow_the_patch():
    model, _ = make(photos(2))
    assert [model.target.positions(level) for level in (1, 2, 3)] == [8, 8, 4]
    assert [model.target.values(tap) for tap in TAPS] == [3 * 3 * 4, 3 * 3, 3 * 4]
    assert PATCH == 4
