"""The training loop without Ray: resuming equals no interruption, what it logs, and steps that are skipped."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from loss_equality.cases import TWO_LEVELS
from tiny_shards import photos, write_set

from pipeline.config.load import load, validate, with_overrides
from pipeline.errors import SettingError
from pipeline.stages import pretrain
from pipeline.training.divergence import DivergedError
from pipeline.training.pretrain_loop import PretrainTask, train
from pipeline.training.schedule import TrainSchedule
from wavemim.weights import checkpoint

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "target.weights": {2: 0.5},
    "train.epochs": 3,
    "train.batch": 10,
    "train.workers": 1,
    "train.warmup_epochs": 1,
    "train.log_every": 2,
    "train.checkpoint_every": 0.5,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))  # 40 to train on: 4 steps an epoch


def run(shards, folder=None, resume=None, **changes):
    recipe = with_overrides(load(TWO_LEVELS), SETTINGS | changes)
    logged = {}

    def keep(write, state):
        if folder is not None:
            write(folder / f"images-{state['images']}")

    trained = train(
        recipe,
        shards,
        device=torch.device("cpu"),
        resume=resume,
        on_log=lambda metrics, images: logged.update({images: metrics}),
        on_checkpoint=keep,
    )
    return trained, logged


def test_resuming_in_the_middle_of_an_epoch_equals_no_interruption(shards, tmp_path):
    whole, logged = run(shards, tmp_path)
    middle = tmp_path / "images-60"  # one and a half epochs
    assert checkpoint.read_state(middle)["batch"] == 2
    resumed, again = run(shards, resume=middle)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.position.history == whole.position.history
    assert set(again) == {images for images in logged if images > 60}
    for images, metrics in again.items():
        for name, value in metrics.items():
            if not name.startswith(("perf/", "cost/")):
                assert value == logged[images][name], name


def test_what_is_logged(shards):
    trained, logged = run(shards)
    assert list(logged) == [20, 40, 60, 80, 100, 120]
    last = logged[120]
    assert last["train/loss"] == pytest.approx(
        0.5 * last["train/loss_level2"] + last["train/loss_level3"] + last["train/loss_level4"]
    )
    assert {"train/lr", "train/grad_norm", "perf/images_per_second", "perf/data_wait_share"} <= set(last)
    assert 0 <= last["perf/data_wait_share"] <= 1
    assert [line["epoch"] for line in trained.position.history] == [1, 2, 3]
    assert trained.position.images == 120


def test_another_seed_is_another_run(shards):
    first, second = run(shards, **{"train.epochs": 1.5})[0], run(shards, **{"train.epochs": 1.5, "seed": 1})[0]
    assert not torch.equal(
        first.model.encoder.model.blocks[0].mlp.fc1.weight, second.model.encoder.model.blocks[0].mlp.fc1.weight
    )


HARNESS = {
    "wavelet, on the device, of crops": {"train.augment": "rrc", "target.source": "device"},
    "pixels, partial cross-attention": {
        "target": {"kind": "pixels", "taps": {0: 2}, "normalise": "patch"},
        "decoder.attention": "cross",
        "decoder.predict": 0.5,
    },
    "hog, blocks, learned weights": {
        "target": {"kind": "hog", "taps": {2: 1, 3: 2, 4: 2}, "normalise": "patch", "weighting": "learned"},
        "mask": {"kind": "block", "unit": 16, "ratio": 0.5},
    },
    "fourier, of corrupted images": {
        "target": {"kind": "fourier", "taps": {0: 2}},
        "mask": {"kind": "frequency", "radius": 8},
        "decoder.depth": 0,
    },
    "wavelet, energy masks, from coarse to fine": {
        "mask": {"kind": "energy", "strength": -1.0},
        "target.weighting": "coarse_to_fine",
    },
    "pixels, SimMIM": {
        "target": {"kind": "pixels", "taps": {0: 2}, "loss": "l1"},
        "mask": {"kind": "block", "unit": 16},
        "encoder.sees": "masked",
        "decoder.depth": 0,
    },
    "wavelet, an average of weights, in parts": {
        "train.ema": 0.9,
        "train.accumulate": 3,
        "train.recompute": True,
        "train.clip_grad": None,
    },
    "wavelet, Muon, three masks in parts": {
        "train.optimizer": "muon",
        "mask": {"count": 3, "ratio": 0.75},
        "train.accumulate": 2,
        "decoder.predict": 0.5,
    },
    "wavelet, drop path": {"encoder.options": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2}},
    "a hierarchy, shared decoder": {
        "encoder": {"name": "resnet10t", "image_size": 64},
        "target": {"taps": {2: 1, 3: 2, 4: 4}},
        "mask": {"kind": "random", "unit": 16},
        "decoder.shared": True,
    },
}


@pytest.mark.parametrize("kind", HARNESS)
def test_resuming_is_exact_for_every_target_mask_and_encoder(shards, tmp_path, kind):
    changes = dict(HARNESS[kind])
    base = load("small").dump()
    for section in ("target", "mask", "encoder"):  # whole sections: what they do not name has its default
        if section in changes:
            base[section] = changes.pop(section)
    settings = {key: value for key, value in SETTINGS.items() if key.partition(".")[0] not in HARNESS[kind]}
    recipe = with_overrides(validate(base), {**settings, "train.epochs": 1.5, **changes})

    def go(resume=None):
        logged = {}
        trained = train(
            recipe,
            shards,
            device=torch.device("cpu"),
            resume=resume,
            on_log=lambda metrics, images: logged.update({images: metrics}),
            on_checkpoint=lambda write, state: write(
                tmp_path / ("again" if resume else "first") / str(state["images"])
            ),
        )
        return trained.model.state_dict(), logged

    whole, logged = go()
    again, resumed = go(tmp_path / "first" / "20")
    files = [checkpoint.read_state(tmp_path / call / "60")["files"] for call in ("first", "again")]
    assert files[0] == files[1]  # their checksums: weights, moments, averages
    assert (checkpoint.AVERAGED in files[0]) == (recipe.train.ema is not None)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    levels = recipe.target.taps
    assert {f"train/loss_level{level}" for level in levels} | {f"train/weight_level{level}" for level in levels} <= set(
        logged[60]
    )
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))).all() for metrics in logged.values())
    kept = {name: value for name, value in resumed[60].items() if not name.startswith(("perf/", "cost/"))}
    assert kept == {name: value for name, value in logged[60].items() if not name.startswith(("perf/", "cost/"))}


def test_a_set_smaller_than_a_batch_trains(shards):
    trained, _ = run(shards, **{"train.batch": 512})
    assert trained.position.step == 3
    assert trained.position.images == 120


@pytest.mark.parametrize(
    ("rows", "workers", "batch", "expected"),
    [
        (100, 1, 32, (32, 4)),
        (100, 2, 512, (100, 1)),
        (19, 2, 64, (18, 2)),
        (3, 2, 64, (2, 2)),
        (64, 2, 64, (64, 1)),
        (99, 3, 32, (32, 4)),
    ],
)
def test_plan_follows_the_size_of_the_set(rows, workers, batch, expected):
    recipe = with_overrides(load("small"), {"train.batch": batch, "train.workers": workers})
    plan = TrainSchedule.of(recipe, rows)
    assert (plan.batch, plan.batches_per_epoch) == expected


def test_more_workers_than_images_is_named():
    with pytest.raises(SettingError, match=r"train\.workers=2: the train split has 1 images; use at most 1"):
        TrainSchedule.of(load("small"), 1)


@contextlib.contextmanager
def without_gradients(bad):
    """The gradients of these steps, counted from 0, are not finite."""
    real = PretrainTask.step

    def step(self, batch, *, epoch, step):
        if step in bad:
            batch.weight = torch.full_like(batch.weight, float("nan"))
        return real(self, batch, epoch=epoch, step=step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTask, "step", step)
        yield


def test_a_short_run_that_diverges_fails(shards, tmp_path):
    """Its 12 steps are fewer than train.max_skipped; the first one, of that learning rate, spoils the weights."""
    with pytest.raises(
        DivergedError, match=r"11 steps in a row were skipped, up to step 12: .* try a smaller train\.lr"
    ):
        run(shards, tmp_path, **{"train.lr": 1e30, "train.warmup_epochs": 0})
    assert not (tmp_path / "images-120").exists()  # nothing says that it has ended


def test_resuming_does_not_begin_to_count_skipped_steps_again(shards, tmp_path):
    with without_gradients(range(5, 12)), pytest.raises(DivergedError, match="7 steps in a row were skipped"):
        run(shards, tmp_path, **{"train.log_every": 5, "train.checkpoint_every": 0.25})
    assert checkpoint.read_state(tmp_path / "images-50")["skipped_in_a_row"] == 0
    for images, before in ((80, 3), (100, 5), (110, 6)):
        state = checkpoint.read_state(tmp_path / f"images-{images}")
        assert (state["skipped"], state["skipped_in_a_row"]) == (before, before)
        with without_gradients(range(5, 12)), pytest.raises(DivergedError, match="7 steps in a row were skipped"):
            run(shards, resume=tmp_path / f"images-{images}")
    with without_gradients({8, 9}), pytest.raises(DivergedError, match="5 steps in a row were skipped, up to step 10"):
        run(shards, resume=tmp_path / "images-80", **{"train.max_skipped": 4})
    resumed, _ = run(shards, resume=tmp_path / "images-100")  # half of its steps were skipped, the last ones were not
    assert (resumed.position.skipped, resumed.position.skipped_in_a_row) == (5, 0)


def test_skipped_steps_of_a_run_that_succeeds_are_a_warning(shards, tmp_path):
    """No more than half of the steps: the last ones, and one before them."""
    recipe = with_overrides(load(TWO_LEVELS), SETTINGS | {"out": str(tmp_path), "shards": str(shards.folder)})
    stage = recipe.stage_dir("pretrain")
    with without_gradients({2, *range(6, 12)}):
        trained, logged = run(shards, stage)
    assert trained.position.skipped == logged[120]["train/skipped_steps"] == 7
    folder = SimpleNamespace(path=stage)
    tracker = SimpleNamespace(artifact=lambda path: None, run_id=lambda: "none")
    result = {**pretrain._result(recipe, shards, folder, tracker), "state": "new"}
    said = pretrain.summary(recipe, result).splitlines()
    assert said[0].startswith("pretrain: 120 images seen → ")
    assert said[1:] == ["pretrain: warning: 7 of 12 steps were skipped: their loss or gradients were not finite"]
    assert len(pretrain.summary(recipe, {**result, "skipped": 0}).splitlines()) == 1
