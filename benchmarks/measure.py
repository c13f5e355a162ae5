"""Shared by the benchmarks: child processes on chosen cores, rates over whole epochs, machine information, JSON."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# numpy and torch read these when they are imported, so they are set in the child's environment.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ANSWER = "answer: "


class Missing(Exception):
    """A measurement lacks something it needs; the text says what."""


class BenchmarkError(Exception):
    """A measurement failed; the text is the child's last message."""


class OutOfTime(Exception):
    """A measurement was stopped because its time was over."""


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Child:
    """How a child process runs.

    Attributes:
        cores: The process and its descendants are pinned to that many cores; libraries use as many threads.
        threads: Threads of the libraries; default: `cores`.
        libraries: Folder of additional packages that only this process can import.
        say: Called with every line that the function prints, as soon as it is printed.
        time_limit: The process is ended after so many seconds.
    """

    cores: int | None = None
    threads: int | None = None
    libraries: str | None = None
    say: Callable[[str], None] | None = None
    time_limit: float | None = None


def in_child(function: str, child: Child | None = None, /, **arguments: Any) -> Any:
    """Call a function of this folder in a new process.

    Args:
        function: "module:function".
        child: How the process runs. Apart from the arguments, whose names may be the same.
        **arguments: passed to the function, as JSON.

    Returns:
        What the function returns, through JSON.

    Raises:
        Missing: something that the function needs is not there.
        BenchmarkError: the function failed.
        OutOfTime: it took longer than `time_limit`.
    """
    child = child or Child()
    cores = child.cores
    threads = cores if child.threads is None else child.threads
    environment = dict(os.environ)
    if threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    if child.libraries:
        environment["PYTHONPATH"] = os.pathsep.join([child.libraries, *filter(None, [environment.get("PYTHONPATH")])])
    allowed = usable_cores() if cores is None else usable_cores()[-cores:]  # the first core serves most interrupts
    if cores is not None and len(allowed) < cores:
        raise Missing(f"{cores} cores")
    call = json.dumps({"function": function, "arguments": arguments, "cores": allowed, "threads": threads})
    command = [sys.executable, str(Path(__file__).resolve())]
    status, answers, errors, late = _run(command, environment, call, child)
    if late:
        raise OutOfTime(f"{function} was stopped after {child.time_limit:.0f} s")
    if status or not answers:
        lines = [line for line in errors.splitlines() if line.strip()]
        if os.environ.get("BENCHMARK_TRACEBACKS"):
            print(errors, file=sys.stderr)
        raise BenchmarkError(f"{function} ended with status {status}: {lines[-1] if lines else 'no message'}")
    answer = json.loads(answers[-1])
    if "missing" in answer:
        raise Missing(answer["missing"])
    return answer["value"]


def _run(command: list[str], environment: Mapping[str, str], call: str, how: Child) -> tuple[int, list[str], str, bool]:
    """Run the process: its status, its answers, its messages, and whether it was ended because its time was over."""
    late = threading.Event()
    answers: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(how.time_limit or 0, lambda: (late.set(), child.kill()))
        try:
            if how.time_limit is not None:
                timer.start()
            with contextlib.suppress(BrokenPipeError), child.stdin as sent:  # type: ignore[union-attr]
                sent.write(call)
            for line in child.stdout:  # type: ignore[union-attr]
                if line.startswith(ANSWER):
                    answers.append(line.removeprefix(ANSWER))
                elif how.say is not None:
                    how.say(line.rstrip("\n"))
            status = child.wait()
        finally:
            timer.cancel()
            child.kill()
            child.wait()
            child.stdout.close()  # type: ignore[union-attr]
        errors.seek(0)
        return status, answers, errors.read(), late.is_set()


def _be_child(call: Mapping[str, Any]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, call["cores"])
    if call["threads"]:
        import torch

        torch.set_num_threads(call["threads"])
    module, _, name = call["function"].partition(":")
    # This file runs as __main__ here, and the function raises the Missing of the imported module.
    missing = importlib.import_module("measure").Missing
    try:
        answer = {"value": getattr(importlib.import_module(module), name)(**call["arguments"])}
    except missing as error:
        answer = {"missing": str(error)}
    print(ANSWER + json.dumps(answer), flush=True)


def rate(epoch: Callable[[int], Iterable[int]], seconds: float) -> float:
    """Images per second over whole epochs.

    Only whole epochs count: stopping inside one would waste what was read ahead. Epoch 0 is a warm-up that fills the
    page cache.

    Args:
        epoch: called with the number of an epoch, yields the number of images of each batch.
        seconds: minimum duration of the measurement.
    """
    for _ in epoch(0):
        pass
    images, number, began = 0, 0, time.perf_counter()
    while number == 0 or time.perf_counter() - began < seconds:
        number += 1
        images += sum(epoch(number))
    return images / (time.perf_counter() - began)


def interleaved(contenders: Mapping[str, Callable[[], float]], repeats: int, say: Callable[[str], None]) -> Rates:
    """Measure the contenders in turn, `repeats` times, so that changes in the machine's speed affect all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    skipped: dict[str, str] = {}
    for repeat in range(repeats):
        for name, contender in contenders.items():
            if name in skipped:
                continue
            try:
                rates[name].append(contender())
            except (Missing, BenchmarkError) as error:
                skipped[name] = str(error)
                say(f"{name}: skipped, {error}")
                continue
            say(f"{name}: {rates[name][-1]:.1f} images/s (repeat {repeat + 1} of {repeats})")
    return Rates({name: found for name, found in rates.items() if name not in skipped}, skipped)


class Rates:
    """The repeats of every contender in images/s, and why others were skipped."""

    def __init__(self, repeats: Mapping[str, list[float]], skipped: Mapping[str, str]) -> None:
        self.repeats, self.skipped = dict(repeats), dict(skipped)

    def median(self, name: str) -> float | None:
        """Images/s; None for a skipped contender."""
        return statistics.median(self.repeats[name]) if name in self.repeats else None

    def ratio(self, above: str, below: Iterable[str]) -> float | None:
        """Median of `above` divided by the largest median of `below`; None where either is missing."""
        mine = self.median(above)
        others = [median for name in below if (median := self.median(name)) is not None]
        return mine / max(others) if mine is not None and others else None


def installed(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """The machine, the versions and the commit of a measurement; no paths."""
    return {
        "cpu": _cpu_model(),
        "cores": len(usable_cores()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "torchvision", "pyarrow", "pillow", "numpy", "ray")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "load_average_at_start": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of this checkout, with a + if files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.strip() else "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    _be_child(json.load(sys.stdin))
