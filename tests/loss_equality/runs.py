"""Runs the cases with the project's own loops and prints what they gave. Started by record.py, in its environment."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import AFTER_TWO, COMMON, FINETUNING, PRETRAINING, PROBE, STEPS, TRAIN_ROWS, TWO_WORKERS, Case
from digests import digests, fingerprint
from tiny_shards import write_set
from torch.nn.parallel import DistributedDataParallel

# All that is imported of the project.
from pipeline.config.load import load, names_of, with_overrides
from pipeline.config.recipe import Recipe
from pipeline.models.encoder_source import find_encoder
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import ShardSet
from pipeline.training.finetune_loop import finetune
from pipeline.training.pretrain_loop import train

Record = dict[str, Any]
LOGGED = ("train/loss", "train/grad_norm", "eval/")  # what names of recorded metrics begin with
CPU = torch.device("cpu")


def narrowed(case: Case) -> Recipe:
    """The case's recipe at CPU size: narrow, shallow, images of at most 64 pixels."""
    recipe = load(case.recipe)
    changes: dict[str, Any] = {"encoder.image_size": min(64, recipe.data.image_size)}
    if recipe.data.image_size > 64:
        changes["data.image_size"] = 96
    if recipe.encoder.name.startswith("vit"):
        blocks = sorted(recipe.target.taps.items())
        changes |= {"encoder.width": 32, "encoder.heads": 2, "encoder.depth": 4}
        changes["target.taps"] = {level: 4 - len(blocks) + i for i, (level, _) in enumerate(blocks, 1)}  # the last ones
    elif recipe.encoder.name.startswith("swin"):
        shape = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2]}
        changes["encoder.options"] = {**recipe.encoder.options, **shape}
    else:
        changes["encoder.options"] = {"dims": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
    if recipe.decoder.depth > 2:
        changes["decoder.depth"] = 2
    if "encoder" in case.settings:
        changes = {key: value for key, value in changes.items() if not key.startswith("encoder.")}
    settings = {**changes, **COMMON, **case.settings}
    first = {key: settings.pop(key) for key in list(settings) if "." not in key}  # whole sections, then what is in them
    plain = {**recipe.dump(), **first}
    return with_overrides(recipe.model_validate(plain), settings)


def textures(count: int, channels: int, side: int) -> np.ndarray:
    """Random images (n, C, side, side) with a photo's smoothness, uint8; in whole numbers, so the same everywhere."""
    generator = np.random.Generator(np.random.PCG64(11))
    total = np.zeros((count, channels, side, side), np.int64)
    for cells, strength in ((4, 90), (16, 45), (32, 24)):
        noise = generator.integers(-strength, strength + 1, (count, channels, cells, cells))
        width = side // cells
        blocks = np.kron(noise, np.ones((1, 1, width, width), np.int64))
        blocks = np.pad(blocks, ((0, 0), (0, 0), *(((0, side - blocks.shape[-1]),) * 2)), mode="edge")
        for axis in (-2, -1):  # a box filter
            sums = np.cumsum(np.concatenate((blocks, blocks), axis), axis)
            blocks = (sums - np.roll(sums, width, axis)).take(range(side, 2 * side), axis) // width
        total += blocks
    total += generator.integers(70, 190, (count, channels, 1, 1))
    return np.clip(total, 0, 255).astype(np.uint8)


class Runs:
    """Runs cases in a folder of its own; shard sets and encoders are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sets: dict[str, str] = {}

    def shards(self, recipe: Recipe) -> ShardSet:
        """Images as the recipe stores them."""
        data = recipe.data
        layout = Layout(data.image_size, data.channels, recipe.steps_by_level(), data.wavelet)
        place = self.folder / f"set{hashlib.sha256(repr(layout).encode()).hexdigest()[:8]}"
        if not place.is_dir():
            write_set(place, textures(TRAIN_ROWS * 3 // 2, data.channels, data.image_size), layout)
        return ShardSet.open(place)

    def pretraining(
        self, case: Case, name: str, *, rank: int = 0, world: int = 1, resume: Path | None = None
    ) -> Record:
        """A run by the loop, and its second half once more from a checkpoint where the case says so."""
        recipe = narrowed(case)
        shards = self.shards(recipe)

        def go(folder: Path, resume: Path | None, log: Callable[[dict[str, float], int], None]) -> None:
            def keep(saver: Any, state: dict[str, Any]) -> None:
                if rank == 0:
                    saver(folder / str(state["step"]))
                else:
                    saver.take_part()

            train(
                recipe,
                shards,
                device=CPU,
                rank=rank,
                world=world,
                wrap=DistributedDataParallel if world > 1 else None,
                threads=1,
                resume=resume,
                on_log=log,
                on_checkpoint=keep,
            )

        return self._recorded(go, name, case.resume, resume)

    def finetuning(self, case: Case, name: str) -> Record:
        """As `pretraining`, of the last checkpoint of a recipe that was pretrained before."""
        recipe = narrowed(case)
        assert case.encoder is not None
        recipe = with_overrides(recipe, {"checkpoint": str(self.place(case.encoder) / "first" / str(STEPS))})
        shards = self.shards(recipe)
        subject = find_encoder(recipe, shards)

        def go(folder: Path, resume: Path | None, log: Callable[[dict[str, float], int], None]) -> None:
            finetune(
                recipe,
                subject,
                shards,
                device=CPU,
                threads=1,
                resume=resume,
                on_log=log,
                on_checkpoint=lambda saver, state: saver(folder / str(state["step"])),
            )

        return self._recorded(go, name, case.resume, None)

    def _recorded(self, go: Callable[..., None], name: str, again: int | None, resume: Path | None) -> Record:
        began = time.perf_counter()
        logged: dict[str, list[float]] = {}

        def log(metrics: dict[str, float], images: int) -> None:
            for key, value in metrics.items():
                if key.startswith(LOGGED):
                    logged.setdefault(key, []).append(value)

        folder = self.place(name)
        go(folder / "first", resume, log)
        last = folder / "first" / str(STEPS)
        if again is not None:
            for values in logged.values():
                del values[again * len(values) // STEPS :]
            go(folder / "resumed", folder / "first" / str(again), log)
            last = folder / "resumed" / str(STEPS)
        print(f"{time.perf_counter() - began:5.1f} s  {name}", flush=True)
        return {
            "metrics": {key: " ".join(map(float.hex, values)) for key, values in sorted(logged.items())},
            "sha256": digests(last),
        }

    def place(self, name: str) -> Path:
        """Folder of a case: ``first`` holds the checkpoints of the run, ``resumed`` those of the resumed one."""
        return self.folder / "runs" / name.replace(":", "").replace(" ", "-")


def two_workers(rank: int, folder: Path, wanted: list[str]) -> None:
    """One of two ranks: the cases of `TWO_WORKERS`, written to ``two.json`` by the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found, runs = {}, Runs(folder)
    for name in wanted:
        if rank == 0:
            runs.shards(narrowed(TWO_WORKERS[name]))
        dist.barrier()
        found[name] = runs.pretraining(TWO_WORKERS[name], name, rank=rank, world=2)
    if rank == 0:
        (folder / "two.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_all(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Record]:
    """All cases whose names are wanted."""
    found: dict[str, Record] = {}
    pairs = [name for name in TWO_WORKERS if wanted(name)]
    if pairs:
        # Forked before anything was computed: autograd's and pyarrow's threads do not survive a fork.
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=two_workers, args=(rank, folder, pairs)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a worker failed; see its traceback above")
        found |= json.loads((folder / "two.json").read_text())
    runs = Runs(folder)
    recipes = {name: Case(name) for name in names_of("pipeline", "recipes")}
    for name, case in {**recipes, **PRETRAINING}.items():
        if wanted(name) or any(wanted(tuned) and FINETUNING[tuned].encoder == name for tuned in FINETUNING):
            found[name] = runs.pretraining(case, name)
    if wanted(AFTER_TWO):
        name, case = next(iter(TWO_WORKERS.items()))
        before = runs.place(name) / "first" / str(case.resume)
        alone = Case(case.recipe, case.settings)
        found[AFTER_TWO] = runs.pretraining(alone, AFTER_TWO, resume=before)
    for name, case in FINETUNING.items():
        if wanted(name):
            found[name] = runs.finetuning(case, name)
    return found


def main() -> None:
    """Arguments: the file to write to, then names of cases; none: all of them, and the probe."""
    file, *names = sys.argv[1:]
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # oneDNN chooses its kernels by the CPU
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder), lambda name: not names or name in names)
        about = {**fingerprint(), "kernels": torch.backends.cpu.get_cpu_capability()}
        content = {"fingerprint": about, "recipes": names_of("pipeline", "recipes"), "cases": found}
        if not names:
            content["probe"] = Runs(Path(folder)).pretraining(PROBE, "probe")
    Path(file).write_text(json.dumps(content))


if __name__ == "__main__":
    assert "OMP_NUM_THREADS" in os.environ, "start record.py, which sets the environment"
    main()
