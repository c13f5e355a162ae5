"""Places with unusual names: they work, or are refused in one line before anything starts."""

import os

import pytest
from stage_calls import wavemim

from pipeline.config.load import load
from pipeline.config.places import check_place, local_place, printable
from pipeline.errors import SettingError
from pipeline.storage.folder import Folder

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a%20b/%C3%A9%2525", "/a b/é%25"),
        ("FILE://localhost/a#b?c", "/a#b?c"),
        ("file:/a%20b", "/a b"),  # as Java writes it
        ("/a%20b", "/a%20b"),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
    ],
)
def test_file_urls_are_decoded_and_nothing_else(url, path):
    assert local_place(url) == path
    assert load("small", [f"images={url}", f"segment.images={url}"]).images == path
    if "s3" not in url:
        assert Folder.at(url).url == path


def test_the_home_folder_is_the_same_in_every_place(monkeypatch, tmp_path):
    """Fails where a recipe's out: ~/runs makes a folder named ~ and the log goes to the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load(
        "small", ["out=~/runs", "shards=~/s", "images=~", "train.checkpoints_at=~/c", "encoder.pretrained=~/e"]
    )
    assert (recipe.out, recipe.shards) == (f"{tmp_path}/runs", f"{tmp_path}/s") and recipe.images == str(tmp_path)
    assert (recipe.train.checkpoints_at, recipe.encoder.pretrained) == (f"{tmp_path}/c", f"{tmp_path}/e")


def test_a_file_url_of_another_machine_is_refused():
    with pytest.raises(SettingError, match="names the machine 'host'"):
        local_place("file://host/x")


@pytest.mark.parametrize(
    "place", ["a b", "a%2Fb", "a?b", "a#b", "a'b\"c", "größe", "照片", "[ab]*", "-x", "~x", "x" * 255, "a\\b"]
)
def test_unusual_names_are_settings_like_others(place):
    recipe = load("small", [f"out={place}", f"images={place}", f"shards={place}", f"checkpoint={place}"])
    assert (recipe.out, recipe.images, recipe.shards, recipe.checkpoint) == (place,) * 4


BAD = [
    (NOT_UTF8, r"caf\\xe9: not valid UTF-8"),
    ("a\nb", r"a\\nb: contains the control character"),
    ("x" * 256, "a name of 256 bytes"),
    ("é" * 128, "a name of 256 bytes"),
    ("x/" * 1950, "a path of .* bytes"),
]
SETTINGS = ["out", "images", "shards", "checkpoint", "segment.images", "segment.masks", "train.checkpoints_at", "tune.space",
            "encoder.pretrained", "segment.classes"]  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize(("place", "words"), BAD, ids=["bytes", "newline", "long", "long bytes", "deep"])
def test_places_that_cannot_exist_or_be_stored_are_refused_for_every_setting(key, place, words):
    with pytest.raises(SettingError, match=words) as refused:
        load("small", [f"{key}={place}"])
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("tool", ["verify", "inspect", "show", "replay", "sync", "compare", "embed", "import"])
@pytest.mark.parametrize("place", [NOT_UTF8, "a\nb", "x" * 256])
def test_every_tool_refuses_them_in_one_line(monkeypatch, capsys, tool, place):
    code, out, err = wavemim(monkeypatch, capsys, tool, place, "x.png", "--out=x.parquet")
    assert (code, out) == (2, "") and err.count("\n") == 1


@pytest.mark.parametrize("place", [NOT_UTF8, "x" * 256])
def test_recipes_too(monkeypatch, capsys, place):
    code, out, err = wavemim(monkeypatch, capsys, "pretrain", "-r", f"{place}.yaml")
    assert (code, out) == (2, "") and err.count("\n") == 1


def test_a_link_of_a_usual_name_is_enough(tmp_path):
    check_place("images", str(tmp_path / "link"))


def test_a_run_is_named_after_its_recipe_also_where_that_has_an_unusual_name(tmp_path):
    recipe = tmp_path / "my recipe (größe 2).yaml"
    recipe.write_text("base: small\n")
    assert load(str(recipe)).name == "my-recipe-gr-e-2"
    assert load(recipe.as_uri()).name == "my-recipe-gr-e-2"


def test_names_of_runs_leave_room_for_those_of_files():
    with pytest.raises(SettingError, match="name=x"):
        load("small", ["name=" + "x" * 201])


def test_what_is_printed_has_no_surrogates_and_one_line():
    assert printable(f"{NOT_UTF8}\n") == "caf\\xe9\\n"


def test_what_was_written_is_never_proposed(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").symlink_to(tmp_path / "gone")
    code, _, err = wavemim(monkeypatch, capsys, "prepare", f"images={tmp_path / 'photos'}")
    assert code == 2 and "did you mean" not in err and "is a link to" in err
    (tmp_path / "cafe\u0301").mkdir()  # as macOS writes é
    code, _, err = wavemim(monkeypatch, capsys, "prepare", f"images={tmp_path / 'café'}")
    assert code == 2 and "did you mean" not in err and "another Unicode form" in err


def test_places_below_an_out_folder_keep_its_options_and_its_copy_has_one_place(monkeypatch, tmp_path):
    monkeypatch.setenv("WAVEMIM_CACHE", str(tmp_path))
    plain, slashed = (load("small", ["name=a", f"out=s3://b/x{end}?scheme=http"]) for end in ("", "/"))
    for recipe in (plain, slashed):
        assert recipe.shards_at == "s3://b/x/shards?scheme=http"
        assert recipe.stage_home("tune") == "s3://b/x/runs/a/tune?scheme=http"
        assert recipe.place_of(recipe.run_dir / "report.md") == "s3://b/x/runs/a/report.md?scheme=http"
        assert recipe.place_of("/elsewhere/report.md") == "/elsewhere/report.md"
    assert plain.local_out == slashed.local_out and plain.local_out.parent == tmp_path
    others = {
        load("small", ["name=a", f"out={out}"]).local_out for out in ("s3://b/x", "s3://b/y", "gs://b/x", "s3://b-x")
    }
    assert len({*others, plain.local_out}) == 5
    local = load("small", ["name=a", "out=here"])
    assert (
        local.home is None and local.stage_home("tune") is None and str(local.stage_dir("tune")) == "here/runs/a/tune"
    )
    assert (local.shards_at, local.place_of("here/x")) == ("here/shards", "here/x")
    monkeypatch.delenv("WAVEMIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert plain.local_out.parent == tmp_path / "cache/wavemim"
