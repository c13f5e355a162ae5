"""What a run has cost: against counts by hand, torch's counter and the files' footers; attempts add up."""

import itertools
import json

import cloudpickle
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from tiny_shards import photos, write_set
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.load import load, with_overrides
from pipeline.runtime.usage import Meter, Spent, TaskMeter, measuring_tasks, spent_in
from pipeline.shards.batches import split_bytes
from pipeline.storage.folder import Folder
from pipeline.storage.jsonl import JsonLines
from pipeline.storage.mirror import Mirror
from pipeline.training.pretrain_loop import train
from wavemim.flops import cost_of, forward_flops
from wavemim.weights import checkpoint

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {3: 1, 4: 2},
    "target.weights": {},
    "train.epochs": 2,
    "train.batch": 16,  # of 40 images: the last batch of an epoch has 8, and is filled up
    "train.workers": 1,
    "train.warmup_epochs": 0.5,
    "train.log_every": 2,
    "train.checkpoint_every": 1,
    "cluster.cpus_per_worker": 2,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "shards", photos(60))


def run(shards, folder, resume=None, end_at=None, spent=None, epochs=2, masks=1):
    """Train, log as a stage does, save at each epoch's end; fall over at `end_at` images."""
    lines = JsonLines(folder / "metrics.jsonl")

    def log(metrics, images):
        lines.append({"step": images, "time": 0.0, "metrics": metrics})
        if images == end_at:
            raise KeyboardInterrupt

    recipe = with_overrides(load("small"), {**SETTINGS, "train.epochs": epochs, "mask.count": masks})
    save = {"on_checkpoint": lambda write, state: write(folder / f"images-{state['images']}")}
    train(recipe, shards, device=torch.device("cpu"), resume=resume, on_log=log, spent=spent, **save)
    return spent_in(folder)


def block(tokens, width):
    return 2 * tokens * 12 * width**2 + 2 * 2 * tokens * tokens * width


def image_by_hand():
    """64 patches of 8 × 8 × 3 values, 16 of them and a class token seen; two decoders and their linear heads."""
    encoder = 2 * 64 * 192 * 32 + 2 * block(17, 32)
    heads = 2 * 16 * (64 * 9 + 16 * 12)  # three bands of a cell a patch; four of a cell for four patches
    return encoder + 2 * (2 * 17 * 32 * 16 + block(65, 16)) + heads


def stored(shards, split, groups=None):
    """Bytes of the columns that are read, by the footers."""
    total = 0
    for name, _ in shards.files(split):
        footer = pq.ParquetFile(shards.folder.local / name).metadata
        for group in groups or range(footer.num_row_groups):
            chunks = [footer.row_group(group).column(i) for i in range(footer.num_columns)]
            total += sum(c.total_compressed_size for c in chunks if c.path_in_schema not in ("path", "pixels"))
    return total


def test_training_counts_images_arithmetic_and_bytes(shards, tmp_path):
    spent = run(shards, tmp_path)
    assert spent.images_seen == 80
    assert spent.flops == 3 * image_by_hand() * 2 * 3 * 16  # what fills up a batch is computed too
    assert spent.bytes_read == 2 * stored(shards, "train")
    assert 0 < stored(shards, "train") < sum(entry["bytes"] for entry in shards.entries())
    assert spent.worker_hours == pytest.approx(2 * spent.wall_clock_s / 3600)
    assert spent.gpu_hours == spent.gpu_peak_memory_bytes == 0
    assert 50e6 < spent.peak_memory_bytes < 100e9


def test_each_mask_costs_arithmetic_but_no_reading(shards, tmp_path):
    spent = run(shards, tmp_path, masks=2)
    assert spent.images_seen == 80
    assert spent.flops == 2 * 3 * image_by_hand() * 2 * 3 * 16
    assert spent.bytes_read == 2 * stored(shards, "train")


def test_costs_only_grow_in_training(shards, tmp_path):
    run(shards, tmp_path)
    costs = [Spent.of(entry["metrics"]) for entry, _ in JsonLines(tmp_path / "metrics.jsonl").read()]
    assert len(costs) == 3
    for before, after in itertools.pairwise(costs):
        for name, value in before.record().items():
            assert after.record()[name] >= value, name
        assert after.wall_clock_s > before.wall_clock_s


def test_a_killed_attempt_is_paid_too(shards, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path, end_at=56)  # 40 images, then a batch of the second epoch
    killed = spent_in(tmp_path)
    assert killed.images_seen == 56
    spent = run(shards, tmp_path, resume=tmp_path / "images-40", spent=killed)
    assert spent.images_seen == 56 + 40
    assert spent.flops == 3 * image_by_hand() * 16 * (4 + 3)
    assert spent.bytes_read == killed.bytes_read + stored(shards, "train")
    assert spent.wall_clock_s > killed.wall_clock_s
    assert spent.worker_hours == pytest.approx(2 * spent.wall_clock_s / 3600)


def test_without_its_metrics_a_run_goes_on_from_what_the_checkpoint_cost(shards, tmp_path):
    run(shards, tmp_path, epochs=1)
    state = checkpoint.read_state(tmp_path / "images-40")
    assert state["cost"]["images_seen"] == 40
    (tmp_path / "elsewhere").mkdir()
    spent = run(shards, tmp_path / "elsewhere", resume=tmp_path / "images-40")
    assert spent.images_seen == 80
    assert spent.bytes_read == 2 * stored(shards, "train")
    assert spent.wall_clock_s > state["cost"]["wall_clock_s"] > 0


@pytest.mark.parametrize("masks", [1, 3])
def test_the_step_does_what_is_counted(masks):
    """torch's counter sees a little less: nothing asks for the gradient of the images."""
    images = tiny.photos(4)
    step = tiny.make_step(images, masks=masks)
    rows, weight = torch.arange(4), torch.ones(4)
    counted = 4 * cost_of(step.model, masks).training_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(tiny.stored(images), rows, weight, 4.0, epoch=0, step=0)
    assert 0.93 * counted < counter.get_total_flops() <= counted


def test_any_model_of_images_is_counted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
    assert forward_flops(model, 3, 6) == 2 * 36 * 8 * 27 + 2 * 8 * 36 * 5


def test_evaluation_reads_whole_row_groups(shards):
    assert split_bytes(shards, "val") == stored(shards, "val")
    assert split_bytes(shards, "train", 1) == split_bytes(shards, "train", 4) == stored(shards, "train", [0])
    assert split_bytes(shards, "train", 5) == stored(shards, "train", [0, 5])  # of ten, far apart
    assert split_bytes(shards, "val", finest=3) < stored(shards, "val")


def test_records_come_back_as_they_were():
    spent = Spent(80, 1.5, 0.25, 0.5, 10**15, 2**30, 2**31, 12345)
    assert Spent.of(spent.metrics()) == Spent.of(json.loads(json.dumps(spent.record()))) == spent
    assert Spent.of(None) == Spent.of({"images_seen": "nan", "other": 1}) == Spent()
    assert str(spent) == (
        "80 images seen, 2 s, 0.25 worker-hours, 0.5 GPU-hours, 1 PFLOP, 1 GiB per worker at most, 2 GiB per GPU at most, "
        "12.1 KiB read"
    )
    assert spent + Spent(peak_memory_bytes=1, bytes_read=1) == Spent(80, 1.5, 0.25, 0.5, 10**15, 2**30, 2**31, 12346)


@pytest.mark.parametrize("after", [0, 30_000])
def test_the_last_record_is_found_behind_other_lines(tmp_path, after):
    first = json.dumps({"step": 1, "metrics": Spent(images_seen=1, wall_clock_s=1.0).metrics()})
    last = json.dumps({"step": 2, "metrics": {"train/loss": 1.0, **Spent(images_seen=7, wall_clock_s=2.0).metrics()}})
    other = '{"step": 3, "metrics": {"system/cpu_utilization_percentage": 1.0}}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{first}\n{last}\n{other * after}{{"step": 4, "metr')
    assert spent_in(tmp_path) == Spent(images_seen=7, wall_clock_s=2.0)
    assert spent_in(tmp_path / "none") == Spent()


def test_tasks_leave_what_they_spent(tmp_path):
    meter = TaskMeter(tmp_path)
    task = cloudpickle.loads(cloudpickle.dumps(meter.around(divmod, cores=2.0)))  # as Ray hands it over
    assert task(7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        task(1, 0)
    lines = [Spent.of(line) for line, _ in JsonLines(tmp_path / ".costs.jsonl").read()]
    assert len(lines) == 2
    assert all(line.worker_hours == pytest.approx(2 * line.wall_clock_s / 3600) for line in lines)
    meter.add(images=3, flops=5, bytes_read=8)
    spent = meter.read()
    assert (spent.images_seen, spent.flops, spent.bytes_read) == (3, 5, 8)
    assert spent.worker_hours == sum(line.worker_hours for line in lines) > 0
    assert spent.peak_memory_bytes == max(line.peak_memory_bytes for line in lines)
    assert TaskMeter(tmp_path).read().worker_hours == 0  # those of earlier attempts are in the metrics


def test_tasks_on_other_machines_leave_what_they_spent_in_the_store(tmp_path):
    home, here = Folder.at(tmp_path / "home"), tmp_path / "here"
    mirror = Mirror(home, here)
    mirror.pull()
    home.write(".costs/of-an-earlier-attempt.json", json.dumps(Spent(images_seen=9).record()).encode())
    meter = TaskMeter(here, mirror=mirror)
    task = meter.around(divmod, cores=2.0)
    task(7, 2)
    assert home.sub(".costs").names() == ["of-an-earlier-attempt.json"]
    one = meter.read().worker_hours
    here.rename(tmp_path / "gone")  # as on another machine, where there is none, or one of an earlier run
    task(7, 2)
    (here / "x").mkdir(parents=True)
    task(7, 2)
    (here / "x").rmdir()
    here.rmdir()
    (tmp_path / "gone").rename(here)
    assert len(home.sub(".costs").names()) == 3
    assert meter.read().worker_hours > one > 0
    assert meter.read().images_seen == 0 and meter.read().worker_hours == meter.read().worker_hours


def test_a_stage_that_fails_has_logged_its_cost_and_goes_on_from_it(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")

    def log(metrics, step):
        lines.append({"step": step, "metrics": metrics})

    def attempt():
        with measuring_tasks(tmp_path, log, 5) as meter:
            meter.add(images=10)
            meter.around(len)("ab")
            raise RuntimeError

    for number in (1, 2):
        with pytest.raises(RuntimeError):
            attempt()
        assert spent_in(tmp_path).images_seen == 10 * number
    assert len(list(lines.read())) == 2
    tasks = [Spent.of(line).worker_hours for line, _ in JsonLines(tmp_path / ".costs.jsonl").read()]
    assert spent_in(tmp_path).worker_hours == pytest.approx(sum(tasks))


def test_a_meter_holds_what_it_is_given():
    meter = Meter(cores=3.0, gpus=2.0, before=Spent(gpu_hours=1.0, wall_clock_s=10.0))
    meter.take(Spent(images_seen=4, wall_clock_s=100.0, worker_hours=0.5))
    spent = meter.read()
    seconds = spent.wall_clock_s - 10
    assert 0 < seconds < 60
    assert spent.worker_hours == pytest.approx(0.5 + 3 * seconds / 3600)
    assert spent.gpu_hours == pytest.approx(1 + 2 * seconds / 3600)
