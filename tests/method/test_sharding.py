"""Workers that shard the model (FSDP), and other numbers of workers: against plain data parallel, without Ray."""

import contextlib
import multiprocessing
import os
import queue
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loss_equality.cases import TWO_LEVELS
from tiny_shards import photos, write_set
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.load import load, with_overrides
from pipeline.shards.shard_set import ShardSet
from pipeline.training.pretrain_loop import train
from wavemim import sharding
from wavemim.encoders.factory import make_encoder
from wavemim.weights import checkpoint

SETTINGS = {
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "decoder.width": 16,
    "decoder.heads": 2,
    "target.taps": {2: 1, 3: 2, 4: 2},
    "target.weighting": "learned",
    "train.epochs": 2,
    "train.batch": 8,
    "train.warmup_epochs": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 0.5,
    "train.accumulate": 2,
    "train.recompute": True,
    "train.clip_grad": 0.5,
    "train.ema": 0.9,
}


def go(url, folder, rank=0, world=1, resume=None, **changes):
    """Train as one of `world` workers; what each step logged, and how many values this worker holds."""
    folder.mkdir(exist_ok=True)
    logged, held = {}, {}

    def keep(saver, state):
        if rank == 0:
            saver(folder / str(state["images"]))
        else:
            saver.take_part()
        moments = [value for state in saver.optimizer.state.values() for value in state.values()]
        for name, tensors in (("model", saver.model.parameters()), ("moments", moments)):
            held[name] = sum(sharding.local(tensor).numel() for tensor in tensors)

    train(
        with_overrides(load(TWO_LEVELS), {**SETTINGS, "train.workers": world, **changes}),
        ShardSet.open(url),
        device=torch.device("cpu"),
        rank=rank,
        world=world,
        wrap=DistributedDataParallel if world > 1 else None,
        resume=resume,
        on_log=lambda metrics, images: logged.update({images: metrics}),
        on_checkpoint=keep,
    )
    return logged, held


def worker(rank, ports, url, folder, results):
    """Ranks 0 and 1 train together, both ways and across; then all three go on from there."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    found = {}
    for world, port in zip((2, 3), ports, strict=True):
        if rank >= world:
            continue
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        if world == 2:
            for way in ("ddp", "fsdp"):
                found[way] = go(url, folder / way, rank, 2, **{"train.parallel": way})
            for way, other in (("ddp", "fsdp"), ("fsdp", "ddp")):  # in the middle of an epoch
                found[f"{way} after {other}"] = go(
                    url, folder / f"{way} after {other}", rank, 2, folder / other / "16", **{"train.parallel": way}
                )
                growing = {
                    "train.parallel": way,
                    "encoder.positions": "learned",
                    "train.progressive": {32: 0.5, 64: 0.5},
                }
                found[f"{way} growing"] = go(url, folder / f"{way} growing", rank, 2, **growing)
        else:
            found["three after two"] = go(url, folder / "three after two", rank, 3, folder / "ddp" / "16")
        dist.destroy_process_group()
    results.put((rank, found))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """({way: (logged, held)} of each rank, the folder with the checkpoints, the shard set)."""
    folder = tmp_path_factory.mktemp("sharding")
    url = write_set(folder / "set", photos(60)).folder.url  # 40 to train on: 5 steps an epoch
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, ports, url, folder, results)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        found, ends = {}, time.monotonic() + 300
        while len(found) < len(processes):
            with contextlib.suppress(queue.Empty):
                found.update([results.get(timeout=1)])
            assert not any(process.exitcode for process in processes), "a worker failed; see its traceback"
            assert time.monotonic() < ends, sorted(found)
        for process in processes:
            process.join(20)
    finally:
        for process in processes:
            process.kill()
    return found, folder, url


def values(path: Path, file: str = checkpoint.MODEL) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / file)


def agree(folder, other, logged, expected, rel=1e-5):
    """The same steps, losses and norms; the same weights, moments and averages under the same names at the end."""
    assert set(logged) <= set(expected) and len(logged) > 5
    for images, metrics in logged.items():
        for name, value in metrics.items():
            if not name.startswith(("perf/", "cost/")):
                assert value == pytest.approx(expected[images][name], rel=rel, abs=1e-9), (images, name)
    for file in (checkpoint.MODEL, checkpoint.AVERAGED, checkpoint.OPTIMIZER):
        first, second = values(folder / "80", file), values(other / "80", file)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], atol=2e-5, rtol=1e-4, msg=name)


def test_a_sharded_model_trains_as_one_that_every_worker_holds(trained):
    found, folder, _ = trained
    agree(folder / "fsdp", folder / "ddp", found[0]["fsdp"][0], found[0]["ddp"][0])


def test_each_worker_holds_half(trained):
    found, _, _ = trained
    for kind, total in found[0]["ddp"][1].items():
        parts = [found[rank]["fsdp"][1][kind] for rank in range(2)]
        assert sum(parts) == pytest.approx(total, rel=0.01)  # steps are counted by both
        assert max(parts) < 0.6 * total, kind  # what has a first dimension of 1, such as positions, is with one of them


@pytest.mark.parametrize("way", ["ddp after fsdp", "fsdp after ddp"])
def test_a_run_goes_on_the_other_way(trained, way):
    found, folder, _ = trained
    assert min(found[0][way][0]) == 24
    agree(folder / way, folder / "ddp", found[0][way][0], found[0]["ddp"][0])


def test_the_model_is_handed_over_from_one_image_size_to_the_next(trained):
    """Learned positions are resampled, and begin without moments."""
    found, folder, _ = trained
    logged, _ = found[0]["fsdp growing"]
    assert [metrics["train/image_size"] for metrics in logged.values()] == 5 * [32.0] + 5 * [64.0]
    agree(folder / "fsdp growing", folder / "ddp growing", logged, found[0]["ddp growing"][0])


def test_one_worker_goes_on_from_what_two_shared(trained):
    found, folder, url = trained
    logged, _ = go(url, folder / "one", resume=folder / "fsdp" / "16", **{"train.parallel": "fsdp"})
    agree(folder / "one", folder / "ddp", logged, found[0]["ddp"][0])


def test_three_workers_share_a_batch_of_eight(trained):
    found, folder, _ = trained
    agree(folder / "three after two", folder / "ddp", found[0]["three after two"][0], found[0]["ddp"][0])


def test_blocks_of_encoders():
    for name, kind, count in [
        ("vit_tiny_patch16_224", "Block", 12),
        ("convnext_atto", "ConvNeXtBlock", 12),
        ("swin_tiny_patch4_window7_224", "SwinTransformerBlock", 12),
    ]:
        with torch.device("meta"):
            encoder = make_encoder(name, image_size=224)
        blocks = list(sharding.blocks(encoder))
        assert [type(block).__name__ for block in blocks] == [kind] * count
        inside = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        assert inside > 0.9 * sum(parameter.numel() for parameter in encoder.parameters())


class Small(torch.nn.Module):
    """Two blocks, and a norm with buffers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_a_snapshot_is_independent_of_further_training(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = Small()
        sharding.shard(model, torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        saver = checkpoint.Saver(model, optimizer)
        assert saver.snapshot().tensors[checkpoint.OPTIMIZER] == {} and not optimizer.state  # no step was made for it
        for number in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 0:
                taken = saver.snapshot().tensors
                before = {(file, name): value.clone() for file in taken for name, value in taken[file].items()}
        assert len(before) == 9 + 6 * 3
        assert all(torch.equal(taken[file][name], value) for (file, name), value in before.items())
        for name, value in saver.snapshot().tensors[checkpoint.MODEL].items():
            assert not torch.equal(value, before[checkpoint.MODEL, name]), name
    finally:
        dist.destroy_process_group()
