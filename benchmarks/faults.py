"""Fault injection into real pretraining: the command as a user calls it, disturbed from outside, one fault per run.

    python benchmarks/faults.py --shards SET [--json FILE] [--folder FOLDER] [NAME …]

Without NAME, all faults are tried one after another. Each run trains the same small model on the same images with two
workers, so that its final weights can be compared with those of an undisturbed run by checksum. Reported per fault:

    lost        images that were trained again, or 0
    noticed     seconds from the fault to the first message about it (None: no message)
    exit        exit codes of the command, one per call
    same        whether the final weights are those of the undisturbed run, bit for bit
    said        the messages of the command

wavemim has no code for this benchmark: workers are stopped, killed and slowed down with signals, files are removed,
damaged or replaced by a pipe without a writer, disks and Ray's object store are filled. `disk_full` mounts a small
tmpfs (Linux, root), `clock_back` needs the libfaketime package or --faketime LIBRARY.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from faults_run import PATIENCE, Run
from measure import Missing, machine_facts, write_json


def undisturbed(run: Run) -> dict[str, Any]:
    """No fault."""
    run.start()
    run.end()
    return run.result(time.monotonic())


def worker_killed(run: Run) -> dict[str, Any]:
    """kill -9 of one worker of two."""
    return _killed(run, lambda: run.workers()[1].kill())


def all_workers_killed(run: Run) -> dict[str, Any]:
    """kill -9 of all workers."""
    return _killed(run, lambda: [worker.kill() for worker in run.workers()])


def _killed(run: Run, kill: Callable[[], Any]) -> dict[str, Any]:
    run.start()
    run.trained(run.middle)
    since = time.monotonic()
    kill()
    run.end()
    return run.result(since)


def ray_killed(run: Run) -> dict[str, Any]:
    """kill -9 of the driver with its whole Ray; then the same command again."""
    process = run.start()
    run.trained(run.middle)
    since = time.monotonic()
    children = psutil.Process(process.pid).children(recursive=True)
    for victim in (process, *children):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            victim.kill()
    run.end()
    run.start()
    run.end()
    return run.result(since, lambda line: "continued from" in line)


def hang_stopped(run: Run) -> dict[str, Any]:
    """SIGSTOP of one worker of two, without SIGCONT; train.hang_timeout=20."""
    run.start("train.hang_timeout=20")
    run.trained(run.middle)
    since = time.monotonic()
    run.workers()[1].suspend()
    run.end()
    return run.result(since, lambda line: "was ended" in line)


def hang_reading(run: Run) -> dict[str, Any]:
    """A file of the shard set becomes a pipe without a writer, so that reading it blocks; train.hang_timeout=20."""
    run.start("train.hang_timeout=20")
    with _away(run) as file:
        os.mkfifo(file)
        since = time.monotonic()
        run.wait(lambda: any("was ended" in line for _, line in run.said))
        file.unlink()
    run.end()
    return run.result(since, lambda line: "was ended" in line)


def slow_worker(run: Run) -> dict[str, Any]:
    """One worker of two runs only a fifth of the time: stopped for 40 of every 50 ms."""
    run.start()
    run.trained(run.middle // 2)
    since, worker, ended = time.monotonic(), run.workers()[1], threading.Event()

    def slow() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                worker.suspend()
                time.sleep(0.04)
                worker.resume()
                time.sleep(0.01)

    thread = threading.Thread(target=slow, daemon=True)
    thread.start()
    run.wait(lambda: any("is slow" in line for _, line in run.said))
    ended.set()
    thread.join()
    run.end()
    return run.result(since, lambda line: "is slow" in line) | {"ratio": max(run.metrics("perf/slowest_ratio"))}


def clock_back(run: Run) -> dict[str, Any]:
    """The clock of all processes is set back by two hours; checkpoints every 15 s by train.checkpoint_minutes."""
    library = FAKETIME or _faketime()
    clock = run.folder / "clock"
    clock.write_text("+0\n")
    fake = {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    run.start("train.checkpoint_minutes=0.25", environment={**fake, "DONT_FAKE_MONOTONIC": "1"})
    run.trained(run.middle)
    since, before = time.monotonic(), run.checkpoints()[-1]
    clock.write_text("-2h\n")
    run.wait(lambda: run.checkpoints()[-1] > before)
    first = time.monotonic() - since
    run.end()
    return run.result(since) | {"next_checkpoint_s": round(first, 1)}


def shard_missing(run: Run) -> dict[str, Any]:
    """A shard is removed during training and put back after the command has ended; then the command is called again."""
    run.start()
    with _away(run):
        since = time.monotonic()
        run.end()
    run.start()
    run.end()
    return run.result(since, lambda line: "is missing" in line)


def shard_away(run: Run) -> dict[str, Any]:
    """A shard is removed during training and put back as soon as the command reports it missing."""
    run.start()
    with _away(run):
        since = time.monotonic()
        run.wait(lambda: any("is missing" in line for _, line in run.said))
    run.end()
    return run.result(since, lambda line: "is missing" in line)


def shard_damaged(run: Run) -> dict[str, Any]:
    """Every page of a shard gets a wrong byte during training; repaired after the end, then called again."""
    run.start()
    with _away(run) as file:
        content = bytearray((run.folder / "away").read_bytes())
        for place in range(1000, len(content) - 100_000, 5000):
            content[place] ^= 0xFF
        file.write_bytes(content)
        since = time.monotonic()
        run.end()
        file.unlink()
    run.start()
    run.end()
    return run.result(since, lambda line: "is damaged" in line)


@contextlib.contextmanager
def _away(run: Run) -> Iterator[Path]:
    """Move the first train shard away while the block runs, after the first checkpoints."""
    run.trained(run.middle // 2)
    file, away = run.shards / "train-00000.parquet", run.folder / "away"
    os.replace(file, away)
    try:
        yield file
    finally:
        os.replace(away, file)


def disk_full(run: Run) -> dict[str, Any]:
    """The disk of `out` is full for two successive checkpoints, then freed."""
    disk = run.folder / "out"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True).returncode:
        raise Missing("the right to mount a tmpfs")
    try:
        run.start()
        run.trained(run.middle // 2)
        since, filler = time.monotonic(), disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        run.wait(lambda: sum("could not be written" in line for _, line in run.said) >= 2)
        filler.unlink()
        run.end()
        return run.result(since, lambda line: "could not be written" in line)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def second_run(run: Run) -> dict[str, Any]:
    """The same command while it is already running."""
    first = run.start()
    run.trained(run.middle // 2)
    since = time.monotonic()
    run.start()
    run.end()
    run.process = first
    run.end()
    return run.result(since, lambda line: "is being written by process" in line)


def changed_recipe(run: Run) -> dict[str, Any]:
    """Stopped in the middle, then resumed with another encoder (refused), another lr (refused), and that with force."""
    process = run.start()
    run.trained(run.middle)
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    run.end()
    for changes in (["encoder.depth=3"], ["train.lr=0.0003"], ["train.lr=0.0003", "force=true"]):
        run.start(*changes)
        run.end()
    return run.result(since, lambda line: "holds the work of other settings" in line)


def object_store_full(run: Run) -> dict[str, Any]:
    """Pretraining on a cluster whose object store of 80 MB, without spilling, is full of another program's objects."""
    port = 20000 + os.getpid() % 20000
    head = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"),
        *(f"--port={port}", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--include-dashboard=false"),
        '--system-config={"automatic_object_spilling_enabled":false}',
    ]  # fmt: skip
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cluster = subprocess.Popen(head, env={**os.environ, **environment}, start_new_session=True, **quiet)
    fill = [sys.executable, "-c", FILLER, f"127.0.0.1:{port}"]
    filler = None
    try:
        ends = time.monotonic() + PATIENCE
        while True:
            filler = subprocess.Popen(fill, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
            line = filler.stdout.readline()  # type: ignore[union-attr]
            if line or time.monotonic() > ends:
                break
        run.said.append((time.monotonic(), line.strip()))
        since = time.monotonic()
        run.start(f"cluster.address=127.0.0.1:{port}", environment=environment)
        run.end()
        return run.result(since) | {"filled": line.strip()}
    finally:
        for process in (filler, cluster):
            if process is not None:
                for victim in (*psutil.Process(process.pid).children(recursive=True), process):
                    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                        victim.kill()


FILLER = """
import sys, time, numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
kept = []
size = 8 << 20
while size > 1 << 16:
    try:
        kept.append(ray.put(numpy.zeros(size, numpy.uint8)))
    except Exception:
        size //= 2
print("full", round(sum(len(ray.get(ref)) for ref in kept) / 1e6), "MB of 80", flush=True)
time.sleep(100000)
"""

FAULTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        undisturbed, worker_killed, all_workers_killed, ray_killed, hang_stopped, hang_reading, slow_worker, clock_back,
        shard_missing, shard_away, shard_damaged, disk_full, second_run, changed_recipe, object_store_full,
    )
}  # fmt: skip
FAKETIME = ""


def _faketime() -> str:
    try:
        import libfaketime
    except ImportError:
        raise Missing("the package libfaketime, or --faketime LIBRARY") from None
    return str(next(Path(libfaketime.__file__).parent.rglob("libfaketime.so*")))


def copy_of(shards: Path, folder: Path) -> Path:
    """A shard set of symbolic links, so that files can be removed."""
    folder.mkdir(parents=True)
    for file in shards.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    return folder


def attempt(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one fault."""
    run = Run(folder, copy_of(Path(arguments.shards), folder / "shards"), arguments.images, arguments.images // 20)
    began = time.monotonic()
    try:
        return {**FAULTS[name](run), "seconds": round(time.monotonic() - began)}
    except Missing as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "said": [line for _, line in run.said]}
    finally:
        if run.process is not None and run.process.poll() is None:
            for victim in (*psutil.Process(run.process.pid).children(recursive=True), run.process):
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    victim.kill()


def main() -> None:
    """Run the faults and report what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"faults to try: {', '.join(FAULTS)}; default: all")
    parser.add_argument("--shards", required=True, help="a local shard set with at least 2000 train images of 64 px")
    parser.add_argument("--images", type=int, default=10_000, help="images that a run trains on")
    parser.add_argument("--folder", help="folder that keeps the runs; default: a temporary one")
    parser.add_argument("--faketime", default="", help="path to libfaketime.so.1, for clock_back")
    parser.add_argument("--json", help="file for the results; existing results of other faults are kept")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FAULTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(FAULTS)}")
    globals()["FAKETIME"] = arguments.faketime
    root = Path(arguments.folder or tempfile.mkdtemp(prefix="faults-"))
    results: dict[str, Any] = {}
    if arguments.json and Path(arguments.json).exists():
        results = json.loads(Path(arguments.json).read_text())["faults"]
    try:
        for name in arguments.names or FAULTS:
            shutil.rmtree(root / name, ignore_errors=True)
            results[name] = found = attempt(name, arguments, (root / name).resolve())
            if "undisturbed" in results and found.get("weights"):
                found["same"] = found["weights"] == results["undisturbed"]["weights"]
            shown = {key: value for key, value in found.items() if key not in ("said", "weights")}
            print(f"{name}: {shown}")
            for line in found.get("said", []):
                print(f"    {re.sub(r'^WARNING:?', '', line)}")
            sys.stdout.flush()
            if arguments.json:
                write_json(
                    Path(arguments.json), {"machine": machine_facts(), "images": arguments.images, "faults": results}
                )
    finally:
        if not arguments.folder:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
