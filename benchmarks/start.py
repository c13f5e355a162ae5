"""What a command costs before and after its work.

    python benchmarks/start.py --shards SHARDS [--repeats N] [--json FILE]

Reported, as medians:

    stage_overhead_s   seconds of `wavemim pretrain` with one worker, on a private Ray, that are not training; by part:
                       imports and checks, the start of Ray, the worker's process with its imports, and the end (figures,
                       MLflow, whose store is made while the worker starts, the end of Ray)
    stage_cpu_s        CPU seconds of all processes until training begins
    help_s             seconds of `wavemim --help`
    cli_start_s        seconds until `wavemim pretrain` has refused a setting

SHARDS is a shard set of 32-px or 64-px images (wavemim prepare); a thousandth of its recipe's training is run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measure import BenchmarkError, machine_facts, write_json

RECIPES = {32: "small32", 64: "small"}
POLL = 0.02  # seconds
WAVEMIM = (sys.executable, "-m", "wavemim")


def stage(shards: str, recipe: str, images: int) -> dict[str, Any]:
    """One pretraining from its command to its end.

    Args:
        shards: A shard set.
        recipe: Name of the recipe.
        images: Its train images.

    Returns:
        "overhead" and the parts of it in seconds, in their order, and "cpu", CPU seconds until training begins.

    Raises:
        BenchmarkError: It failed.
    """
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out) / "runs" / recipe / "pretrain"
        settings = (f"shards={shards}", f"out={out}", f"train.epochs={1024 / images:.4f}", "train.workers=1")
        moments: dict[str, Callable[[set[str]], bool]] = {
            "imports and checks": lambda names: "gcs_server" in names,
            "Ray": lambda names: folder.is_dir(),
            "worker": lambda names: any(folder.glob(".beats/*")),
            "training": lambda names: any(folder.glob("images-*")),
        }
        began, found, cpu = time.perf_counter(), dict[str, float](), dict[int, float]()
        command = subprocess.Popen(
            [*WAVEMIM, "pretrain", "--quiet", "-r", recipe, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        process = psutil.Process(command.pid)
        while command.poll() is None:
            with contextlib.suppress(psutil.Error):  # of a process that has just ended
                family = [process, *process.children(recursive=True)]
                if "worker" not in found:
                    cpu |= {each.pid: sum(each.cpu_times()[:2]) for each in family}
                for name, reached in moments.items():
                    if name not in found and reached({each.name() for each in family}):
                        found[name] = time.perf_counter() - began
            time.sleep(POLL)
        total = time.perf_counter() - began
        if command.returncode or set(found) != set(moments):
            text = command.stdout.read().decode() if command.stdout else ""
            raise BenchmarkError(f"pretrain ended with {command.returncode}, after {', '.join(found)}: {text}")
        result = json.loads((folder / "result.json").read_text())
    parts, before = {}, 0.0
    for name, reached_at in found.items():
        parts[name], before = reached_at - before, reached_at
    del parts["training"]
    overhead = total - result["cost"]["wall_clock_s"]
    return {"overhead": overhead, **parts, "end": total - before, "cpu": sum(cpu.values())}


def seconds_of(*arguments: str, code: int) -> float:
    """Wall-clock seconds of a command that ends with this exit code."""
    began = time.perf_counter()
    done = subprocess.run([*WAVEMIM, *arguments], capture_output=True, text=True)
    if done.returncode != code:
        raise BenchmarkError(f"wavemim {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="a shard set")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; default: 3")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()

    from pipeline.shards.shard_set import ShardSet

    place = str(Path(arguments.shards).absolute())
    shards = ShardSet.open(place)
    found: dict[str, Any] = {"machine": machine_facts(), "repeats": arguments.repeats}
    for name, call in {
        "help_s": lambda: seconds_of("--help", code=0),
        "cli_start_s": lambda: seconds_of("pretrain", "train.epochs=-1", code=2),
    }.items():
        found[name] = statistics.median(call() for _ in range(arguments.repeats))
        print(f"{name}: {found[name]:.2f}", flush=True)
    runs = []
    for _ in range(arguments.repeats):
        runs.append(stage(place, RECIPES[shards.image_size], shards.rows["train"]))
        print(", ".join(f"{name} {value:.1f}" for name, value in runs[-1].items()), flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    found |= {"stage_overhead_s": medians.pop("overhead"), "stage_cpu_s": medians.pop("cpu"), "parts": medians}
    print(f"stage_overhead_s: {found['stage_overhead_s']:.1f}; CPU seconds until training: {found['stage_cpu_s']:.1f}")
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
