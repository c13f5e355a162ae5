"""The step benchmark on tiny networks: what it names is there and sane; no timing is asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step as benchmark
import step_contenders

from pipeline.config.load import load, names_of
from pipeline.models.build import build_blank_model
from wavemim.flops import cost_of

TINY = ["data.image_size=64", "encoder.image_size=64", "encoder.width=24", "encoder.heads=2"]
TINY += ["decoder.width=16", "decoder.depth=1", "decoder.heads=2"]


@pytest.fixture
def in_process(monkeypatch):
    """Memory is measured in this process, which saves the start of another one."""
    calls = []

    def call(function, **arguments):
        calls.append(arguments)
        return getattr(step_contenders, function.removeprefix("step_contenders:"))(**json.loads(json.dumps(arguments)))

    monkeypatch.setattr(benchmark, "in_child", call)
    return calls


def test_all_numbers(tmp_path, capsys, in_process):
    file = tmp_path / "step.json"
    arguments = ["--json", str(file), "--set", *TINY, "--batch", "2", "--repeats", "2", "--seconds", "0"]
    assert benchmark.main([*arguments, "--matrix", "64", "--device", "cpu", "--no-compile"]) == 0
    result = json.loads(file.read_text())
    assert set(result["recipes"]) == {"wamim_vit_base", "mae_vit_base"} and not result["left_out"]
    for name, made in result["recipes"].items():
        with torch.device("meta"):
            cost = cost_of(build_blank_model(load(name, TINY)))
        assert made["training_gflop_per_image"] == pytest.approx(3 * cost.forward_flops / 1e9)
        assert len(made["repeats"]) == 2 and made["images_per_second"] == pytest.approx(sum(made["repeats"]) / 2)
        assert made["peak_memory_bytes"] > 16 * made["parameters"]
    assert [call["recipe"] for call in in_process] == ["wamim_vit_base", "mae_vit_base"]
    numbers, rates = result["numbers"], {name: made["images_per_second"] for name, made in result["recipes"].items()}
    assert numbers["wamim_vs_mae_step"] == pytest.approx(rates["wamim_vit_base"] / rates["mae_vit_base"])
    matmul = sorted(result["matmul_flops_per_second"])
    for name, mfu in numbers["mfu"].items():
        work = rates[name] * result["recipes"][name]["training_gflop_per_image"] * 1e9
        assert work / matmul[-1] <= mfu * (1 + 1e-9) and mfu <= work / matmul[0] * (1 + 1e-9)
    assert numbers["target_share_stored"] > 0 and numbers["target_share_device"] > 0
    assert set(result["goals"]) == {"wamim_vs_mae_step", "target_share_device", "target_share_stored"}
    facts = result["machine"]
    assert facts["date"] and facts["commit"] and facts["cpu"] and facts["torch"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("wamim_vs_mae_step", "target_share_device", "mae_vit_base", "TFLOP/s"))


def test_costs_are_printed_for_headers(capsys):
    assert benchmark.main(["--costs", "small", "mae_vit_base"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == ["small:", "mae_vit_base:"]
    assert lines[1][1] == "# Cost: 111.9 M parameters, encoder 85.8 M, 19.6 GFLOP forward per image (counted)"


def test_what_cannot_be_built_is_said(tmp_path, in_process):
    settings = step_contenders.Settings(recipes=("nowhere", "small_hog"), batch=2, repeats=1, seconds=0, matrix=64)
    result = benchmark.run(settings, {})
    assert "nowhere" in result["left_out"]["nowhere eager"]
    assert list(result["recipes"]) == ["small_hog"] and "wamim_vs_mae_step" not in result["numbers"]
    assert "target_share_stored" not in result["numbers"]  # no wavelet recipe
    assert "skipped" in benchmark.table(result)


def narrow(name):
    """Settings that make a recipe's network narrow and shallow, of the same kind."""
    recipe = load(name)
    if recipe.encoder.name.startswith("vit"):
        shape = ["encoder.width=24", "encoder.heads=2"]
    elif recipe.encoder.name.startswith("swin"):
        shape = [
            "encoder.options.embed_dim=8",
            "encoder.options.depths=[1, 2, 1, 1]",
            "encoder.options.num_heads=[1, 1, 1, 1]",
        ]
    else:
        shape = ["encoder.options.dims=[8, 8, 8, 8]", "encoder.options.depths=[1, 1, 1, 1]"]
    return (*shape, "decoder.width=16", "decoder.heads=2")


@pytest.mark.parametrize("name", names_of("pipeline", "recipes"))
def test_every_recipe_trains(name):
    """Its crops, masks, targets, decoders and loss, at its own size of images."""
    made = step_contenders.make_contender(name, step_contenders.Settings(overrides=narrow(name), batch=2), "eager")
    model = made.step.model
    stored, rows = made.batches[0], torch.arange(2)
    result = made.step(stored, rows, torch.ones(2), 2.0, epoch=0, step=20, crop=made.crop)
    assert result.losses.shape == (len(made.recipe.target.taps),)
    assert (result.losses > 0).all() and torch.isfinite(result.losses).all() and result.grad_norm > 0
    moments = made.step.optimizer.state
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert not [key for key, value in trained.items() if not moments[value]["exp_avg"].any()]  # the loss reaches all
