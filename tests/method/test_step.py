"""A step on a GPU must not wait for the host, break its graph, or compile again: held on the CPU, and on a GPU if there is one."""

import pytest
import torch
from tiny import SIZE, STEPS, TAPS, make_step, photos, statistics, stored
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from wavemim.encoders.hierarchical import HierarchicalEncoder
from wavemim.inputs import Inputs
from wavemim.masking import Masking
from wavemim.model import DecoderSettings, MaskedImageModel
from wavemim.optim import make_optimizer, make_schedule
from wavemim.step import TrainStep
from wavemim.targets import Tap, WaveletTarget
from wavemim.views import Views

KINDS = {
    "plain": {},
    "partial cross-attention": {"decoder": DecoderSettings(16, 1, 2, attention="cross", predict=0.4)},
    "partial self-attention": {"decoder": DecoderSettings(16, 1, 2, predict=0.4)},
    "shared, learned weights": {"decoder": DecoderSettings(16, 2, 2, shared=True), "weighting": "learned"},
    "an average of weights": {"ema": 0.99},
    "Muon": {"optimizer": "muon"},
    "three masks": {"masks": 3, "decoder": DecoderSettings(16, 1, 2, predict=0.4)},
    "masked tokens, linear": {"sees": "masked", "decoder": DecoderSettings(16, 0, 2)},
}


def run(step, images, epoch=0, number=0):
    rows = torch.arange(len(images))
    return step(stored(images), rows, torch.ones(len(images)), float(len(images)), epoch=epoch, step=number)


class NoHostSync(TorchDispatchMode):
    """Raises where a value of a tensor is asked for, or a shape depends on one: on a GPU the host would wait there."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten._unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.WAITING):
            raise RuntimeError(f"{func} waits for a value")
        if str(func).startswith("aten.index.") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise RuntimeError("an index of booleans waits for their count")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_a_value(kind):
    images = photos(4)
    step = make_step(images, clip=1.0, **KINDS[kind])
    with NoHostSync():
        losses = step.backward(stored(images), torch.arange(4), torch.ones(4), 4.0, epoch=0, progress=0.3)
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.clip_grad)
        if step.averaged is not None:
            step.averaged.update(step.model)
    assert losses.shape == (len(TAPS),)


@pytest.mark.parametrize(
    "waits", [torch.Tensor.item, bool, lambda t: t.reshape(1)[t.reshape(1) > 0], lambda t: t.reshape(1).nonzero()]
)
def test_what_waits_is_noticed(waits):
    with NoHostSync(), pytest.raises(RuntimeError, match="waits"):
        waits(torch.tensor(1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_and_no_compiling_again_for_other_masks(kind):
    torch._dynamo.reset()
    images = photos(4)
    compiled = []

    def counting(graph, _):
        compiled.append(graph)
        return graph

    def wrap(model):
        return torch.compile(model, backend=counting, fullgraph=True)  # fullgraph: a break is an error

    step, plain = make_step(images, wrap=wrap, **KINDS[kind]), make_step(images, **KINDS[kind])
    for number in range(3):
        result, expected = (
            run(step, images, epoch=number, number=number),
            run(plain, images, epoch=number, number=number),
        )
        torch.testing.assert_close(result.losses, expected.losses)
        assert len(compiled) == 1, number
    assert not torch.equal(*(step.views(stored(images), torch.arange(4), epoch=e).mask for e in (0, 1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu_does_not_synchronise(kind):
    images = photos(4)
    step = make_step(images, device="cuda", **KINDS[kind])
    batch = {level: values.pin_memory() for level, values in stored(images).items()}
    rows, weight = torch.arange(4).pin_memory(), torch.ones(4).pin_memory()
    step(batch, rows, weight, 4.0, epoch=0, step=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, rows, weight, 4.0, epoch=0, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", [False, True])  # activations are then computed again in the backward pass
@pytest.mark.parametrize("attention", ["self", "cross"])  # timm's, and our own
def test_attention_in_bfloat16_on_a_cpu_avoids_the_fused_kernel(attention, recompute):
    images, results, kernels = photos(4), {}, {}
    for precision in (torch.float32, torch.bfloat16):
        step = make_step(images, decoder=DecoderSettings(16, 1, 2, attention=attention))
        step.precision = precision
        if recompute:
            step.model.encoder.recompute_activations()
        with profile() as profiled:
            results[precision] = run(step, images)
        kernels[precision] = {event.key for event in profiled.key_averages() if "_scaled_dot_product" in event.key}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernels[torch.float32] == {fused, f"{fused}_backward"}
    assert kernels[torch.bfloat16] == {"aten::_scaled_dot_product_attention_math"}
    low, full = results[torch.bfloat16], results[torch.float32]
    torch.testing.assert_close(low.losses, full.losses, rtol=0.01, atol=0)
    torch.testing.assert_close(low.grad_norm, full.grad_norm, rtol=0.03, atol=0)
    assert not torch.equal(low.losses, full.losses)
    assert torch.backends.cuda.flash_sdp_enabled()  # outside of steps nothing has changed


@pytest.mark.parametrize("predict", [0.25, 0.5])
def test_the_chosen_positions_are_hidden_ones_and_a_function_of_seed_epoch_and_row(predict):
    images = photos(6)
    step = make_step(images, decoder=DecoderSettings(16, 1, 2, predict=predict))
    model, rows = step.model, torch.arange(6)
    mask = step.views(stored(images), rows, epoch=0).mask
    found = model.chosen(mask, rows, seed=0, epoch=0)
    hidden = mask.sum(1)
    assert found[2].shape == (6, round(64 * 0.5 * predict))
    assert mask.gather(1, found[2]).all()
    assert all(len(set(line)) == len(line) == hidden[0] * predict for line in found[2].tolist())
    again = model.chosen(mask[3:], rows[3:], seed=0, epoch=0)
    assert all(torch.equal(again[level], found[level][3:]) for level in found)
    assert not torch.equal(model.chosen(mask, rows, seed=0, epoch=1)[2], found[2])
    share = step.model.target.positions(3) ** 2
    assert found[3].shape[1] == round(share * 0.5 * predict)


def test_partial_prediction_is_an_unbiased_part_of_the_loss():
    """With cross-attention predictions are independent, so the mean over draws nears the loss of all."""
    images = photos(4)
    settings = {"attention": "cross", "width": 16, "depth": 1, "heads": 2}
    part, whole = (make_step(images, decoder=DecoderSettings(**settings, predict=p)) for p in (0.5, 1.0))
    whole.model.load_state_dict(part.model.state_dict())
    view = whole.views(stored(images), torch.arange(4), epoch=0)
    targets, weight = whole.model.target(view.images, view.pyramid), torch.full((4,), 0.25)
    with torch.no_grad():
        scheduled = whole.model.level_weights.at(0)
        expected = whole.model(view.seen, targets, view.mask, weight, scheduled)[1]
        draws = []
        for epoch in range(24):
            index = part.model.chosen(view.mask, torch.arange(4), seed=1, epoch=epoch)
            draws.append(part.model(view.seen, targets, view.mask, weight, scheduled, index)[1])
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 24**0.5
    assert ((mean - expected)[1:].abs() < 4 * error[1:] + 1e-4).all() or (
        (mean - expected).abs() / expected < 0.02
    ).all()


def test_rows_that_fill_up_a_batch_stay_out_of_batch_norm():
    images = photos(8)
    taps, sizes = [Tap(2, 1, "HVD"), Tap(4, 4, "AHVD")], {2: 4, 4: 32}
    stats = statistics(images)

    def step_of():
        torch.manual_seed(0)
        encoder = HierarchicalEncoder("resnet10t", image_size=SIZE)
        masking = Masking("random", 0.5, encoder.grid, 4)
        target = WaveletTarget(taps, stats, image_size=SIZE, token_sizes=sizes)
        model = MaskedImageModel(encoder, target, hidden=masking.hidden, decoder=DecoderSettings(16, 1, 2))
        optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
        return TrainStep(
            model,
            Views(Inputs(STEPS, stats), masking, seed=0),
            optimizer,
            make_schedule(optimizer, total_steps=10, warmup_steps=1, min_lr=0.0),
            seed=0,
            total_steps=10,
            clip_grad=None,
            precision=torch.float32,
        )

    filled, plain = step_of(), step_of()
    places = torch.tensor([0, 1, 7, 7, 2, 7, 3, 4])  # three fill up, among others
    weight = torch.tensor([1.0, 1, 1, 0, 1, 0, 1, 1])
    counted = places[weight > 0]
    whole = stored(images)
    losses = [
        filled.backward({level: v[places] for level, v in whole.items()}, places, weight, 6.0, epoch=0),
        plain.backward({level: v[counted] for level, v in whole.items()}, counted, torch.ones(6), 6.0, epoch=0),
    ]
    torch.testing.assert_close(*losses)
    for (name, a), b in zip(filled.model.named_buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert float(filled.model.encoder.model.bn1.running_mean.abs().sum()) > 0
