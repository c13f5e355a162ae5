"""Encoders of convolutions with channels next to each other in memory: the same results in another order."""

import copy

import pytest
import torch

from wavemim.encoders.factory import make_encoder

CONVOLUTIONS = {
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "regnetx_002": {},  # without max pooling, whose gradient depends on the order among equals
}


def features(encoder, images, mask):
    """Tokens of all stages, and gradients by parameter, of a sum that depends on each of them."""
    tokens = encoder(images, mask, None, [1, 2, 3, 4])
    torch.manual_seed(1)
    sum((one * torch.randn(one.shape, dtype=one.dtype)).sum() for one in tokens.values()).backward()
    return tokens, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_results_are_the_same(name):
    torch.manual_seed(0)
    encoder = make_encoder(name, image_size=64, options=CONVOLUTIONS[name]).double()
    other = copy.deepcopy(encoder)
    assert other.use_channels_last()
    seen = []
    convolution = [module for module in other.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    convolution.register_forward_hook(lambda _, given, out: seen.append(out))
    images, mask = torch.randn(4, 3, 64, 64).double(), torch.rand(4, 256) < 0.5
    (tokens, gradients), (tokens2, gradients2) = (features(one, images, mask) for one in (encoder, other))
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in (*seen, convolution.weight))
    for stage, one in tokens.items():
        torch.testing.assert_close(tokens2[stage], one)
    assert gradients.keys() == gradients2.keys() and len(gradients) > 20
    for key, one in gradients.items():
        torch.testing.assert_close(gradients2[key], one, atol=1e-9 * float(one.abs().max()), rtol=1e-7, msg=key)


def test_who_is_asked():
    with torch.device("meta"):
        convolutions = make_encoder("resnet10t", image_size=64)
        assert convolutions.use_channels_last() and convolutions.use_channels_last(True)
        assert not convolutions.use_channels_last(False)
        assert convolutions.model.layer1[0].conv1.weight.is_contiguous()
        swin = make_encoder(
            "swin_tiny_patch4_window7_224", image_size=64, options={"window_size": 2, "depths": [1] * 4}
        )
        assert not swin.use_channels_last()
        assert not make_encoder("vit_tiny_patch16_224", image_size=64).use_channels_last()
