"""Several nodes on one machine, each a Ray node of its own: stages that spread, and nodes that vanish, join, or lack.

    python benchmarks/cluster.py --images FOLDER [--json FILE] [NAME …]

Without NAME, all scenarios run one after another, each on a new cluster (Ray's `cluster_utils.Cluster`: a head without CPUs and
three nodes of one CPU). A node is lost by kill -9 of its raylet and of all processes below it. Reported per scenario:

    exit        exit codes of the command, one per call
    seconds     of the whole scenario
    nodes       nodes that worked on it
    repeated    images that were decoded or trained a second time
    noticed     seconds from the fault to the first message about it (None: no message)
    rows        of a shard set: inputs, kept and rejected
    same        whether the result is that of a run without a fault
    said        the messages of the command

FOLDER holds at least 2,000 small images in class folders; they are read with data.image_size=32. Segmentation is on pairs of
images and masks that are made here. A node that is lost by a sweep is a test: tests/stages/test_tune_faults.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from faults_run import Run
from measure import machine_facts, write_json
from PIL import Image

QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
DATA = ("data.image_size=32", "data.levels=3", "data.rows_per_shard=128", "data.val_share=0.1")
LOST = "was lost"  # in the message about a node
PAIRS, SIDE = 320, 64  # for segmentation, and their side in pixels
COLOURS = np.array([[120, 120, 120], [200, 40, 40], [40, 180, 60], [50, 60, 210]])  # of its classes


class Nodes:
    """A cluster of single-CPU nodes."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(count)]
        self.cluster.wait_for_nodes()
        self.seen: set[int] = set()

    @property
    def address(self) -> str:
        """Of the head."""
        return str(self.cluster.address)

    def add(self) -> None:
        """One more node."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def working(self, name: str) -> list[int]:
        """Numbers of the nodes on which a process of this name runs, which are also added to `seen`."""
        found = []
        for number, node in enumerate(self.nodes):
            with contextlib.suppress(psutil.Error):  # a node that was killed
                raylet = psutil.Process(_raylet(node))
                if any(child.name().startswith(name) for child in raylet.children(recursive=True)):
                    found.append(number)
        self.seen |= set(found)
        return found

    def kill(self, number: int) -> None:
        """kill -9 of a node's raylet and everything below it."""
        raylet = psutil.Process(_raylet(self.nodes[number]))
        for victim in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


class Stage(Run):
    """A stage on these nodes, with its messages."""

    def __init__(self, folder: Path, nodes: Nodes, recipe: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.nodes, self.recipe = folder, nodes, {"out": str(folder / "out"), **recipe}
        self.said, self.exits, self.process, self._readers = [], [], None, []

    def call(self, stage: str, *settings: str) -> None:
        """Start a stage on the cluster."""
        self.stage = self.folder / "out" / "runs" / str(self.recipe["name"]) / stage
        self.start(*settings, f"cluster.address={self.nodes.address}", environment=QUIET, stage=stage)

    def report(self, since: float, sign: str = "") -> dict[str, Any]:
        """What every scenario reports."""
        later = [at - since for at, line in self.said if sign and at >= since and sign in line]
        return {
            "exit": self.exits,
            "nodes": sorted(self.nodes.seen),
            "noticed": round(later[0], 1) if later else None,
            "said": [line for _, line in self.said],
        }


def prepare_spreads(images: str, folder: Path) -> dict[str, Any]:
    """Prepare on three nodes; a fourth one joins."""

    def join(nodes: Nodes) -> None:
        nodes.add()

    return _prepared(images, folder, join)


def prepare_loses_a_node(images: str, folder: Path) -> dict[str, Any]:
    """Prepare on three nodes; one is killed."""
    return _prepared(images, folder, lambda nodes: nodes.kill(1))


def _prepared(images: str, folder: Path, fault: Callable[[Nodes], None]) -> dict[str, Any]:
    with _cluster(3) as nodes:
        stage = Stage(folder, nodes, {"name": "cluster", "images": images})
        began = time.monotonic()
        stage.call("prepare", *DATA)
        units = folder / "out" / "shards" / "units"
        stage.wait(lambda: len(nodes.working("ray::Map(make_shard)")) > 0 and len(list(units.glob("*.json"))) >= 3)
        fault(nodes)
        process = stage.process
        assert process is not None
        while process.poll() is None:
            nodes.working("ray::Map(make_shard)")
            time.sleep(0.05)
        stage.end()
        manifest = json.loads((folder / "out" / "shards" / "manifest.json").read_text())
        counts = manifest["counts"]
        assert counts["inputs"] == counts["kept"] + counts["rejected"]
        return {**stage.report(began), "rows": counts, "seconds": round(time.monotonic() - began)}


def pretrain_loses_a_node(images: str, folder: Path) -> dict[str, Any]:
    """Pretraining with a worker on each of two nodes of three; one of the two is killed, and the third takes its place."""
    with _cluster(3) as nodes:
        stage, epochs = _shards(images, folder, nodes), 6
        every = f"train.checkpoint_every={200 / _rows(folder)}"
        return _loses_a_worker(stage, "pretrain", epochs, f"train.epochs={epochs}", "train.workers=2", every)


def finetune_loses_a_node(images: str, folder: Path) -> dict[str, Any]:
    """Fine-tuning in the same way, with its checkpoint after every epoch."""
    with _cluster(3) as nodes:
        stage, epochs = _shards(images, folder, nodes), 8
        places = (f"checkpoint={_encoder(folder / 'encoder', 32, 32, 2)}", f"finetune.epochs={epochs}")
        settings = ("finetune.workers=2", "finetune.batch=50", "finetune.warmup_epochs=1", "finetune.log_every=2")
        return _loses_a_worker(stage, "finetune", epochs, *places, *settings)


def _loses_a_worker(stage: Stage, name: str, epochs: int, *settings: str) -> dict[str, Any]:
    began, nodes = time.monotonic(), stage.nodes
    stage.call(name, *settings)
    stage.trained(epochs * _rows(stage.folder) // 3)
    since, before = time.monotonic(), nodes.working("ray::RayTrainWo")
    nodes.kill(before[0])
    stage.wait(lambda: before[0] not in (now := nodes.working("ray::RayTrainWo")) and len(now) == 2)
    resumed = time.monotonic() - since
    stage.end()
    return {
        **stage.report(since, LOST),
        "workers_on": before,
        "repeated": stage.result(since)["lost"],
        "resumed_s": round(resumed, 1),
        "seconds": round(time.monotonic() - began),
    }


def segment_loses_two_nodes(images: str, folder: Path) -> dict[str, Any]:
    """Segmentation on three nodes: one is killed while tokens are computed, another one while heads are fitted."""
    with _cluster(3) as nodes:
        masked = _pairs(folder / "pairs")
        recipe = {"images": str(masked / "images"), "masks": str(masked / "masks"), "batch": 8, "steps": 200}
        encoder = _encoder(folder / "encoder", SIDE, 192, 12)
        stage = Stage(folder, nodes, {"name": "whole", "checkpoint": encoder, "segment": recipe})
        stage.call("segment")
        stage.end()
        whole = _measured(stage)
        began = time.monotonic()
        stage.recipe["name"] = "fault"
        stage.call("segment")
        tokens = stage.stage / ".tokens"
        stage.wait(lambda: bool(nodes.working("ray::Map")) and len(list(tokens.glob("*.masks.npy"))) >= PAIRS // 8 // 3)
        since, worked = time.monotonic(), set(nodes.seen)
        nodes.kill(nodes.working("ray::Map")[0])
        stage.wait(lambda: bool(nodes.working("ray::fit_head")))
        nodes.kill(nodes.working("ray::fit_head")[0])
        stage.end()
        return {
            **stage.report(since, LOST),
            "encoded_on": sorted(worked),
            "same": _measured(stage) == whole,
            "seconds": round(time.monotonic() - began),
        }


def _measured(stage: Stage) -> Any:
    return json.loads((stage.stage / "result.json").read_text())["measured"]


def _pairs(folder: Path) -> Path:
    """Images of four flat quarters with noise, each of one of four classes, and their masks."""
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(PAIRS):
        classes = random.integers(0, len(COLOURS), (2, 2)).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
        pixels = (COLOURS[classes] + random.normal(0, 40, (SIDE, SIDE, 3))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(classes.astype(np.uint8)).save(folder / "masks" / f"{number}.png")
    return folder


def _encoder(folder: Path, size: int, width: int, depth: int) -> str:
    """An untrained ViT in timm's format, for images of `size` pixels a side."""
    import timm

    from wavemim.weights.timm_folder import export_timm

    name, mean, std = "vit_tiny_patch16_224", [128.0] * 3, [64.0] * 3
    made: dict[str, Any] = {"img_size": size, "patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2}
    made |= {"in_chans": 3, "num_classes": 0}
    model = timm.create_model(name, **made)
    export_timm(folder, model, architecture=name, arguments=made, pixel_mean=mean, pixel_std=std, about={})
    return str(folder)


def evaluate_loses_a_node(images: str, folder: Path) -> dict[str, Any]:
    """Evaluation on three nodes; one that computes features is killed."""
    with _cluster(3) as nodes:
        began = time.monotonic()
        stage = _shards(images, folder, nodes)
        stage.call("pretrain", "train.epochs=1", "train.workers=2")
        stage.end()
        stage.call("evaluate")
        stage.wait(lambda: bool(nodes.working("ray::evaluate")))
        since = time.monotonic()
        nodes.kill(nodes.working("ray::evaluate")[0])
        stage.end()
        return {**stage.report(since, LOST), "seconds": round(time.monotonic() - began)}


def tune_gains_a_node(images: str, folder: Path) -> dict[str, Any]:
    """A sweep on two nodes; a third one joins while both train a trial."""
    with _cluster(2) as nodes:
        stage = _shards(images, folder, nodes)
        began = time.monotonic()
        fixed = ("tune.space=mask_ratio", "tune.search=random", "tune.trials=4", "tune.epochs=5", "tune.rungs=1")
        stage.call("tune", *fixed, "tune.recipe_seeds=1", "tune.finalists=0", "evaluate.probe_strengths=[0.1]")
        trial = "ray::ImplicitFunc.train"  # a process that has begun with one
        stage.wait(lambda: len(nodes.working(trial)) == 2)
        since = time.monotonic()
        nodes.add()
        stage.wait(lambda: len(nodes.working(trial)) == 3)
        used = time.monotonic() - since
        stage.end()
        return {**stage.report(since), "used_s": round(used, 1), "seconds": round(time.monotonic() - began)}


def never_placed(images: str, folder: Path) -> dict[str, Any]:
    """Pretraining with more workers than the cluster has CPUs, which no autoscaler enlarges."""
    with _cluster(2) as nodes:
        stage = _shards(images, folder, nodes)
        since = time.monotonic()
        stage.call("pretrain", "train.workers=5")
        stage.end()
        return {**stage.report(since, "need"), "seconds": round(time.monotonic() - since)}


def _rows(folder: Path) -> int:
    """Train images of the shard set in a run's folder."""
    return int(json.loads((folder / "out" / "shards" / "manifest.json").read_text())["splits"]["train"]["rows"])


def _shards(images: str, folder: Path, nodes: Nodes) -> Stage:
    """A shard set, and a recipe of a small model on it."""
    recipe = {
        "name": "fault",
        "images": images,
        "data": {"image_size": 32, "levels": 3},
        "encoder": {
            "name": "vit_base_patch16_224",
            "patch_size": 4,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "image_size": 32,
        },
        "decoder": {"width": 16, "heads": 2},
        "target": {"taps": {2: 1, 3: 2}},
        "train": {"batch": 50, "warmup_epochs": 0.01, "log_every": 2, "monitor_minutes": None},
        "tracking": {"system_metrics": False},
    }
    stage = Stage(folder, nodes, recipe)
    stage.call("prepare", *DATA)
    if stage.end():
        raise RuntimeError(f"prepare failed: {stage.said[-3:]}")
    return stage


@contextlib.contextmanager
def _cluster(count: int) -> Iterator[Nodes]:
    os.environ.update(QUIET)
    nodes = Nodes(count)
    try:
        yield nodes
    finally:
        nodes.close()


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        prepare_spreads,
        prepare_loses_a_node,
        pretrain_loses_a_node,
        finetune_loses_a_node,
        evaluate_loses_a_node,
        segment_loses_two_nodes,
        tune_gains_a_node,
        never_placed,
    )
}


def main() -> None:
    """Run the scenarios and report what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"scenarios: {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--images", required=True, help="a folder of small images in class folders")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SCENARIOS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(SCENARIOS)}")
    results: dict[str, Any] = {}
    root = Path(tempfile.mkdtemp(prefix="nodes-"))
    try:
        for name in arguments.names or SCENARIOS:
            try:
                results[name] = SCENARIOS[name](str(Path(arguments.images).absolute()), root / name)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: { {key: value for key, value in results[name].items() if key != 'said'} }")
            for line in results[name].get("said", []):
                print(f"    {line}")
            sys.stdout.flush()
            if arguments.json:
                write_json(arguments.json, {"machine": machine_facts(), "scenarios": results})
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
