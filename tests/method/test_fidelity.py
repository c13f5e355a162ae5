"""Recipes that reproduce a paper, against a plain restatement of its equations: MAE and LocalMIM."""

import math

import pytest
import torch

from pipeline.config.load import load
from pipeline.models.build import build_blank_model, build_masking

# Narrow networks of the same code and the same recipe.
TINY = ["encoder.image_size=96", "encoder.width=48", "encoder.heads=3", "decoder.width=32", "decoder.heads=2"]


def masked_batch(name, settings, batch, *, dtype=torch.float64):
    """(recipe, model, images, mask) with weights that are all different from where they begin."""
    recipe = load(name, settings)
    model = build_blank_model(recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("norm" in key or key.endswith(("bias", "token"))):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    size = recipe.encoder.image_size
    images = torch.randn(batch, 3, size, size, generator=generator)
    # Contrast and brightness that vary over the image, so that normalising per patch matters.
    slope = torch.linspace(0.2, 2, size)
    images = images * slope + slope.flip(0)[:, None]
    mask = build_masking(recipe, model.encoder)(torch.arange(batch) + 7, {}, seed=0, epoch=3)
    return recipe, model, images, mask


def losses_of(recipe, model, images, mask):
    """(sum, one a tap) of our code."""
    with torch.no_grad():
        targets = model.target(images, {})
        weight = torch.full((len(images),), 1 / len(images))
        return model(images, targets, mask, weight, model.level_weights.at(0.0))


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x, weights, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def transformer_block(x, weights, name, heads):
    """x (T, E) of one image: pre-norm attention by an explicit softmax, then an MLP with the exact GELU."""
    tokens, width = x.shape
    parts = linear(norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv")
    q, k, v = (part.reshape(tokens, heads, width // heads).transpose(0, 1) for part in parts.split(width, 1))
    scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
    odds = (scores - scores.amax(-1, keepdim=True)).exp()
    attended = (odds / odds.sum(-1, keepdim=True)) @ v
    x = x + linear(attended.transpose(0, 1).reshape(tokens, width), weights, f"{name}.attn.proj")
    hidden = linear(norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def sincos(grid, width):
    """(grid², width): sine and cosine of the column, then of the row, at width / 4 frequencies from 1 to 1/10000."""
    table = torch.zeros(grid * grid, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                rate = 10000.0 ** (-i / quarter)
                place = row * grid + column
                table[place, i], table[place, quarter + i] = math.sin(column * rate), math.cos(column * rate)
                table[place, 2 * quarter + i], table[place, 3 * quarter + i] = (
                    math.sin(row * rate),
                    math.cos(row * rate),
                )
    return table


def patches_of(image, patch):
    """(N, C·patch²) of an image (C, H, W), row by row; values ordered channel, y, x."""
    grid = image.shape[1] // patch
    cells = [
        image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten()
        for i in range(grid)
        for j in range(grid)
    ]
    return torch.stack(cells)


def encoded(weights, patches, hidden, heads, depth):
    """MAE's encoder on the visible patches (N, D) of one image: tokens after every block {number: (1 + V, E)}."""
    positions = sincos(math.isqrt(len(patches)), weights["encoder.model.cls_token"].shape[-1])
    flat = weights["encoder.model.patch_embed.proj.weight"].flatten(1)
    tokens = patches @ flat.T + weights["encoder.model.patch_embed.proj.bias"] + positions
    visible = [place for place in range(len(patches)) if not hidden[place]]
    tokens = torch.cat((weights["encoder.model.cls_token"][0], tokens[visible]))
    taps = {}
    for number in range(depth):
        tokens = transformer_block(tokens, weights, f"encoder.model.blocks.{number}", heads)
        taps[number + 1] = tokens
    return taps


def decoded(weights, name, tokens, hidden, heads, depth, positions):
    """MAE's decoder on the encoder's tokens (1 + V, E): tokens (1 + N, W) after the last norm."""
    tokens = linear(tokens, weights, f"{name}.embed")
    width, seen = tokens.shape[1], iter(tokens[1:])
    token = weights[f"{name}.trunk.mask_token"][0, 0]
    whole = torch.stack([tokens[0], *(token if is_hidden else next(seen) for is_hidden in hidden.tolist())])
    whole = whole + torch.cat((torch.zeros(1, width, dtype=whole.dtype), positions))
    for number in range(depth):
        whole = transformer_block(whole, weights, f"{name}.trunk.blocks.{number}", heads)
    return norm(whole, weights, f"{name}.trunk.norm")


def mae_loss(weights, images, mask, *, patch, heads, depth, decoder_heads, decoder_depth):
    """He et al. 2022: mean squared error of the pixels of hidden patches, each patch of zero mean and unit deviation."""
    grid = images.shape[-1] // patch
    decoder_positions = sincos(grid, weights["decoders.4.trunk.mask_token"].shape[-1])
    total, count = 0.0, 0
    for image, hidden in zip(images, mask, strict=True):
        patches = patches_of(image, patch)
        tokens = encoded(weights, patches, hidden, heads, depth)[depth]
        tokens = norm(tokens, weights, "encoder.model.norm")
        tokens = decoded(weights, "decoders.4", tokens, hidden, decoder_heads, decoder_depth, decoder_positions)
        predictions = linear(tokens[1:], weights, "decoders.4.head")
        mean = patches.mean(1, keepdim=True)
        variance = (patches - mean).square().sum(1, keepdim=True) / (patches.shape[1] - 1)
        targets = (patches - mean) / (variance + 1e-6).sqrt()
        for place in range(len(patches)):
            if hidden[place]:
                total, count = total + float((predictions[place] - targets[place]).square().mean()), count + 1
    return total / count


def double(model):
    return {name: value.detach().double() for name, value in model.state_dict().items()}


def test_mae_base_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        model = build_blank_model(load("mae_vit_base"))
    assert sum(p.numel() for p in model.parameters()) == 111_907_840
    assert sum(p.numel() for p in model.encoder.model.parameters()) == 85_798_656
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.model.pos_embed", "decoders.4.places"}


def test_positions_are_those_of_mae():
    model = build_blank_model(load("mae_vit_base", [*TINY, "encoder.depth=1", "target.taps={4: 1}", "decoder.depth=1"]))
    for found, width in ((model.encoder.model.pos_embed, 48), (model.decoders["4"].places, 32)):
        assert (found[0, 0] == 0).all()  # of the class token
        torch.testing.assert_close(found[0, 1:].detach().double(), sincos(6, width), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "batch", "sizes"),
    [
        ([*TINY, "encoder.depth=3", "target.taps={4: 3}", "decoder.depth=2"], 3, (3, 3, 2, 2)),
        ([], 1, (12, 12, 16, 8)),  # mae_vit_base itself
    ],
    ids=["narrow", "mae_vit_base"],
)
def test_loss_of_mae(settings, batch, sizes):
    recipe, model, images, mask = masked_batch("mae_vit_base", settings, batch)
    heads, depth, decoder_heads, decoder_depth = sizes
    assert (mask.sum(1) == mask.shape[1] * 3 // 4).all()
    expected = mae_loss(
        double(model),
        images.double(),
        mask,
        patch=16,
        heads=heads,
        depth=depth,
        decoder_heads=decoder_heads,
        decoder_depth=decoder_depth,
    )
    total, losses = losses_of(recipe, model, images, mask)
    assert total == losses[0]
    assert float(total) == pytest.approx(expected, rel=1e-5)
    # Other weights would not pass: the predictions matter, they do not drown in the targets.
    with torch.no_grad():
        model.decoders["4"].head.bias += 0.01
    assert float(losses_of(recipe, model, images, mask)[0]) != pytest.approx(expected, rel=1e-5)


def test_localmim_base_has_the_taps_and_scales_of_the_paper():
    with torch.device("meta"):
        model = build_blank_model(load("localmim_vit_base"))
    target = model.target
    assert [(tap.block, target.cell_size(tap.level)) for tap in target.taps] == [(2, 4), (4, 8), (10, 16), (12, 32)]
    assert [target.positions(tap.level) ** 2 * target.cells(tap.level) ** 2 for tap in target.taps] == [
        (224 // cell) ** 2 for cell in (4, 8, 16, 32)
    ]
    assert [head.head.out_features for head in model.decoders.values()] == [3 * 9 * 16, 3 * 9 * 4, 3 * 9, 3 * 9]
    assert (target.bins, target.normalise, target.loss) == (9, "patch", "l2")
    assert list(model.level_weights.at(0.0).shape) == [4]


def mask_at(hidden, grid, cells):
    """Hidden share of cell (y, x) on a grid of `cells`, by its pixels (LocalMIM: repeated where finer, else averaged)."""
    side = max(grid, cells)
    shares = torch.zeros(cells, cells, dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            share = float(hidden[(y * grid // side) * grid + x * grid // side])
            shares[y * cells // side, x * cells // side] += share / (side // cells) ** 2
    return shares


def test_loss_of_localmim():
    """Sum over scales of Σ M · (mean squared error of the cell) / Σ M, with the encoder's and decoders' equations.

    Targets are those of our HOG, whose differences the recipe's header names.
    """
    settings = [*TINY, "encoder.image_size=128", "encoder.depth=4", "target.taps={2: 1, 3: 2, 4: 3, 5: 4}"]
    recipe, model, images, mask = masked_batch("localmim_vit_base", settings, 2)
    assert recipe.weights_by_level() == dict.fromkeys((2, 3, 4, 5), 1.0)
    weights, grid = double(model), 8
    histograms = model.target.histograms(images)
    partly, expected = 0, []
    for tap in model.target.taps:
        top, below = 0.0, 0.0
        for image, hidden, histogram in zip(images.double(), mask, histograms[tap.level].double(), strict=True):
            tokens = encoded(weights, patches_of(image, 16), hidden, 3, 4)[tap.block]
            name = f"decoders.{tap.level}"
            tokens = norm(tokens, weights, "encoder.model.norm" if tap.block == 4 else f"{name}.norm_in")
            cells = 128 // 2**tap.level
            found = predicted_cells(weights, name, tokens, hidden, grid, cells)
            lengths = histogram.square().sum(1, keepdim=True).sqrt()
            truth = (histogram / lengths).flatten(0, 1)  # (C · bins, cells, cells)
            share = mask_at(hidden, grid, cells)
            partly += int(((share > 0) & (share < 1)).sum())
            for y in range(cells):
                for x in range(cells):
                    error = (found[:, y, x] - truth[:, y, x]).square().mean()
                    top, below = top + float(share[y, x] * error), below + float(share[y, x])
        expected.append(top / below)
    total, losses = losses_of(recipe, model, images, mask)
    assert partly > 4  # cells of 32 px count by the share of their four tokens that is hidden
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(sum(expected), rel=1e-5)


def predicted_cells(weights, name, tokens, hidden, grid, cells):
    """Predictions (27, cells, cells) of one decoder: a linear map to all cells of a token, or of four averaged ones."""
    token = linear(tokens, weights, f"{name}.embed")
    width = token.shape[1]
    seen, stand_in = iter(token[1:]), weights[f"{name}.trunk.mask_token"][0, 0]
    whole = torch.stack([token[0], *(stand_in if h else next(seen) for h in hidden.tolist())])
    whole = whole + torch.cat((torch.zeros(1, width, dtype=whole.dtype), sincos(grid, width)))
    whole = transformer_block(whole, weights, f"{name}.trunk.blocks.0", 2)[1:].reshape(grid, grid, width)
    if cells < grid:
        whole = torch.stack(
            [whole[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for y in range(cells) for x in range(cells)]
        ).reshape(cells, cells, width)
    vectors = linear(norm(whole, weights, f"{name}.trunk.norm"), weights, f"{name}.head")
    inner = max(cells // grid, 1)  # cells a side of a token, ordered channel and bin, y, x
    found = torch.zeros(27, cells, cells, dtype=torch.float64)
    for y in range(cells):
        for x in range(cells):
            vector = vectors[y // inner, x // inner].reshape(27, inner, inner)
            found[:, y, x] = vector[:, y % inner, x % inner]
    return found
