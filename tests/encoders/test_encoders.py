"""Plain vision transformers as encoders: timm's own features where nothing is hidden, and weights to start from."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

from wavemim.encoders.factory import make_encoder
from wavemim.encoders.vit import ViTEncoder
from wavemim.weights.timm_folder import export_timm

SMALL = {"width": 32, "depth": 3, "heads": 2}
VARIANTS = {  # name -> settings: what differs is where prefix, positions and norms stand
    "plain": ("vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8}),
    "no class token": ("vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "class_token": False}),
    "registers": ("vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "options": {"reg_tokens": 4}}),
    "learned": ("vit_tiny_patch16_224", {"image_size": 48, "patch_size": 16, "positions": "learned"}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"image_size": 56, "patch_size": 14}),
    "dinov2 without registers": ("vit_small_patch14_dinov2", {"image_size": 28}),
    "clip": ("vit_base_patch16_clip_224", {"image_size": 32}),
    "deit3": ("deit3_small_patch16_224", {"image_size": 32, "patch_size": 8}),
    "siglip": ("vit_base_patch16_siglip_224", {"image_size": 32, "class_token": False}),
    "layer scale": ("vit_base_patch16_224", {"image_size": 32, "options": {"init_values": 0.1}}),
}  # fmt: skip


def make(variant="plain", **kw):
    torch.manual_seed(0)
    name, settings = VARIANTS[variant]
    encoder = ViTEncoder(name, **{"channels": 2, **SMALL, **settings, **kw})
    with torch.no_grad():
        for parameter in encoder.parameters():  # so that layer scale, norms, tokens and positions all matter
            parameter += 0.3 * torch.randn(parameter.shape)
    return encoder.eval()


def batch(encoder, rows=2, share=0.5):
    """(images, mask, visible)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 2, encoder.image_size, encoder.image_size, generator=generator)
    tokens = encoder.grid**2
    order = torch.rand(rows, tokens, generator=generator).argsort(1)
    hidden = int(share * tokens)
    return images, order < hidden, torch.stack([row.nonzero().flatten() for row in order >= hidden])


@pytest.mark.parametrize("sees", ["visible", "masked", "whole"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_nothing_hidden_it_is_timm(variant, sees):
    encoder = make(variant, sees=sees)
    images, mask, visible = batch(encoder, share=0.0)
    assert visible.shape[1] == encoder.grid**2
    assert not mask.any()
    with torch.no_grad():
        tokens = encoder(images, mask, visible if encoder.drops else None, [1, 3])
        torch.testing.assert_close(tokens[3], encoder.model.forward_features(images), atol=1e-5, rtol=1e-5)
        pooled = tokens[3][:, encoder.prefix :].mean(1)
        torch.testing.assert_close(pooled, encoder.model(images), atol=1e-5, rtol=1e-5)
        (parts,) = encoder.model.forward_intermediates(
            images, indices=[0], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        whole = torch.cat(parts[::-1], 1) if encoder.prefix else parts  # timm gives (patches, prefix), or patches alone
        torch.testing.assert_close(tokens[1], whole, atol=1e-5, rtol=1e-5)
    assert encoder.drops == (sees == "visible")
    assert (encoder.prefix, encoder.width(1)) == (tokens[1].shape[1] - encoder.grid**2, 32)
    assert encoder.token_size(1) == encoder.cell == encoder.image_size // encoder.grid == encoder.default_unit
    assert [encoder.normalised(block) for block in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("variant", ["plain", "no class token", "registers", "dinov2", "clip"])
def test_dropping_and_masking_are_literal_loops(variant):
    dropping, masking = make(variant), make(variant, sees="masked")
    images, mask, visible = batch(dropping)
    model = dropping.model
    masking.model.load_state_dict(model.state_dict())
    own = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
    size = dropping.cell

    def encode(b, replacing):
        cells = images[b].unfold(1, size, size).unfold(2, size, size)  # (C, G, G, p, p)
        tokens, places = [], []
        for n in range(dropping.grid**2):
            y, x = divmod(n, dropping.grid)
            value = model.patch_embed.proj(cells[None, :, y, x])[0, :, 0, 0]
            if mask[b, n]:
                if replacing is None:
                    continue
                value = replacing
            tokens.append(value)
            places.append(n)
        front = torch.cat(own) if own else torch.zeros(0, 32)
        positions = model.pos_embed[0]
        if model.no_embed_class:
            positions = torch.cat((torch.zeros(len(front), 32), positions))
        sequence = torch.cat((front, torch.stack(tokens)))
        sequence = sequence + positions[[*range(len(front)), *(len(front) + n for n in places)]]
        return model.norm(model.blocks(model.norm_pre(sequence[None])))[0]

    with torch.no_grad():
        dropped = dropping(images, mask, visible, [3])[3]
        masked = masking(images, mask, None, [3])[3]
        for b in range(2):
            torch.testing.assert_close(dropped[b], encode(b, None), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(masked[b], encode(b, masking.mask_token[0, 0]), atol=1e-5, rtol=1e-5)


def test_whole_images_are_not_masked():
    encoder = make(sees="whole")
    images, mask, _ = batch(encoder)
    assert encoder.mask_token is None
    assert torch.equal(encoder(images, mask, None, [3])[3], encoder(images, ~mask, None, [3])[3])


@pytest.mark.parametrize("sees", ["visible", "masked"])
@pytest.mark.parametrize("variant", ["plain", "dinov2", "clip"])
def test_no_hidden_pixel_is_seen_and_every_parameter_trains(variant, sees):
    encoder = make(variant, sees=sees).train()
    images, mask, visible = batch(encoder)
    images.requires_grad_()
    tokens = encoder(images, mask, visible if sees == "visible" else None, [1, 3])
    (tokens[1].square().mean() + (tokens[3] * torch.randn(tokens[3].shape)).mean()).backward()
    hidden = mask.reshape(2, 1, encoder.grid, encoder.grid)
    hidden = hidden.repeat_interleave(encoder.cell, 2).repeat_interleave(encoder.cell, 3).expand_as(images)
    assert (images.grad[hidden] == 0).all()
    assert (images.grad[~hidden] != 0).float().mean() > 0.99
    frozen = {"model.pos_embed"}  # sine-cosine
    without = {key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {key for key, p in encoder.named_parameters() if not p.requires_grad} == frozen


def test_compiles_without_a_graph_break():
    for sees in ("visible", "masked"):
        encoder = make("registers", sees=sees)
        images, mask, visible = batch(encoder)
        compiled = torch.compile(encoder, fullgraph=True, backend="eager", dynamic=False)
        with torch.no_grad():
            assert torch.allclose(compiled(images, mask, visible, [3])[3], encoder(images, mask, visible, [3])[3])


def test_builds_without_memory_and_copies(tmp_path):
    with torch.device("meta"):
        blank = make("registers", pretrained=str(tmp_path))
    assert all(tensor.is_meta for tensor in blank.state_dict().values())
    encoder = make("registers")
    assert {k: v.shape for k, v in blank.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    twin = copy.deepcopy(encoder)
    images, mask, visible = batch(encoder)
    with torch.no_grad():
        before = encoder(images, mask, visible, [3])[3]
        for parameter in encoder.parameters():
            parameter.zero_()
        assert torch.equal(twin(images, mask, visible, [3])[3], before)


# ---- weights to start from


def export(encoder, folder):
    return export_timm(
        folder, encoder.model, architecture=encoder.name, arguments=encoder.arguments,
        pixel_mean=[120.0] * 2, pixel_std=[60.0] * 2, about={},
    )  # fmt: skip


def untouched(variant="plain", **kw):
    """As `make`, with the weights as the encoder made them."""
    torch.manual_seed(1)
    name, settings = VARIANTS[variant]
    return ViTEncoder(name, **{"channels": 2, **SMALL, **settings, **kw}).eval()


@pytest.mark.parametrize("variant", ["plain", "registers", "dinov2", "clip", "no class token"])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_starting_from_an_export_gives_its_features(variant, positions, tmp_path):
    encoder = make(variant)
    export(encoder, tmp_path / "e")
    images = batch(encoder)[0]
    again = untouched(variant, pretrained=str(tmp_path / "e"), positions=positions)
    with torch.no_grad():
        assert torch.equal(again.model(images), encoder.model(images))
    assert again.model.pos_embed.requires_grad == (positions == "learned")


def test_other_sizes_channels_and_patches_are_adapted_as_timm_does(tmp_path):
    encoder = make("registers")
    export(encoder, tmp_path / "e")
    old = encoder.model.state_dict()
    new = untouched(
        "registers", image_size=48, channels=5, pretrained=str(tmp_path / "e" / "model.safetensors")
    ).model.state_dict()
    expected = timm.layers.resample_abs_pos_embed(old["pos_embed"], new_size=[6, 6], num_prefix_tokens=5)
    assert torch.allclose(new["pos_embed"], expected, atol=1e-6)
    first = "patch_embed.proj.weight"
    assert torch.allclose(new[first], timm.models.adapt_input_conv(5, old[first], base_chans=2), atol=1e-6)
    assert all(torch.equal(new[key], old[key]) for key in old if key not in ("pos_embed", first))
    patch = untouched("registers", image_size=64, patch_size=16, pretrained=str(tmp_path / "e")).model.state_dict()
    assert torch.allclose(patch[first], timm.layers.resample_patch_embed(old[first], [16, 16]), atol=1e-5)


def classifier(folder, **kw):
    """Bare weights of timm with a classifier of 1000 classes, and no config.json."""
    torch.manual_seed(2)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, **kw
    )
    with torch.no_grad():
        model.pos_embed.normal_()
    path = folder / "weights.safetensors"
    save_file(model.state_dict(), path)
    return model.state_dict(), path


def test_a_bare_file_needs_no_description(tmp_path):
    weights, path = classifier(tmp_path, in_chans=4)
    encoder = untouched(channels=4, pretrained=str(path))
    loaded = encoder.model.state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in loaded)
    assert set(weights) - set(loaded) == {"head.weight", "head.bias"}
    without = untouched(channels=4, class_token=False, pretrained=str(path)).model.state_dict()
    assert torch.equal(without["pos_embed"], weights["pos_embed"][:, 1:])


@pytest.fixture
def hub(monkeypatch):
    """What timm gets from its hub: the returned dictionary's "weights", or the "error" that is raised."""
    content = {}

    def fetch(*_args, **_kw):
        if "error" in content:
            raise content["error"]
        return dict(content["weights"])

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    return content


def test_timms_own_weights(hub, tmp_path):
    torch.manual_seed(3)
    arguments = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    theirs = timm.create_model("vit_tiny_patch16_224", **arguments)
    hub["weights"] = theirs.state_dict()
    encoder = untouched(image_size=32, patch_size=16, channels=1, pretrained=True)
    loaded = encoder.model.state_dict()
    first = "patch_embed.proj.weight"
    assert torch.equal(loaded[first], timm.models.adapt_input_conv(1, hub["weights"][first]))
    assert torch.equal(loaded["blocks.2.mlp.fc2.weight"], hub["weights"]["blocks.2.mlp.fc2.weight"])
    assert loaded["pos_embed"].shape == (1, 5, 32)
    with pytest.raises(ValueError, match=r"encoder\.pretrained=true does not fit.*blocks\.3") as caught:
        untouched(image_size=32, depth=4, pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("403\nForbidden"), ConnectionError("refused")])
def test_a_failing_download_is_one_line(hub, error):
    hub["error"] = error
    with pytest.raises(
        ValueError, match=r"encoder\.pretrained=true: timm's weights of 'vit_tiny_patch16_224'"
    ) as caught:
        untouched(pretrained=True)
    assert "\n" not in str(caught.value)
    assert str(error).split()[0] in str(caught.value)
    assert ".safetensors file" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 64}, r"does not fit 'vit_tiny_patch16_224'.*size mismatch"),
        ({"depth": 4}, r"does not fit.*Missing key.*blocks\.3"),
        ({"depth": 2}, r"does not fit.*Unexpected key.*blocks\.2"),
        ({"options": {"reg_tokens": 4}}, r"does not fit 'vit_tiny"),
        ({"class_token": True}, r"lacks cls_token.*encoder\.class_token=false"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(settings, message, tmp_path):
    export(make("no class token"), tmp_path / "e")
    with pytest.raises(ValueError, match=message) as caught:
        untouched("no class token", **{"pretrained": str(tmp_path / "e"), **settings})
    assert "\n" not in str(caught.value)


def test_what_is_no_weights_is_refused(tmp_path):
    export(make("dinov2"), tmp_path / "dinov2")
    (tmp_path / "empty").mkdir()
    torch.save(make().model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, message in {
        "weights.pth": r"nor a \.safetensors file",
        "empty": "cannot be read as timm weights",
        "broken.safetensors": "cannot be read as timm weights",
        "absent": r"nor a \.safetensors file",
        "dinov2": r"is of 'vit_small_patch14_reg4_dinov2', encoder\.name is 'vit_tiny_patch16_224'",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            untouched(pretrained=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_make_encoder_takes_what_applies():
    with torch.device("meta"):
        encoder = make_encoder("vit_tiny_patch16_224", image_size=64, patch_size=None, channels=16, positions="learned")
        tagged = make_encoder("vit_tiny_patch16_224.augreg_in21k", image_size=64, sees="masked")
    assert isinstance(encoder, ViTEncoder)
    assert (encoder.cell, encoder.grid, encoder.depth, encoder.prefix, encoder.word) == (16, 4, 12, 1, "block")
    assert encoder.model.pos_embed.requires_grad
    assert encoder.mask_token is None
    assert tagged.mask_token.shape == (1, 1, 192)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit_tiny_patch16_22", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("deit_tiny_distilled_patch16_224", {"class_token": None}, "deit_tiny_distilled_patch16_224"),
        ("beit_base_patch16_224", {}, r"'beit_base_patch16_224' has feature maps of reductions 12 × 16; use a"),
        ("vit_base_mci_224", {}, r"'vit_base_mci_224' has feature maps of reductions"),
        (
            "vit_tiny_patch16_224",
            {"image_size": 60},
            "60 pixels are not a multiple of the token size, 16 pixels; nearest allowed: 48 or 64",
        ),
        ("vit_tiny_patch16_224", {"sees": "hidden"}, r"encoder\.sees='hidden': .*visible, masked, whole"),
        ("vit_tiny_patch16_224", {"positions": "rope"}, r"encoder\.positions='rope'"),
        ("vit_tiny_patch16_224", {"width": 30, "heads": 2}, r"encoder\.width=30 is not a multiple of 4"),
        ("vit_tiny_patch16_224", {"width": 31}, "timm cannot build"),
        ("vit_tiny_patch16_224", {"options": {"embed_dim": 32}}, r"options\.embed_dim=32.*set encoder\.width instead"),
        (
            "vit_tiny_patch16_224",
            {"options": {"drop_path_rate": 1.5}},
            r"drop_path_rate=1\.5: a rate is a number from 0",
        ),
        ("vit_tiny_patch16_224", {"options": {"fc_norm": True}}, r"options\.fc_norm=True.*remove it"),
        ("vit_tiny_patch16_224", {"options": {"reg_token": 4}}, r"timm cannot build.*reg_token"),
        ("vit_tiny_patch16_224", {"options": {"pos_embed": "none"}}, "not a plain vision transformer with absolute"),
    ],
)
def test_mistakes_are_named_in_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as caught, torch.device("meta"):
        make_encoder(name, **{"image_size": 64, **settings})
    assert "\n" not in str(caught.value)
