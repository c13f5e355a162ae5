"""A run that blows up leaves what is needed to look into it, and the replay names the image."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.shards.reader import Reader
from pipeline.shards.row_groups import read_columns
from pipeline.tools.replay_steps import replay
from pipeline.training.divergence import CHECKPOINT, FOLDER, STEPS, DivergedError
from pipeline.training.pretrain_loop import train
from wavemim.model import MaskedImageModel
from wavemim.weights import checkpoint

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "train.epochs": 20,
    "train.batch": 10,
    "train.workers": 1,
    "train.warmup_epochs": 1,
    "train.log_every": 1,
    "train.max_skipped": 1,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on: 4 steps an epoch


def blow_up(shards, folder, **changes):
    recipe = with_overrides(load("small"), SETTINGS | changes)
    with pytest.raises(DivergedError) as caught:
        train(
            recipe,
            shards,
            device=torch.device("cpu"),
            folder=folder,
        )
    return str(caught.value), json.loads((folder / FOLDER / STEPS).read_text())


def rows_of(shards, seed, epoch, batch):
    reader = Reader(shards, "train", batch=10, seed=seed, window=64, flip=True, streams=1)
    return next(reader.epoch(epoch, start=batch)).rows.tolist()


def test_weights_that_are_gone_are_named_with_every_step(shards, tmp_path, monkeypatch):
    """From step 6 on the head of level 3 has an infinite weight."""
    forward, calls = MaskedImageModel.forward, []

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            with torch.no_grad():
                self.decoders["3"].head.weight[0, 0] = float("inf")
        return forward(self, *arguments)

    monkeypatch.setattr(MaskedImageModel, "forward", broken)
    line, about = blow_up(shards, tmp_path)
    monkeypatch.undo()
    assert "2 steps in a row were skipped, up to step 7" in line
    assert f"wavemim replay {tmp_path / FOLDER}" in line
    seed = load("small").seed
    assert [(step["step"], step["epoch"]) for step in about["steps"]] == [(6, 1), (7, 1)]
    assert [step["rows"] for step in about["steps"]] == [rows_of(shards, seed, 1, 1), rows_of(shards, seed, 1, 2)]
    assert checkpoint.read_state(tmp_path / FOLDER / CHECKPOINT)["step"] == 7
    assert checkpoint.latest(tmp_path) is None  # no checkpoint to go on from

    said = []
    found = replay(str(tmp_path), say=said.append)
    assert [step.step for step in found] == [6, 7]
    for step in found:
        assert math.isfinite(step.losses[2]) and not math.isfinite(step.losses[3])
        assert step.parameter is not None
        assert len(step.images) == 10  # all of them
    assert said[-1] == "2 of 2 steps are not finite for any image: the weights are the cause."


def test_the_image_is_named_that_alone_does_it(shards, tmp_path, monkeypatch):
    """One image's pixels are not finite: every step that has it is left out, and one step is an epoch."""
    from wavemim.inputs import Inputs

    column = read_columns(shards, shards.files("train")[0][0], 0, ["row", "path"])
    row, path = column.column("row")[3].as_py(), column.column("path")[3].as_py()
    raw = Inputs.raw
    asked = []

    def poisoned(self, stored, crop=None):
        pixels, pyramid = raw(self, stored, crop)
        at = asked[-1] == row
        return torch.where(at[:, None, None, None], float("nan"), pixels), pyramid

    from wavemim.views import Views

    view = Views.__call__

    def noted(self, stored, rows, **more):
        asked.append(rows)
        return view(self, stored, rows, **more)

    monkeypatch.setattr(Inputs, "raw", poisoned)
    monkeypatch.setattr(Views, "__call__", noted)
    _, about = blow_up(shards, tmp_path, **{"train.batch": 40})
    assert [step["step"] for step in about["steps"]] == [1, 2]
    said = []
    found = replay(str(tmp_path / FOLDER), say=said.append)
    assert [step.images for step in found] == [[path], [path]]
    assert said[-1] == "2 of 2 steps are not finite, because of 1 image whose loss or gradient is not finite."
    assert found[0].parameter is not None
    monkeypatch.undo()
    found = replay(str(tmp_path), say=said.append)  # with images that are whole
    assert [step.images for step in found] == [[], []]
    assert [step.parameter for step in found] == [None, None]
    assert "All losses and gradients are finite here" in said[-1]


def test_nothing_to_replay_is_said(tmp_path):
    with pytest.raises(SettingError, match="nothing to replay"):
        replay(str(tmp_path))


def test_the_command(shards, tmp_path, monkeypatch):
    from pipeline.cli import _group
    from pipeline.tools import replay_steps as module

    monkeypatch.setattr(module, "replay", lambda where, shards, say: say(f"{where} {shards}"))
    done = CliRunner().invoke(_group, ["replay", "here", "--shards", "there"])
    assert (done.exit_code, done.output) == (0, "here there\n")
