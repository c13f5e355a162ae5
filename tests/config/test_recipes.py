"""Every recipe builds, costs what its header says, and has the published settings."""

import functools
import re
from importlib import resources

import pytest
import torch

from pipeline.config.load import load, names_of
from pipeline.models.build import build_blank_model
from wavemim.flops import cost_of

NAMES = names_of("pipeline", "recipes")
OWN = ("demo", "small", "small32", "tiny_imagenet")  # reproduce nothing
FOUR = ("small_wavelet", "small_pixels", "small_hog", "small_fourier")
COST = r"# Cost: [\d.]+ M parameters, encoder [\d.]+ M, [\d.]+ GFLOP forward per image \(counted\)"


def header(name):
    text = (resources.files("pipeline") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


@functools.cache
def blank(name):
    with torch.device("meta"):
        return build_blank_model(load(name))


def test_the_recipes_that_are_promised():
    sizes = {"wamim_vit": "tiny small base large", "wamim_swin": "tiny base", "wamim_convnext": "tiny base"}
    sizes |= {
        "mae_vit": "small base tiny_cifar10 lite_tiny_imagenet",
        "localmim_vit": "small base",
        "simmim_swin": "base",
        "mfm_vit": "base",
    }
    assert set(NAMES) >= {f"{kind}_{size}" for kind, all_ in sizes.items() for size in all_.split()} | {*FOUR}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_and_costs_what_it_says(name):
    said = [line for line in header(name) if line.startswith("# Cost")]
    assert len(said) == 1 and re.fullmatch(COST, said[0]), said
    assert said[0] == f"# Cost: {cost_of(blank(name))}", f"to be mended by: python benchmarks/step.py --costs {name}"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_a_header_says_what_where_from_and_what_differs(name):
    lines = header(name)
    assert not lines[0].startswith(("# Cost", "# Source"))
    starts = [line.split(":")[0] for line in lines if re.match(r"# (Cost|Source|Deviations): \S", line)]
    assert starts == ["# Cost", "# Source", "# Deviations"]
    source = " ".join(lines).partition("# Source:")[2].partition("# Deviations:")[0]
    named = [word for word in re.findall(r"[a-z]+(?:_[a-z]+)+", source) if word in NAMES]
    assert re.search(r"arXiv \d{4}\.\d{5}", source) or named, source  # its own source, or that of another recipe


# Of the papers: images a step, learning rate at this batch, epochs of warm-up, betas, clipping, weight decay, share hidden.
PUBLISHED = {
    "localmim_vit_base": (2048, 2e-4 * 2048 / 256, 10, (0.9, 0.95), None, 0.05, 0.75),
    "mae_vit_base": (4096, 1.5e-4 * 4096 / 256, 40, (0.9, 0.95), None, 0.05, 0.75),
    "simmim_swin_base": (2048, 1e-4 * 2048 / 512, 10, (0.9, 0.999), 5.0, 0.05, 0.6),
    "mfm_vit_base": (2048, 3e-4 * 2048 / 512, 20, (0.9, 0.95), 3.0, 0.05, None),
    "mae_vit_tiny_cifar10": (512, 3e-4, 15, (0.9, 0.95), None, 0.05, 0.75),
    "mae_vit_lite_tiny_imagenet": (128, 5e-4, 20, (0.9, 0.95), None, 0.15, 0.75),
    "wamim_vit_base": (2048, 2e-4 * 2048 / 256, 10, (0.9, 0.95), 3.0, 0.05, 0.75),
    "wamim_swin_base": (2048, 1e-4 * 2048 / 256, 10, (0.9, 0.95), 3.0, 0.05, 0.75),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    recipe = load(name)
    train, hidden = recipe.train, None if recipe.mask.kind == "frequency" else recipe.mask.ratio
    rate = pytest.approx(train.lr * train.batch / 256)
    found = (train.batch, rate, train.warmup_epochs, train.betas, train.clip_grad, train.weight_decay, hidden)
    assert found == PUBLISHED[name]


# Of the papers' code: images a step, learning rate at this batch, layer decay, epochs, of warm-up, drop path.
FINETUNED = {
    "mae_vit_base": (1024, 5e-4 * 1024 / 256, 0.65, 100, 5, 0.1),
    "localmim_vit_base": (1024, 4e-3, 0.75, 100, 20, 0.1),
    "wamim_vit_base": (1024, 4e-3, 0.75, 100, 20, 0.1),
    "wamim_vit_large": (1024, 3e-3, 0.75, 50, 5, 0.2),
    "wamim_swin_base": (1024, 4e-3, 0.9, 100, 20, 0.1),
    "simmim_swin_base": (2048, 1.25e-3 * 2048 / 512, 0.8, 100, 20, 0.1),  # after 800 epochs of pretraining
    "mfm_vit_base": (2048, 2e-3 * 2048 / 512, 0.8, 100, 5, 0.1),
}


@pytest.mark.parametrize("name", FINETUNED)
def test_published_fine_tuning(name):
    found = load(name).finetune
    rate = pytest.approx(found.lr * found.batch / 256)
    lengths = (found.layer_decay, found.epochs, found.warmup_epochs, found.drop_path)
    assert (found.batch, rate, *lengths) == FINETUNED[name]
    assert (found.mixup, found.cutmix, found.label_smoothing, found.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (found.rand_augment, found.weight_decay, found.betas) == ("rand-m9-mstd0.5-inc1", 0.05, (0.9, 0.999))


# Images a step, learning rate at this batch, epochs, of warm-up, weight decay; blocks, width and heads of encoder and decoder.
SMALL_MAE = {
    "mae_vit_tiny_cifar10": (128, 5e-4, 50, 5, 0.05, (12, 192, 3), (4, 192, 3)),
    "mae_vit_lite_tiny_imagenet": (128, 1e-3, 100, 5, 0.05, (7, 256, 4), (2, 128, 4)),
}


@pytest.mark.parametrize("name", SMALL_MAE)
def test_published_small_vits(name):
    recipe, model = load(name), blank(name).encoder.model
    found, decoder = recipe.finetune, recipe.decoder
    rate = pytest.approx(found.lr * found.batch / 256)
    shape = (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads)
    sizes = (shape, (decoder.depth, decoder.width, decoder.heads))
    assert (found.batch, rate, found.epochs, found.warmup_epochs, found.weight_decay, *sizes) == SMALL_MAE[name]
    regularised = (found.layer_decay, found.drop_path, found.mixup, found.cutmix, found.label_smoothing, found.erasing)
    assert regularised == (1, 0, 0, 0, 0, 0) and found.head == "token"
    train, images = recipe.train, (recipe.data.image_size, recipe.data.steps)
    assert (train.augment, train.flip, recipe.encoder.image_size) == ("window", False, images[0])  # the whole image
    assert images[1] == "lossless" and recipe.target.normalise == "none" and len(recipe.target.taps) == 1


def test_published_pictures_masks_and_decoders():
    names = ("mae_vit_base", "localmim_vit_base", "simmim_swin_base", "mfm_vit_base")
    mae, localmim, simmim, mfm = (load(name) for name in names)
    assert [r.train.augment for r in (mae, localmim, simmim, mfm)] == ["rrc"] * 4
    assert [r.train.crop_scale[0] for r in (mae, localmim, simmim, mfm)] == [0.2, 0.2, 0.67, 0.2]
    assert (mae.decoder.width, mae.decoder.depth, mae.decoder.heads) == (512, 8, 16)
    assert (localmim.decoder.width, localmim.decoder.depth, localmim.decoder.heads) == (256, 1, 8)
    assert (simmim.encoder.image_size, simmim.mask.kind, simmim.mask.unit, simmim.target.loss) == (
        192,
        "block",
        32,
        "l1",
    )
    assert (mfm.mask.radius, mfm.mask.low_pass_share, mfm.target.gamma, mfm.target.focal) == (16, 0.5, 1, 0)
    assert mfm.target.average == "frequency"
    assert simmim.decoder.depth == mfm.decoder.depth == 0
    assert blank("simmim_swin_base").encoder.model.layers[0].blocks[0].window_size == (6, 6)
    assert (simmim.train.epochs, simmim.finetune.image_size) == (800, 224)
    assert {r.name: r.encoder.init for r in (mae, localmim, simmim, mfm)} == dict(
        zip(names, ("mae", "mae", "timm", "beit"), strict=True)
    )
    assert blank("wamim_swin_base").encoder.model.layers[0].blocks[0].window_size == (7, 7)


@pytest.mark.parametrize("prefix", ["small", "small32"])
def test_the_four_small_ones_differ_in_the_target_alone(prefix):
    four = [name.replace("small", prefix) for name in FOUR]
    recipes = {name: load(name).dump() for name in (*four, prefix)}
    kinds = {name: recipe["target"]["kind"] for name, recipe in recipes.items() if name != prefix}
    assert kinds == {name: name.removeprefix(f"{prefix}_") for name in four}
    assert {block for recipe in recipes.values() for block in recipe["target"]["taps"].values()} == {8}
    for recipe in recipes.values():
        del recipe["target"], recipe["name"]
    assert all(recipe == recipes[prefix] for recipe in recipes.values())
    # The same network too, but for the layers that predict.
    shapes = [
        {
            re.sub(r"decoders\.\d", "decoders", k): v.shape
            for k, v in blank(name).named_parameters()
            if ".head." not in k
        }
        for name in four
    ]
    assert all(shape == shapes[0] for shape in shapes)
