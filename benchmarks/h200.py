"""Everything that is to be measured on one GPU, in one go and without Ray: a table as it goes, and a JSON file.

    python benchmarks/h200.py --json FILE [--shards SET] [--minutes 6]

The parts come in this order, and one that would begin after so many minutes is left out:

    step         training steps of wamim_vit_base and mae_vit_base in bfloat16, compiled: images/s, FLOPs utilisation against the
                 measured rate of matrix products, memory, and the time of the targets (benchmarks/step.py)
    input        of the same step: bytes that go to the device for each image, and the shares of the copy, of the inverse
                 transform, and of transform and RandomResizedCrop together
    end_to_end   wamim_vit_base from the shard set SET against batches in memory, with as many reader threads as training uses
                 (benchmarks/end_to_end.py); SET holds images of 256 px
    small        training steps of the small recipes

The file is written after each part, so that a call that is cut keeps what it has. Written for an H200, and not bound to one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import end_to_end
import step
import torch
from end_to_end_training import Job
from measure import write_json
from step_contenders import DEFAULT, MATRIX, Contender, Settings, make_contender, measure_rate

GOALS = {
    "wamim_vs_mae_step": (">=", 1.6),
    "mfu": (">=", 0.45),
    "target_share_device": ("<=", 0.02),
    "end_to_end_vs_synthetic": (">=", 0.97),
}
SMALL = ("small_wavelet", "small_pixels", "small_mae", "small32_wavelet", "small32_mae")


def steps(settings: Settings) -> dict[str, Any]:
    """Part step."""
    result = step.run(settings, {})
    print(step.table(result), flush=True)
    numbers = result["numbers"]
    found = {name: numbers[name] for name in ("wamim_vs_mae_step", "target_share_device") if name in numbers}
    return {**found, "mfu": min(numbers["mfu"].values()), "recipes": result["recipes"], "left_out": result["left_out"]}


def input_shares(settings: Settings, calls: int = 20) -> dict[str, float]:
    """Part input: of the first recipe."""
    one = make_contender(settings.recipes[0], settings, settings.modes[-1])
    measure_rate(one, settings)
    seconds = settings.batch / one.images_per_second
    stored = one.batches[0]
    rows = torch.arange(settings.batch)
    inputs = one.step.views.inputs
    there = {level: values.to(settings.device) for level, values in stored.items()}
    timed = {
        "copy": lambda: [values.to(settings.device, non_blocking=True) for values in stored.values()],
        "inverse_transform": lambda: inputs.raw(there, one.crop),
        "views": lambda: one.step.views(there, rows, epoch=0, crop=one.crop),
    }
    bytes_each = sum(values.numel() * values.element_size() for values in stored.values()) / settings.batch
    found = {"bytes_per_image": bytes_each, "step_seconds": seconds}
    for name, call in timed.items():
        found[f"{name}_share"] = _median_seconds(call, one, calls) / seconds
    for name, value in found.items():
        print(f"{name:28} {value:.4g}", flush=True)
    return found


def _median_seconds(call: Callable[[], Any], one: Contender, calls: int) -> float:
    wait = torch.cuda.synchronize if one.step.device.type == "cuda" else lambda: None
    found = []
    for _ in range(calls + 1):
        wait()
        began = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def from_shards(settings: Settings, shards: str, seconds: float) -> dict[str, Any]:
    """Part end_to_end."""
    overrides = (*settings.overrides, f"train.batch={settings.batch}")
    overrides += ("train.compile=true",) if "compiled" in settings.modes else ()
    job = Job(settings.recipes[0], overrides, shards, 1, settings.device)
    with tempfile.TemporaryDirectory() as folder:
        result = end_to_end.run(job, repeats=2, seconds=seconds, ray=False, folder=Path(folder))
    print(end_to_end.table(result), flush=True)
    return {**result["numbers"], "images_per_second": result["images_per_second"]}


def small(settings: Settings, recipes: Sequence[str] = SMALL) -> dict[str, float]:
    """Part small: images/s of each recipe."""
    found = {}
    for name in recipes:
        one = make_contender(name, settings, settings.modes[-1])
        measure_rate(one, settings)
        found[name] = one.images_per_second
        print(f"{name:28} {one.images_per_second:10.1f} images/s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--shards", help="shard set of 256-px images; without one, end_to_end is left out")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins after so many; default: 6")
    parser.add_argument("--batch", type=int, default=256, help="images a step; default: 256")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each repeat; default: 4")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override in all recipes")
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    settings = Settings(
        recipes=DEFAULT,
        overrides=tuple(given.set),
        batch=given.batch,
        repeats=3,
        seconds=given.seconds,
        device="cuda" if gpu else "cpu",
        dtype="bfloat16" if gpu else "float32",
        modes=("compiled",) if gpu else ("eager",),
        matrix=MATRIX["cuda" if gpu else "cpu"] if given.seconds else 64,
    )
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: steps(settings),
        "input": lambda: input_shares(replace(settings, repeats=1)),
    }
    if given.shards:
        parts["end_to_end"] = lambda: from_shards(settings, given.shards, 3 * given.seconds)
    parts["small"] = lambda: small(replace(settings, repeats=1))
    began = time.monotonic()
    found: dict[str, Any] = {"machine": step.describe(settings.device, None), "left_out": {}}
    for name, part in parts.items():
        if time.monotonic() - began > 60 * given.minutes:
            found["left_out"][name] = "out of time"
        else:
            try:
                found[name] = part()
            except Exception as error:  # the other parts count all the same
                found["left_out"][name] = f"{type(error).__name__}: {error}"
        if name in found["left_out"]:
            print(f"{name}: left out, {found['left_out'][name]}", flush=True)
        measured = {key: value for part in ("step", "end_to_end") for key, value in found.get(part, {}).items()}
        found["goals"] = {key: step.verdict(goal, measured[key]) for key, goal in GOALS.items() if key in measured}
        write_json(given.json, found)
    for name, said in found["goals"].items():
        print(f"{name:28} {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
