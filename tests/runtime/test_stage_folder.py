"""A stage's folder: one owner, a finishing mark, and no work of other settings taken for one's own."""

import json
import multiprocessing
import os
import signal

import pytest

from pipeline.errors import SettingError, StageError
from pipeline.runtime.stage_folder import stage_folder, write_json


def test_new_unfinished_finished(tmp_path):
    path = tmp_path / "s"
    with stage_folder(path, {"a": 1}) as folder:
        assert folder.state == "new"
        (path / "half").write_text("x")
    with stage_folder(path, {"a": 1}) as folder:
        assert folder.state == "unfinished"
        folder.clear()
        assert sorted(p.name for p in path.iterdir()) == ["settings.json"]
        folder.finish({"answer": 42})
    with stage_folder(path, {"a": 1}) as folder:
        assert folder.finished
        assert folder.result() == {"answer": 42}


def test_other_settings_are_refused_and_named(tmp_path):
    with stage_folder(tmp_path / "s", {"train.epochs": 3, "seed": 0}) as folder:
        folder.finish({})
    with (
        pytest.raises(SettingError, match=r"train\.epochs: 3 → 5") as caught,
        stage_folder(tmp_path / "s", {"train.epochs": 5, "seed": 0}),
    ):
        pass
    assert "seed" not in str(caught.value)
    with stage_folder(tmp_path / "s", {"train.epochs": 5, "seed": 0}, restart=True) as folder:
        assert folder.state == "new"


def test_a_call_that_failed_early_is_in_nobodys_way(tmp_path):
    """Would catch: a mistake in a setting whose correction is refused; work that is thrown away with other settings."""
    path, work = tmp_path / "s", ("*.parquet", "images-*")
    with stage_folder(path, {"images": "a"}, work=work):
        (path / "units").mkdir()
        (path / ".hidden.json").write_text("{}")
    with stage_folder(path, {"images": "a"}, work=work) as folder:  # the same settings resume
        assert folder.state == "unfinished" and (path / "units").is_dir()
    with stage_folder(path, {"images": "b"}, work=work) as folder:
        assert folder.state == "new" and not (path / "units").exists()
        assert json.loads((path / "settings.json").read_text()) == {"images": "b"}
    for name in ("images-000000000100", "one.parquet", "result.json"):
        (path / name).write_text("{}")
        with pytest.raises(SettingError, match="images: b → c"), stage_folder(path, {"images": "c"}, work=work):
            pass
        (path / name).unlink()
    with (
        pytest.raises(SettingError, match="images: b → c"),
        stage_folder(path, {"images": "c"}),
    ):  # all is worth keeping
        pass
    (path / "settings.json").write_text('{"editor": "vim"}')
    with (
        pytest.raises(SettingError, match="was not made by this stage"),
        stage_folder(path, {"images": "c"}, work=work),
    ):
        pass


def test_a_foreign_folder_is_never_emptied(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("precious")
    for restart in (False, True):
        with (
            pytest.raises(SettingError, match="was not made by a stage"),
            stage_folder(tmp_path / "photos", {}, restart=restart),
        ):
            pass
    assert (tmp_path / "photos" / "mine.jpg").read_text() == "precious"


def test_neither_is_one_with_somebody_elses_settings(tmp_path):
    (tmp_path / "settings.json").write_text('{"editor": "vim"}')
    (tmp_path / "mine.txt").write_text("precious")
    with (
        pytest.raises(SettingError, match="was not made by this stage"),
        stage_folder(tmp_path, {"seed": 0}, restart=True),
    ):
        pass
    assert (tmp_path / "mine.txt").read_text() == "precious"


def _hold(path, ready):
    with stage_folder(path, {"a": 1}):
        ready.set()
        signal.pause()


def test_one_owner_and_a_killed_owner_owns_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "s", ready))
    holder.start()
    assert ready.wait(60)
    with (
        pytest.raises(StageError, match=f"being written by process {holder.pid}"),
        stage_folder(tmp_path / "s", {"a": 1}),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with stage_folder(tmp_path / "s", {"a": 1}) as folder:
        assert folder.state == "unfinished"


def test_settings_are_whole_or_named(tmp_path):
    with stage_folder(tmp_path / "s", {"x": 1}) as folder:
        folder.finish({"answer": 42})
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    (tmp_path / "s" / "settings.json").write_text('{"x": ')
    with pytest.raises(StageError, match=r"settings\.json cannot be read"), stage_folder(tmp_path / "s", {"x": 1}):
        pass


def test_what_may_change_goes_on_when_forced_and_nothing_else_does(tmp_path):
    def at(force, **settings):
        return stage_folder(
            tmp_path / "s", {"train.lr": 1, "seed": 0, **settings}, changeable={"train.lr"}, force=force
        )

    with at(False) as folder:
        (tmp_path / "s" / "reached").write_text("x")
        folder.finish({})
    with (
        pytest.raises(SettingError, match=r"train\.lr: 1 → 2\).*force=true, or replace it"),
        at(False, **{"train.lr": 2}),
    ):
        pass
    with (
        pytest.raises(SettingError, match=r"seed: 0 → 1.*give another name= or out=, or replace it") as caught,
        at(True, **{"train.lr": 2, "seed": 1}),
    ):
        pass
    assert "force" not in str(caught.value)
    with at(True, **{"train.lr": 2}) as folder:
        assert folder.state == "unfinished"
        assert (tmp_path / "s" / "reached").exists()
    with at(False, **{"train.lr": 2}) as folder:  # these are its settings now
        assert folder.state == "unfinished"
