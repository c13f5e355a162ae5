"""Features of all blocks in one pass, against the model itself and hooks; and parts of a split put together."""

import numpy as np
import pytest
import timm
import torch
from tiny_shards import photos, write_set

from pipeline.evaluation.features import features_of, tapped_of, with_tokens
from pipeline.models.build import build_inputs
from pipeline.shards.batches import positions_of_part, sequential
from wavemim.encoders.factory import make_encoder
from wavemim.evaluation.features import Taps, extract_taps, joined, pools_of
from wavemim.weights.mae_import import import_vit

SIDE = 32


def models():
    vit = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    yield (
        "vit, pooled",
        make_encoder("vit_tiny_patch16_224", image_size=SIDE, patch_size=8, width=32, depth=3, heads=2).model,
    )
    yield "vit, class token", timm.create_model("vit_tiny_patch16_224", **vit)
    yield "registers", timm.create_model("vit_tiny_patch16_224", **vit, reg_tokens=2, global_pool="avg")
    yield "convnext", timm.create_model("convnext_atto", num_classes=0)


@pytest.mark.parametrize(("name", "model"), models(), ids=lambda value: value if isinstance(value, str) else "")
def test_one_pass_gives_the_models_own_features_and_every_blocks(name, model):
    model = model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 3, SIDE, SIDE, generator=generator), torch.arange(n)) for n in (3, 2)]
    seen, calls = [], []
    layers = model.blocks if hasattr(model, "blocks") else model.stages
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out))
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    found = extract_taps(Taps(model, blocks=True, tokens=True), batches, tokens_of=np.array([1, 1, 1, 1, 0], bool))
    assert len(calls) == 3  # each batch once, and once more to see that the head gives the model's own features
    seen.clear()
    with torch.inference_mode():
        own = torch.cat([model(images) for images, _ in batches])
    np.testing.assert_allclose(found.final, own.numpy(), rtol=1e-4, atol=1e-5)
    assert sorted(found.blocks) == list(range(1, len(layers) + 1))
    for number in found.blocks:
        out = torch.cat(seen[number - 1 :: len(layers)])
        patches = out[:, model.num_prefix_tokens :] if out.ndim == 3 else out.flatten(2).transpose(1, 2)
        np.testing.assert_allclose(found.blocks[number], patches.mean(1).numpy(), rtol=1e-4, atol=1e-5)
    assert found.tokens.dtype == np.float16
    np.testing.assert_allclose(found.tokens, patches[:4].numpy(), rtol=2e-3, atol=2e-3)
    assert found.labels.tolist() == [0, 1, 2, 0, 1]


def poolable():
    vit = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    for name, arguments, pools in (
        ("mean", {"global_pool": "avg", "fc_norm": False}, ("mean", "token")),
        ("mean, then a norm", {"global_pool": "avg"}, ("mean", "token")),
        ("class token", {}, ("mean", "token")),
        ("class token and registers", {"reg_tokens": 2}, ("mean", "token")),
        ("no class token", {"global_pool": "avg", "class_token": False}, ("mean",)),
        ("the largest token", {"global_pool": "max"}, ()),
        ("attention", {"global_pool": "map"}, ()),
        ("with the prefix", {"global_pool": "avg", "pool_include_prefix": True}, ()),
    ):
        yield name, timm.create_model("vit_tiny_patch16_224", **vit, **arguments), pools
    yield "convnext", timm.create_model("convnext_atto", num_classes=0), ()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("name", "model", "pools"), poolable(), ids=lambda v: v if isinstance(v, str) else "")
def test_poolings_differ_in_the_pooling_alone(name, model, pools, blocks):
    model = model.eval()
    images = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert pools_of(model, images[:1]) == pools
    asked = pools[::-1]
    batches = [(images[:3], torch.zeros(3)), (images[3:], torch.zeros(2))]
    found = extract_taps(Taps(model, blocks=blocks, tokens=False, pools=asked), batches)
    with torch.inference_mode():
        if not asked:
            np.testing.assert_allclose(found.final, model(images).numpy(), rtol=1e-4, atol=1e-5)
            assert found.others == {}
            return
        tokens = model.forward_features(images)
        expected = {"token": tokens[:, 0], "mean": tokens[:, model.num_prefix_tokens :].mean(1)}
        expected = {key: model.fc_norm(values).numpy() for key, values in expected.items()}
    np.testing.assert_allclose(found.final, expected[asked[0]], rtol=1e-4, atol=1e-5)
    assert tuple(found.others) == asked[1:]
    for pool in asked[1:]:
        assert np.abs(expected["mean"] - expected["token"]).max() > 0.01
        np.testing.assert_allclose(found.pooled(pool)[0], expected[pool], rtol=1e-4, atol=1e-5)
    halves = [extract_taps(Taps(model, blocks=blocks, tokens=False, pools=asked), [batch]) for batch in batches]
    together = joined(halves[::-1], [np.array([3, 4]), np.array([0, 1, 2])])
    for pool in asked[1:]:
        np.testing.assert_allclose(together.others[pool], found.others[pool], atol=1e-5)


def test_an_imported_mae_has_the_features_of_the_same_weights_of_ours(tmp_path):
    """Its own features are the class token, ours the mean of the patch tokens: by evaluate.pool both are the same."""
    ours = make_encoder("vit_tiny_patch16_224", image_size=SIDE, patch_size=8, width=32, depth=2, heads=2).model.eval()
    torch.save({"model": ours.state_dict()}, tmp_path / "mae.pth")
    import_vit(tmp_path / "mae.pth", tmp_path / "mae", heads=2)
    imported = timm.create_model(f"local-dir:{tmp_path / 'mae'}", pretrained=True).eval()
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.zeros(3))]
    own = {
        pool: extract_taps(Taps(model, blocks=False, tokens=False), batches).final
        for pool, model in (("mean", ours), ("token", imported))
    }
    assert np.abs(own["mean"] - own["token"]).max() > 0.01
    for pool in own:
        features = [
            extract_taps(Taps(model, blocks=False, tokens=False, pools=(pool,)), batches).final
            for model in (ours, imported)
        ]
        np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(features[0], own[pool], rtol=1e-5, atol=1e-6)


def test_a_head_that_does_not_follow_gives_the_models_own_features_all_the_same():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

        def forward_intermediates(self, x, indices=None, output_fmt="NCHW"):
            return x, [x, 2 * x]

        def forward_head(self, x):
            return x.mean((2, 3)) + 1

    images = torch.randn(4, 3, 8, 8)
    found = extract_taps(
        Taps(Odd(), blocks=True, tokens=False), [(images[:2], torch.zeros(2)), (images[2:], torch.zeros(2))]
    )
    np.testing.assert_allclose(found.final, images.mean((2, 3)).numpy(), rtol=1e-5)
    assert found.tokens is None and set(found.blocks) == {1, 2}


@pytest.mark.parametrize("most", [None, 10, 3])
def test_parts_of_a_split_are_the_split(tmp_path, most):
    shards = write_set(tmp_path / "shards", photos(21), rows_per_group=4)
    model = make_encoder("vit_tiny_patch16_224", image_size=64, patch_size=16, width=32, depth=2, heads=2).model.eval()
    inputs, settled = build_inputs(shards), {"window": 64, "batch": 3, "max_rows": most}
    taps = Taps(model, blocks=True, tokens=True)
    whole = tapped_of(taps, inputs, shards, "train", **settled, token_rows=6)
    assert len(whole.tokens) == min(6, most or 6)
    count = min(2, len(whole.labels) // 4) or 1
    parts = [tapped_of(taps, inputs, shards, "train", **settled, part=(k, count), token_rows=6) for k in range(count)]
    places = [positions_of_part(shards, "train", (k, count), most) for k in range(count)]
    together = joined(parts, places)
    assert np.array_equal(together.labels, whole.labels)
    np.testing.assert_allclose(together.final, whole.final, atol=1e-5)
    np.testing.assert_allclose(together.blocks[1], whole.blocks[1], atol=1e-5)
    tokens = np.zeros_like(whole.tokens)
    for k, part in enumerate(parts):
        if part.tokens is not None:
            tokens[with_tokens(shards, "train", (k, count), most, 6)[1]] = part.tokens
    np.testing.assert_allclose(tokens, whole.tokens, atol=2e-3)
    rows = torch.cat([batch.rows for batch in sequential(shards, "train", 3, window=64, max_rows=most)])
    for k in range(count):
        mine = [b.rows for b in sequential(shards, "train", 3, window=64, max_rows=most, part=(k, count))]
        assert torch.equal(torch.cat(mine), rows[places[k]])
    plain, labels = features_of(model, inputs, shards, "train", **settled)
    np.testing.assert_allclose(plain, whole.final, atol=1e-5)
    assert np.array_equal(labels, whole.labels)
