"""Training from shards compared with training on batches that are already in memory: a table and a JSON file.

    python benchmarks/end_to_end.py --json FILE [--recipe NAME] [--images FOLDER | --shards SET] [--workers N] [--ray]

It runs the project's own loop (`pipeline.training.pretrain_loop.train`) as training does: one process per worker, DDP
between several workers, and as many reader threads as training would use. The two runs differ only in their batches:
one reads them from the shard set, the other reuses its first few batches. They take turns, and numbers are medians
over the repeats:

    end_to_end_vs_synthetic   images/s from shards divided by images/s from memory
    data_wait_share           share of the time that the slowest worker waits for a batch from shards

Without --shards, a set of --rows images is made, from the photos of a folder or from synthetic images. Reader threads
stop and start at the end of every epoch: a set with few batches per epoch exaggerates that cost. With --ray the workers
are those of the pretrain stage, including MLflow; without it, neither Ray nor MLflow is needed. On a GPU the recipe is
compiled; `--set train.compile=false` turns that off.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from end_to_end_training import SHARDS, SYNTHETIC, Job, ray_workers, workers_of
from measure import BenchmarkError, in_child, interleaved, machine_facts, usable_cores, write_json

GOALS = {"end_to_end_vs_synthetic": (">=", 0.97), "data_wait_share": ("<=", 0.03)}


def run(job: Job, *, repeats: int, seconds: float, ray: bool, folder: Path) -> dict[str, Any]:
    """Measure both kinds of batches in turn."""
    found: dict[str, list[list[dict[str, float]]]] = {SYNTHETIC: [], SHARDS: []}
    with (ray_workers if ray else workers_of)(job, folder) as call:
        trial = call(SYNTHETIC, job.warm + job.log_every)[0]
        rate = trial["images_per_second"]
        batch = trial["seconds"] * rate / job.log_every
        steps = job.warm + max(1, round(seconds * rate / batch / job.log_every)) * job.log_every
        say(f"{steps} steps of {batch:.0f} images per repeat; the first {job.warm} of them are not counted")

        def measure(kind: str) -> float:
            found[kind].append(call(kind, steps))
            return found[kind][-1][0]["images_per_second"]

        contenders = {kind: functools.partial(measure, kind) for kind in found}
        rates = interleaved(contenders, repeats, say)
    if rates.skipped:
        raise BenchmarkError("; ".join(f"{kind}: {reason}" for kind, reason in rates.skipped.items()))
    waits = {kind: [max(worker["wait"] for worker in workers) for workers in made] for kind, made in found.items()}
    pairs = [shards / memory for memory, shards in zip(rates.repeats[SYNTHETIC], rates.repeats[SHARDS], strict=True)]
    numbers = {
        "end_to_end_vs_synthetic": rates.ratio(SHARDS, [SYNTHETIC]),
        "data_wait_share": statistics.median(waits[SHARDS]),
    }
    return {
        "numbers": numbers,
        "goals": {name: verdict(*goal, numbers[name]) for name, goal in GOALS.items()},
        "images_per_second": {kind: rates.median(kind) for kind in found},
        "repeats": rates.repeats,
        "ratios_of_pairs": pairs,
        "data_wait_shares": waits,
        "cpu_seconds_per_image": {kind: cpu_of(made) for kind, made in found.items()},
        "steps": steps,
        "batch": round(batch),
    }


def cpu_of(made: Sequence[Sequence[dict[str, float]]]) -> float | None:
    """CPU seconds per image of all workers and their threads; unlike a rate, other processes hardly affect it."""
    if not all("cpu_seconds_per_image" in worker for workers in made for worker in workers):
        return None
    return statistics.median(sum(worker["cpu_seconds_per_image"] for worker in workers) for workers in made)


def verdict(sign: str, bound: float, value: float) -> str:
    """A goal, and whether it is reached."""
    reached = value >= bound if sign == ">=" else value <= bound
    return f"{sign} {bound:g}: {'reached' if reached else 'missed'}"


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The results as text."""
    lines = [f"{'batches':28} {'images/s':>10} {'data wait':>10} {'CPU ms/image':>13}"]
    for kind, rate in result["images_per_second"].items():
        wait = statistics.median(result["data_wait_shares"][kind])
        cpu = result["cpu_seconds_per_image"][kind]
        name = "from shards" if kind == SHARDS else "in memory"
        lines.append(f"{name:28} {rate:10.1f} {wait:10.2%} {'-' if cpu is None else f'{1e3 * cpu:.2f}':>13}")
    lines += [f"{name:28} {value:10.4f} {result['goals'][name]}" for name, value in result["numbers"].items()]
    return "\n".join(lines)


def job_of(given: argparse.Namespace, folder: Path) -> Job:
    """The settings of this call, with a shard set made in `folder` where none is given."""
    import torch

    gpus = torch.cuda.device_count()
    gpu = gpus > 0 if given.device is None else given.device == "cuda"
    recipe = given.recipe or ("wamim_vit_base" if gpu else "small_wavelet")
    workers = given.workers or (1 if gpu else min(2, len(usable_cores())))
    defaults = [f"train.batch={256 * workers}", "train.compile=true"] if gpu else []
    overrides = (*defaults, *given.set)
    shards = given.shards
    if shards is None:
        rows = given.rows or (20_480 if gpu else 12_800)
        shards = str(folder / "shards")
        say(f"writing {rows} rows")
        images = str(Path(given.images).absolute()) if given.images else None
        made = {"recipe": recipe, "overrides": list(overrides), "out": shards, "rows": rows, "images": images}
        in_child("end_to_end_shards:make_shards", **made)
    return Job(recipe, overrides, shards, workers, "cuda" if gpu else "cpu", log_every=given.log_every, warm=given.warm)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--json", type=Path, required=True, help="file to write")
    made.add_argument("--recipe", help="name or YAML file; default: wamim_vit_base on a GPU, small_wavelet on a CPU")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override in the recipe")
    source = made.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="FOLDER", help="photos to make a shard set from")
    source.add_argument("--shards", metavar="SET", help="a shard set that fits the recipe, as a folder or URL")
    made.add_argument("--rows", type=int, help="rows of the set to make; default: 20480 on a GPU, 12800 on a CPU")
    made.add_argument("--workers", type=int, help="default: 1 on a GPU, 2 on a CPU")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    made.add_argument("--ray", action="store_true", help="train through Ray Train, as the pretrain stage does")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--seconds", type=float, default=20.0, help="approximate duration of a repeat")
    made.add_argument("--log-every", type=int, default=10, help="steps between logged metrics")
    made.add_argument("--warm", type=int, default=10, help="warm-up steps of each repeat, a multiple of --log-every")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser()
    given = options.parse_args(arguments)
    if given.warm % given.log_every or given.warm < given.log_every:
        options.error(f"--warm {given.warm}: not a multiple of --log-every {given.log_every}")
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as temporary:
        job = job_of(given, Path(temporary))
        result = run(job, repeats=given.repeats, seconds=given.seconds, ray=given.ray, folder=Path(temporary))
    if job.device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    described = {**asdict(job), "images": given.images, "ray": given.ray, "seconds": given.seconds}
    write_json(given.json, {"machine": facts, "settings": described, **result})
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
