"""Settings that follow those that were given, those that stay as they were given, and what is said about it."""

import logging
from operator import attrgetter

import pytest

from pipeline.config.follow import RULES
from pipeline.config.load import load, validate, with_overrides
from pipeline.config.recipe import BEHAVIOURS
from pipeline.errors import SettingError
from pipeline.stages.tune_check import changes

# Recipe, what is given, and values that follow.
PAIRS = [
    ("small", ["train.epochs=1"], {"train.warmup_epochs": 0.1}),
    ("demo", ["train.epochs=2"], {"train.warmup_epochs": 0.2}),
    ("mae_vit_base", ["train.epochs=40"], {"train.warmup_epochs": 4}),
    ("small", ["finetune.epochs=1"], {"finetune.warmup_epochs": 0.1}),
    ("small", ["train.batch=1"], {"train.workers": 1}),
    ("small", ["finetune.batch=63"], {"finetune.workers": 1}),
    ("wamim_vit_base", ["data.image_size=192"], {"encoder.image_size": 192}),
    ("simmim_swin_base", ["data.image_size=192"], {"encoder.image_size": 192, "finetune.image_size": 192}),
    ("small", ["encoder.width=64"], {"encoder.heads": 2}),
    ("mae_vit_base", ["decoder.width=100"], {"decoder.heads": 10}),
    ("demo", ["target.taps={3: 4, 4: 6}"], {"target.weights": {}}),
    ("small", ["target.kind=pixels"], {"target.normalise": "patch", "target.tilt": None}),
    ("small", ["target.kind=fourier"], {"target.normalise": "dataset", "target.tilt": None}),
    ("small", ["train.parallel=fsdp"], {"train.optimizer": "adamw"}),
    ("simmim_swin_base", ["target.kind=fourier"], {"target.loss": "l2"}),
    ("mfm_vit_base", ["target.kind=pixels", "mask.ratio=0.5"], {"target.average": "image"}),
    ("mfm_vit_base", ["mask.kind=random", "encoder.sees=masked"], {"target.average": "image"}),
]


@pytest.mark.parametrize(("recipe", "given", "follow"), PAIRS)
def test_what_was_not_given_follows_and_nothing_else_changes(caplog, recipe, given, follow):
    before, loaded = load(recipe), load(recipe, given)
    keys = {*follow, *(text.partition("=")[0] for text in given)}
    for key in BEHAVIOURS:
        if key in follow:
            assert attrgetter(key)(loaded) == pytest.approx(follow[key]), key
        elif key not in keys:
            assert attrgetter(key)(loaded) == attrgetter(key)(before), key
    changed = [key for key, value in follow.items() if attrgetter(key)(before) != value]
    assert len(caplog.records) == bool(changed)  # one line for all of them
    for key in changed:
        assert f"{key}=" in caplog.text and " instead of " in caplog.text and given[0].partition("=")[0] in caplog.text
    assert validate(loaded.dump()) == loaded  # the stored recipe has the values that followed


def test_every_rule_is_tried_above():
    assert {rule.setting for rule in RULES} == {key for _, _, follow in PAIRS for key in follow}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.epochs=1", "train.warmup_epochs=1"], "train.warmup_epochs=1: must be less than train.epochs=1"),
        (["train.warmup_epochs=20"], "train.warmup_epochs=20: must be less than train.epochs=20"),
        (["finetune.epochs=1", "finetune.warmup_epochs=2"], "finetune.warmup_epochs=2: must be less than"),
        (["train.batch=1", "train.workers=2"], "train.workers=2: more workers than images in a batch, train.batch=1"),
        (["train.workers=200"], "train.workers=200: more workers than images in a batch, train.batch=128"),
        (["finetune.batch=63", "finetune.workers=2"], "finetune.batch=63: not a multiple of finetune.workers=2"),
        (["data.image_size=48", "encoder.image_size=64"], "encoder.image_size=64: larger than the stored images"),
        (["decoder.width=36", "decoder.heads=8"], "decoder.width=36: a decoder of width 36 is not a multiple of its 8"),
        (["target.taps={3: 8}", "target.weights.4=1"], "target.weights.4: level 4 has no tap"),
        (["target.kind=fourier", "target.loss=l1"], "target.loss=l1: target.kind=fourier has a loss of its own"),
    ],
)
def test_what_was_given_itself_stays_and_a_contradiction_is_one_line(caplog, given, message):
    with pytest.raises(SettingError, match="^" + message.replace(".", r"\.")):
        load("small", given)
    assert not caplog.records


def test_recipes_of_ones_own_give_settings_and_those_of_the_project_do_not(tmp_path, caplog):
    base = tmp_path / "base.yaml"
    base.write_text("base: small\ntrain: {warmup_epochs: 3}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntrain.epochs: 5\n")
    mine = str(tmp_path / "mine.yaml")
    assert load(mine).train.warmup_epochs == 3 and not caplog.records
    with pytest.raises(SettingError, match=r"train\.warmup_epochs=3: must be less than train\.epochs=2"):
        load(mine, ["train.epochs=2"])
    base.write_text("base: small\ntrain: {batch: 64}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntrain.epochs: 1\n")
    assert load(mine).train.warmup_epochs == 0.1
    assert caplog.text.count("train.warmup_epochs=0.1 instead of 1, to fit train.epochs=1") == 1


def test_what_fits_stays_and_is_not_mentioned(caplog):
    caplog.set_level(logging.INFO)
    recipe = load("small", ["train.epochs=2", "finetune.epochs=1.5", "train.batch=2", "data.image_size=128"])
    assert (recipe.train.warmup_epochs, recipe.finetune.warmup_epochs, recipe.train.workers) == (1, 1, 2)
    assert recipe.encoder.image_size == 64 and not caplog.records


def test_sweeps_shorten_warm_ups_by_the_same_rule_and_not_those_that_were_given(caplog):
    recipe = load("mae_vit_base")
    assert with_overrides(recipe, {"train.epochs": 30}).train.warmup_epochs == 3  # as written into best.yaml
    assert changes(recipe, {"train.epochs": 30})["train.warmup_epochs"] == 3  # of a trial
    own = load("mae_vit_base", ["train.warmup_epochs=20"])
    assert with_overrides(own, {"train.epochs": 30}).train.warmup_epochs == 20
    with pytest.raises(SettingError, match=r"train\.warmup_epochs=20: must be less than train\.epochs=10"):
        with_overrides(with_overrides(own, {"seed": 1}), {"train.epochs": 10})
    assert (
        changes(own, {"train.epochs": 10})["train.warmup_epochs"] == 1
    )  # trials are short without being a contradiction
    assert not caplog.records


def test_who_gave_a_setting_is_no_part_of_it():
    given, other = load("small", ["train.epochs=20"]), load("small")
    assert given == other and given.dump() == other.dump() and given.given == {"train.epochs"}
