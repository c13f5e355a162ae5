"""The tilt of level weights: between equal weights, the loss on pixels, and finer; and decoders that taps share."""

import numpy as np
import pytest
import pywt
import torch
from tiny import PATCH, SIZE, STEPS, masking_of, photos, statistics, stored

from wavemim.decoders import TapHead
from wavemim.encoders.vit import ViTEncoder
from wavemim.inputs import Inputs
from wavemim.level_weights import LevelWeights
from wavemim.model import DecoderSettings, MaskedImageModel
from wavemim.targets import PixelTarget, Tap, WaveletTarget

BANDS = [Tap(1, 3, "HVD"), Tap(2, 3, "AHVD")]  # with patches of 4 px an orthonormal transform of each patch


def model_of(images, cls, taps, decoder, **target):
    torch.manual_seed(0)
    encoder = ViTEncoder("vit_tiny_patch16_224", image_size=SIZE, patch_size=PATCH, width=32, depth=3, heads=2)
    made = cls(taps, statistics(images), image_size=SIZE, token_sizes={tap.level: PATCH for tap in taps}, **target)
    counts = [made.positions(tap.level) ** 2 * made.values(tap) for tap in made.taps]
    tilt = 1 if cls is WaveletTarget else None
    weights = LevelWeights([1.0] * len(taps), tilt=tilt, coefficients=counts)
    return MaskedImageModel(encoder, made, hidden=masking_of(0.75).hidden, decoder=decoder, level_weights=weights)


def transforms():
    """{level: matrix (D, C·PATCH²)} from the pixels of a patch to its coefficients, by PyWavelets."""
    columns = {1: [], 2: []}
    for pixel in torch.eye(3 * PATCH**2).reshape(-1, 3, PATCH, PATCH).numpy():
        approximation, second, first = pywt.wavedec2(pixel, "haar", mode="periodization", level=2)
        columns[1].append(torch.tensor(np.stack(first)).movedim(0, 1).flatten())  # (3 bands, C, h, w) -> (C, 3, h, w)
        columns[2].append(torch.tensor(np.stack([approximation, *second])).movedim(0, 1).flatten())
    return {level: torch.stack(found, 1) for level, found in columns.items()}


def loss_of(model, images, mask, predict):
    inputs = Inputs(STEPS, statistics(images))
    pyramid = inputs.pyramid(stored(images))
    seen = inputs.normalise(inputs.pixels(pyramid))
    index = model.chosen(mask, torch.arange(len(mask)), seed=0, epoch=0) if predict < 1 else None
    weight = torch.full((len(mask),), 1 / len(mask))
    loss, _ = model(seen, model.target(seen, pyramid), mask, weight, model.level_weights.at(0.3), index)
    loss.backward()
    return loss.detach(), index


@pytest.mark.parametrize("kinds", [("contrast", "patch"), ("none", "none")])
@pytest.mark.parametrize(("attention", "predict"), [("self", 1.0), ("cross", 1.0), ("self", 0.5), ("cross", 0.5)])
def test_with_tilt_1_the_wavelet_loss_is_the_pixel_loss(kinds, attention, predict):
    """The loss, and the gradient of everything but the heads, which are related by the transform."""
    images = photos(6)
    settings = {"width": 16, "depth": 2, "heads": 2, "attention": attention, "predict": predict}
    pixels = model_of(images, PixelTarget, [Tap(0, 3)], DecoderSettings(**settings), normalise=kinds[1])
    wavelet = model_of(images, WaveletTarget, BANDS, DecoderSettings(**settings, per="block"), normalise=kinds[0])
    torch.nn.init.normal_(pixels.decoders["0"].head.bias)
    weights = {name.replace("decoders.0", "decoders.1"): value for name, value in pixels.state_dict().items()}
    for level, matrix in transforms().items():
        for part in ("weight", "bias"):
            weights[f"decoders.{level}.head.{part}"] = matrix @ weights_of(pixels, part)
    wavelet.load_state_dict(weights)
    mask = masking_of(0.75)(torch.arange(6), {}, seed=0, epoch=0)
    index = {}
    if predict < 1:  # both predict the same positions
        index = pixels.chosen(mask, torch.arange(6), seed=0, epoch=0)
        wavelet.chosen = lambda *_, **__: {1: index[0], 2: index[0]}
    one, _ = loss_of(pixels, images, mask, predict)
    other, _ = loss_of(wavelet, images, mask, predict)
    assert other.item() == pytest.approx(one.item(), rel=1e-5)
    for name, parameter in pixels.named_parameters():
        if parameter.requires_grad and ".head." not in name:
            mine = wavelet.get_parameter(name.replace("decoders.0", "decoders.1")).grad
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))
    back = sum(m.T @ wavelet.decoders[str(level)].head.weight.grad for level, m in transforms().items())
    torch.testing.assert_close(back, pixels.decoders["0"].head.weight.grad, rtol=1e-4, atol=1e-6)


def weights_of(pixels, part):
    return getattr(pixels.decoders["0"].head, part).detach()


def test_weights_of_a_tilt():
    counts = (768, 192, 64)
    assert LevelWeights([1.0] * 3, tilt=0, coefficients=counts).at(0.5).tolist() == pytest.approx([1 / 3] * 3)
    assert LevelWeights([1.0] * 3, tilt=1, coefficients=counts).at(0.5).tolist() == pytest.approx(
        [0.75, 0.1875, 0.0625]
    )
    roots = [0.75**0.5, 0.1875**0.5, 0.0625**0.5]
    half = LevelWeights([2.0, 1.0, 0.0], tilt=0.5, coefficients=counts).at(0)
    assert half.tolist() == pytest.approx([2 * roots[0] / sum(roots), roots[1] / sum(roots), 0])
    finer = LevelWeights([1.0] * 3, tilt=2, coefficients=counts).at(0)
    assert finer[0] > 0.75 and finer.sum().item() == pytest.approx(1)


def test_a_schedule_of_tilts_is_linear_between_its_points():
    moving = LevelWeights([1.0, 1.0], tilt={0.25: 0, 0.75: 1}, coefficients=(3, 1))
    for progress, tilt in ((0.0, 0), (0.25, 0), (0.5, 0.5), (0.75, 1), (1.0, 1)):
        still = LevelWeights([1.0, 1.0], tilt=tilt, coefficients=(3, 1))
        assert moving.at(progress).tolist() == pytest.approx(still.at(0).tolist())
        assert moving.effective(progress).tolist() == pytest.approx(still.at(0).tolist())


def test_without_a_tilt_weights_are_as_given():
    assert LevelWeights([3.0, 0.5]).at(0.5).tolist() == [3, 0.5]


def test_scale_erased_gives_every_band_unit_deviation_and_kept_that_of_the_image():
    images = photos(64)
    inputs = Inputs(STEPS, statistics(images))
    pyramid = inputs.pyramid(stored(images))
    seen = inputs.normalise(inputs.pixels(pyramid))
    sizes = {"image_size": SIZE, "token_sizes": {1: PATCH, 2: PATCH}}
    for normalise in ("dataset", "none"):
        erased = WaveletTarget(BANDS, statistics(images), normalise=normalise, band_scale="erased", **sizes)
        kept = WaveletTarget(BANDS, statistics(images), normalise=normalise, band_scale="kept", **sizes)
        values = erased(seen, pyramid)
        assert values[1].square().mean().item() == pytest.approx(1, rel=0.05)
        energy = sum(found.square().sum().item() for found in kept(seen, pyramid).values())
        centred = images - images.mean((0, 2, 3), keepdims=True)
        assert energy == pytest.approx((centred**2).sum() / images.std((0, 2, 3)).mean() ** 2, rel=0.02)


def test_taps_at_one_block_share_a_decoder_and_count_once():
    """Also with a level whose cells are larger than a token; not where queries are made for positions."""
    images = photos(4)
    taps = [*BANDS[:1], Tap(2, 3, "HVD"), Tap(3, 3, "AHVD")]
    tap, block = (
        model_of(images, WaveletTarget, taps, DecoderSettings(width=16, depth=1, heads=2, per=per), normalise="patch")
        for per in ("tap", "block")
    )
    count = {name: sum(p.numel() for p in model.decoders.parameters()) for name, model in (("t", tap), ("b", block))}
    heads = sum(p.numel() for level in "23" for p in block.decoders[level].parameters())
    assert count["b"] == sum(p.numel() for p in block.decoders["1"].parameters()) + heads < count["t"]
    assert all(isinstance(block.decoders[level], TapHead) for level in "23")
    mask = masking_of(0.75)(torch.arange(4), {}, seed=0, epoch=0)
    loss, _ = loss_of(block, images, mask, 1.0)
    assert loss.isfinite() and all(p.grad is not None for p in block.parameters() if p.requires_grad)
    # the same as a decoder per tap whose shared parts have the same weights
    for level in "23":
        own = {k: v for k, v in block.decoders["1"].state_dict().items() if not k.startswith("head.")}
        tap.decoders[level].load_state_dict(own | block.decoders[level].state_dict())
    tap.decoders["1"].load_state_dict(block.decoders["1"].state_dict())
    tap.encoder.load_state_dict(block.encoder.state_dict())
    torch.testing.assert_close(loss_of(tap, images, mask, 1.0)[0], loss)
    crossed = DecoderSettings(width=16, depth=1, heads=2, attention="cross", per="block")
    apart = model_of(images, WaveletTarget, taps, crossed, normalise="patch")
    assert apart.leaders == {1: 1, 2: 1, 3: 3}
