"""Fine-tuning by the common loop: what it measures, and what it does when it is interrupted, hangs, diverges or cannot read."""

import json
import logging
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_finetune import coloured_set, recipe_for, tuned
from tiny_shards import LAYOUT, photos, write_set
from torch.nn.parallel import DistributedDataParallel

from pipeline.checkpoints.find import name_of
from pipeline.checkpoints.uploader import Copier, opened
from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate, with_overrides
from pipeline.config.recipe import identity
from pipeline.errors import SettingError
from pipeline.models.encoder_source import find_encoder
from pipeline.runtime.stage_folder import stage_folder
from pipeline.runtime.usage import Spent
from pipeline.shards import row_groups
from pipeline.shards.errors import UnreadableError
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import ShardSet
from pipeline.stages import finetune
from pipeline.tools.replay_steps import replay
from pipeline.training.divergence import CHECKPOINT, FOLDER, STEPS, DivergedError
from pipeline.training.finetune_loop import TOP1, FinetuneTask, top1_of
from pipeline.training.schedule import FinetuneState
from pipeline.workers import coordination, heartbeat
from pipeline.workers.coordination import CheckpointTimer, Coordinator
from pipeline.workers.heartbeat import EVALUATION, STEP, HangMonitor
from pipeline.workers.stragglers import KEEP_BUFFERS
from pipeline.workers.unreadable import note, still_unreadable
from wavemim.weights import checkpoint

SHORT = {  # 4 steps an epoch, 3 epochs; metrics are logged across the ends of epochs
    **{"finetune.epochs": 3, "finetune.mixup": 0.8, "finetune.cutmix": 1.0, "finetune.erasing": 0.25},
    **{"finetune.ema": 0.9, "finetune.accumulate": 2, "finetune.drop_path": 0.2, "finetune.log_every": 5},
    **{"finetune.eval_every": 1, "finetune.eval_batch": 8},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return coloured_set(tmp_path_factory.mktemp("finetune") / "shards")


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory):
    return recipe_for(shards, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole(recipe, shards):
    """A short run without an interruption: its outcome, and what it logged."""
    logged = []
    done = tuned(with_overrides(recipe, SHORT), shards, on_log=lambda *line: logged.append(line))
    return done, logged


def measured(logged, after=0):
    """What does not depend on the clock or the machine."""
    return [
        (images, {name: value for name, value in metrics.items() if not name.startswith(("perf/", "cost/"))})
        for metrics, images in logged
        if images > after
    ]


def assert_same(done, whole):
    assert {**vars(done.position), "parts": []} == {**vars(whole.position), "parts": []}
    assert torch.equal(done.counts, whole.counts)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(done.model.state_dict()[key], value), key


def test_an_easy_label_is_learnt_and_every_val_row_is_counted_once(recipe, shards):
    logged = []
    done = tuned(recipe, shards, on_log=lambda metrics, images: logged.append((images, metrics)))
    assert done.counts.sum() == shards.rows["val"] == 32
    assert done.counts.sum(1).tolist() == [11, 11, 10] or sorted(done.counts.sum(1).tolist()) == [10, 11, 11]
    assert top1_of(done.counts) > 90  # a third is chance
    assert [line["epoch"] for line in done.position.history] == [5, 10]
    assert done.position.history[-1][TOP1] == top1_of(done.counts)
    assert [images for images, metrics in logged if TOP1 in metrics] == [5 * 64, 10 * 64]
    losses = [metrics["train/loss"] for _, metrics in logged if "train/loss" in metrics]
    assert losses[0] > 0.7 * np.log(3) > losses[-1] / 0.8
    assert {"train/lr", "train/grad_norm", "train/skipped_steps", "perf/data_wait_share", "cost/flops"} <= set(
        logged[0][1]
    )


def test_other_wavelets_give_the_same_pictures_to_learn_from(recipe, tmp_path):
    images = photos(12)
    smooth = write_set(tmp_path / "db2", images, Layout(LAYOUT.image_size, 3, dict.fromkeys(range(1, 5), 0.5), "db2"))
    short = with_overrides(
        recipe, {"finetune.epochs": 2, "finetune.rand_augment": "rand-m5", "finetune.batch": 5, "finetune.workers": 1}
    )
    done = tuned(short, smooth)
    assert done.counts.sum() == 4 and done.position.images == 16


# Interruptions.
class Decisions:
    """Saves after one step, or stops after one."""

    def __init__(self, save=0, stop=0):
        self.step, self.save, self.stop = 0, save, stop

    def after_step(self):
        self.step += 1
        return self.step == self.save, self.step == self.stop


@pytest.mark.parametrize("step", [2, 4, 6, 7])
def test_resuming_from_any_step_equals_no_interruption(recipe, shards, whole, tmp_path, step):
    short, where = with_overrides(recipe, SHORT), tmp_path / "last"
    stopped = tuned(short, shards, coordinator=Decisions(stop=step), on_checkpoint=lambda saver, state: saver(where))
    assert stopped.stopped and stopped.position.step == step and stopped.counts is None
    state = checkpoint.read_state(where)
    assert (state["step"], state["batch"]) == (step, step % 4)
    logged = []
    resumed = tuned(short, shards, resume=where, on_log=lambda *line: logged.append(line))
    assert_same(resumed, whole[0])
    assert measured(logged) == measured(whole[1], after=16 * step)
    costs = [Spent.of(metrics).images_seen for metrics, _ in logged if "cost/images_seen" in metrics]
    assert costs[-1] == 3 * 64  # of both attempts


def test_resuming_is_exact_with_rand_augment_in_threads(recipe, shards, tmp_path):
    changes = {**SHORT, "finetune.epochs": 2, "finetune.rand_augment": "rand-m9-mstd0.5-inc1"}
    short = with_overrides(recipe, changes)

    def keep(saver, state):
        saver(tmp_path / str(state["step"]))

    whole = tuned(short, shards, threads=4, coordinator=Decisions(save=3), on_checkpoint=keep)
    assert_same(tuned(short, shards, threads=1, resume=tmp_path / "3"), whole)


def test_checkpoints_are_taken_by_time_in_the_middle_of_epochs(recipe, shards, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(coordination, "INTERVAL", 0.0)
    now, taken = [0.0], []
    timer = CheckpointTimer(1, clock=lambda: now[0])

    def work(activity):
        now[0] += 25 * (activity == STEP)  # seconds a step

    def on_checkpoint(saver, state):
        timer.reset()
        saver(tmp_path / name_of(state["images"]))
        taken.append(state["step"])

    coordinator = Coordinator(0, 1, stop=lambda: False, save=timer)
    short = with_overrides(recipe, SHORT)
    done = tuned(short, shards, coordinator=coordinator, on_checkpoint=on_checkpoint, heartbeat=work)
    assert taken == [3, 4, 7, 8, 11, 12]  # a minute after the last one, and after each epoch
    assert_same(done, whole[0])
    assert_same(tuned(short, shards, resume=tmp_path / name_of(16 * 7)), whole[0])


def test_a_run_whose_folder_is_lost_resumes_from_the_second_place(recipe, shards, whole, tmp_path):
    places = {"out": str(tmp_path / "out"), "train.checkpoints_at": str(tmp_path / "copies")}
    short = with_overrides(recipe, {**SHORT, **places})
    same = {**identity(short, "finetune"), "shards": shards.fingerprint}

    class Lost(Exception):
        pass

    def go(stop=None):
        with stage_folder(short.stage_dir("finetune"), same) as stage, opened(short, same, stage) as store:
            uploader = Copier(store, stage.path, keep=2, best=False)
            keeper = Keeper(stage.path, keep=2, uploader=uploader)

            def on_checkpoint(saver, state):
                keeper.save(saver)
                assert keeper.finish() == keeper.uncopied == ""
                if state["step"] == stop:
                    raise Lost

            resume = checkpoint.latest(stage.path)
            coordinator = Decisions(save=6)
            return resume, tuned(short, shards, resume=resume, coordinator=coordinator, on_checkpoint=on_checkpoint)

    with pytest.raises(Lost):
        go(stop=6)
    shutil.rmtree(short.out)
    assert (tmp_path / "copies" / short.name / "finetune" / name_of(16 * 6)).is_dir()
    resume, done = go()
    assert resume.name == name_of(16 * 6)
    assert_same(done, whole[0])


# Run as a process: fine-tunes with a heartbeat and checkpoints, and hangs at the start of step 6 unless the file is there.
WORKER = """
import json, sys, time
from pathlib import Path
from tiny_finetune import tuned
from pipeline.checkpoints.writer import Keeper
from pipeline.config.load import validate
from pipeline.shards.shard_set import ShardSet
from pipeline.training.finetune_loop import FinetuneTask
from pipeline.workers.heartbeat import Heartbeat
from wavemim.weights import checkpoint

folder, recipe = Path(sys.argv[1]), validate(json.loads(Path(sys.argv[2]).read_text()))
hung, step = folder / "hung", FinetuneTask.step

def hanging(self, batch, *, epoch, step: int, do=step):
    if step == 6 and not hung.exists():
        hung.touch()
        time.sleep(1000)
    return do(self, batch, epoch=epoch, step=step)

FinetuneTask.step = hanging
keeper = Keeper(folder, keep=2)
with Heartbeat(folder, 0, float(sys.argv[3])) as heartbeat:
    tuned(
        recipe, ShardSet.open(recipe.shards_at), resume=checkpoint.latest(folder), heartbeat=heartbeat,
        on_checkpoint=lambda saver, state: keeper.save(saver),
    )
    assert keeper.finish() == ""
"""


def test_a_run_that_hangs_is_ended_and_resumes(recipe, shards, whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "LEAST_START", 30.0)
    limit, stage = 5.0, tmp_path / "stage"
    stage.mkdir()
    settings = tmp_path / "recipe.json"
    settings.write_text(json.dumps(with_overrides(recipe, SHORT).dump()))
    paths = {"PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])}

    def start():
        command = [sys.executable, "-c", WORKER, str(stage), str(settings), str(limit)]
        return subprocess.Popen(command, env={**os.environ, **paths}, stderr=subprocess.PIPE, text=True)

    process, ended = start(), []
    monitor = HangMonitor(stage, limit, lambda worker: ended.append(worker) or process.kill() or True)
    ends = time.monotonic() + 200
    with caplog.at_level(logging.WARNING):
        while process.poll() is None and time.monotonic() < ends:
            time.sleep(monitor.interval)
            monitor.look()
    assert len(ended) == 1 and ended[0].pid == process.pid, process.communicate()
    assert (
        "waiting for its own computation" in caplog.text and "training resumes from the last checkpoint" in caplog.text
    )
    assert [images for images, _ in checkpoint.seen(stage)] == [64]
    again = start()
    _, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    last = checkpoint.latest(stage)
    assert last.name == name_of(3 * 64) and checkpoint.read_state(last)["history"] == whole[0].position.history
    assert_same(tuned(with_overrides(recipe, SHORT), shards, resume=last), whole[0])


# Two workers.
def one_of_two(rank, port, settings, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    recipe, activities = validate(settings), []
    coordination.INTERVAL = 0.0  # decide after every step

    def on_checkpoint(saver, state):
        if rank == 0:
            saver(folder / str(state["step"]))
        else:
            saver.take_part()

    done = tuned(
        recipe,
        ShardSet.open(recipe.shards_at),
        rank=rank,
        world=2,
        wrap=lambda model: DistributedDataParallel(model, **KEEP_BUFFERS),
        coordinator=Coordinator(rank, 2, stop=lambda: False, save=lambda: True),
        on_checkpoint=on_checkpoint,
        heartbeat=activities.append,
    )
    total = sum(float(value.double().sum()) for value in done.model.state_dict().values())
    content = {"activities": activities, "total": total, "counts": done.counts.tolist()}
    (folder / f"{rank}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


@pytest.mark.timeout(300)
def test_two_workers_report_equally_and_fewer_take_over(recipe, tmp_path, monkeypatch):
    """33 val images in batches of 8 are three batches for one worker and two for the other."""
    shards = write_set(tmp_path / "set", photos(99))
    changes = {**SHORT, "shards": shards.url, "finetune.workers": 2, "finetune.batch": 22, "cluster.min_workers": 1}
    two = with_overrides(recipe, changes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, port, two.dump(), tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["activities"].count(EVALUATION) == 3 * 3 and np.sum(first["counts"]) == 33
    middle = tmp_path / "5"  # of 3 steps an epoch
    assert checkpoint.read_state(middle)["batch"] == 2
    batches, real = [], FinetuneTask.step
    monkeypatch.setattr(
        FinetuneTask, "step", lambda self, batch, **at: batches.append(batch) or real(self, batch, **at)
    )
    alone = tuned(two, shards, resume=middle)  # elastic: with the batches of two, all of them
    assert (alone.position.streams, alone.position.step, alone.position.images) == (2, 9, 3 * 66)
    assert [int(batch.weight.sum()) for batch in batches] == [22] * 4
    anew = tuned(with_overrides(two, {"finetune.epochs": 1.4}), shards)  # begun by one of the two that were wanted
    assert anew.position.streams == 2


# Failures.
def test_a_shard_that_cannot_be_read_ends_the_run_until_it_is_back(recipe, shards, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "PAUSES", (0.01,))
    copy = tmp_path / "set"
    shutil.copytree(shards.url, copy)
    opened_set, away, stage = ShardSet.open(copy), tmp_path / "away", tmp_path / "stage"
    stage.mkdir()
    short = with_overrides(recipe, {**SHORT, "shards": str(copy)})

    def go(**options):
        return tuned(
            short, opened_set, on_checkpoint=lambda saver, state: saver(stage / name_of(state["images"])), **options
        )

    for split in ("train", "val"):  # of which val is first read after the first epoch
        file = copy / f"{split}-00000.parquet"
        file.rename(away)
        with pytest.raises(UnreadableError, match=rf"{file.name} is missing") as caught:
            go()
        note(stage, caught.value)
        assert "restore the file and run the same command again" in still_unreadable(stage, str(copy))
        away.rename(file)
        assert still_unreadable(stage, str(copy)) == ""
    assert checkpoint.latest(stage) is None

    real, calls = FinetuneTask.evaluate, iter(range(10))

    def evaluate(self):
        if next(calls) == 1:  # after the second epoch: there is a checkpoint of the first
            (copy / "val-00000.parquet").rename(away)
        return real(self)

    monkeypatch.setattr(FinetuneTask, "evaluate", evaluate)
    with pytest.raises(UnreadableError):
        go()
    away.rename(copy / "val-00000.parquet")
    assert checkpoint.latest(stage).name == name_of(64)
    assert_same(go(resume=checkpoint.latest(stage)), whole[0])


@pytest.fixture
def bad(monkeypatch):
    """Steps, counted from 0, that have no finite gradient."""
    real, bad = FinetuneTask.step, set()

    def step(self, batch, *, epoch, step):
        if step in bad:
            batch.pixels = torch.full(batch.pixels.shape, float("nan"))
        return real(self, batch, epoch=epoch, step=step)

    monkeypatch.setattr(FinetuneTask, "step", step)
    return bad


def test_steps_without_a_finite_gradient_are_skipped_and_too_many_end_the_run(recipe, shards, tmp_path, bad):
    bad |= {1, 2, 5}
    few, logged = with_overrides(recipe, {**SHORT, "train.max_skipped": 2}), []
    done = tuned(few, shards, on_log=lambda metrics, images: logged.append(metrics), folder=tmp_path)
    assert done.position.skipped == 3
    assert [line["train/skipped_steps"] for line in logged if "train/skipped_steps" in line] == [2, 3, 3]
    assert all(value.isfinite().all() for value in done.model.state_dict().values())

    bad |= set(range(5, 12))
    with pytest.raises(DivergedError) as caught:
        tuned(few, shards, folder=tmp_path)
    line = str(caught.value)
    assert (
        "3 steps in a row were skipped, up to step 8: the loss is not finite" in line and "smaller finetune.lr" in line
    )
    about = json.loads((tmp_path / FOLDER / STEPS).read_text())
    assert (about["stage"], [step["step"] for step in about["steps"]]) == ("finetune", [6, 7, 8])
    assert checkpoint.read_state(tmp_path / FOLDER / CHECKPOINT)["encoder"]
    with pytest.raises(SettingError, match="steps of finetune; only those of pretraining"):
        replay(str(tmp_path / FOLDER))


def test_a_short_run_that_ends_in_skipped_steps_fails_also_when_it_was_resumed(recipe, shards, tmp_path, bad):
    """7 of its 12 steps, fewer than train.max_skipped."""
    bad |= set(range(5, 12))
    short, states, where = with_overrides(recipe, SHORT), [], tmp_path / "last"
    with pytest.raises(DivergedError, match=r"7 steps in a row were skipped, up to step 12: .*finetune\.lr"):
        tuned(short, shards, on_checkpoint=lambda saver, state: states.append(state) or saver(where))
    assert [(state["step"], state["skipped_in_a_row"]) for state in states] == [(4, 0), (8, 3)]
    with pytest.raises(DivergedError, match="7 steps in a row were skipped, up to step 12"):
        tuned(short, shards, resume=where)


def test_skipped_steps_of_a_run_that_succeeds_are_a_warning(recipe, shards, tmp_path, bad):
    bad |= {1, 2, 5}
    short, stage = with_overrides(recipe, SHORT), tmp_path / "finetune"
    done = tuned(short, shards, on_checkpoint=lambda saver, state: saver(stage / name_of(state["images"])))
    tracker = SimpleNamespace(artifact=lambda *place: None, log=lambda *line: None, run_id=lambda: "none")
    folder, subject = SimpleNamespace(path=stage), find_encoder(short, shards)
    result = finetune._result(short, subject, shards, folder, tracker, done.counts.numpy())
    said = finetune.summary(short, {**result, "state": "new"}).splitlines()
    assert said[2:] == ["finetune: warning: 3 of 12 steps were skipped: their loss or gradients were not finite"]
    del result["skipped"], result["steps"]  # a result of the time before they were noted
    assert finetune.summary(short, {**result, "state": "finished already"}).count("\n") == 1


def test_mixed_row_groups_follow_the_setting_with_which_the_run_began(recipe, shards, tmp_path):
    rows = {}

    def go(name, resume=None, **changes):
        rows[name] = []
        real = FinetuneTask.step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                FinetuneTask,
                "step",
                lambda self, batch, **at: rows[name].append(batch.rows.tolist()) or real(self, batch, **at),
            )
            return tuned(
                with_overrides(recipe, {**SHORT, "finetune.epochs": 2, **changes}),
                shards,
                resume=resume,
                on_checkpoint=lambda saver, state: saver(tmp_path / name / str(state["step"])),
            )

    go("eight")
    go("two", **{"train.mix_groups": 2})
    assert rows["eight"] != rows["two"]
    go("resumed", tmp_path / "two" / "4", **{"train.mix_groups": 8})
    assert rows["resumed"] == rows["two"][4:]

    # a checkpoint of the time before the setting applied
    state = checkpoint.read_state(tmp_path / "eight" / "4")
    old = {key: state[key] for key in ("step", "images", "epoch", "batch", "streams", "skipped", "history")}
    assert FinetuneState.of({**old, "since_removed": 3}) == FinetuneState(**old)
    assert FinetuneState.of(old).mix_groups == 8
