"""Many trials of a sweep log to an MLflow server at once: is anything lost, stored twice or left running, and how long do
writes take?

    python benchmarks/tracking_server.py [--uri URI] [--trials 50] [--lines 60] [--seconds 60] [--processes 5] [--json FILE]

The server is any that is running, such as that of deploy/mlflow; its password comes from MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. All trials begin together. Each logs as a real one does, by wavemim's tracker: its run with
parameters, tags and the recipe, `--lines` lines of ten metrics spread over `--seconds`, a picture, and its end. They run in
threads of `--processes` processes, which end with their last trial. Then every value is read back. Reported:

    lost, doubled      values of metrics that were logged and are not stored, or are stored more than once
    runs               runs of trials in MLflow, by status; all are FINISHED if each was ended by its own trial
    files              trials whose picture and recipe are stored
    log_max_s          the longest that a trial waited in `Tracker.log`
    start_s, end_s     median and longest seconds of `Tracker.start` and `Tracker.end`
    calls              requests to the server: number, failures by type, median, 99 % quantile and slowest, in seconds

wavemim has no code for this benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import machine_facts, write_json

from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.storage.jsonl import JsonLines
from pipeline.tracking import mlflow_client as store
from pipeline.tracking import sender, store_uris
from pipeline.tracking.journal import METRICS, metric_values
from pipeline.tracking.tracker import RunHandle, Tracker

NAMES = (
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "perf/images_per_second",
    "perf/data_wait_share",
    "eval/objective",
)
NAMES += tuple(f"train/loss_level{level}" for level in range(1, 5))
PICTURE = "picture.png"


def trial(recipe: Recipe, parent: RunHandle, folder: Path, number: int, lines: int, seconds: float) -> dict[str, float]:
    """Log as a trial does; returns how long it waited."""
    place = folder / f"{number:03d}"
    place.mkdir()
    (place / PICTURE).write_bytes(os.urandom(50_000))
    params = {f"level_weights.level{level}": number + level for level in range(1, 5)} | {
        "mask.ratio": 0.1,
        "seed": number,
    }
    began = time.monotonic()
    tracker = Tracker.start(
        recipe,
        "trial",
        parent=parent,
        name=f"#{number:03d}",
        params=params,
        log_dir=place,
        tags={"wavemim.seed": str(number)},
    )
    started = time.monotonic()
    longest = 0.0
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracker)
        for line in range(1, lines + 1):
            time.sleep(max(0.0, started + seconds * line / lines - time.monotonic()))
            before = time.monotonic()
            tracker.log(dict.fromkeys(NAMES, number + line / lines), 64 * line)
            longest = max(longest, time.monotonic() - before)
        tracker.artifact(place / PICTURE)
        tracker.description(f"trial {number}", [PICTURE])
        ending = time.monotonic()
    return {"start_s": started - began, "log_max_s": longest, "end_s": time.monotonic() - ending}


def _timed_calls(calls: list[tuple[float, str]]) -> None:
    """Note how long each request of this process takes, and its error."""
    within = store.within

    def timed(seconds: float, call: Any) -> Any:
        began, error = time.monotonic(), ""
        try:
            return within(seconds, call)
        except Exception as raised:
            error = type(raised).__name__
            raise
        finally:
            calls.append((time.monotonic() - began, error))

    sender.store.within = timed  # type: ignore[assignment]


def process(settings: dict[str, Any], numbers: list[int], barrier: Any, answers: Any) -> None:
    """Run some of the trials in threads of this process."""
    calls: list[tuple[float, str]] = []
    _timed_calls(calls)
    recipe, parent, folder = load("small", settings["overrides"]), settings["parent"], Path(settings["folder"])
    store.import_mlflow()
    together = threading.Barrier(len(numbers))

    def run(number: int) -> dict[str, float]:
        if together.wait() == 0:
            barrier.wait()
        return trial(recipe, parent, folder, number, settings["lines"], settings["seconds"])

    with ThreadPoolExecutor(len(numbers)) as pool:
        waits = list(pool.map(run, numbers))
    answers.put((waits, list(calls)))


@contextlib.contextmanager
def _sweep(recipe: Recipe, folder: Path) -> Iterator[Tracker]:
    with Tracker.start(recipe, "tune", name="sweep", log_dir=folder) as tracker:
        if not tracker.handle.run_id:
            raise SystemExit("the server does not answer, or refuses; nothing was measured")
        yield tracker


def read_back(uri: str, parent: str, folder: Path) -> dict[str, Any]:
    """Compare what is stored with what was logged."""
    client = store.connect(uri, create=False)
    experiment = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=5000)
    states, lost, doubled, complete = Counter(run.info.status for run in runs), 0, 0, 0
    of_name: dict[str, list[Any]] = {}
    for run in runs:
        of_name.setdefault(run.info.run_name, []).append(run)
    for place in sorted(folder.glob("[0-9]*")):
        wanted = Counter(v for line, _ in JsonLines(place / METRICS).read() for v in metric_values(line))
        stored: Counter[Any] = Counter()
        for run in of_name.get(f"#{place.name}", []):
            for name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                stored.update((name, value.value, value.timestamp, value.step) for value in history)
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            complete += {PICTURE, "recipe.yaml"} <= files
        lost += (wanted - stored).total()
        doubled += (stored - wanted).total()
    return {"runs": dict(states), "lost": lost, "doubled": doubled, "files": complete}


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "q99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "slowest": ordered[-1],
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the trials, and read back what they logged."""
    overrides = [f"out={folder}", f"tracking.uri={options.uri}", f"tracking.experiment=many-{uuid.uuid4().hex[:8]}"]
    context = multiprocessing.get_context("spawn")
    processes = min(options.processes, options.trials)
    barrier, answers = context.Barrier(processes), context.Queue()
    began = time.monotonic()
    with _sweep(load("small", overrides), folder / "sweep") as sweep:
        settings = {
            "overrides": overrides,
            "parent": sweep.handle,
            "folder": str(folder),
            "lines": options.lines,
            "seconds": options.seconds,
        }
        parts = [list(range(options.trials))[start::processes] for start in range(processes)]
        children = [context.Process(target=process, args=(settings, part, barrier, answers)) for part in parts]
        for child in children:
            child.start()
        answered = [answers.get(timeout=options.seconds + 1800) for _ in children]
        for child in children:
            child.join()
    took = time.monotonic() - began
    waits = [wait for part, _ in answered for wait in part]
    calls = [call for _, part in answered for call in part]
    found = read_back(options.uri, sweep.handle.run_id, folder)
    return {
        "trials": options.trials,
        "lines": options.lines,
        "values": options.trials * options.lines * len(NAMES),
        "seconds_planned": options.seconds,
        "seconds": took,
        **found,
        "log_max_s": max(wait["log_max_s"] for wait in waits),
        "start_s": _quantiles([wait["start_s"] for wait in waits]),
        "end_s": _quantiles([wait["end_s"] for wait in waits]),
        "calls": {
            "number": len(calls),
            "failed": dict(Counter(error for _, error in calls if error)),
            **_quantiles([seconds for seconds, _ in calls]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="of the server; default: MLFLOW_TRACKING_URI"
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--lines", type=int, default=60, help="lines of ten metrics that a trial logs")
    parser.add_argument("--seconds", type=float, default=60, help="that a trial takes")
    parser.add_argument("--processes", type=int, default=5, help="for the trials, which are threads")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if not options.uri:
        parser.error("--uri or MLFLOW_TRACKING_URI is needed")
    with tempfile.TemporaryDirectory(prefix="tracking-") as folder:
        result = measure(options, Path(folder))
    result = {"server": store_uris.without_password(options.uri), **result}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, {"machine": machine_facts(), **result})
    whole = result["runs"] == {"FINISHED": options.trials} and result["files"] == options.trials
    sys.exit(0 if whole and not result["lost"] and not result["doubled"] else 1)


if __name__ == "__main__":
    main()
