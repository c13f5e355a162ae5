"""What a sweep costs beyond its trials.

    python benchmarks/sweep.py --shards SHARDS [--trials N] [--json FILE]

Reported:

    overhead    seconds from the end of a trial to the end of the next one, less what the next one reports for training and
                probes; with trials that reuse their process, and with a new process for each, both under the real
                `wavemim tune` with one trial at a time
    probes      share of a trial's own seconds that probes take
    start       seconds from the call of the command to the beginning of the first trial
    shared      bytes that trials which train at the same time read from the disk, over those that a single one reads.
                Every process goes through one epoch; before each measurement the page cache forgets the shard set (Linux)

SHARDS is a shard set of 32-px or 64-px images (wavemim prepare). Trials are short, since the overhead does not depend on their
length; the share of probes does, and is of these short trials only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import BenchmarkError, Child, Missing, in_child, machine_facts, write_json

RECIPES = {32: "small32", 64: "small"}
WAYS = {"reused": True, "new process": False}
POLL = 0.01  # seconds
IMAGES = 640  # that a trial trains on, and that its probe is fitted to


def tune(arguments: list[str], reuse: bool) -> None:
    """`wavemim tune` in this process.

    Args:
        arguments: Of the command.
        reuse: Whether trials reuse their processes, as they do in the project.
    """
    import ray.tune

    original = ray.tune.TuneConfig
    ray.tune.TuneConfig = lambda **options: original(**{**options, "reuse_actors": reuse})

    from pipeline.cli import main

    sys.argv = ["wavemim", "tune", *arguments]
    main()


def read_epoch(shards: str) -> dict[str, int]:
    """Read all train images once; returns the bytes that this process fetched from the disk.

    Raises:
        Missing: The system does not count bytes (/proc/self/io).
    """
    from pipeline.shards.batches import sequential
    from pipeline.shards.shard_set import ShardSet

    found = ShardSet.open(shards)
    before = _fetched()
    for _ in sequential(found, "train", 256, window=found.image_size):
        pass
    return {"fetched": _fetched() - before}


def _fetched() -> int:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        raise Missing("/proc/self/io, which counts bytes from the disk") from None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def forget(folder: Path) -> None:
    """Drop the shards of a folder from the page cache."""
    for path in folder.glob("**/*.parquet"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def shared_reading(shards: Path, processes: int) -> dict[str, Any]:
    """Bytes from the disk for one process, and for many at the same time."""

    def fetched(count: int) -> int:
        forget(shards)
        with ThreadPoolExecutor(count) as pool:
            calls = [
                pool.submit(in_child, "sweep:read_epoch", Child(threads=1), shards=str(shards)) for _ in range(count)
            ]
            return sum(call.result()["fetched"] for call in calls)

    one, many = fetched(1), fetched(processes)
    if one == 0:
        raise Missing("a disk: reading the shard set fetched nothing (a file system in memory?)")
    return {"processes": processes, "bytes_one": one, "bytes_all": many, "ratio": many / one}


def overhead(shards: str, side: int, rows: int, trials: int, reuse: bool) -> dict[str, Any]:
    """A real sweep of `trials` trials, one at a time.

    Returns:
        `between`: overhead of each trial but the first in seconds; `start`; `probes`: the share of each trial.

    Raises:
        BenchmarkError: The sweep failed.
    """
    with tempfile.TemporaryDirectory(prefix="wavemim-sweep-", ignore_cleanup_errors=True) as out:
        settings = ["--recipe", RECIPES[side], "--space", "mask_ratio", f"shards={shards}", f"out={out}", "name=sweep"]
        settings += [f"tune.trials={trials}", "tune.recipe_seeds=0", "tune.finalists=0", "tune.search=random"]
        settings += ["tune.concurrent=1", "train.batch=32", "train.warmup_epochs=0"]
        settings += [f"tune.epochs={IMAGES / rows:.6f}", f"tune.max_images={IMAGES}"]
        ledger = Path(out) / "runs" / "sweep" / "tune" / "trials.jsonl"
        seen: list[tuple[float, dict[str, Any]]] = []
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(ledger, seen, over))
        watcher.start()
        began = time.perf_counter()
        call = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps([settings, reuse])]
        try:
            done = subprocess.run(call, capture_output=True, text=True)
        finally:
            over.set()
            watcher.join()
        if done.returncode:
            raise BenchmarkError(f"the sweep ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    first = next(at for at, line in seen if "begin" in line)
    ends = [(at, line["end"]) for at, line in seen if "end" in line]
    between = [
        later - earlier - end["cost"]["cost/wall_clock_s"] for (earlier, _), (later, end) in itertools.pairwise(ends)
    ]
    probes = [end["metrics"]["perf/probe_share"] for _, end in ends if "perf/probe_share" in end["metrics"]]
    return {"between": between, "start": first - began, "probes": probes}


def _watch(path: Path, seen: list[tuple[float, dict[str, Any]]], over: threading.Event) -> None:
    """Note when each line of a file was first there."""
    position = 0
    while not over.is_set():
        with contextlib.suppress(FileNotFoundError), path.open() as file:
            file.seek(position)
            while (line := file.readline()).endswith("\n"):
                seen.append((time.perf_counter(), json.loads(line)))
                position = file.tell()
        over.wait(POLL)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="a labelled shard set")
    parser.add_argument("--trials", type=int, default=6, help="trials of each sweep; default: 6")
    parser.add_argument("--processes", type=int, default=8, help="that read at the same time; default: 8")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()

    from pipeline.shards.shard_set import ShardSet

    shards = Path(arguments.shards).absolute()
    opened = ShardSet.open(str(shards))
    found: dict[str, Any] = {"machine": machine_facts(), "trials": arguments.trials}
    for way, reuse in WAYS.items():
        found[way] = overhead(str(shards), opened.image_size, opened.rows["train"], arguments.trials, reuse)
        median, most = statistics.median(found[way]["between"]), max(found[way]["between"])
        print(f"{way}: {median:.2f} s a trial beyond training and probes (at most {most:.2f}), "
              f"{found[way]['start']:.1f} s to the first trial, probes {statistics.median(found[way]['probes']):.0%}")  # fmt: skip
    ratio = statistics.median(found["new process"]["between"]) / statistics.median(found["reused"]["between"])
    print(f"a new process for each trial costs {ratio:.1f} times as much")
    try:
        found["shared"] = shared_reading(shards, arguments.processes)
        print(f"{arguments.processes} trials at once read {found['shared']['ratio']:.2f} times the bytes of one")
    except Missing as missing:
        print(f"shared reading: skipped, it needs {missing}")
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        tune(*json.loads(sys.argv[2]))
    else:
        main()
