"""What grows with the number of images, and what a cluster saturates first.

    python benchmarks/scale.py [--inputs N …] [--json FILE]

For each number of images, with the real code and without decoding any image, each in a process of its own:

    tree        N names in 1,000 class folders, as a file system lists them → splits, order, units
    plan        a list of N paths and classes → the same, and the file that tasks read them from
    resume      which of these units are finished, when all are
    merge       the reports of all units → statistics and manifest
    open        that manifest → a shard set
    epoch       the order of one epoch as one of 64 ranks plans it
    merge_sets  100 shard sets of N images each → one
    open_merged that set, as each process of a training opens it

with seconds, memory beyond that of the imports, and bytes that were written. Then a model of pretraining on 8 to 1,024 GPUs from
rates that were measured on one (options): bytes a second that storage has to give, the share of a step that the all-reduce
takes if nothing overlaps, seconds for a checkpoint, and what is saturated first.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measure import in_child, machine_facts, write_json

INPUTS = (1_000_000, 10_000_000)
CLASSES, SHARD, GROUP = 1000, 1024, 64
RANKS = 64
SETS = 100
BYTES = 8_000_000  # of a shard
GPUS = (8, 64, 256, 1024)
MEMORY = "memory_mib"


@contextlib.contextmanager
def _measured(found: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Seconds of the block and how far the process grew in it."""
    page, about, over = os.sysconf("SC_PAGE_SIZE"), dict[str, Any](), threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before, most = resident(), [0]

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], resident())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    began = time.perf_counter()
    try:
        yield about
    finally:
        about["seconds"] = time.perf_counter() - began
        over.set()
        watching.join()
        about[MEMORY] = (max(most[0], resident()) - before) / 2**20
        found[name] = about


def write_list(path: str, inputs: int) -> None:
    """A list of images in Parquet, as a user would give it for so many: path and label of each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema({"path": pa.string(), "label": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, inputs, 1_000_000):
            number = np.arange(start, min(start + 1_000_000, inputs))
            label = pc.binary_join_element_wise("n", pc.cast(pa.array(number % CLASSES + 1_000_000), pa.string()), "")
            name = pc.cast(pa.array(number + 10**9), pa.string())
            writer.write_table(pa.table([pc.binary_join_element_wise(label, name, "/"), label], schema=schema))


def listing(inputs: int) -> dict[str, Any]:
    """Phase tree."""
    from pipeline.images.folders import plan_tree
    from pipeline.images.plan import PlanOptions
    from pipeline.images.tree_layout import Tree
    from pipeline.stages.prepare_task import make_units
    from pipeline.storage.folder import Folder

    def folders(self: Folder) -> Iterator[tuple[str, list[str]]]:
        for number in range(CLASSES):
            name = f"n{10**7 + number}"
            yield name, [f"{name}_{10**5 + image}.JPEG" for image in range(inputs // CLASSES)]

    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as room,
        patch.object(Folder, "tree", folders),
        _measured(found, "tree") as about,
    ):
        tree = Tree(Folder.at(room))
        units = make_units(plan_tree(tree, PlanOptions("images", val_share=0.02, seed=0)), SHARD)
    return {"tree": {**about, "units": len(units)}}


def preparing(inputs: int) -> dict[str, Any]:
    """Phases plan, resume, merge and open."""
    import pyarrow.dataset  # noqa: F401  # so that imports count for no phase

    from pipeline.images.sources import plan_source
    from pipeline.runtime.stage_folder import as_json
    from pipeline.shards.layout import Layout
    from pipeline.shards.shard_set import MANIFEST, ShardSet, make_manifest
    from pipeline.shards.statistics import Moments
    from pipeline.stages.prepare_task import UNITS, Unit, make_units
    from pipeline.stages.prepare_units import finished_reports, write_plan
    from pipeline.storage.folder import Folder

    found: dict[str, Any] = {}
    layout = Layout(64, 3, {1: 8.0, 2: 4.0, 3: 4.0, 4: 4.0}, "haar")
    moments = {
        **Moments(layout).state(),
        "images": SHARD,
        "squares": {"1": [[9] * 3] * 3, **{str(n): [[9] * 3] * 3 for n in (2, 3)}, "4": [[9] * 4] * 3},
    }

    def report(unit: Unit) -> dict[str, Any]:
        sha256 = hashlib.sha256(unit.name.encode()).hexdigest()
        file = {"name": f"{unit.name}.parquet", "rows": unit.inputs, "bytes": 8_000_000, "sha256": sha256}
        about = {"unit": unit.name, "split": unit.split, "digest": unit.digest, "inputs": unit.inputs}
        return {**about, "kept": unit.inputs, "rejects": [], "file": file, "moments": moments}

    with tempfile.TemporaryDirectory() as room:
        in_child("scale:write_list", path=f"{room}/list.parquet", inputs=inputs)
        folder = Folder.at(f"{room}/set")
        Path(room, "set", UNITS).mkdir(parents=True)
        with _measured(found, "plan") as about:
            plan = plan_source(f"{room}/list.parquet", val_share=0.02, seed=0)
            units = make_units(plan, SHARD)
            write_plan(folder, plan, units)
        about |= {"units": len(units), "bytes": sum(path.stat().st_size for path in Path(room, "set", UNITS).iterdir())}
        classes = plan.classes
        del plan
        for unit in units:
            folder.write(f"{UNITS}/{unit.name}.json", as_json(report(unit)))
        sizes = {f"{unit.name}.parquet": 8_000_000 for unit in units}
        with patch.object(Folder, "sizes", lambda self: sizes), _measured(found, "resume"):
            reports = finished_reports(folder, units)
        assert len(reports) == len(units)
        with _measured(found, "merge") as about:
            total, splits = Moments(layout), dict[str, list[dict[str, Any]]](train=[], val=[])
            for unit in units:
                splits[unit.split].append(reports[unit.name]["file"])
                total.merge(reports[unit.name]["moments"])
            manifest = make_manifest(
                layout,
                rows_per_group=GROUP,
                classes=classes,
                splits=splits,
                statistics=total.statistics(),
                counts={"inputs": inputs, "kept": inputs, "rejected": 0, "ignored": 0},
            )
            folder.write(MANIFEST, as_json(manifest))
        about["bytes"] = folder.size(MANIFEST)
        del reports, manifest, splits, total
        with _measured(found, "open"):
            ShardSet.open(folder.url, check_files=False)
    return found


def reading(inputs: int) -> dict[str, Any]:
    """Phase epoch."""
    from pipeline.shards.layout import Layout
    from pipeline.shards.reader import Reader
    from pipeline.shards.shard_set import ShardSet
    from pipeline.storage.folder import Folder

    found: dict[str, Any] = {}
    files = [
        {"name": f"train-{n:05d}.parquet", "rows": SHARD, "bytes": 1, "sha256": ""} for n in range(inputs // SHARD)
    ]
    manifest = {
        "rows_per_group": GROUP,
        "splits": {"train": {"rows": SHARD * len(files), "files": files}, "val": {"rows": 0, "files": []}},
    }
    layout = Layout(64, 3, {1: 8.0, 2: 4.0, 3: 4.0, 4: 4.0}, "haar")
    with _measured(found, "epoch"):
        shards = ShardSet(Folder.at("."), manifest, layout)
        reader = Reader(shards, "train", batch=4096, world=RANKS, window=64, flip=True)
        orders = reader._orders(0, reader._bounds(), [0])
        assert orders[0].ends()[-1] == SHARD * len(files) // RANKS
    return found


def write_sets(path: str, inputs: int) -> None:
    """Shard sets of so many images each, without their shards."""
    from pipeline.shards.layout import Layout
    from pipeline.shards.shard_set import MANIFEST, REJECTED, make_manifest
    from pipeline.shards.writer import write_rejected

    layout = Layout(64, 3, {1: 8.0, 2: 4.0, 3: 4.0, 4: 4.0}, "haar")
    measured = {"mean": [1.0] * 3, "std": [2.0] * 3}
    statistics = {
        "levels": {str(level): dict.fromkeys("AHVD", measured) for level in layout.steps},
        "pixels": measured,
    }
    for number in range(SETS):
        room = Path(path, f"part-{number:02d}")
        room.mkdir()
        files = [
            {
                "name": name,
                "rows": SHARD,
                "bytes": BYTES,
                "sha256": hashlib.sha256(f"{room}{name}".encode()).hexdigest(),
            }
            for name in _shards(inputs)
        ]
        manifest = make_manifest(
            layout,
            rows_per_group=GROUP,
            classes=[f"n{10**6 + number * 5 + each}" for each in range(CLASSES)],
            splits={"train": files, "val": []},
            statistics=statistics,
            counts={"inputs": SHARD * len(files) + 1, "kept": SHARD * len(files), "rejected": 1, "ignored": 0},
        )
        (room / MANIFEST).write_text(json.dumps(manifest))
        write_rejected(room / REJECTED, [("bad.jpg", "empty file")])


def _shards(inputs: int) -> list[str]:
    return [f"train-{number:05d}.parquet" for number in range(-(-inputs // SHARD))]


def merge_sets(path: str, inputs: int) -> dict[str, Any]:
    """Phase merge_sets."""
    from pipeline.shards.merge import merge
    from pipeline.shards.shard_set import MANIFEST
    from pipeline.storage.folder import Folder

    found, sizes = dict[str, Any](), dict.fromkeys(_shards(inputs), BYTES)
    with patch.object(Folder, "sizes", lambda self: sizes), _measured(found, "merge_sets") as about:
        merged = merge(path, progress=False)
    return {"merge_sets": {**about, "bytes": merged.folder.size(MANIFEST), "images": sum(merged.rows.values())}}


def open_merged(path: str, inputs: int) -> dict[str, Any]:
    """Phase open_merged."""
    from pipeline.shards.shard_set import ShardSet
    from pipeline.storage.folder import Folder

    found, sizes = dict[str, Any](), dict.fromkeys(_shards(inputs), BYTES)
    with patch.object(Folder, "sizes", lambda self: sizes), _measured(found, "open_merged") as about:
        images = sum(ShardSet.open(path).rows.values())
    return {"open_merged": {**about, "images": images}}


def merging(inputs: int) -> dict[str, Any]:
    """Phases merge_sets and open_merged, each in a process of its own."""
    with tempfile.TemporaryDirectory() as room:
        in_child("scale:write_sets", path=room, inputs=inputs)
        return {
            **in_child("scale:merge_sets", path=room, inputs=inputs),
            **in_child("scale:open_merged", path=room, inputs=inputs),
        }


def model(rates: argparse.Namespace) -> list[dict[str, Any]]:
    """Pretraining on many GPUs, by arithmetic.

    Args:
        rates: The measured rates of one GPU, as given on the command line.

    Returns:
        A row for each number of GPUs.
    """
    rows = []
    step = rates.batch / rates.images_per_second
    for gpus in GPUS:
        reduce = 2 * (gpus - 1) / gpus * 4e6 * rates.parameters / (rates.network * 1e9 / 8)  # float32 gradients
        storage = gpus * rates.images_per_second * rates.image_bytes / 1e9
        checkpoint = 3 * 4e6 * rates.parameters / (rates.disk * 1e9)  # weights and two moments, by one rank
        shares = {
            "storage": storage / rates.storage,
            "network": reduce / step,
            "checkpoints": checkpoint / 60 / rates.checkpoint_minutes,
        }
        rows.append(
            {
                "gpus": gpus,
                "images_per_second": gpus * rates.images_per_second,
                "storage_gb_per_s": storage,
                "all_reduce_share": reduce / step,
                "checkpoint_seconds": checkpoint,
                "first": max(shares, key=lambda name: shares[name]),
                "of_it": max(shares.values()),
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="*", default=INPUTS, help="numbers of images")
    add = parser.add_argument_group("rates of one GPU and its machine").add_argument
    add("--images-per-second", type=float, default=2500.0, help="of one GPU; default: 2500")
    add("--batch", type=int, default=256, help="images a step and GPU; default: 256")
    add("--parameters", type=float, default=90.0, help="millions; default: 90 (ViT-B with decoder)")
    add("--image-bytes", type=float, default=100_000.0, help="stored, of one image; default: 100000")
    add("--network", type=float, default=100.0, help="Gbit/s between machines, for each GPU; default: 100")
    add("--storage", type=float, default=50.0, help="GB/s that the store of the shards gives; default: 50")
    add("--disk", type=float, default=1.0, help="GB/s to where checkpoints go; default: 1")
    add("--checkpoint-minutes", type=float, default=10.0, help="between checkpoints; default: 10")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine_facts(), "phases": {}}
    for inputs in arguments.inputs:
        phases = {
            **in_child("scale:listing", inputs=inputs),
            **in_child("scale:preparing", inputs=inputs),
            **in_child("scale:reading", inputs=inputs),
            **merging(inputs),
        }
        found["phases"][inputs] = phases
        for name, about in phases.items():
            more = "".join(f", {about[key]:,} {key}" for key in ("images", "units", "bytes") if key in about)
            print(f"{inputs:,} {name}: {about['seconds']:.1f} s, {about[MEMORY]:.0f} MiB{more}", flush=True)
    found["model"] = model(arguments)
    for row in found["model"]:
        print(
            f"{row['gpus']} GPUs: {row['images_per_second']:,.0f} images/s, storage {row['storage_gb_per_s']:.1f} GB/s, "
            f"all-reduce {row['all_reduce_share']:.0%} of a step, checkpoint {row['checkpoint_seconds']:.1f} s; "
            f"first: {row['first']} at {row['of_it']:.0%}"
        )
    if arguments.json:
        write_json(arguments.json, json.loads(json.dumps(found)))


if __name__ == "__main__":
    main()
