"""Training at growing image sizes: what is read, what a halved image's coefficients are, positions, and exact resume."""

import numpy as np
import pytest
import pywt
import timm
import torch
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
from pipeline.config.recipe import for_size
from pipeline.errors import SettingError
from pipeline.models.build import build_blank_model, build_inputs, check_model
from pipeline.shards.layout import Layout
from pipeline.shards.reader import Reader
from pipeline.training.pretrain_loop import train
from pipeline.training.schedule import phases_of
from wavemim.positions import fitted, sincos, stretch_positions
from wavemim.weights import checkpoint

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "encoder.positions": "learned",
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "train.epochs": 3,
    "train.batch": 10,
    "train.workers": 1,
    "train.warmup_epochs": 0,
    "train.log_every": 2,
    "train.checkpoint_every": 0.25,
    "train.ema": 0.8,
    "train.accumulate": 2,
    "train.progressive": {32: 0.5, 64: 0.5},
}


def recipe_with(**changes):
    return with_overrides(load("small"), SETTINGS | changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on: 4 steps an epoch


def go(recipe, shards, folder=None, resume=None):
    logged = {}

    def keep(saver, state):
        if folder is not None:
            saver(folder / f"step-{state['step']}")

    trained = train(
        recipe,
        shards,
        device=torch.device("cpu"),
        resume=resume,
        on_log=lambda metrics, images: logged.update({images: metrics}),
        on_checkpoint=keep,
    )
    return trained, logged


def test_both_sizes_are_trained_and_resuming_is_exact_in_either(shards, tmp_path):
    whole, logged = go(recipe_with(), shards, tmp_path)
    assert [(metrics["train/image_size"], images) for images, metrics in logged.items()] == [
        (32, 20), (32, 40), (32, 60), (64, 80), (64, 100), (64, 120)
    ]  # fmt: skip
    small, large = whole.position.parts
    assert (small["image_size"], small["images_seen"]) == (32, 60)
    assert (large["image_size"], large["images_seen"]) == (64, 60)
    assert small["flops"] < 0.4 * large["flops"]
    assert whole.model.encoder.image_size == 64
    for step in (2, 6, 8):  # in the first part, between the two, in the second
        resumed, again = go(recipe_with(), shards, resume=tmp_path / f"step-{step}")
        assert list(again) == [images for images in logged if images > 10 * step]
        for images, metrics in again.items():
            same = {key: value for key, value in metrics.items() if not key.startswith(("perf/", "cost/"))}
            assert same == {key: logged[images][key] for key in same}
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), (step, name)
        assert [part["images_seen"] for part in resumed.position.parts] == [60, 60]
    averages = [checkpoint.read_state(tmp_path / f"step-{step}")["files"][checkpoint.AVERAGED] for step in (6, 12)]
    assert averages[0] != averages[1]


def test_a_checkpoint_of_a_small_size_loads_into_the_model_that_others_build(shards, tmp_path):
    for positions in ("learned", "sincos"):
        recipe = recipe_with(**{"encoder.positions": positions})
        folder = tmp_path / positions
        go(recipe, shards, folder)
        model = build_blank_model(recipe)
        fixed = model.encoder.model.pos_embed.detach().clone()
        checkpoint.load_trained(folder / "step-4", model)
        table = model.encoder.model.pos_embed
        assert table.shape == fixed.shape
        assert torch.equal(table, fixed) == (positions == "sincos")  # put back exactly, though it was saved stretched
        model.predict(torch.zeros(2, 3, 64, 64), torch.arange(64).expand(2, -1) % 4 > 0)


def test_images_come_in_the_same_order_out_of_fewer_bytes(shards):
    plan = {"batch": 10, "flip": True, "seed": 3}
    full, halved = (Reader(shards, "train", window=64, finest=finest, **plan) for finest in (1, 2))
    for a, b in zip(full.epoch(1), halved.epoch(1), strict=True):
        assert a.rows.tolist() == b.rows.tolist()
        assert set(b.levels) == set(a.levels) - {1}
        assert all(torch.equal(a.levels[level], b.levels[level]) for level in b.levels)
    assert 0 < halved.bytes_read < 0.6 * full.bytes_read


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("finest", [2, 3])
def test_coefficients_of_a_halved_image_are_those_of_pywavelets(tmp_path, wavelet, finest):
    layout = Layout(64, 3, dict.fromkeys(range(1, 5), 0.25), wavelet=wavelet)
    shards = write_set(tmp_path / "set", photos(9), layout)
    [batch] = Reader(shards, "train", batch=6, window=64, flip=False, finest=finest).epoch(0)
    images, pyramid = build_inputs(shards, depth=4).raw(batch.levels, batch.crop)
    assert images.shape == (6, 3, 64 >> (finest - 1), 64 >> (finest - 1))
    assert sorted(pyramid) == [1, 2, 3, 4]  # one or two of them are not stored
    oracle = pywt.wavedec2(images.numpy().astype(np.float64), wavelet, mode="periodization", level=4, axes=(-2, -1))
    for level in range(1, 5):
        for band, expected in zip((-3, -2, -1), oracle[len(oracle) - level], strict=True):
            np.testing.assert_allclose(pyramid[level][:, :, band], expected, atol=2e-3)
    np.testing.assert_allclose(pyramid[4][:, :, 0], oracle[0], atol=2e-3)


def test_mirrored_windows_of_halved_images_of_other_wavelets(tmp_path):
    shards = write_set(tmp_path / "set", photos(9), Layout(64, 3, dict.fromkeys(range(1, 5), 0.25), wavelet="db2"))
    make = build_inputs(shards)
    plain, mirrored = (
        next(iter(Reader(shards, "train", batch=6, window=64, flip=flip, finest=2).epoch(0))) for flip in (False, True)
    )
    assert mirrored.crop is not None and mirrored.crop.mirrored.any() and not mirrored.crop.mirrored.all()
    here, there = make.raw(plain.levels, plain.crop)[0], make.raw(mirrored.levels, mirrored.crop)[0]
    for image, other, flipped in zip(here, there, mirrored.crop.mirrored, strict=True):
        assert torch.allclose(other, image.flip(-1) if flipped else image, atol=1e-3)


def test_positions_are_resampled_as_timm_does():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=24, num_heads=2, depth=1)
    before = model.pos_embed.detach().clone()
    model.set_input_size(img_size=96)
    own = torch.zeros(1, 1 + 12 * 12, 24)
    assert torch.allclose(fitted("encoder.model.pos_embed", before, own), model.pos_embed, atol=1e-6)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=224, window_size=7, embed_dim=24, depths=(1,) * 4)
    name = "layers.3.blocks.0.attn.relative_position_bias_table"
    before = swin.state_dict()[name].clone()
    swin.set_input_size(img_size=128)  # the last stage is 4 × 4: its windows become smaller
    after = swin.state_dict()[name]
    assert after.shape != before.shape
    assert torch.allclose(fitted(name, before, torch.zeros_like(after)), after, atol=1e-5)
    assert fitted("blocks.0.mlp.fc1.weight", torch.zeros(3, 4), torch.zeros(4, 4)).shape == (3, 4), (
        "the model refuses it"
    )


def test_fixed_positions_keep_their_place_in_the_image():
    recipe, halvings = for_size(recipe_with(**{"encoder.positions": "sincos"}), 32, 64, 4)
    assert (halvings, recipe.encoder.image_size) == (1, 32)
    model = build_blank_model(recipe)
    stretch_positions(model, model.encoder.image_size, 64)
    grid, width = 4, 32
    table = model.encoder.model.pos_embed[0, 1:].detach().reshape(grid, grid, width)
    whole = sincos(8, width)[0].reshape(8, 8, width)
    slow = [width // 4 - 1, width // 2 - 1]  # sine and cosine of the lowest frequency of the column: nearly a line
    for column in range(1, 3):  # bicubic sampling bends at the edges
        assert torch.allclose(table[:, column, slow], whole[:4, 2 * column : 2 * column + 2, slow].mean(1), atol=2e-3)


@pytest.mark.parametrize(
    ("sizes", "stored", "expected"),
    [
        ({112: 0.5, 224: 0.5}, 256, [(112, 1), (224, 0)]),
        ({96: 0.25, 128: 0.25, 224: 0.5}, 256, [(96, 1), (128, 1), (224, 0)]),
        ({64: 0.5, 224: 0.5}, 256, [(64, 2), (224, 0)]),
        ({192: 0.5, 224: 0.5}, 256, [(192, 0), (224, 0)]),  # 384 pixels are not stored
        ({128: 0.5, 256: 0.5}, 256, [(128, 1), (256, 0)]),
    ],
)
def test_images_are_halved_as_often_as_they_shrink(sizes, stored, expected):
    full = max(sizes)
    recipe = load("wamim_vit_base")
    recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"image_size": full})})
    assert [(size, for_size(recipe, size, stored, 5)[1]) for size in sizes] == expected


def test_every_part_has_a_step_and_all_of_them_the_whole(shards):
    recipe = recipe_with(**{"train.progressive": {16: 0.01, 32: 0.01, 64: 0.98}})
    assert [phase.end for phase in phases_of(recipe, shards, 12)] == [1, 2, 12]
    assert [phase.end for phase in phases_of(recipe, shards, 1)] == [1, 1, 1]
    assert [phase.end for phase in phases_of(recipe_with(**{"train.progressive": {}}), shards, 12)] == [12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.progressive": {64: 0.5, 32: 0.5}}, "sizes must grow"),
        ({"train.progressive": {32: 1.0}}, "end with encoder.image_size=64"),
        ({"train.progressive": {32: 0.5, 64: 0.6}}, "add up to 1, not to 1.1"),
        ({"train.progressive": {32: 0.0, 64: 1.0}}, "above 0"),
        (
            {"train.progressive": {24: 0.5, 64: 0.5}},
            "images of 24 pixels do not fit the other settings; encoder.image_size=24",
        ),
        ({"train.progressive": "fast"}, "train.progressive"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(SettingError, match=message) as error:
        recipe_with(**changes)
    assert "\n" not in str(error.value)


def test_a_hierarchy_grows_too(tmp_path):
    shards = write_set(tmp_path / "set", photos(6, side=128), Layout(128, 3, dict.fromkeys(range(1, 6), 1)))
    changes = {
        "encoder.image_size": 128,
        "data.image_size": 128,
        "encoder.options": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]},
        "decoder.width": 16,
        "decoder.heads": 2,
        "train.epochs": 2,
        "train.batch": 4,
        "train.warmup_epochs": 0,
        "train.workers": 1,
        "train.progressive": {64: 0.5, 128: 0.5},
    }
    recipe = with_overrides(load("wamim_swin_tiny"), changes)
    check_model(recipe)
    trained, _ = go(recipe, shards)
    assert [part["image_size"] for part in trained.position.parts] == [64, 128]
    assert trained.model.encoder.image_size == 128
