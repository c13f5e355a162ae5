"""How settings behave is declared at their fields; what is derived from it is what it always was."""

import json
from pathlib import Path

import pytest

from pipeline.config.behaviour import STAGES
from pipeline.config.checks import check_searchable
from pipeline.config.load import load, names_of, with_overrides
from pipeline.config.recipe import BEHAVIOURS, CHANGEABLE, STAGE_SECTIONS, Recipe, behaviour_of, identity
from pipeline.errors import SettingError

# Identities as the commit before behaviours moved to the fields computed them: settings.json of older out folders is
# compared with them. `demo` in full, of others what differs from it, of `small` with settings what differs from that. Where a recipe has other values since, these are
# recorded: its older out folders are of other settings.
RECORDED = json.loads(Path(__file__).with_name("identities.json").read_text(encoding="utf-8"))


def plain(recipe: Recipe, stage: str):
    return json.loads(json.dumps(identity(recipe, stage)))


@pytest.mark.parametrize("stage", STAGES)
def test_identities_are_those_of_older_out_folders(stage):
    base = RECORDED["demo"][stage]
    assert plain(load("demo"), stage) == base
    for name, changed in RECORDED["recipes"].items():
        assert plain(load(name), stage) == base | changed[stage], name
    for case in RECORDED["overrides"]:
        small = base | RECORDED["recipes"]["small"][stage]
        assert plain(load("small", case["settings"]), stage) == small | case["changed"][stage], case["settings"]


def test_every_recipe_was_recorded():
    assert {"demo", *RECORDED["recipes"]} <= set(names_of("pipeline", "recipes"))


def test_a_local_source_is_identified_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert identity(load("small", ["images=photos"]), "prepare")["images"] == str(tmp_path / "photos")


def test_every_setting_is_read_by_a_stage_and_decides_no_other():
    for key, behaviour in BEHAVIOURS.items():
        assert behaviour.stages and set(behaviour.stages) <= set(STAGES), key
        assert set(behaviour.identity) <= set(behaviour.stages), key
        assert not (behaviour.operational and (behaviour.identity or behaviour.searchable)), key


def test_what_may_change_on_resume_decides_what_pretraining_computes():
    assert len(CHANGEABLE) == 16
    for key in CHANGEABLE:
        assert "pretrain" in BEHAVIOURS[key].identity, key


def test_sections_of_stages():
    assert STAGE_SECTIONS["prepare"] == ("data", "tracking", "cluster")
    assert STAGE_SECTIONS["export"] == ("export", "tracking")
    assert STAGE_SECTIONS["tune"][:2] == ("encoder", "target") and "evaluate" in STAGE_SECTIONS["tune"]


def test_entries_of_mappings_and_unknown_settings_behave_as_what_holds_them():
    assert behaviour_of("target.weights.3") == BEHAVIOURS["target.weights"]
    assert behaviour_of("encoder.options.reg_tokens").searchable
    assert not behaviour_of("tracking.of_an_older_version").compared
    assert behaviour_of("of_an_older_version").compared


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "train.log_every",
            "X cannot be searched: it does not change what is trained; nearest searchable setting: train.",
        ),
        (
            "evaluate.batch",
            "X cannot be searched: it does not change what is trained; nearest searchable setting: train.batch;",
        ),
        ("segment.lrs", "X cannot be searched; nearest searchable setting: train.lr;"),
        (
            "seed",
            "X cannot be searched; nearest searchable setting: encoder.sees; allowed are model and training settings of",
        ),
        ("space", "X cannot be searched; "),
    ],
)
def test_a_sweep_varies_only_what_changes_the_training(key, message):
    with pytest.raises(SettingError) as caught:
        check_searchable(key, "X")
    assert str(caught.value).startswith(message)
    for allowed in ("train.lr", "target.weights.3", "encoder.options.reg_tokens", "mask.ratio", "target.taps"):
        check_searchable(allowed, "X")


def test_places_are_declared():
    places = {key for key, behaviour in BEHAVIOURS.items() if behaviour.place}
    assert {"images", "shards", "out", "checkpoint", "train.checkpoints_at", "segment.images"} <= places
    recipe = with_overrides(load("small"), {"train.checkpoints_at": "/elsewhere"})
    assert identity(recipe, "pretrain") == identity(load("small"), "pretrain")
