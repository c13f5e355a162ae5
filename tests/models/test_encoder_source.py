"""Encoders to evaluate: checkpoints, folders in timm's format, timm's own weights, and what is said of others."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from tiny_shards import LAYOUT, photos, write_set

from pipeline.config.load import load
from pipeline.errors import SettingError, StageError
from pipeline.models.build import build_model
from pipeline.models.encoder_source import EncoderSource, find_encoder
from pipeline.models.timm_config import load_call
from pipeline.stages import evaluate
from pipeline.storage.folder import Folder
from wavemim.weights import checkpoint
from wavemim.weights.timm_folder import export_timm

SIDE, MEAN, STD = LAYOUT.image_size, [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
TINY = [
    f"data.image_size={SIDE}",
    f"data.levels={LAYOUT.levels}",
    f"encoder.image_size={SIDE}",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "encoder.patch_size=8",
    "decoder.width=16",
    "decoder.heads=2",
    "target.taps={2: 1, 3: 2}",
    "tracking.system_metrics=false",
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(recipe, shard set, checkpoint's folder, its encoder): weights moved away from where they start."""
    out = tmp_path_factory.mktemp("subjects")
    shards = write_set(out / "shards", photos(12))
    recipe = load("small", [*TINY, f"out={out}", "name=tiny", "seed=3"])
    model = build_model(recipe, shards)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    folder = recipe.stage_dir("pretrain") / "images-000000000012"
    state = {
        "images": 12,
        "recipe": recipe.dump(),
        "shards": shards.fingerprint,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        "wavelet": "haar",
        "epoch": 1,
    }
    folder.parent.mkdir(parents=True)
    checkpoint.save(folder, model, None, state)
    return recipe, shards, folder, model.encoder.model.eval()


@pytest.fixture(scope="module")
def exported(ours):
    """The checkpoint's encoder in timm's format."""
    recipe, _, folder, encoder = ours
    target = folder.parents[1] / "folder"
    model = build_model(recipe, ours[1])
    about = {"images_seen": 12}
    named = {"architecture": model.encoder.name, "arguments": model.encoder.arguments}
    export_timm(target, encoder, **named, pixel_mean=MEAN, pixel_std=STD, about=about)
    return target


def images():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items() if name in other)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder"])
def test_the_trained_encoder_comes_back_from_wherever_it_is(ours, exported, kind):
    recipe, shards, folder, encoder = ours
    named = {"run": None, "checkpoint": str(folder), "folder": str(exported)}[kind]
    subject = find_encoder(recipe.model_copy(update={"checkpoint": named}), shards)
    subject = EncoderSource(**json.loads(json.dumps(asdict(subject))))  # plain values: it travels to workers
    assert subject.kind == ("folder" if kind == "folder" else "checkpoint")
    assert (subject.image_size, subject.channels, subject.images_seen) == (SIDE, 3, 12)
    assert subject.pixel_mean == pytest.approx(MEAN) and subject.pixel_std == pytest.approx(STD)
    with torch.no_grad():
        torch.testing.assert_close(subject.model().eval()(images()), encoder(images()))
    weights = (exported if kind == "folder" else folder) / checkpoint.MODEL
    assert subject.fingerprint == checkpoint.checksum(weights)


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_arguments_and_fresh_weights(ours, exported, kind):
    recipe, shards, _, encoder = ours
    named = None if kind == "checkpoint" else str(exported)
    subject = find_encoder(recipe.model_copy(update={"checkpoint": named}), shards)
    before = torch.get_rng_state()
    classifier = subject.model(num_classes=7, drop_path_rate=0.2)
    fresh, again, other = (subject.model(trained=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws change
    assert classifier.eval()(images()).shape == (3, 7)
    assert same(encoder.state_dict(), classifier.state_dict())
    assert same(fresh.state_dict(), again.state_dict()) and not same(fresh.state_dict(), other.state_dict())
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
    assert subject.model(img_size=2 * SIDE).eval()(images().repeat(1, 1, 2, 2)).shape == (3, 32)


def test_the_beginning_is_where_this_very_training_began(ours):
    recipe, shards, _, _ = ours
    began = build_model(recipe, shards, start=True).encoder.model
    subject = find_encoder(recipe, shards)
    assert same(began.state_dict(), subject.beginning().state_dict()) and not subject.starts_pretrained


def test_images_are_normalised_as_the_encoder_expects(ours):
    recipe, shards, _, _ = ours
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (2, 3, 4, 4)).astype(np.float32))
    expected = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(find_encoder(recipe, shards).inputs(shards).normalise(pixels), expected)


def fetched(monkeypatch, name):
    """Weights that a name of timm's has in place of a download: those of a model with seed 5."""
    torch.manual_seed(5)
    source = timm.create_model(name)
    config = timm.get_pretrained_cfg(name)
    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_state_dict_from_hf", lambda *_, **__: source.state_dict())
    return source, config


def test_timms_models_take_the_size_and_channels_of_the_shard_set(ours, monkeypatch):
    """Positions resampled, the classifier left away, pixels as timm's own config says."""
    recipe, shards, _, _ = ours
    source, config = fetched(monkeypatch, "vit_tiny_patch16_224")
    subject = find_encoder(recipe.model_copy(update={"checkpoint": "timm:vit_tiny_patch16_224"}), shards)
    assert (subject.source, subject.kind) == ("timm:vit_tiny_patch16_224", "timm")
    assert subject.fingerprint == f"vit_tiny_patch16_224, timm {timm.__version__}"
    assert subject.image_size == SIDE and subject.images_seen is None
    assert subject.pixel_mean == pytest.approx([255 * value for value in config.mean])
    model = subject.model().eval()
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert model.pos_embed.shape[1] == 1 + (SIDE // 16) ** 2
    assert model(images()).shape == (3, 192)
    assert not torch.equal(model.blocks[3].mlp.fc1.weight, subject.beginning().blocks[3].mlp.fc1.weight)
    assert find_encoder(recipe.model_copy(update={"checkpoint": "timm:vit_tiny_patch16_224"}), None).image_size == 224


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("timm:vit_tiny_patch16_224", ["mean", "token"], ("mean", "token")),
        ("timm:vit_tiny_patch16_224", ["token"], ("token",)),
        ("timm:vit_tiny_patch16_224", ["token", "mean", "token"], ("token", "mean")),
        (None, ["mean", "token"], ("mean", "token")),
        ("timm:resnet10t", ["mean", "token"], ()),
        ("timm:resnet10t", ["token"], None),
    ],
)
def test_poolings_are_those_that_the_encoder_has(ours, monkeypatch, name, asked, expected):
    recipe, _, folder, _ = ours
    if name is not None:
        fetched(monkeypatch, name.removeprefix("timm:"))
    changed = {
        "checkpoint": name or str(folder),
        "evaluate": recipe.evaluate.model_copy(update={"pool": tuple(asked)}),
    }
    recipe = recipe.model_copy(update=changed)
    if expected is not None:
        assert evaluate.check(recipe).pools == expected
        return
    with pytest.raises(SettingError, match=r"evaluate.pool=\['token'\]: timm:resnet10t has no class token; set"):
        evaluate.check(recipe)


def test_weights_that_cannot_be_fetched_are_one_line(ours, monkeypatch):
    recipe, shards, _, _ = ours
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        StageError, match=r"checkpoint=timm:resnet10t: timm's weights cannot be downloaded .*HF_HOME"
    ) as raised:
        find_encoder(recipe.model_copy(update={"checkpoint": "timm:resnet10t"}), shards)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("timm:vit_tiny_patch1_224", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_base_patch16_224.mea", "no weights with this name; available: vit_base_patch16_224"),
        ("timm:mixer_l32_224", "no weights with this name$"),
        ("/nowhere", "checkpoint=/nowhere: no such folder"),
    ],
)
def test_names_that_are_wrong_are_said_to_be(ours, named, said):
    recipe, shards, _, _ = ours
    with pytest.raises(SettingError, match=said):
        find_encoder(recipe.model_copy(update={"checkpoint": named}), shards)


def test_folders_of_others_are_refused(ours, exported, tmp_path):
    recipe, shards, _, _ = ours
    recipe = recipe.model_copy(update={"checkpoint": str(tmp_path)})
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SettingError, match="is not in timm's format"):
        find_encoder(recipe, shards)
    content = json.loads((exported / "config.json").read_text())
    del content["pretrained_cfg"]["mean"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SettingError, match=r"pretrained_cfg \(input_size, mean, std\)"):
        find_encoder(recipe, shards)
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=r"there is no model\.safetensors"):
        find_encoder(recipe, shards)
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    assert find_encoder(recipe, shards).kind == "folder"
    config["wavemim"]["value_range"] = [0, 1000]  # what wavemim embed scales such images by
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_encoder(recipe, shards).value_range == (0, 1000)
    config["model_args"]["embed_dim"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="do not fit"):
        find_encoder(recipe, shards)


def test_a_set_without_such_images_is_refused(ours, tmp_path):
    recipe, _, _, _ = ours
    from pipeline.shards.layout import Layout

    small = Layout(SIDE // 2, 3, dict.fromkeys(range(1, 4), 4.0), "haar")
    shards = write_set(tmp_path / "small", photos(6, SIDE // 2), small)
    with pytest.raises(SettingError, match=rf"needs images of {SIDE} pixels.*stores images of {SIDE // 2}"):
        find_encoder(recipe, shards)
    grey = Layout(SIDE, 1, dict.fromkeys(range(1, 4), 4.0), "haar")
    shards = write_set(tmp_path / "grey", photos(6)[:, :1], grey)
    with pytest.raises(SettingError, match=r"3 channels.*data\.channels=3"):
        find_encoder(recipe, shards)


def test_another_node_fetches_the_checkpoint_and_not_another_one_of_the_same_name(ours, tmp_path, monkeypatch):
    """`memory://` is a store of this process."""
    _, shards, folder, expected = ours
    home = Folder.at(f"memory://{tmp_path.name}/out")
    monkeypatch.setenv("WAVEMIM_CACHE", str(tmp_path / "driver"))
    recipe = load("small", [*TINY, f"out={home.url}", f"shards={shards.folder.url}", "name=tiny", "seed=3"])
    with pytest.raises(StageError, match=r"memory://.*/out/runs/tiny/pretrain has no checkpoint; run wavemim pretrain"):
        find_encoder(recipe, shards)
    for path in folder.iterdir():
        home.write(f"runs/tiny/pretrain/{folder.name}/{path.name}", path.read_bytes())
    subject = find_encoder(recipe, shards)
    assert subject.place == f"{home.url}/runs/tiny/pretrain/{folder.name}"
    near = recipe.stage_dir("pretrain") / folder.name
    shutil.copytree(folder, near)
    shutil.rmtree(recipe.local_out / "fetched")
    assert find_encoder(recipe, shards).source == str(near)  # not downloaded where the machine has it

    (near / checkpoint.STATE).write_text((near / checkpoint.STATE).read_text().replace(subject.fingerprint, "0" * 64))
    monkeypatch.setenv("WAVEMIM_CACHE", str(tmp_path / "node"))
    for source in (str(tmp_path / "is not there"), str(near)):
        there = EncoderSource(**{**vars(subject), "source": source}).model()
        for name, value in expected.state_dict().items():
            assert torch.equal(there.state_dict()[name], value), name
    assert len(list((tmp_path / "node").rglob(checkpoint.MODEL))) == 1


def test_of_a_folder_in_a_store_the_line_for_timm_names_a_copy(tmp_path):
    here, away = load("small", [f"out={tmp_path}"]), load("small", ["out=s3://bucket/runs"])
    assert (
        load_call(here, tmp_path / "encoder") == f"timm.create_model('local-dir:{tmp_path}/encoder', pretrained=True)"
    )
    assert load_call(away, away.stage_dir("export") / "encoder") == (
        "timm.create_model('local-dir:encoder', pretrained=True)"
    )
