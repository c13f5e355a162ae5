"""Backbones with stages: hidden pixels stay hidden, every parameter trains, the export is timm's."""

import copy

import pytest
import timm
import torch

from wavemim.encoders.factory import make_encoder
from wavemim.encoders.hierarchical import REDUCTIONS, HierarchicalEncoder
from wavemim.weights.timm_folder import export_timm

SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
MODELS = {  # name -> (image size, options that make it small)
    "swin_tiny_patch4_window7_224": (64, SWIN),
    "swinv2_tiny_window8_256": (64, SWIN),
    "convnext_atto": (64, {"dims": (16, 32, 48, 64)}),
    "convnextv2_atto": (64, {"dims": (16, 32, 48, 64)}),
    "hiera_tiny_224": (64, {"embed_dim": 16, "stages": (1, 1, 2, 1)}),
    "maxvit_pico_rw_256": (64, {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}),
    "resnet10t": (64, {}),
    "efficientnet_b0": (64, {}),
}
CHANNELS = 2


def make(name, **kw):
    torch.manual_seed(0)
    size, options = MODELS[name]
    return HierarchicalEncoder(name, **{"image_size": size, "channels": CHANNELS, "options": options, **kw})


def batch(encoder, rows=2, share=0.5, channels=CHANNELS, seed=0):
    """(images, mask); in every image the same number of cells is hidden."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, channels, encoder.image_size, encoder.image_size, generator=generator)
    cells = encoder.grid**2
    order = torch.rand(rows, cells, generator=generator).argsort(1)
    return images, order < int(share * cells)


def linear_loss(tokens):
    """Fixed random weights of every feature."""
    total = torch.zeros(())
    for stage, values in tokens.items():
        weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(stage))
        total = total + (values * weight).mean()
    return total


def pixels_of(mask, encoder):
    """The mask of every pixel (B, 1, H, W), cell by cell."""
    hidden = torch.zeros(len(mask), 1, encoder.image_size, encoder.image_size, dtype=torch.bool)
    for b, row in enumerate(mask):
        for cell in row.nonzero().flatten().tolist():
            y, x = divmod(cell, encoder.grid)
            hidden[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = True
    return hidden


@pytest.mark.parametrize("name", MODELS)
def test_trains_for_two_steps_and_sees_no_hidden_pixel(name):
    encoder = make(name)
    images, mask = batch(encoder)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(3):
        images.requires_grad_()
        images.grad = None
        optimizer.zero_grad()
        tokens = encoder(images, mask, None, (1, 2, 3, 4))
        loss = linear_loss(tokens)
        loss.backward()
        losses.append(loss.item())
        if step < 2:
            optimizer.step()
    for stage, reduction in enumerate(REDUCTIONS, 1):
        assert encoder.token_size(stage) == reduction
        assert tokens[stage].shape == (2, (encoder.image_size // reduction) ** 2, encoder.width(stage))
    # A parameter without gradient would stop DDP, which is not told to look for unused ones.
    assert [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    assert encoder.mask_token.grad.any()
    assert losses[2] < losses[1] < losses[0]
    hidden = pixels_of(mask, encoder).expand_as(images)
    assert (images.grad[hidden] == 0).all()
    assert (images.grad[~hidden] != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "convnext_atto", "hiera_tiny_224", "efficientnet_b0"])
def test_only_what_features_do_not_depend_on_is_frozen(name):
    expected = {
        "swinv2_tiny_window8_256": [],
        "convnext_atto": ["head.norm.weight", "head.norm.bias"],
        "hiera_tiny_224": ["head.norm.weight", "head.norm.bias"],
        "efficientnet_b0": ["conv_head.weight", "bn2.weight", "bn2.bias"],
    }
    encoder = make(name)
    assert [key for key, p in encoder.model.named_parameters() if not p.requires_grad] == expected[name]


@pytest.mark.parametrize("name", [n for n in MODELS if "hiera" not in n])  # whose blocks have tokens in another order
def test_unmasked_features_are_those_that_timm_passes_through(name):
    encoder = make(name, sees="whole").eval()
    assert encoder.mask_token is None
    images, mask = batch(encoder)
    seen = {}
    for stage, info in enumerate(encoder.model.feature_info[-4:], 1):
        module = encoder.model.get_submodule(info["module"])
        module.register_forward_hook(lambda _m, _i, output, stage=stage: seen.update({stage: output}))
    with torch.no_grad():
        final = encoder.model.forward_features(images)
        expected = dict(seen)
        tokens = encoder(images, mask, None, (1, 2, 3, 4))
    if encoder.normalised(4):
        assert not torch.equal(final, expected[4])
        expected[4] = final
    channels_last = getattr(encoder.model, "output_fmt", "NCHW") == "NHWC"
    for stage, values in expected.items():
        flat = values.flatten(1, 2) if channels_last else values.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[stage], flat, atol=1e-5, rtol=1e-5)
    assert encoder.normalised(4) == ("swin" in name or "maxvit" in name)


def test_masking_of_a_convolutional_model_is_a_literal_loop():
    encoder = make("convnext_atto").eval()
    images, mask = batch(encoder)
    with torch.no_grad():
        encoder.mask_token[:] = torch.tensor([0.5, -2.0])[None, :, None, None]
        hidden = pixels_of(mask, encoder)[:, 0]
        literal = images.clone()
        for channel, value in enumerate((0.5, -2.0)):
            literal[:, channel][hidden] = value
        expected = encoder.model.forward_features(literal).flatten(2).transpose(1, 2)
        assert torch.allclose(encoder(images, mask, None, [4])[4], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_masking_of_swin_is_that_of_its_embedding(name):
    encoder = make(name).eval()
    images, mask = batch(encoder)

    def replace(_module, _inputs, output):
        for b, row in enumerate(mask):
            for cell in row.nonzero().flatten().tolist():
                output[b, cell // encoder.grid, cell % encoder.grid] = encoder.mask_token[0, 0, 0]
        return output

    with torch.no_grad():
        tokens = encoder(images, mask, None, [1, 4])
        handle = encoder.model.patch_embed.register_forward_hook(replace)
        expected = encoder.model.forward_features(images).flatten(1, 2)
        handle.remove()
    torch.testing.assert_close(tokens[4], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_compiles_without_a_graph_break(name):
    encoder = make(name).eval()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for seed in range(2):
            images, mask = batch(encoder, seed=seed)
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                assert torch.allclose(compiled(images, mask, None, [4])[4], encoder(images, mask, None, [4])[4])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"])
def test_export_loads_into_a_fresh_model_and_as_pretrained_weights(name, tmp_path):
    encoder = make(name)
    images, mask = batch(encoder, rows=4)
    encoder(images, mask, None, [4])  # moves running statistics
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    encoder.eval()
    export_timm(
        tmp_path / "e", encoder.model, architecture=name, arguments=encoder.arguments, image_size=64,
        pixel_mean=[120.0] * 2, pixel_std=[60.0] * 2, about={},
    )  # fmt: skip
    fresh = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True).eval()
    classifier = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True, num_classes=5).eval()
    torch.manual_seed(1)
    again = make(name, pretrained=str(tmp_path / "e")).eval()
    one_channel = make(name, channels=1, pretrained=str(tmp_path / "e" / "model.safetensors"))
    assert set(fresh.state_dict()) == set(encoder.model.state_dict())
    assert timm.data.resolve_model_data_config(fresh)["input_size"] == (2, 64, 64)
    with torch.no_grad():
        expected = encoder.model(images)
        assert expected.shape == (4, encoder.width(4))
        assert torch.equal(fresh(images), expected)
        assert torch.equal(again.model(images), expected)
        assert torch.equal(classifier.forward_head(classifier.forward_features(images), pre_logits=True), expected)
    first = encoder.model.pretrained_cfg["first_conv"] + ".weight"
    adapted = timm.models.adapt_input_conv(1, encoder.model.state_dict()[first], base_chans=2)
    assert torch.equal(one_channel.model.state_dict()[first], adapted)


def test_swin_weights_of_another_image_size_and_window_are_resampled(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    encoder = make(name, options={**SWIN, "window_size": 4})
    export_timm(
        tmp_path / "e", encoder.model, architecture=name, arguments=encoder.arguments,
        pixel_mean=[120.0] * 2, pixel_std=[60.0] * 2, about={},
    )  # fmt: skip
    larger = make(name, image_size=96, options={**SWIN, "window_size": 6}, pretrained=str(tmp_path / "e"))
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    table, old = (e.model.state_dict()[key] for e in (larger, encoder))
    assert table.shape == (11 * 11, 1)
    assert old.shape == (7 * 7, 1)
    expected = timm.layers.resize_rel_pos_bias_table(old, new_window_size=(6, 6), new_bias_shape=table.shape)
    assert torch.equal(table, expected)
    same = "layers.1.blocks.0.mlp.fc1.weight"
    assert torch.equal(larger.model.state_dict()[same], encoder.model.state_dict()[same])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t"])
def test_builds_without_memory_and_copies(name, tmp_path):
    with torch.device("meta"):
        blank = make(name, pretrained=str(tmp_path))
    assert all(tensor.is_meta for tensor in blank.state_dict().values())
    encoder = make(name).eval()
    assert {k: v.shape for k, v in blank.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    twin = copy.deepcopy(encoder)
    images, mask = batch(encoder)
    with torch.no_grad():
        before = encoder(images, mask, None, [4])[4]
        for parameter in encoder.parameters():
            parameter.zero_()
        assert torch.equal(twin(images, mask, None, [4])[4], before)


@pytest.mark.parametrize("channels", [1, 16])
def test_channels(channels):
    encoder = make("convnext_atto", channels=channels)
    images, mask = batch(encoder, channels=channels)
    assert encoder(images, mask, None, [1])[1].shape == (2, 256, 16)


def test_make_encoder_chooses_it():
    with torch.device("meta"):
        encoder = make_encoder("resnet10t", image_size=64, channels=3)
    assert isinstance(encoder, HierarchicalEncoder)
    assert (encoder.depth, encoder.word, encoder.grid, encoder.prefix, encoder.default_unit) == (4, "stage", 16, 0, 32)
    assert not encoder.drops


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet10t", {"image_size": 72}, "72 pixels are not a multiple of the token size, 32 pixels; nearest allowed: 64 or 96"),
        ("swin_tiny_patch4_window7_224", {"sees": "visible"}, r"encoder\.sees='visible'.*needs masked"),
        ("convnext_atto", {"patch_size": 16}, r"encoder\.patch_size=16 does not apply to 'convnext_atto'"),
        ("convnext_atto", {"options": {"in_chans": 5}}, r"encoder\.options\.in_chans=5 cannot be set here"),
        ("convnext_atto", {"options": {"dimz": 5}}, r"timm cannot build 'convnext_atto'.*dimz"),
        ("eva02_tiny_patch14_224", {"image_size": 224}, r"'eva02_tiny_patch14_224' has feature maps of reductions 12 × 14"),
        ("visformer_tiny", {}, r"reductions 8, 16, 32; use a"),
        ("halonet26t", {}, r"encoder\.image_size=64: 'halonet26t' cannot encode such images"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as caught, torch.device("meta"):
        make_encoder(name, **{"image_size": 64, **settings})
    assert "\n" not in str(caught.value)
