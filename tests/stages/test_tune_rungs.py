"""Measurements during a trial are made once each, wherever the trial is interrupted."""

import pytest
import tiny_shards
import torch
from loss_equality.cases import TWO_LEVELS
from torch import nn

from pipeline.config.load import load
from pipeline.evaluation.features import features_of
from pipeline.models.build import build_blank_model, build_inputs, build_model
from pipeline.stages.tune_parts import STOPPED
from pipeline.stages.tune_rungs import FEWEST, FEWEST_AT_END, SHARE, Measuring, Rungs, plan_rungs, tracked
from pipeline.training.pretrain_loop import train
from wavemim.flops import cost_of, forward_flops
from wavemim.weights.checkpoint import Saver

STEPS = 12


class Killed(Exception):
    """The trial's process is lost."""


def attempt(folder, begin=0, end=STEPS, kill_in_measurement=None):
    """Train from a checkpoint on; the weight is the number of steps. Returns the last checkpoint, what was measured and told."""
    model, copy, measured, told = nn.Linear(1, 1), nn.Linear(1, 1), [], []
    nn.init.constant_(copy.weight, 0.0)
    saved = begin

    def measure(other):
        if len(measured) == kill_in_measurement:
            raise Killed
        measured.append(other.weight.item())
        return 10 * other.weight.item()

    step = begin
    saver = Saver(model, None, None, lambda: {"step": step, "images": 7 * step, "cost": {"images_seen": 7 * step}})
    rungs = None
    try:
        rungs = Rungs(
            folder,
            3,
            rungs=4,
            total_steps=STEPS,
            step=begin,
            model=copy,
            measure=measure,
            report=lambda *one: told.append(one),
        )
        while step < end:
            step += 1
            nn.init.constant_(model.weight, float(step))
            save, stop = rungs.after_step()
            assert not stop
            if save or step % 5 == 0 or step == STEPS:
                rungs.at_checkpoint(saver, saver.snapshot().state)
                saved = step
    except Killed:
        pass
    return saved, measured, told


def test_the_objective_is_measured_at_the_start_and_evenly_before_the_end(tmp_path):
    _, measured, told = attempt(tmp_path)
    assert measured == [0, 3, 6, 9]
    assert [(one.number, one.rung, one.images, one.objective) for one, _ in told] == [
        (3, 0, 0, 0), (3, 1, 21, 30), (3, 2, 42, 60), (3, 3, 63, 90),
    ]  # fmt: skip
    assert [spent.images_seen for _, spent in told] == [0, 21, 42, 63]


@pytest.mark.parametrize("end", range(STEPS))
def test_a_trial_that_is_resumed_measures_no_rung_again_and_leaves_none_out(tmp_path, end):
    """Would catch: a rung that is skipped because the checkpoint is behind it, or measured twice because it is before it."""
    saved, first, told = attempt(tmp_path, end=end)
    _, second, again = attempt(tmp_path, begin=saved)
    assert first + second == [0, 3, 6, 9]
    assert [one for one, _ in again[: len(told)]] == [one for one, _ in told]
    assert all(spent is None for _, spent in again[: len(told)]) and len(again) == 4


@pytest.mark.parametrize("kill", range(4))
def test_a_measurement_that_was_interrupted_is_made_again(tmp_path, kill):
    saved, first, _ = attempt(tmp_path, kill_in_measurement=kill)
    _, second, told = attempt(tmp_path, begin=saved)
    assert first + second == [0, 3, 6, 9] and [one.rung for one, _ in told] == [0, 1, 2, 3]


def test_rungs_are_cheap_and_fewer_rather_than_of_a_handful_of_images(tmp_path):
    shards = tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    rows = shards.rows["train"]
    assert plan_rungs(load("small", ["tune.rungs=1"]), shards) == Measuring(1, 0, rows)
    assert plan_rungs(load("small", ["tune.epochs=1000"]), shards) == Measuring(4, rows, rows)
    many = type("Many", (), {"rows": {"train": 100_000}, "channels": 3})()
    plans = [plan_rungs(load(TWO_LEVELS, [f"tune.rungs={n}", "tune.epochs=2"]), many) for n in (3, 7, 15)]
    assert [plan.rungs for plan in plans] == [3, 7, 15] and {plan.at_end for plan in plans} == {10_000}
    counts = [plan.images for plan in plans]
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.01) and counts[1] == pytest.approx(2 * counts[2], rel=0.01)
    asha = "tune.scheduler=asha"
    assert plan_rungs(load("small", ["tune.epochs=0.001"]), many) == Measuring(1, FEWEST, FEWEST_AT_END)
    assert plan_rungs(load("small", ["tune.epochs=0.001", asha]), many) == Measuring(4, FEWEST, FEWEST_AT_END)
    assert plan_rungs(load("small", ["tune.max_images=50", "tune.epochs=100"]), many) == Measuring(4, 50, 50)


@pytest.mark.parametrize("epochs", [0.6, 1, 2, 5, 20])
def test_features_of_probes_take_a_small_share_of_training(epochs):
    """Counted independently: of CIFAR-10's size, from half an epoch on. Fails if a measurement is left out of the plan."""
    many = type("Many", (), {"rows": {"train": 50_000}, "channels": 3})()
    recipe = load("small32_wavelet", [f"tune.epochs={epochs}"])
    plan = plan_rungs(recipe, many)
    with torch.device("meta"):
        model = build_blank_model(recipe)
    training = epochs * 50_000 * cost_of(model, 1).training_flops
    measured = plan.at_end + (plan.rungs + 1) * plan.images
    share = measured * forward_flops(model.encoder.model, 3, 32) / training
    assert share <= (SHARE if epochs >= 2 else 0.175 / epochs)
    assert FEWEST_AT_END <= plan.at_end <= 10_000 and (plan.rungs == 4 or epochs < 5)


class Run:
    """A tracker."""

    def __init__(self):
        self.ends = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end("FINISHED")

    def end(self, status):
        self.ends.append(status)


def test_a_run_ends_as_killed_only_where_a_scheduler_stopped_the_trial(tmp_path):
    """An interrupted trial keeps its checkpoints, and its run is left as it is, to be gone on with."""
    for stopped, ends in ((False, []), (True, ["KILLED"])):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        if stopped:
            (tmp_path / STOPPED).touch()
        run = Run()
        with pytest.raises(SystemExit), tracked(run, tmp_path):
            raise SystemExit(0)
        assert run.ends == ends and (tmp_path / "checkpoints").exists() == (not stopped)
    run = Run()
    with tracked(run, tmp_path):
        pass
    assert run.ends == ["FINISHED"]


@pytest.mark.parametrize("options", [["train.ema=0.9"], ["train.progressive={32: 0.5, 64: 0.5}"]])
def test_a_measurement_changes_nothing_in_training_and_sees_the_weights_of_its_step(tmp_path, options):
    shards = tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(24))
    tiny = ["encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"]
    tiny += [
        "target.taps={3: 1, 4: 2}",
        "train.batch=8",
        "train.warmup_epochs=0",
        "train.epochs=4",
        "encoder.image_size=64",
    ]
    recipe = load("small", [*tiny, *options])
    device, values = torch.device("cpu"), {}
    plain = train(recipe, shards, device=device, on_checkpoint=lambda saver, state: None)

    def measure(model):
        inputs = build_inputs(shards)
        features, _ = features_of(model.encoder.model.eval(), inputs, shards, "train", window=64, batch=8, max_rows=16)
        return float(features.std())

    rungs = Rungs(
        tmp_path, 1, rungs=4, total_steps=8, step=0, model=build_model(recipe, shards, start=True), measure=measure,
        report=lambda one, spent: values.setdefault(one.rung, one.objective),
    )  # fmt: skip
    probed = train(
        recipe,
        shards,
        device=device,
        coordinator=rungs,
        on_checkpoint=lambda saver, state: rungs.at_checkpoint(saver, state),
    )
    for one, other in zip(plain.model.state_dict().values(), probed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert sorted(values) == [0, 1, 2, 3] and len(set(values.values())) == 4
    assert rungs.count == 4 and rungs.at_end(probed.model) == measure(probed.model)  # as at the rungs
    assert rungs.count == 5 and sorted(values) == [0, 1, 2, 3]
