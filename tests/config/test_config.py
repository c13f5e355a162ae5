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
    ("mask.ratio=0.001", "mask.ratio=0.001: hides 0 of 64 patches"),
    ("mask.kind=blocky", "mask.kind=blocky: input should be 'random'"),
    ("train.batch=0", "train.batch=0: input should be greater than or equal to 1"),
    ("train.batch=1", "train.workers=2: more than images in a batch, train.batch=1"),
    ("cluster.min_workers=3", "cluster.min_workers=3: more than train.workers=2; use fewer"),
    (
        "data.image_size=100",
        "data.image_size=100: no multiple of 2^levels = 16 (data.levels=4); nearest allowed: 96 or 112",
    ),
    ("encoder.patch_size=12", "encoder.image_size=64: no multiple of encoder.patch_size=12; nearest allowed: 60 or 72"),
    ("encoder.image_size=128", "encoder.image_size=128: larger than the stored images, data.image_size=64"),
    ("target.taps.5=8", "target.taps.5: level 5 is deeper than the stored pyramid, data.levels=4; allowed are 1 to 4"),
    ("target.taps.x=8", "'x' is not a level"),
    ("target.weights.1=2", "target.weights.1: level 1 has no tap"),
    ("target.bands.3=HX", "target.bands.3=HX: allowed are some of the letters A, H, V, D"),
    ("target.bands.3=DH", "target.bands.3=DH: allowed are some of the letters A, H, V, D, in this order"),
    ("train.warmup_epochs=1000", "train.warmup_epochs=1000: has to be less than train.epochs"),
    ("decoder.heads=5", "multiple of 4 and of decoder.heads=5"),
    ("seed.x=1", "'seed' is a value and has no settings inside"),
    ("name=a/b", "name=a/b: allowed are letters"),
    ("train.lr=.nan", "train.lr=nan: input should be a finite number"),
    ("data.steps=loose", "data.steps=loose: allowed are numbers above 0"),
    ("data.steps=[4, 0]", "data.steps=[4, 0]: every step has to be a number above 0"),
    ("data.steps=[]", "data.steps=[]: allowed are numbers above 0"),
    ("data.wavelet=db99", "data.wavelet=db99: no discrete wavelet of PyWavelets; did you mean 'db9'?"),
    ("data.wavelet=morl", "data.wavelet=morl: no discrete wavelet of PyWavelets"),
    ("data.channels=17", "data.channels=17: input should be less than or equal to 16"),
    ("data.value_range=[1, 1]", "data.value_range=[1.0, 1.0]: the first value has to be below the second"),
    ("out=s3://bucket/x", "out=s3://bucket/x: checkpoints and reports go to a folder"),
    (
        "target.kind=hogs",
        "target.kind=hogs: no target of this name; did you mean 'hog'?; allowed are wavelet, pixels, hog, fourier",
    ),
    ("target.taps={0: 8}", "target.taps.0: level 0, the patch itself, is for pixels and fourier, not wavelet"),
    ("target.bins=12", "target.bins=12: input should be 9 or 18"),
    ("target.taps.-1=8", "'-1' is not a level"),
    ("decoder.depth=0", "decoder.depth=0: a linear decoder needs tokens of hidden patches"),
    ("decoder.predict=0", "decoder.predict=0: input should be greater than 0"),
    ("mask.unit=12", "mask.unit=12: has to be a multiple of 8 pixels"),
    ("mask.unit=48", "mask.unit=48: has to be a multiple of 8 pixels (the encoder's patches) and to divide"),
    ("train.crop_scale=[0.9, 0.5]", "train.crop_scale=[0.9, 0.5]: the first value has to be the smaller one"),
    ("train.clip_grad=0", "train.clip_grad=0: input should be greater than 0"),
    ("encoder.options=3", "encoder.options=3: input should be a valid dictionary"),
    ("encoder.options={reg_tokens:4}", "write a space after each colon"),
    ("target.taps={3:6,4:9}", "target.taps={3:6,4:9}: write a space after each colon, for example {3: 6, 4: 8}"),
    ("encoder.options={reg_tokens: null}", "reg_tokens has no value"),
    ("seed=99999999999999999999999", "seed=99999999999999999999999: input should be less than"),
    ("target.focal=100", "target.focal=100: input should be less than or equal to 4"),
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
    recipe = load("small", ["train.lr=1e-4", "train.lr=2e-4", "target.weights.4=3", "train.flip=no", "name=2024"])
    assert (recipe.train.lr, recipe.weights_by_level(), recipe.train.flip) == (2e-4, {3: 1.0, 4: 3.0}, False)
    assert recipe.name == "2024"
    assert load("small", ["target.taps={4: 8}"]).target.taps == {4: 8}


TOGETHER = [
    (["target.kind=hog", "target.bands.3=HV"], "target.bands: bands are of wavelets, not of target.kind=hog"),
    (
        ["target.kind=hog", "target.normalise=contrast"],
        "is of target.kind=wavelet, not hog; use patch, dataset or none",
    ),
    (["target.kind=fourier", "target.loss=l1"], "the loss of target.kind=fourier is set by target.gamma and focal"),
    (["mask.kind=frequency", "encoder.sees=visible"], "mask.kind=frequency: the whole corrupted image is seen"),
    (["mask.kind=frequency", "mask.radius=32"], "mask.radius=32: a spectrum of 64 pixels ends at 32 cycles"),
    (["mask.kind=block", "mask.ratio=0.1"], "mask.ratio=0.1: hides 0 of 4 blocks of 32 pixels"),
    (["decoder.shared=true", "decoder.depth=0", "encoder.sees=masked"], "has no blocks to share"),
    (
        ["decoder.depth=0", "decoder.attention=cross", "encoder.sees=masked"],
        "a linear decoder (decoder.depth=0) has no",
    ),
    (["target.weights={3: 0, 4: 0}"], "target.weights: every level weighs 0"),
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
    with pytest.raises(SettingError, match="other wavelets than haar have no exact integers"):
        load("small", ["data.steps=lossless", "data.wavelet=db2"])
    recipe = load("small", ["data.steps=lossless"])
    assert Recipe.model_validate(recipe.dump()) == recipe


def test_who_only_prepares_need_not_mind_the_encoder():
    settings = ["data.image_size=256", "data.levels=8"]
    with pytest.raises(SettingError, match=r"encoder\.image_size=64: no multiple of 2\^levels = 256"):
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
        ("- 1\n", "holds list, not a mapping"),
        ("train: {epocs: 3}\n", "train.epochs"),
    ],
)
def test_a_broken_recipe_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(SettingError, match=message):
        load(str(path))


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
