"""Counted cost: against counts by hand, and nothing of the model is touched."""

import pytest
import torch

from pipeline.config.load import load
from pipeline.models.build import build_blank_model
from wavemim.flops import Cost, cost_of


def blank(name, *settings):
    with torch.device("meta"):
        return build_blank_model(load(name, settings))


def block(tokens, width, context=None):
    """FLOPs of a transformer block with an MLP of 4 widths: 12 maps of width², and attention to `context` tokens."""
    return 2 * tokens * 12 * width**2 + 2 * 2 * tokens * (context or tokens) * width


def vit(tokens, seen, width, depth):
    """Patch embedding of all tokens (16 × 16 × 3 values), blocks over the visible ones and a class token."""
    return 2 * tokens * 768 * width + depth * block(seen + 1, width)


def test_mae_base_by_hand():
    cost = cost_of(blank("mae_vit_base"))
    assert cost.encoder_flops == vit(196, 49, 768, 12)
    assert cost.decoder_flops == 2 * 50 * 768 * 512 + 8 * block(197, 512) + 2 * 196 * 512 * 768
    assert cost.forward_flops == cost.encoder_flops + cost.decoder_flops
    assert cost.training_flops == 3 * cost.forward_flops
    assert (cost.parameters, cost.encoder_parameters) == (111_907_840, 85_798_656)
    assert str(cost) == "111.9 M parameters, encoder 85.8 M, 19.6 GFLOP forward per image (counted)"


def test_wamim_base_by_hand():
    """Four decoders, of which the coarsest predicts 7 × 7 cells; level n has (16 / 2^n)² coefficients a band and token."""
    cost = cost_of(blank("wamim_vit_base"))
    heads = sum(2 * 256 * positions * values for positions, values in ((196, 144), (196, 36), (196, 9), (49, 12)))
    assert cost.decoder_flops == 4 * (2 * 50 * 768 * 256 + block(197, 256)) + heads
    assert cost.encoder_flops == vit(196, 49, 768, 12)


def test_swin_by_hand():
    """Every attention is inside of a window of 7 × 7, shifted (with a mask) or not."""
    count, width, side = 2 * 56**2 * 48 * 96, 96, 56
    for stage, depth in enumerate((2, 2, 6, 2)):
        if stage:
            side, width = side // 2, 2 * width
            count += 2 * side**2 * (2 * width) * width  # merging of four patches
        count += depth * block(side**2, width, 49)
    assert cost_of(blank("wamim_swin_tiny")).encoder_flops == count


SMALL = ("encoder.width=48", "encoder.heads=3", "decoder.width=32", "decoder.heads=2")


def test_cheaper_decoders_are_counted_as_such():
    """Cross-attention from S of the 48 hidden patches, without a token that sees another one, and self-attention among
    fewer tokens."""
    base = cost_of(blank("small_pixels", *SMALL, "target.taps={3: 8}"))
    cross = cost_of(
        blank("small_pixels", *SMALL, "target.taps={3: 8}", "decoder.attention=cross", "decoder.predict=0.25")
    )
    fewer = cost_of(blank("small_pixels", *SMALL, "target.taps={3: 8}", "decoder.predict=0.25"))
    assert base.encoder_flops == cross.encoder_flops == fewer.encoder_flops
    embed, head = 2 * 17 * 48 * 32, 2 * 32 * 192
    assert base.decoder_flops == embed + block(65, 32) + 64 * head
    assert fewer.decoder_flops == embed + block(17 + 12, 32) + 12 * head
    query, key_value = 2 * 12 * 10 * 32**2, 2 * 17 * 2 * 32**2
    assert cross.decoder_flops == embed + query + key_value + 2 * 2 * 12 * 17 * 32 + 12 * head


def test_a_model_in_use_is_left_as_it_is():
    model = build_blank_model(load("small_wavelet", [*SMALL, "encoder.options={proj_drop_rate: 0.1}"]))
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    images = torch.randn(2, 3, 64, 64)
    mask = torch.arange(64).expand(2, -1) >= 16
    model.predict(images, mask)[3].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert cost_of(model) == cost_of(blank("small_wavelet", *SMALL))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name] and parameter.device.type == "cpu", name
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and torch.equal(value, before[name][1]), name


@pytest.mark.parametrize(
    ("flops", "said"), [(68_400_000, "0.068"), (141_000_000, "0.14"), (3_776_000_000, "3.78"), (35_440_000_000, "35.4")]
)
def test_three_digits(flops, said):
    assert f", {said} GFLOP" in str(Cost(1, 1, flops, 1, 1))
