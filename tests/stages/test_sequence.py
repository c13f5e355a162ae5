"""The order of checks and work, without Ray: settings first, then each stage's check, run and summary; nothing twice."""

import contextlib
import sys

import pytest
from tiny_checkpoint import SMALL, write_checkpoint
from tiny_shards import photos, write_set

from pipeline import cli
from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.models import build
from pipeline.runtime.ray_session import SessionInfo
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import ShardSet
from pipeline.stages import evaluate, export, finetune, prepare, pretrain, run, segment, sequence, tune
from pipeline.stages.sequence import check_settings, run_stages

MODULES = {
    "prepare": prepare,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "finetune": finetune,
    "segment": segment,
    "tune": tune,
    "export": export,
}


def test_every_stage_has_the_same_interface():
    assert set(MODULES) == set(cli.STAGES) and set(run.STAGES) < set(MODULES)
    for name, module in MODULES.items():
        assert module.__name__ == cli.STAGES[name].module
        assert all(callable(check) for check in module.CHECKS)
        assert {"check", "run", "summary"} <= set(vars(module))


@pytest.fixture
def events(tmp_path, monkeypatch):
    """A prepared and pretrained out folder; what happens in it, with the work of every stage replaced by its name."""
    happened = []

    def counting(name, function):
        def counted(*arguments, **options):
            happened.append(name)
            return function(*arguments, **options)

        return counted

    @contextlib.contextmanager
    def fake_ray(cluster):
        happened.append("Ray starts")
        yield SessionInfo(2, 0, 1, "", private=True)
        happened.append("Ray ends")

    steps = dict.fromkeys((1, 2, 3), 1.0)
    write_set(tmp_path / "shards", photos(12, side=32), Layout(32, 3, steps))
    write_checkpoint(tmp_path / "runs/small/pretrain/images-000000000008")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    monkeypatch.setattr(sequence, "ray_session", fake_ray)
    monkeypatch.setattr(build, "_check_forward", counting("model is tried", build._check_forward))
    monkeypatch.setattr(ShardSet, "open", counting("shard set is opened", ShardSet.open))
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "run", counting(name, lambda *_, **__: {}))
        monkeypatch.setattr(module, "summary", lambda *_, name=name: f"{name} is done")
    monkeypatch.setattr(run, "write_report", lambda *_: "report")
    return happened


def wavemim(monkeypatch, folder, stage, *settings):
    monkeypatch.setattr(sys, "argv", ["wavemim", stage, f"out={folder}", *SMALL, *settings])
    cli.main()


@pytest.mark.parametrize("stage", ["pretrain", "evaluate", "finetune", "tune"])
def test_a_stage_checks_nothing_twice(events, tmp_path, monkeypatch, capsys, stage):
    wavemim(monkeypatch, tmp_path, stage)
    tried = ["model is tried"] if stage in ("pretrain", "tune") else []
    assert events == [*tried, "shard set is opened", "Ray starts", stage, "Ray ends"]
    assert capsys.readouterr().out == f"{stage} is done\n"


def test_export_needs_no_ray(events, tmp_path, monkeypatch, capsys):
    wavemim(monkeypatch, tmp_path, "export")
    assert events == ["export"]


def test_a_run_checks_all_settings_first_and_each_once(events, tmp_path, monkeypatch, capsys):
    checked = []
    checks = [check for module in run.STAGES.values() for check in module.CHECKS]
    replaced = {check: lambda recipe, check=check: (checked.append(check), check(recipe)) for check in checks}
    for module in run.STAGES.values():
        monkeypatch.setattr(module, "CHECKS", tuple(replaced[check] for check in module.CHECKS))
    wavemim(monkeypatch, tmp_path, "run", f"images={tmp_path / 'photos'}")
    assert len(checked) == len(set(checked)) == len(set(checks))
    opened = "shard set is opened"
    assert events == [
        *("model is tried", "Ray starts", "prepare", opened, "pretrain", opened, "evaluate", opened, "tune"),
        *("Ray ends", "export"),
    ]
    names = ("prepare", "pretrain", "evaluate", "tune", "export")
    assert capsys.readouterr().out == "".join(f"{name} is done\n" for name in names) + "\nreport\n"


def test_a_run_ends_at_a_mistake_of_its_last_stage_before_it_starts(events, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "missing_packages", lambda: ["onnx"])
    with pytest.raises(SystemExit) as ended:
        wavemim(monkeypatch, tmp_path, "run", f"images={tmp_path / 'photos'}", "export.onnx=true")
    assert ended.value.code == 2
    assert "Ray starts" not in events and "prepare" not in events


def test_durations_are_of_the_stages_and_of_rays_start(events, tmp_path):
    said = []
    recipe = load("small", [*SMALL, f"out={tmp_path}"])
    outcome = run_stages({"evaluate": evaluate, "export": export}, recipe, say=said.append)
    assert list(outcome.seconds) == ["start", "evaluate", "export"] and list(outcome.results) == ["evaluate", "export"]
    assert all(seconds >= 0 for seconds in outcome.seconds.values())
    assert said == ["evaluate is done", "export is done"]


def test_a_check_that_several_stages_name_is_called_once():
    def check(recipe):
        called.append(recipe)

    def refuse(recipe):
        raise SettingError("no")

    class First:
        CHECKS = (check,)

    class Second:
        CHECKS = (check, refuse)

    called: list = []
    recipe = load("small")
    with pytest.raises(SettingError, match="no"):
        check_settings([First, Second, First], recipe)
    assert called == [recipe]
