"""A trial in parts is the trial without pauses, and a fork is the donor's training with other settings."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny_shards
import torch

from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import load, with_overrides
from pipeline.models.build import build_model
from pipeline.stages.tune_parts import (
    CHECKPOINTS,
    KEPT,
    Part,
    folder_of,
    forks_in_words,
    keep_checkpoint,
    starting_checkpoint,
)
from pipeline.stages.tune_rungs import Rungs
from pipeline.sweeps.trials import Fork
from pipeline.training.pretrain_loop import train
from wavemim.weights import checkpoint

TINY = [
    *("encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"),
    *(
        "target.taps={3: 1, 4: 2}",
        "train.batch=8",
        "train.warmup_epochs=0",
        "train.epochs=3",
        "train.checkpoint_every=100",
    ),
]
RUNGS, STEPS = 3, 6
OTHER = {"train.lr": 0.01, "target.weights.3": 0.3, "mask.ratio": 0.5, "train.weight_decay": 0.2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards.write_set(tmp_path_factory.mktemp("shards") / "s", tiny_shards.photos(24))


class Killed(Exception):
    """The trial's process is lost."""


def run_part(logs, number, recipe, shards, part, kill_at=None):
    """Train a part as a trial does; the objective is the number of the step. Returns the model if it is the last part."""
    folder = folder_of(logs, number)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    resume = starting_checkpoint(logs, number, part)
    step = 0 if resume is None else checkpoint.read_state(resume)["step"]
    rungs = Rungs(
        folder, number, rungs=RUNGS, total_steps=STEPS, step=step, pause=part.pause, at_start=False,
        model=build_model(recipe, shards, start=resume is None), measure=lambda model: 1.0, report=lambda *one: None,
    )  # fmt: skip
    if rungs.paused:
        keep_checkpoint(folder, part.pause)
        return None
    keeper, steps = Keeper(folder / CHECKPOINTS, keep=1), []

    def decide():
        steps.append(1)
        save, stop = rungs.after_step()
        if kill_at is not None and step + len(steps) == kill_at and not stop:
            raise Killed
        return save, stop

    def save(saver, state):
        rungs.at_checkpoint(saver, state)
        keeper.save(saver)
        keeper.wait()
        if state["step"] == kill_at:  # between the checkpoint and its being kept
            raise Killed

    asked = SimpleNamespace(after_step=decide)
    trained = train(recipe, shards, device=torch.device("cpu"), resume=resume, coordinator=asked, on_checkpoint=save)
    if trained.stopped:
        keep_checkpoint(folder, part.pause)
        return None
    return trained.model


def parts(*forks):
    return [Part(begin, begin + 1 if begin + 1 < RUNGS else None, forks) for begin in range(RUNGS)]


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_a_trial_in_parts_is_the_trial_without_pauses(tmp_path, shards):
    recipe = load("small", TINY)
    whole = train(recipe, shards, device=torch.device("cpu"), on_checkpoint=lambda saver, state: None).model
    first, second, last = parts()
    assert run_part(tmp_path, 1, recipe, shards, first) is None
    kept = folder_of(tmp_path, 1) / KEPT
    assert [path.name for path in kept.iterdir()] == ["1"] and not list(
        (folder_of(tmp_path, 1) / CHECKPOINTS).iterdir()
    )
    assert run_part(tmp_path, 1, recipe, shards, first) is None  # reported, but the driver was killed
    assert run_part(tmp_path, 1, recipe, shards, second) is None
    assert sorted(path.name for path in kept.iterdir()) == ["1", "2"]  # others may still be forked from the first
    assert same(run_part(tmp_path, 1, recipe, shards, last), whole)
    assert [path.name for path in kept.iterdir()] == ["2"]


@pytest.mark.parametrize("kill_at", [3, 4])
def test_a_part_that_was_killed_goes_on_from_its_own_checkpoint_or_begins_again(tmp_path, shards, kill_at):
    """In the part, and between its last checkpoint and that being kept."""
    recipe = load("small", [*TINY, "train.checkpoint_every=0.5"])
    fork = Fork(1, 2, 1, 32, OTHER)
    changed = with_overrides(recipe, OTHER)
    for number, one in ((1, recipe), (2, changed), (3, recipe)):
        run_part(tmp_path, number, one, shards, Part(0, 1))
    shutil.copytree(folder_of(tmp_path, 1), folder_of(tmp_path, 4))
    with pytest.raises(Killed):
        run_part(tmp_path, 1, changed, shards, Part(1, 2, (fork,)), kill_at=kill_at)
    for number in (1, 4):
        assert run_part(tmp_path, number, changed, shards, Part(1, 2, (fork,))) is None
    ends = [run_part(tmp_path, number, changed, shards, Part(2, None, (fork,))) for number in (1, 4)]
    assert same(*ends)


def test_a_fork_trains_on_from_the_donors_weights_and_moments_with_the_new_settings_and_its_own_cost(tmp_path, shards):
    """The same as the donor's own training with other settings from there on. Would catch: own weights, moments that are lost,
    settings of the donor, an own cost that is replaced."""
    recipe = load("small", TINY)
    changed = with_overrides(recipe, OTHER)
    run_part(tmp_path, 1, with_overrides(recipe, {"train.lr": 0.1}), shards, Part(0, 1))
    run_part(tmp_path, 2, recipe, shards, Part(0, 1))
    donor = folder_of(tmp_path, 2) / KEPT / "1"
    reference = train(
        changed, shards, device=torch.device("cpu"), resume=donor, on_checkpoint=lambda saver, state: None
    ).model
    own = checkpoint.read_state(folder_of(tmp_path, 1) / KEPT / "1")
    forks = (Fork(1, 2, 1, 32, OTHER),)
    start = starting_checkpoint(tmp_path, 1, Part(1, 2, forks))
    copied, original = checkpoint.read_state(start), checkpoint.read_state(donor)
    assert start.parent == folder_of(tmp_path, 1) / CHECKPOINTS and copied["files"] == original["files"]
    assert copied["cost"] == own["cost"] != original["cost"] and copied["step"] == original["step"] == 2
    assert run_part(tmp_path, 1, changed, shards, Part(1, 2, forks)) is None
    shutil.rmtree(folder_of(tmp_path, 2))  # the donor is needed at the fork alone
    assert same(run_part(tmp_path, 1, changed, shards, Part(2, None, forks)), reference)


def test_a_part_follows_from_a_trials_configuration():
    fork = Fork(3, 5, 2, 4000, {"mask.ratio": 0.5})
    made = Part.of(json.loads(json.dumps({"number": 3, "begin": 2, "pause": 3, "forks": [vars(fork)]})))
    assert made == Part(2, 3, (fork,)) and made.donor == 5 and not made.is_whole
    assert Part(3, None, (fork,)).donor is None and Part.of({"number": 3}).is_whole
    assert forks_in_words([fork], ["mask.ratio"]) == (
        "- after 4,000 images: continued from a checkpoint of #05 with mask=0.5"
    )
