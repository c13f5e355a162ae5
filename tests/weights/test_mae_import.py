"""Published weights of ViTs: what timm's model gives, bit for bit; code in a file is not run; mistakes in one line each."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_checkpoint import SMALL

from pipeline.cli import _group
from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.models.build import build_encoder
from pipeline.models.encoder_source import find_encoder
from wavemim.weights.mae_import import IMAGENET_MEAN, import_vit

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}


def vit(**changes):
    """timm's ViT with no weight left at zero or one."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "num_classes": 0, "global_pool": "token", **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def mae_layout(model):
    """The weights as MAE's pretraining stores them: beside a decoder, with the command line that made them."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 64),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
        "decoder_pred.weight": torch.zeros(192, 16),
    }
    options = argparse.Namespace(model="mae_vit", lr=1e-4, betas=(0.9, 0.95), resume="")
    return {"model": {**model.state_dict(), **decoder}, "epoch": 799, "args": options}


def saved(content, path):
    torch.save(content, path)
    return path


def features(model, images):
    with torch.inference_mode():
        return model.eval()(images)


def test_an_encoder_of_maes_pretraining_is_the_same_bit_for_bit_everywhere(tmp_path):
    model = vit()
    file = saved(mae_layout(model), tmp_path / "mae.pth")
    out = str(tmp_path / "out")
    config = import_vit(file, tmp_path / "out", heads=4)
    assert config["pretrained_cfg"]["mean"] == pytest.approx(IMAGENET_MEAN)
    images = torch.randn(3, 3, 32, 32)
    expected = features(model, images)
    assert torch.equal(features(timm.create_model(f"local-dir:{out}", pretrained=True), images), expected)
    subject = find_encoder(with_overrides(load("small"), {"checkpoint": out}), None)
    assert torch.equal(features(subject.model(), images), expected)
    assert subject.pixel_mean == pytest.approx([255 * value for value in IMAGENET_MEAN])
    own = {"name": config["architecture"], "pretrained": out, "width": 64, "heads": 4, "depth": 3, "patch_size": 8}
    changes = {f"encoder.{key}": value for key, value in own.items()} | {"encoder.options": {"mlp_ratio": 2.0}}
    encoder = build_encoder(with_overrides(load("small", SMALL), changes | {"target.taps": {3: 3}}), start=True).model
    with torch.inference_mode():  # the recipe's encoder pools otherwise
        assert torch.equal(encoder.eval().forward_features(images), model.forward_features(images))


def test_fine_tuned_on_pooled_tokens(tmp_path):
    model = vit(global_pool="avg", num_classes=10)
    assert "fc_norm.weight" in model.state_dict()
    import_vit(saved({"model": model.state_dict()}, tmp_path / "f.pth"), tmp_path / "out", heads=4)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(features(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), images), expected)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "safetensors", "module."])
def test_bare_and_wrapped_weights_of_deit_and_timm(wrapper, tmp_path):
    model = vit(embed_dim=192, num_heads=3, num_classes=5, in_chans=2, qkv_bias=False)
    weights = model.state_dict()
    if wrapper == "safetensors":
        save_file(weights, file := tmp_path / "w.safetensors")
    elif wrapper == "module.":
        file = saved({f"module.{key}": value for key, value in weights.items()}, tmp_path / "w.pth")
    else:
        file = saved(weights if wrapper is None else {wrapper: weights}, tmp_path / "w.pth")
    config = import_vit(file, tmp_path / "out", mean=(0.1, 0.2), std=(0.3, 0.4))
    assert config["model_args"]["num_heads"] == 3 and config["pretrained_cfg"]["std"] == pytest.approx((0.3, 0.4))
    images = torch.randn(2, 2, 32, 32)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(features(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), images), expected)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("by_torch", [True, False])
def test_a_file_that_runs_code_is_refused(by_torch, tmp_path):
    content = {"model": vit().state_dict(), "extra": Evil(str(tmp_path / "ran"))}
    if by_torch:
        torch.save(content, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(content["extra"]))
    what = r"needs 'io\.open' to be read" if by_torch else "does not hold only weights"
    with pytest.raises(ValueError, match=rf"evil\.pth {what}: files that may run code are not opened"):
        import_vit(tmp_path / "evil.pth", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def wrong(**changes):
    return {"model": {**vit().state_dict(), **changes}}


MISTAKES = {
    "shape": (wrong(**{"blocks.1.mlp.fc2.bias": torch.zeros(7)}), r"blocks\.1\.mlp\.fc2\.bias is \(7,\); needed is \(64,\)"),
    "scalar": (wrong(**{"blocks.0.mlp.fc1.weight": torch.zeros(())}), r"fc1\.weight is \(\); needed is \(hidden width, 64\)"),
    "not finite": (wrong(**{"norm.weight": torch.full((64,), torch.nan)}), r"norm\.weight holds values that are not finite"),
    "positions": (wrong(pos_embed=torch.zeros(1, 16, 64)), r"pos_embed is \(1, 16, 64\); needed is \(1, a square number \+ 1, 64\)"),
    "unknown": (wrong(**{"blocks.0.gamma_1": torch.zeros(64)}), r"is not a plain ViT of timm: it has additional blocks\.0\.gamma_1$"),
    "lacking": ({k: v for k, v in vit().state_dict().items() if "blocks.1.norm2" not in k}, r"it lacks blocks\.1\.norm2\.weight, blocks\.1\.norm2\.bias$"),
    "no ViT": ({"conv1.weight": torch.zeros(4, 3, 7, 7)}, r"lacks patch_embed\.proj\.weight, .* and holds conv1\.weight"),
    "no tensors": ({"model": {"a": 1}}, r"'a' is int, not a tensor"),
    "nothing": ([1, 2], "does not map names to weights"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_named_and_nothing_is_written(mistake, tmp_path):
    content, message = MISTAKES[mistake]
    file = saved(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        import_vit(file, tmp_path / "out", heads=4)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{"mean": (float("nan"), 0, 0)}, {"std": (1.0, 0.0, 1.0)}])
def test_numbers_that_no_pixels_have_are_refused(given, tmp_path):
    file = saved(vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="all numbers have to be finite, those of --std above 0"):
        import_vit(file, tmp_path / "out", heads=4, **given)
    assert not (tmp_path / "out").exists()


def test_a_text_of_that_name_is_no_file_of_weights(tmp_path):
    (tmp_path / "w.pth").write_text("hello")
    with pytest.raises(
        ValueError, match="cannot be read as PyTorch weights: it is empty, truncated, or of another format"
    ):
        import_vit(tmp_path / "w.pth", tmp_path / "out")


def test_heads_and_channels_that_cannot_be_seen_are_asked_for(tmp_path):
    file = saved(vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"heads of a ViT of width 64 cannot be inferred.*give --heads"):
        import_vit(file, tmp_path / "out")
    with pytest.raises(ValueError, match=r"width 64 cannot be 5; give --heads"):
        import_vit(file, tmp_path / "out", heads=5)
    file = saved(vit(in_chans=4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="4 channels: give as many numbers for --mean and for --std"):
        import_vit(file, tmp_path / "out", heads=4)
    (tmp_path / "junk.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"junk\.pth"):
        import_vit(tmp_path / "junk.pth", tmp_path / "out")


def test_the_command(tmp_path, capsys):
    file = str(saved(mae_layout(vit()), tmp_path / "mae.pth"))
    out = str(tmp_path / "out")

    def run(*arguments):
        _group.main(["import", *arguments], standalone_mode=False)

    run(file, out, "--heads", "4")
    said = capsys.readouterr().out
    assert said == f"import: vit_base_patch16_224, width 64, 3 blocks, 4 heads, patches of 8 in 32 pixels → {out}\n"
    with pytest.raises(SettingError, match="already exists; --overwrite replaces it"):
        run(file, out, "--heads", "4")
    run(file, out, "--heads", "4", "--overwrite")
    with pytest.raises(SettingError, match="was not written by import"):
        run(file, str(tmp_path), "--overwrite")
    with pytest.raises(SettingError, match="--mean a,b: give one number per channel"):
        run(file, str(tmp_path / "new"), "--mean", "a,b")
    with pytest.raises(SettingError, match="no such file"):
        run(str(tmp_path / "absent.pth"), str(tmp_path / "new"))
