"""The one door for settings: what is right goes through, what is wrong gets one line."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load, names_of, settings_of, with_overrides
from pipeline.config.recipe import STAGE_SECTIONS, Recipe, differences, identity
from pipeline.errors import SettingError

MISTAKES = [
    ("train.epoch=3", "unknown setting 'train.epoch'; did you mean 'train.epochs'?"),
    ("trian.lr=3", "did you mean 'train.lr'?"),
    ("batch=3", "unknown setting 'batch'; did you mean"),
    ("train.epochs=many", "train.epochs=many: input should be a valid number"),
    ("train.epochs=-1", "train.epochs=-1: input should be greater than 0"),
    ("evaluate.protocols=linear", "evaluate.protocols=linear: input should be a list, such as [A, B]"),
    ("segment.classes=0", "segment.classes=0: input should be greater than or equal to 1"),
    ("segment.masks=s3://key:secret@bucket/masks", "segment.masks: a URL with credentials would end up in logs"),
    ("mask.ratio=1.5", "mask.ratio=1.5: input should be less than 1"),
    (
        "mask.ratio=0.001",
        "mask.ratio=0.001: a ratio of 0.001 hides 0 of 64 blocks; at least one must be hidden and one visible",
    ),
    ("mask.kind=blocky", "mask.kind=blocky: input should be 'random'"),
    ("train.batch=0", "train.batch=0: input should be greater than or equal to 1"),
    ("cluster.min_workers=3", "cluster.min_workers=3: more than train.workers=2; use fewer"),
    (
        "data.image_size=100",
        "data.image_size=100: not a multiple of 2^levels = 16 (data.levels=4); nearest allowed: 96 or 112",
    ),
    (
        "encoder.patch_size=12",
        "encoder.image_size=64: 64 pixels are not a multiple of the token size, 12 pixels; nearest allowed: 60 or 72",
    ),
    ("encoder.image_size=128", "encoder.image_size=128: larger than the stored images, data.image_size=64"),
    ("target.taps.5=8", "target.taps.5: level 5 is deeper than the stored pyramid, data.levels=4; allowed are 1 to 4"),
    ("target.taps.x=8", "'x' is not a level"),
    ("target.weights.4=2", "target.weights.4: level 4 has no tap"),
    ("target.bands.3=HX", "target.bands.3=HX: must be some of the letters A, H, V, D"),
    ("target.bands.3=DH", "target.bands.3=DH: must be some of the letters A, H, V, D, in this order"),
    ("train.warmup_epochs=1000", "train.warmup_epochs=1000: must be less than train.epochs"),
    (
        "decoder.heads=5",
        "decoder.width=64: a decoder of width 64 is not a multiple of its 5 attention heads (decoder.heads=5)",
    ),
    ("seed.x=1", "'seed' is a single value, not a group of settings"),
    ("name=a/b", "name=a/b: must consist of letters"),
    ("train.lr=.nan", "train.lr=nan: input should be a finite number"),
    ("data.steps=loose", "data.steps=loose: must be numbers above 0"),
    ("data.steps=[4, 0]", "data.steps=[4, 0]: every step must be a number above 0"),
    ("data.steps=[]", "data.steps=[]: must be numbers above 0"),
    ("data.wavelet=db99", "data.wavelet=db99: not a discrete wavelet of PyWavelets; did you mean 'db9'?"),
    ("data.wavelet=morl", "data.wavelet=morl: not a discrete wavelet of PyWavelets"),
    ("data.channels=17", "data.channels=17: input should be less than or equal to 16"),
    ("data.value_range=[1, 1]", "data.value_range=[1.0, 1.0]: the first value must be below the second"),
    ("out=https://host/x", "out=https://host/x: nothing can be written there"),
    (
        "target.kind=hogs",
        "target.kind=hogs: no target of this name; did you mean 'hog'?; allowed are wavelet, pixels, hog, fourier",
    ),
    (
        "target.taps={0: 8}",
        "target.taps.0: level 0 does not exist for this target; its levels start at 1 (target.kind=wavelet)",
    ),
    ("target.bins=12", "target.bins=12: input should be 9 or 18"),
    ("target.taps.-1=8", "'-1' is not a level"),
    (
        "decoder.depth=0",
        "decoder.depth=0: a linear decoder predicts from tokens of hidden patches, which this encoder drops; set encoder.sees=",
    ),
    ("decoder.predict=0", "decoder.predict=0: input should be greater than 0"),
    (
        "mask.unit=12",
        "mask.unit=12: the side of a hidden block, 12, is not a multiple of 8 that divides 64; allowed are 8, 16, 32, 64",
    ),
    ("mask.unit=48", "mask.unit=48: the side of a hidden block, 48, is not a multiple of 8 that divides 64"),
    ("train.crop_scale=[0.9, 0.5]", "train.crop_scale=[0.9, 0.5]: the first value must be the smaller one"),
    ("train.clip_grad=0", "train.clip_grad=0: input should be greater than 0"),
    ("encoder.options=3", "encoder.options=3: needs a mapping"),
    ("encoder.options={reg_tokens:4}", "write a space after each colon"),
    ("target.taps={3:6,4:9}", "target.taps={3:6,4:9}: write a space after each colon, for example {3: 6, 4: 8}"),
    ("encoder.options={reg_tokens: null}", "reg_tokens has no value"),
    ("seed=99999999999999999999999", "seed=99999999999999999999999: input should be less than"),
    ("target.tilt=5", "target.tilt=5: must be from -4 to 4"),
    ("target.tilt=.nan", "target.tilt=nan: must be from -4 to 4"),
    ("target.tilt={0: 0, 2: 1}", "shares of training are from 0 to 1, tilts from -4 to 4"),
    ("target.focal=100", "target.focal=100: input should be less than or equal to 4"),
    ("target.taps={3: 6, 4: 8, 3: 7}", "target.taps={3: 6, 4: 8, 3: 7}: '3' is given twice (line 1); give it once"),
    ("nonsense", "'nonsense' is not a setting; write key=value"),
    ("=3", "'=3' is not a setting"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_gets_one_line(override, message):
    with pytest.raises(SettingError) as caught:
        load("small", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_typed_and_later_ones_win():
    recipe = load("small", ["train.lr=1e-4", "train.lr=2e-4", "target.weights.3=3", "train.flip=no", "name=2024"])
    assert (recipe.train.lr, recipe.weights_by_level(), recipe.train.flip) == (2e-4, {1: 1.0, 2: 1.0, 3: 3.0}, False)
    assert recipe.name == "2024"
    assert load("small", ["target.taps={4: 8}"]).target.taps == {4: 8}


TOGETHER = [
    (["target.kind=hog", "target.bands.3=HV"], "target.bands: target.kind=hog has no bands, only wavelet does"),
    (
        ["target.kind=hog", "target.normalise=contrast"],
        "for target.kind=wavelet only, not hog; use patch, dataset or none",
    ),
    (
        ["target.kind=fourier", "target.loss=l1"],
        "target.kind=fourier has a loss of its own, set by target.gamma and target.focal",
    ),
    (
        ["mask.kind=frequency", "encoder.sees=visible"],
        "mask.kind=frequency: the encoder sees the whole corrupted image; set encoder.sees=auto",
    ),
    (
        ["mask.kind=frequency", "mask.radius=32"],
        "mask.radius=32: a radius of 32 is not within the spectrum of images of 64 pixels, which ends at 32 cycles",
    ),
    (
        ["mask.kind=block", "mask.ratio=0.1"],
        "mask.ratio=0.1: a ratio of 0.1 hides 0 of 4 blocks; at least one must be hidden and one visible (blocks of 32 pixels",
    ),
    (
        ["decoder.shared=true", "decoder.depth=0", "encoder.sees=masked"],
        "decoder.shared=true: a linear decoder has no blocks that taps could share; set decoder.depth=1",
    ),
    (
        ["decoder.depth=0", "decoder.attention=cross", "encoder.sees=masked"],
        "decoder.attention=cross: a linear decoder has no attention; set decoder.depth=1",
    ),
    (
        ["target.kind=hog", "target.tilt=1"],
        "target.tilt=1.0: for targets that predict bands, such as target.kind=wavelet",
    ),
    (
        ["target.average=frequency"],
        "target.average=frequency: for target.kind=fourier with mask.kind=frequency only, not wavelet with random",
    ),
    (["target.kind=fourier", "target.average=frequency"], "not fourier with random; set target.average=image"),
    (["target.weights={1: 0, 2: 0, 3: 0}"], "target.weights: the weight of every level is 0"),
]


@pytest.mark.parametrize(("overrides", "message"), TOGETHER)
def test_settings_that_do_not_go_together_get_one_line(overrides, message):
    with pytest.raises(SettingError) as caught:
        load("small", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_of_the_encoder_are_open_and_null_is_no_clipping():
    recipe = load("small", ["encoder.options.reg_tokens=4", "encoder.options.qk_norm=true", "train.clip_grad=null"])
    assert recipe.encoder.options == {"reg_tokens": 4, "qk_norm": True}
    assert recipe.train.clip_grad is None
    assert load("small", ["encoder.options={init_values: 1e-5}"]).encoder.options == {"init_values": 1e-5}
    assert load("small", ["encoder.pretrained=null"]).encoder.pretrained is False
    dino = ["encoder.name=vit_small_patch14_dinov2", "encoder.patch_size=null", "data.image_size=112"]
    dino += ["encoder.image_size=112", "target.kind=pixels", "target.taps={0: 8}"]
    assert load("small", dino).encoder.patch_size is None  # its masks are checked with the model
    assert load("small", ["target.kind=pixels", "target.taps={0: 8}"]).bands_by_level() == {0: ""}
    assert load("small", ["encoder.pretrained=true"]).encoder.pretrained is True
    assert load("small", ["encoder.pretrained=some/folder"]).encoder.pretrained == str(Path.cwd() / "some/folder")


@pytest.mark.parametrize("name", names_of("pipeline", "recipes"))
def test_every_recipe_is_valid_and_survives_a_round_trip(name):
    recipe = load(name)
    assert Recipe.model_validate(recipe.dump()) == recipe
    assert recipe.name == name


def test_steps_are_one_for_all_levels_or_one_each_or_lossless():
    assert load("small", ["data.steps=4"]).steps_by_level() == {1: 4, 2: 4, 3: 4, 4: 4}
    assert load("small", ["data.steps=[4, 2]"]).steps_by_level() == {1: 4, 2: 2, 3: 2, 4: 2}
    assert load("small", ["data.steps=lossless"]).steps_by_level() == {1: 0.5, 2: 0.25, 3: 0.125, 4: 0.0625}
    assert load("small", ["data.steps=[1e0, 5e-1]"]).steps_by_level()[2] == 0.5  # texts to YAML 1.1
    with pytest.raises(SettingError, match="only the haar wavelet has an exact integer transform"):
        load("small", ["data.steps=lossless", "data.wavelet=db2"])
    recipe = load("small", ["data.steps=lossless"])
    assert Recipe.model_validate(recipe.dump()) == recipe


def test_who_only_prepares_need_not_mind_the_encoder():
    settings = ["data.image_size=256", "data.levels=8"]
    with pytest.raises(SettingError, match=r"encoder\.image_size=64: not a multiple of 2\^levels = 256"):
        load("small", settings)
    assert load("small", settings, data_only=True).data.levels == 8
    with pytest.raises(SettingError, match=r"data\.image_size=100"):
        load("small", ["data.image_size=100"], data_only=True)


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:SECRET@bucket/photos", "s3://KEY:SEC/SECRET@bucket/photos", "s3://bucket/x?region=eu&secret_key=SECRET"],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(SettingError, match="images: a URL with credentials") as caught:
        load("small", [f"images={url}"])
    assert "SECRET" not in str(caught.value).replace("AWS_SECRET", "")
    assert load("small", ["images=s3://bucket/a?endpoint_override=127.0.0.1:9&scheme=http"]).images


def test_a_recipe_file_builds_on_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: small\ntrain: {epochs: 7}\n")
    recipe, base = load(str(path)), load("small")
    assert recipe.name == "mine"
    assert recipe.train.epochs == 7
    assert recipe.train.batch == base.train.batch
    path.write_text(f"base: {path}\n")
    with pytest.raises(SettingError, match="based on itself"):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [1, 2", "not valid YAML"),
        ("- 1\n", "contains a list, not a mapping"),
        ("train: {epocs: 3}\n", "train.epochs"),
        ("train: {epochs: 40}\nmask: {ratio: 0.6}\ntrain: {batch: 64}\n", r"'train' is given twice \(lines 1 and 3\)"),
        ("train:\n  lr: 1\n  lr: 2\n", r"broken.yaml': 'train.lr' is given twice \(lines 2 and 3\); give it once"),
        ("target: {taps: {3: 6, '3': 7}}\n", r"'target.taps.3' is given twice \(line 1\)"),
        ("tune: {space: [{a: 1}, {b: 1, b: 2}]}\n", "'tune.space.1.b' is given twice"),
        ("train: {epochs: 4}\ntrain.epochs: 5\n", "'train.epochs' is given twice, as a key with dots and in a section"),
        ("target: {weights: {3: 1}, weights.3: 2}\n", "'target.weights.3' is given twice"),
        ("train.epocs: 5\n", "unknown setting 'train.epocs'; did you mean 'train.epochs'"),
        ("train.epochs.x: 5\n", "'train.epochs.x': 'epochs' is a single value"),
    ],
)
def test_a_broken_recipe_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(SettingError, match=message):
        load(str(path))


def test_keys_with_dots_mean_what_they_mean_on_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: small\ntrain.epochs: 5\ntarget: {kind: wavelet, weights.3: 0.5}\nencoder.options.reg_tokens: 4\n"
    )
    typed = ["train.epochs=5", "target.weights.3=0.5", "encoder.options.reg_tokens=4", "name=mine"]
    assert load(str(path)) == load("small", typed)
    assert load(str(path), ["train.epochs=6"]).train.epochs == 6
    (tmp_path / "next.yaml").write_text("base: mine.yaml\ntrain: {epochs: 7}\n")
    assert load(str(tmp_path / "next.yaml")).train.epochs == 7


def test_anchors_and_merges_are_no_duplicates(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: small\ntrain: &both {epochs: 3}\nfinetune: {<<: *both, epochs: 2}\ntune: *both\n")
    recipe = load(str(path))
    assert (recipe.train.epochs, recipe.finetune.epochs, recipe.tune.epochs) == (3, 2, 3)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(SettingError, match="did you mean 'small'"):
        load("smal")
    with pytest.raises(SettingError, match="no such file"):
        load("nowhere/mine.yaml")


def test_every_setting_is_described():
    for key, kind, field in settings_of():
        assert field.description, key
        assert kind, key
    assert set(STAGE_SECTIONS) == {"prepare", "pretrain", "evaluate", "finetune", "segment", "tune", "export", "run"}


def test_identity_tells_what_is_computed_from_how():
    base = load("small")
    for change in (
        {"train.keep_checkpoints": 1},
        {"train.workers": 1},
        {"train.log_every": 3},
        {"cluster.cpus_per_worker": 2},
        {"out": "elsewhere"},
    ):
        assert identity(with_overrides(base, change), "pretrain") == identity(base, "pretrain"), change
    for change in (
        {"train.epochs": 3},
        {"mask.ratio": 0.5},
        {"seed": 1},
        {"target.weights.3": 2.0},
    ):
        changed = identity(with_overrides(base, change), "pretrain")
        assert len(differences(identity(base, "pretrain"), changed)) == 1, change


def test_best_recipe_of_a_sweep_can_be_read_back(tmp_path):
    path = tmp_path / "best.yaml"
    recipe = with_overrides(load("small"), {"target.weights.3": 0.3, "mask.ratio": 0.61})
    path.write_text(yaml.safe_dump(recipe.dump()))
    assert load(str(path)) == recipe


def test_texts_stay_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load("small", ["name=007", "images=2024", "out=1e5"])
    assert (recipe.name, recipe.images, recipe.out) == ("007", "2024", "1e5")
    assert load("small", ["images=x", "images=null"]).images is None
    (tmp_path / "taken").write_text("")
    with pytest.raises(SettingError, match="out=taken: a file"):
        load("small", ["out=taken"])


def test_a_base_is_found_beside_its_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text("base: small\ntrain: {epochs: 3}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nmask: {ratio: 0.5}\n")
    recipe = load(str(tmp_path / "mine.yaml"))
    assert (recipe.train.epochs, recipe.mask.ratio) == (3, 0.5)
