"""A training step (forward, backward, optimiser) on synthetic input: a table and a JSON file.

    python benchmarks/step.py --json FILE [--recipes NAME …] [--batch 256] [--repeats 5] [--seconds 5]
    python benchmarks/step.py --costs [NAME …]     the cost lines in the headers of recipes

It runs the project's own `TrainStep`: quantised coefficients become images, masks and targets on the device, as in
training. Recipes take turns, and rates are medians over the repeats. Model FLOPs utilisation (mfu) is the counted FLOPs
of forward and backward (3 times those of forward) per second, divided by the rate that matrix products reach on the
same device with the same type in the same run. On a GPU each recipe runs eagerly and compiled; numbers without a mode
are those of the compiled one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import BenchmarkError, in_child, installed, machine_facts, write_json
from step_contenders import (
    DEFAULT,
    MATRIX,
    Contender,
    Settings,
    make_contender,
    matmul_rate,
    measure_rate,
    target_seconds,
)

GOALS: dict[str, tuple[str, float]] = {
    "wamim_vs_mae_step": (">=", 1.6),
    "target_share_device": ("<=", 0.02),
    "target_share_stored": ("<=", 0.01),
}
MFU_GOAL = (">=", 0.45)  # on a GPU


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def run(settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure all recipes; those that cannot be built are skipped with their reason."""
    contenders, left_out = [], {}
    for name in settings.recipes:
        for mode in settings.modes:
            say(f"{name}: {mode}, first steps")
            try:
                contenders.append(make_contender(name, settings, mode))
            except (ValueError, torch.OutOfMemoryError) as error:
                left_out[f"{name} {mode}"] = str(error).partition("\n")[0]
                say(f"{name}: skipped, {error}")
    matmul: list[float] = []
    shares: dict[str, list[float]] = {"stored": [], "device": []}
    wavelet = next((one for one in reversed(contenders) if one.recipe.target.kind == "wavelet"), None)
    for repeat in range(settings.repeats):
        matmul.append(matmul_rate(settings))
        for one in contenders:
            measure_rate(one, settings)
            say(f"{one.name}: {one.rates[-1]:.2f} images/s (repeat {repeat + 1} of {settings.repeats})")
        if wavelet is not None:
            step_seconds = settings.batch / wavelet.rates[-1]
            for kind, found in shares.items():
                found.append(target_seconds(wavelet, settings, on_device=kind == "device") / step_seconds)
    numbers, goals = numbers_of(contenders, statistics.median(matmul), shares, settings.device)
    return {
        "machine": facts,
        "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
        "numbers": numbers,
        "goals": goals,
        "recipes": {one.name: _described(one, statistics.median(matmul), settings) for one in contenders},
        "matmul_flops_per_second": matmul,
        "target_share_of": wavelet.name if wavelet else None,
        "left_out": left_out,
    }


def numbers_of(
    contenders: Sequence[Contender], matmul: float, shares: dict[str, list[float]], device: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The named numbers, and whether their goals are reached."""
    rates = {one.name: one.images_per_second for one in contenders}
    numbers: dict[str, Any] = {}
    for suffix, mode in ((" compiled", "compiled"), ("", "eager")):
        pair = [rates.get(f"{name}{suffix}") for name in DEFAULT]
        if all(pair):
            numbers.setdefault("wamim_vs_mae_step", pair[0] / pair[1])
            numbers[f"wamim_vs_mae_step {mode}"] = pair[0] / pair[1]
    numbers["mfu"] = {one.name: one.images_per_second * one.cost.training_flops / matmul for one in contenders}
    numbers |= {f"target_share_{kind}": statistics.median(found) for kind, found in shares.items() if found}
    goals = {name: verdict(goal, numbers[name]) for name, goal in GOALS.items() if name in numbers}
    if device.startswith("cuda"):
        goals |= {f"mfu {name}": verdict(MFU_GOAL, value) for name, value in numbers["mfu"].items()}
    return numbers, goals


def verdict(goal: tuple[str, float], value: float) -> str:
    """A goal, and whether it is reached."""
    reached = value >= goal[1] if goal[0] == ">=" else value <= goal[1]
    return f"{goal[0]} {goal[1]:g}: {'reached' if reached else 'missed'}"


def _described(one: Contender, matmul: float, settings: Settings) -> dict[str, Any]:
    found = {
        "images_per_second": one.images_per_second,
        "repeats": one.rates,
        "step_seconds": settings.batch / one.images_per_second,
        "forward_gflop_per_image": one.cost.forward_flops / 1e9,
        "training_gflop_per_image": one.cost.training_flops / 1e9,
        "encoder_gflop_per_image": one.cost.encoder_flops / 1e9,
        "decoder_gflop_per_image": one.cost.decoder_flops / 1e9,
        "parameters": one.cost.parameters,
        "mfu": one.images_per_second * one.cost.training_flops / matmul,
    }
    if one.peaks:
        return {**found, "peak_memory_bytes": max(one.peaks)}
    names = ("overrides", "batch", "device", "dtype")
    arguments = {name: getattr(settings, name) for name in names}
    try:
        return {
            **found,
            "peak_memory_bytes": in_child("step_contenders:peak_memory", recipe=one.given, **arguments),
        }
    except BenchmarkError as error:
        return {**found, "peak_memory_bytes": None, "peak_memory_missing": str(error)}


def table(result: dict[str, Any]) -> str:
    """The results as text."""
    lines = [f"{'recipe':32} {'images/s':>10} {'ms/step':>10} {'peak GiB':>9} {'GFLOP':>8} {'mfu':>6}"]
    for name, made in result["recipes"].items():
        peak = f"{made['peak_memory_bytes'] / 2**30:.2f}" if made["peak_memory_bytes"] else "-"
        lines.append(
            f"{name:32} {made['images_per_second']:10.2f} {1e3 * made['step_seconds']:10.1f} {peak:>9} "
            f"{made['training_gflop_per_image']:8.1f} {made['mfu']:6.3f}"
        )
    matmul = statistics.median(result["matmul_flops_per_second"])
    lines.append(f"{'matrix products, ' + result['settings']['dtype']:32} {matmul / 1e12:10.3f} TFLOP/s")
    for name, value in result["numbers"].items():
        if isinstance(value, float):
            lines.append(f"{name:32} {value:10.4f} {result['goals'].get(name, '')}".rstrip())
    lines += [f"{name:32} {said}" for name, said in result["goals"].items() if name.startswith("mfu ")]
    lines += [f"{name:32} skipped: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def costs(names: Sequence[str]) -> Iterator[str]:
    """Name and cost line of recipes; default: all."""
    from pipeline.config.load import load, names_of
    from pipeline.models.build import build_blank_model
    from wavemim.flops import cost_of

    for name in names or names_of("pipeline", "recipes"):
        with torch.device("meta"):
            model = build_blank_model(load(name))
        yield f"{name + ':':24} # Cost: {cost_of(model)}"


def describe(device: str, threads: int | None) -> dict[str, Any]:
    """The machine, its device and the relevant libraries."""
    facts = machine_facts() | {"timm": installed("timm"), "threads": threads or torch.get_num_threads()}
    if device.startswith("cuda"):
        found = torch.cuda.get_device_properties(device)
        facts |= {"gpu": found.name, "gpu_memory_gib": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--costs", nargs="*", metavar="NAME", help="only print the cost lines of recipes")
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULT), metavar="NAME", help="names or YAML files")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override in all recipes")
    parser.add_argument("--batch", type=int, help="images per step; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--repeats", type=int, help="default: 5 on a GPU, 3 on a CPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="minimum duration of a repeat")
    parser.add_argument("--device", help="default: cuda where there is a GPU, otherwise cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="only compiled, or only eager; default: both on a GPU, eager on a CPU",
    )
    parser.add_argument(
        "--matrix", type=int, help="rows of the square matrices whose products measure the device's rate"
    )
    given = parser.parse_args(arguments)
    if given.costs is not None:
        for line in costs(given.costs):
            print(line, flush=True)
        return 0
    if given.json is None:
        parser.error("--json FILE is needed")
    if given.threads:
        torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.startswith("cuda")
    modes = ("eager", "compiled") if gpu else ("eager",)
    settings = Settings(
        recipes=tuple(given.recipes),
        overrides=tuple(given.set),
        batch=given.batch or (256 if gpu else 8),
        repeats=given.repeats or (5 if gpu else 3),
        seconds=given.seconds,
        device=device,
        dtype=given.dtype or ("bfloat16" if gpu else "float32"),
        modes=modes if given.compile is None else ("compiled",) if given.compile else ("eager",),
        matrix=given.matrix or MATRIX["cuda" if gpu else "cpu"],
    )
    result = run(settings, describe(device, given.threads))
    write_json(given.json, result)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
