"""The command as a person types it: help, mistakes, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from stage_calls import wavemim

from pipeline import cli
from pipeline.config.load import settings_of
from pipeline.config.recipe import STAGE_SECTIONS


@pytest.mark.parametrize("stage", [*STAGE_SECTIONS, "demo"])
def test_help_lists_every_setting_of_the_stage(monkeypatch, capsys, stage):
    code, out, _ = wavemim(monkeypatch, capsys, stage, "--help")
    assert code == 0
    for key, kind, field in settings_of("run" if stage == "demo" else stage):
        assert f"  {key}=" in out
        assert f"({kind})" in out
        assert field.description.split()[0] in out
    assert "small" in out


def test_help_of_finetune_lists_what_the_training_harness_reads(monkeypatch, capsys):
    _, out, _ = wavemim(monkeypatch, capsys, "finetune", "--help")
    assert "  train.hang_timeout=" in out and "  train.checkpoints_at=" in out
    assert "train.epochs=" not in out and "images=" not in out


def test_help_shows_the_values_of_the_recipe(monkeypatch, capsys):
    _, out, _ = wavemim(monkeypatch, capsys, "pretrain", "--recipe", "wamim_vit_base", "--help", "mask.ratio=0.61")
    assert "encoder.patch_size=16 " in out
    assert "mask.ratio=0.61 " in out
    assert "target.taps={2: 2, 3: 4, 4: 10, 5: 12}" in out


MISTAKES = [
    (["pretrain", "train.epoch=3"], "did you mean 'train.epochs'?"),
    (["pretrain", "target.taps={3: 6, 4: 9}"], "block 9 does not exist, vit_tiny_patch16_224 has blocks 1 to 8"),
    (
        ["run", f"images={Path(__file__).parents[1] / 'docs'}", "target.taps={3: 6, 4: 7}"],
        "the last block, 8, has no tap",
    ),
    (["pretrain", "encoder.name=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
    (["pretrain", "encoder.name=resnet50"], "do not apply to 'resnet50'"),
    (["prepare"], "images"),
    (["prepare", "images=nowhere"], "nowhere"),
    (["run"], "images"),
    (["run", "images=nowhere"], "nowhere"),
    (["tune", "tune.space=level_weight"], "did you mean 'level_weights'"),
    (["pretrain", "--recipe", "smal"], "did you mean 'small'"),
    (["pretrain", "--recipe", "nowhere.yaml"], "no such file"),
    (["train"], "no command 'train'"),
    (["pretrain", "--fast"], "No such option"),
    (["prepare", "--images", "D"], "Settings are given as KEY=VALUE, such as images=FOLDER"),
    (["prepare", "data.image_size=1000000000"], "less than or equal to 8192"),
    (["pretrain", f"shards={Path(__file__).parent}"], "is not a shard set, it has no manifest.json"),
    (["pretrain", "tracking.uri=foo://bar"], "tracking.uri=foo://bar: MLflow has no such store"),
    (["pretrain", f"tracking.uri={__file__}"], "MLflow has no such store"),
    (["pretrain", "out=/dev/null"], "out=/dev/null cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "pipeline.runtime.ray_session.ray_session", lambda *_: pytest.fail("Ray was started for a mistake")
    )
    code, out, err = wavemim(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("wavemim: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["evaluate", "export"])
def test_a_stage_without_what_it_needs_says_what_to_run(monkeypatch, capsys, tmp_path, stage):
    monkeypatch.chdir(tmp_path)
    code, _, err = wavemim(monkeypatch, capsys, stage)
    assert code == 1
    assert "run wavemim pretrain with the same name= and out= first" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("space: {mask.ratoi: {uniform: [0.4, 0.9]}}", "did you mean 'mask.ratio'?"),
        ("space: {mask.ratio: {unifrom: [0.4, 0.9]}}", "mask.ratio needs one of uniform"),
        ("space: {mask.ratio: {uniform: [0.9, 0.4]}}", "uniform needs [low, high]"),
        ("space: {mask.ratio: {uniform: [0.4, 1.9]}}", "mask.ratio=1.9: input should be less than 1"),
        ("space: {target.weights.4: {uniform: [0.4, 0.9]}}", "the recipe taps none of its levels"),
        ("space: {target.weights.x: {uniform: [0, 1]}}", "'x' is not a level"),
        ("space: {3: {uniform: [0, 1]}}", "3 cannot be searched"),
        ("space: {mask.ratio: {uniform: [a, 0.5]}}", "uniform needs [low, high], got ['a', 0.5]"),
        ("space: {target.weights.3: {log_uniform: [0, 1]}}", "log_uniform needs [low, high] above 0"),
        ("space: {train.batch: {uniform: [32, 64]}}", "train.batch=43.84: input should be a valid integer"),
        ("space: {evaluate.knn_k: {int_uniform: [1, 5]}}", "evaluate.knn_k cannot be searched"),
        ("spaces: {}", "the file needs a mapping 'space'"),
    ],
)
def test_a_broken_space_is_named_before_anything_starts(monkeypatch, capsys, tmp_path, space, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(space)
    code, _, err = wavemim(monkeypatch, capsys, "tune", "tune.space=./space.yaml")
    assert code == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def loaded_by(code):
    """Which large libraries a fresh interpreter has loaded after some code."""
    heavy = ("torch", "ray", "pyarrow", "mlflow", "timm", "numpy", "pydantic")
    code = f"{code}\nprint('loaded', *[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(cli.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded", 1)[1].split())


def test_the_list_of_commands_is_shown_without_loading_any():
    call = "import sys\nfrom pipeline.cli import _group\n_group.main(['--help'], standalone_mode=False)"
    assert loaded_by(call) == set()


def test_help_of_tools_loads_neither_torch_nor_ray():
    call = (
        "import sys\nfrom pipeline.cli import TOOLS, _group\n"
        "for tool in TOOLS: _group.main([tool, '--help'], standalone_mode=False)"
    )
    assert not loaded_by(call) & {"torch", "ray", "mlflow", "timm"}


def test_a_mistake_in_the_settings_loads_neither_torch_nor_ray():
    call = (
        "import sys\nfrom pipeline.cli import _group\n"
        "try: _group.main(['run', 'train.epoch=3'], standalone_mode=False)\nexcept ValueError as error: print(error)"
    )
    assert not loaded_by(call) & {"torch", "ray", "mlflow", "timm", "pyarrow"}


def test_prepare_refuses_its_images_without_loading_ray():
    call = (
        "import sys\nfrom pipeline.cli import _group\n"
        "try: _group.main(['prepare', 'images=nowhere'], standalone_mode=False)\nexcept ValueError as error: print(error)"
    )
    assert not loaded_by(call) & {"ray", "mlflow"}


def test_every_command_is_listed_with_its_description(monkeypatch, capsys):
    code, out, _ = wavemim(monkeypatch, capsys, "--help")
    assert code == 0
    for name, entry in {**cli.SEQUENCES, **cli.STAGES, **cli.TOOLS}.items():
        assert f"  {name} " in out
        assert entry.about.split()[0] in out
        assert cli._group.get_command(None, name).name == name


def test_the_command_alone_shows_the_help_as_it_is(monkeypatch, capsys):
    _code, shown, _ = wavemim(monkeypatch, capsys, "--help")
    assert wavemim(monkeypatch, capsys) == (2, "", shown)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretran"], "wavemim: no command 'pretran'; did you mean 'pretrain'?\n"),
        (["inspect", "out=here"], "wavemim: 'out=here': inspect takes paths and --options, not settings; "),
        (["verify", "shards=x"], "wavemim: 'shards=x': verify takes paths and --options, not settings; "),
    ],
)
def test_mistakes_in_commands_and_tools_are_one_line(monkeypatch, capsys, arguments, said):
    code, out, err = wavemim(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(said) and err.count("\n") == 1
