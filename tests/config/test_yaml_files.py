"""YAML as people write it: values that YAML 1.1 would change, and mistakes with mappings and texts."""

import pytest

from pipeline.config.load import load
from pipeline.config.yaml_files import DuplicateKeyError, parse_yaml
from pipeline.errors import SettingError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90
        ("no", "no"),  # false
        ("2024-01-01", "2024-01-01"),  # a date
        ("12e4", "12e4"),  # also a name, as short hashes are; settings read numbers
        ("-1.5E+3", -1500.0),
        (".inf", float("inf")),
        ("12", 12),
        ("0x10", 16),
        ("True", True),
        ("~", None),
        ("", None),
        ("{a: , <<: {b: 1}}", {"a": None, "b": 1}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    """Fails where a value becomes another one than it says."""
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_the_same_number_twice_is_the_same_key():
    with pytest.raises(DuplicateKeyError, match=r"'a\.1' is given twice"):
        parse_yaml("a: {1: 2, 0x1: 3}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: yes}", "train.epochs=yes: input should be a valid number"),
        ("train: {epochs: true}", "train.epochs=true: needs a number"),
        ("train: {epochs: 1:30}", "train.epochs=1:30: input should be a valid number"),
        ("train:", "train=null: needs a mapping of settings, such as train: {NAME: VALUE}"),
        ("train: [epochs, 5]", "train=['epochs', 5]: needs a mapping"),
        ("target: {weights: [1, 2]}", "target.weights=[1, 2]: needs a mapping"),
        ("images: 2024", "images=2024: needs a text; put it in quotes, as in images: '2024'"),
        ("Train: {epochs: 5}", "unknown setting 'Train'; did you mean 'train'?"),
        ("trian: {epochs: 5}", "unknown setting 'trian'; did you mean 'train'?"),
        ("1: 5", "'1' is not the name of a setting"),
    ],
)
def test_mistakes_in_recipes_say_what_is_needed(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(f"base: small\n{text}\n")
    with pytest.raises(SettingError) as caught:
        load(str(tmp_path / "r.yaml"))
    assert str(caught.value).startswith(message)


def test_values_stay_as_written(tmp_path):
    """Fails where a name becomes a date or a number, where 010 is 8, or where on and off are no booleans any more."""
    text = "base: small\nname: 2024-01-01\nforce: on\nrestart: no\ntrain: {epochs: 010, lr: 1e-4, warmup_epochs: 0.5}\n"
    (tmp_path / "r.yaml").write_text(text)
    recipe = load(str(tmp_path / "r.yaml"))
    assert (recipe.name, recipe.force, recipe.restart) == ("2024-01-01", True, False)
    assert (recipe.train.epochs, recipe.train.lr) == (10, 1e-4)


def test_a_base_may_be_a_url_or_in_the_home_folder_and_a_recipe_of_any_suffix(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.yaml").write_text("base: small\ntrain: {epochs: 7, warmup_epochs: 1}\n")
    for number, base in enumerate(((tmp_path / "a b.yaml").as_uri(), "~/a b.yaml")):
        (tmp_path / f"{number}.json").write_text(f'{{"base": "{base}"}}')
        assert load(str(tmp_path / f"{number}.json")).train.epochs == 7
