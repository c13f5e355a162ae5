"""Initial weights against the rules of the methods' code: range, deviation and mean of each tensor."""

import math

import pytest
import timm
import torch
from torch import nn

from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.models.build import build_blank_model
from wavemim.encoders.factory import make_encoder
from wavemim.initial_weights import initialise_vit

CUT = 0.02 * math.sqrt(1 - 2 * 0.2419707 / 0.6826895)  # a normal distribution cut off at its own deviation: 0.0108
NARROW = ["encoder.width=192", "encoder.heads=3"]


@pytest.fixture(scope="module")
def models():
    """{recipe: model}; narrower, but as deep as published."""
    names = {"mae_vit_base": NARROW, "localmim_vit_base": NARROW, "mfm_vit_base": NARROW, "simmim_swin_base": []}
    return {name: build_blank_model(load(name, settings)) for name, settings in names.items()}


def is_uniform(weight, bound):
    """Whether values fill [-bound, bound] evenly: their range, deviation and mean, within five standard errors."""
    value, n = weight.detach(), weight.numel()
    return (
        (1 - 10 / n) * bound < value.abs().max() <= bound
        and abs(float(value.std()) / (bound / math.sqrt(3)) - 1) < 5 * 0.45 / math.sqrt(n)
        and abs(float(value.mean())) < 5 * bound / math.sqrt(3 * n)
    )


def is_normal(weight, std, cut=None):
    """Whether values are normal, with deviation `std` after they are cut off at `cut`."""
    value, n = weight.detach(), weight.numel()
    widest = cut if cut is not None else 6 * std
    return (
        float(value.abs().max()) <= widest * (1 + 1e-6)
        and (cut is None or value.abs().max() > 0.95 * cut)
        and abs(float(value.std()) / std - 1) < 5 / math.sqrt(2 * n)
        and abs(float(value.mean())) < 5 * std / math.sqrt(n)
    )


def linear_maps(module):
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("name", ["mae_vit_base", "localmim_vit_base"])
def test_mae_and_localmim(models, name):
    model = models[name]
    vit = model.encoder.model
    assert len(linear_maps(vit)) == 12 * 4
    for key, layer in linear_maps(model).items():  # those of the decoders too
        rows, columns = layer.weight.shape
        assert is_uniform(layer.weight, math.sqrt(6 / (rows + columns))), key
        assert (layer.bias == 0).all(), key
    patch = vit.patch_embed.proj  # as the linear map of 768 values that it is
    assert is_uniform(patch.weight, math.sqrt(6 / (192 + 3 * 16 * 16)))
    assert is_uniform(patch.bias, 1 / math.sqrt(3 * 16 * 16))  # of torch
    assert is_normal(vit.cls_token, 0.02)
    tokens = [decoder.trunk.mask_token for decoder in model.decoders.values()]
    assert len(tokens) == {"mae_vit_base": 1, "localmim_vit_base": 4}[name]
    assert all(is_normal(token, 0.02) for token in tokens)


def test_mfm(models):
    model = models["mfm_vit_base"]
    vit = model.encoder.model
    for key, layer in linear_maps(vit).items():
        shrunk = 1.0
        if key.endswith(("attn.proj", "mlp.fc2")):
            shrunk = math.sqrt(2 * (int(key.split(".")[1]) + 1))
        assert is_normal(layer.weight, CUT / shrunk, 0.02 / shrunk), key
        assert (layer.bias == 0).all(), key
    for tensor in (vit.patch_embed.proj.weight, vit.cls_token, vit.pos_embed):
        assert is_normal(tensor, CUT, 0.02)
    assert (vit.patch_embed.proj.bias == 0).all() and vit.pos_embed.requires_grad


@pytest.mark.parametrize("name", ["mfm_vit_base", "simmim_swin_base"])
def test_a_linear_decoder_starts_as_torchs_convolutions(models, name):
    (decoder,) = models[name].decoders.values()
    torch_own = 1 / math.sqrt(decoder.head.in_features)
    assert is_uniform(decoder.head.weight, torch_own)
    assert is_uniform(decoder.head.bias, torch_own)


def test_simmim(models):
    model = models["simmim_swin_base"]
    for key, layer in linear_maps(model.encoder.model).items():
        assert is_normal(layer.weight, 0.02), key
        assert layer.bias is None or (layer.bias == 0).all(), key
    tables = [value for key, value in model.named_parameters() if key.endswith("relative_position_bias_table")]
    assert len(tables) == 24
    assert all(is_normal(table, 0.02) for table in (*tables, model.encoder.mask_token))


def test_the_default_leaves_timms_own_weights():
    shape = {"image_size": 32, "width": 48, "heads": 3, "depth": 2, "positions": "learned"}
    torch.manual_seed(0)
    encoder = make_encoder("vit_tiny_patch16_224", **shape)
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", **encoder.arguments)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, encoder.model.state_dict()[key]), key


def test_registers_start_as_class_tokens():
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, depth=1, init="mae", options={"reg_tokens": 4})
    assert is_normal(encoder.model.reg_token, 0.02)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(
        SettingError, match=r"encoder\.init='mae' does not apply to 'convnext_atto'.*encoder\.init to timm"
    ):
        build_blank_model(load("wamim_convnext_tiny", ["encoder.name=convnext_atto", "encoder.init=mae"]))
    with pytest.raises(ValueError, match=r"encoder\.init='xavier': must be one of timm, mae, beit"):
        make_encoder("vit_tiny_patch16_224", image_size=32, init="xavier")
    parallel = timm.create_model("vit_small_patch16_18x2_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match=r"encoder\.init='beit'.*no attn\.proj; use encoder\.init=timm or mae"):
        initialise_vit(parallel, "beit")
