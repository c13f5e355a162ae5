"""Fine-tuning on images of another size than in pretraining."""

import pytest
import timm
import torch
from tiny_finetune import coloured_set, encoder_of, recipe_for, tuned
from torch import nn

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.models.encoder_source import build_classifier, find_encoder
from wavemim.finetune import make_classifier, resize_input

VIT, SWIN_T = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"


def resized(name, size, **changes):
    """(classifier before, after, arguments of the latter) with other weights than it begins with."""
    encoder, arguments = encoder_of(name, **changes)
    before, used = make_classifier(encoder, name, arguments, classes=5, drop_path=0.1)
    for value in before.parameters():
        nn.init.normal_(value, std=0.3)
    after, _ = make_classifier(encoder, name, arguments, classes=5, drop_path=0.1)
    after.load_state_dict(before.state_dict())
    return before, after, resize_input(after, used, channels=3, size=size)


def table(model):
    return model.layers[2].blocks[1].attn.relative_position_bias_table.detach()


def test_windows_of_swin_keep_their_share_of_the_image():
    """As SimMIM fine-tunes: 192 pixels with windows of 6 become 224 with windows of 7."""
    before, after, arguments = resized(SWIN_T, 224, img_size=192, window_size=6)
    assert [layer.blocks[0].window_size for layer in after.layers] == [(7, 7)] * 4
    assert all(value.requires_grad for value in after.parameters()) and after.training
    old, new = table(before), table(after)
    assert old.shape == (11**2, 2) and new.shape == (13**2, 2)
    torch.testing.assert_close(new[13**2 // 2], old[11**2 // 2])  # of a token to itself
    corners = [0, 12, 13 * 12, 13**2 - 1]
    torch.testing.assert_close(new[corners], old[[0, 10, 11 * 10, 11**2 - 1]], atol=0.1, rtol=0)
    again = timm.create_model(SWIN_T, **arguments)
    again.load_state_dict(after.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(again.eval()(images), after.eval()(images))


def test_the_recipe_of_simmim_is_fine_tuned_with_windows_of_seven():
    recipe = load("simmim_swin_base")
    assert (recipe.encoder.image_size, recipe.encoder.options["window_size"]) == (192, 6)
    sized = {"img_size": 192, **recipe.encoder.options}
    _, after, _ = resized(SWIN_T, recipe.finetune.image_size, **sized)
    assert after.patch_embed.img_size == (224, 224) and after.layers[0].blocks[0].window_size == (7, 7)


def test_positions_of_a_vit_are_resampled():
    before, after, arguments = resized(VIT, 96)
    old, new = before.pos_embed, after.pos_embed
    assert new.shape[1] == 1 + 6**2 and arguments["img_size"] == 96
    assert torch.equal(old[:, 0], new[:, 0])  # of the class token
    with torch.no_grad():  # a slope stays one
        before.pos_embed[0, 1:] = torch.arange(4.0).repeat(4)[:, None]
    resize_input(before, {}, channels=3, size=96)
    rows = before.pos_embed.detach()[0, 1:, 0].reshape(6, 6)
    torch.testing.assert_close(rows, rows[:1].expand(6, 6))
    assert (rows.diff(dim=1) > 0).all() and float(rows.mean()) == pytest.approx(1.5, abs=1e-3)


def test_a_convolutional_network_needs_no_change():
    arguments = {"num_classes": 5, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    model = timm.create_model("convnext_atto", **arguments)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert resize_input(model, arguments, channels=3, size=96) == arguments
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return coloured_set(tmp_path_factory.mktemp("sizes") / "shards")  # of 64 pixels


def test_sizes_that_do_not_fit_are_refused(shards, tmp_path):
    recipe = recipe_for(shards, tmp_path)
    subject = find_encoder(recipe, shards)
    for size, words in (
        (96, r"finetune\.image_size=96: larger than the images of 64 pixels that .* stores; use smaller images"),
        (
            40,
            r"finetune\.image_size=40: 40 pixels are not a multiple of the token size, 16 pixels; nearest allowed: 32",
        ),
    ):
        changed = with_overrides(recipe, {"finetune.image_size": size})
        with pytest.raises(SettingError, match=words):
            build_classifier(changed.finetune, subject, shards)
    model = timm.create_model("hiera_tiny_224", num_classes=5)  # its positions cannot be resampled
    with pytest.raises(ValueError, match="the model does not accept images of 96 pixels"):
        resize_input(model, {}, channels=3, size=96)


def test_a_smaller_size_is_trained_evaluated_and_exported(shards, tmp_path):
    from pipeline.stages.finetune import _export

    recipe = recipe_for(shards, tmp_path, **{"finetune.image_size": 48, "finetune.epochs": 6})
    subject, last = find_encoder(recipe, shards), tmp_path / "last"

    def keep(saver, state):
        if state["step"] == 6 * 4:
            saver(last)

    found = tuned(recipe, shards, on_checkpoint=keep)
    assert found.model.patch_embed.img_size == (48, 48) and found.counts.sum() == 32
    assert found.counts.trace() > 0.6 * 32
    _export(recipe, subject, shards, last, tmp_path / "model", {})
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.pretrained_cfg["input_size"] == (3, 48, 48)
    assert again.pretrained_cfg["crop_pct"] == pytest.approx(56 / 64)  # 7/8 of the stored images
    images = torch.randn(4, 3, 48, 48)
    torch.testing.assert_close(again.eval()(images), found.model.eval()(images))
