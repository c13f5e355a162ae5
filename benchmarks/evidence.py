"""Which target, decoder, mask or weighting yields the best encoder? Same shard set, seed, data order, masks and budget.

    python benchmarks/evidence.py --shards SHARDS                 # reduced: about an hour on two cores
    python benchmarks/evidence.py --shards SHARDS --full --device cuda   # within 25 minutes on one GPU

Every variant of a comparison is trained without Ray from the same seed on the same rows with the same masks (they are a
function of seed, epoch and row). The frozen encoder is evaluated by a linear probe on val at several points during
training. Variants take turns, seed by seed. Seconds are those of training only, on a CPU the CPU seconds of the process.
`wavelet_training_to_reach_best_pixel` is the number of images that the wavelet target needs to reach the best accuracy
of the pixel target, as a share of those that pixels needed. The same command resumes an interrupted call. The numbers go
to results/evidence-DATE-DEVICE.json in this folder, with the plot beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import BenchmarkError, in_child, machine_facts, usable_cores, write_json

Curve = Sequence[Mapping[str, float]]  # returned by evidence_training.curve
Results = Mapping[str, Sequence[Curve]]  # variant -> one curve per seed

# comparison -> variant -> (recipe, overrides)
COMPARISONS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "targets": {
        "wavelet": ("small_wavelet", {}),
        "pixels": ("small_pixels", {}),
        "pixels, last block alone": ("small_pixels", {"target.taps": {0: 8}}),
        "hog": ("small_hog", {}),
        "fourier": ("small_fourier", {}),
    },
    "wavelets": {
        "levels 3, 4, per patch": ("small_wavelet", {}),
        "by the data set": ("small_wavelet", {"target.normalise": "dataset"}),
        "by the data set, L1": ("small_wavelet", {"target.normalise": "dataset", "target.loss": "l1"}),
        "by contrast": ("small_wavelet", {"target.normalise": "contrast"}),
        "by contrast, all bands": (
            "small_wavelet",
            {"target.normalise": "contrast", "target.bands": {3: "AHVD", 4: "AHVD"}},
        ),
        "not normalised": ("small_wavelet", {"target.normalise": "none"}),
        "level 4 alone": ("small_wavelet", {"target.taps": {4: 8}}),
        "level 3 alone": ("small_wavelet", {"target.taps": {3: 8}}),
        "levels 2, 3, 4, equal weights": ("small_wavelet", {"target.taps": {2: 4, 3: 6, 4: 8}}),
        "levels 1 to 4, equal weights": ("small_wavelet", {"target.taps": {1: 2, 2: 4, 3: 6, 4: 8}}),
        "levels 1 to 4 at block 8": ("small_wavelet", {"target.taps": {1: 8, 2: 8, 3: 8, 4: 8}}),
        "levels 1 to 3 at block 6": ("small_wavelet", {"target.taps": {1: 6, 2: 6, 3: 6, 4: 8}}),
        "levels 1 to 4, weights 0.1, 0.3, 1, 3": (
            "small_wavelet",
            {"target.taps": {1: 2, 2: 4, 3: 6, 4: 8}, "target.weights": {1: 0.1, 2: 0.3, 3: 1, 4: 3}},
        ),
        "details alone": ("small_wavelet", {"target.bands": {3: "HVD", 4: "HVD"}}),
        "all bands": ("small_wavelet", {"target.bands": {3: "AHVD", 4: "AHVD"}}),
        "learned weights": ("small_wavelet", {"target.weighting": "learned"}),
        "coarse to fine": ("small_wavelet", {"target.weighting": "coarse_to_fine"}),
    },
    "decoders": {
        "self, 1 block a tap": ("small_wavelet", {}),
        "self, shared": ("small_wavelet", {"decoder.shared": True}),
        "self, a quarter predicted": ("small_wavelet", {"decoder.predict": 0.25}),
        "cross": ("small_wavelet", {"decoder.attention": "cross"}),
        "cross, a quarter predicted": ("small_wavelet", {"decoder.attention": "cross", "decoder.predict": 0.25}),
        "self, 2 blocks a tap": ("small_wavelet", {"decoder.depth": 2}),
        "linear, masked tokens": ("small_wavelet", {"decoder.depth": 0, "encoder.sees": "masked"}),
    },
    "masks": {
        "random": ("small_wavelet", {}),
        "blocks of 16 px": ("small_wavelet", {"mask.kind": "block", "mask.unit": 16}),
        "energy, detail hidden": ("small_wavelet", {"mask.kind": "energy", "mask.strength": 0.5}),
        "energy, detail seen": ("small_wavelet", {"mask.kind": "energy", "mask.strength": -0.5}),
    },
}


class Journal:
    """Finished curves, kept in a file until the results are complete: the same command resumes an interrupted call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # the last line may be incomplete
                lines.append(json.loads(line))
        self._curves = {line["task"]: line["curve"] for line in lines}
        self._lock = threading.Lock()
        self._running: dict[str, threading.Lock] = {}
        if lines:
            print(f"reusing {len(lines)} curves from {path}; remove it to start over", flush=True)

    def curve(self, threads: int, **task: Any) -> Curve:
        """Train and probe in a new process, or return the recorded curve; no task runs twice."""
        key = json.dumps(task, sort_keys=True)
        with self._lock:
            running = self._running.setdefault(key, threading.Lock())
        with running:
            if key not in self._curves:
                found = in_child("evidence_training:curve", threads=threads, **task)
                with self._lock, self.path.open("a") as file:
                    file.write("\n" + json.dumps({"task": key, "curve": found}))
                self._curves[key] = found
            return self._curves[key]  # type: ignore[no-any-return]

    def close(self) -> None:
        """Remove the file: everything is in the results."""
        self.path.unlink(missing_ok=True)


# Short runs need steps more than large batches: with the recipes' batch of 128, HOG learnt nothing from 20,000 images.
REDUCED = {"train.batch": 32, "train.lr": 6e-3}


def run(
    arguments: argparse.Namespace, variants: Mapping[str, tuple[str, dict[str, Any]]], journal: Journal
) -> dict[str, list[Curve]]:
    """Train every variant with every seed, `jobs` of them at a time.

    Returns:
        The curves of each variant, by seed. All begin with the untrained encoder, which is probed once per seed.
    """
    results: dict[str, list[Curve]] = {name: [] for name in variants}
    shared = {} if arguments.full else REDUCED
    first = next(iter(variants))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending: list[tuple[str, int, Future[Curve]]] = [
            (
                name,
                seed,
                pool.submit(
                    journal.curve,
                    arguments.threads,
                    shards_at=arguments.shards,
                    recipe_name=recipe,
                    overrides={**shared, **overrides},
                    seed=seed,
                    images_seen=arguments.images_seen,
                    points=arguments.points,
                    device=arguments.device,
                    untrained=name == first,
                ),
            )
            for seed in range(arguments.seeds)
            for name, (recipe, overrides) in variants.items()
        ]
        for name, seed, future in pending:
            curve = future.result()
            results[name].append(curve if name == first else [results[first][seed][0], *curve])
            points = ", ".join(f"{point['top1']:.1f} % at {point['images']:,.0f}" for point in results[name][-1])
            print(f"{name}, seed {seed}: {points}", flush=True)
    return results


def training_to_reach(curves: Sequence[Curve], goal: float, key: str = "images") -> float | None:
    """Images (or seconds) after which the mean curve over seeds first reaches `goal`, interpolated linearly."""
    mean = [
        (statistics.mean(curve[i][key] for curve in curves), statistics.mean(curve[i]["top1"] for curve in curves))
        for i in range(len(curves[0]))
    ]
    if mean[0][1] >= goal:
        return 0.0
    for (before, low), (after, high) in itertools.pairwise(mean):
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low)
    return None


def needed(results: Results) -> float | None:
    """`wavelet_training_to_reach_best_pixel`; None if wavelets never reach it."""
    pixels = [name for name in results if name.startswith("pixels")]
    best = {
        name: max(statistics.mean(c[i]["top1"] for c in results[name]) for i in range(len(results[name][0])))
        for name in pixels
    }
    name = max(best, key=best.__getitem__)
    own, ours = training_to_reach(results[name], best[name]), training_to_reach(results["wavelet"], best[name])
    return ours / own if own and ours is not None else None


def table(results: Results) -> str:
    """Final accuracy of each variant: mean and values of all seeds, interval of the first seed, images/s."""
    lines = ["| variant | top-1, % | each seed | 95 % of one | images/s | TFLOP |", "|---|---|---|---|---|---|"]
    for name, curves in results.items():
        ends = [curve[-1] for curve in curves]
        each = ", ".join(f"{end['top1']:.1f}" for end in ends)
        rate = statistics.median(end["images"] / end["seconds"] for end in ends)
        mean = statistics.mean(end["top1"] for end in ends)
        interval, work = f"{ends[0]['low']:.1f}-{ends[0]['high']:.1f}", ends[0]["flops"] / 1e12
        lines.append(f"| {name} | {mean:.1f} | {each} | {interval} | {rate:.0f} | {work:.0f} |")
    untrained = next(iter(results.values()))[0][0]
    lines.append(f"| untrained | {untrained['top1']:.1f} | | {untrained['low']:.1f}-{untrained['high']:.1f} | | |")
    return "\n".join(lines)


def draw(path: Path, results: Results) -> None:
    """Plot accuracy against images seen and against seconds of training: one line per variant, its seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, key, words in zip(axes, ("images", "seconds"), ("images seen", "seconds of training"), strict=True):
        for name, curves in results.items():
            x = [statistics.median(curve[i][key] for curve in curves) for i in range(len(curves[0]))]
            at = [[curve[i]["top1"] for curve in curves] for i in range(len(curves[0]))]
            (line,) = axis.plot(x, [statistics.mean(values) for values in at], marker=".", label=name)
            axis.fill_between(x, [min(v) for v in at], [max(v) for v in at], color=line.get_color(), alpha=0.15)
        axis.set_xlabel(words)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("linear probe, top-1 in %")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that evidence.py and progressive.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="a labelled shard set of 64-px images (wavemim prepare)")
    parser.add_argument("--images-seen", type=int, help="images that every variant is trained on")
    parser.add_argument("--points", type=int, default=4, help="probes during training")
    parser.add_argument("--seeds", type=int, help="seeds per variant")
    parser.add_argument(
        "--full",
        action="store_true",
        help="200,000 images and 3 seeds with the recipes' batches, instead of 40,000 and 2 with small batches",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, help="variants trained at the same time; on a CPU one per core")
    parser.add_argument("--threads", type=int, default=1, help="threads per variant")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    return parser


def settle(arguments: argparse.Namespace, name: str) -> None:
    """Fill in the defaults.

    Raises:
        SystemExit: the device is not available.
    """
    import torch

    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {arguments.device}: torch sees no GPU here")
    if "://" not in arguments.shards:
        arguments.shards = str(Path(arguments.shards).absolute())
    arguments.images_seen = arguments.images_seen or (200_000 if arguments.full else 40_000)
    arguments.seeds = arguments.seeds or (3 if arguments.full else 2)
    arguments.jobs = arguments.jobs or (4 if arguments.device != "cpu" else len(usable_cores()))
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"
    stem = f"{name}-{datetime.now(UTC):%Y-%m-%d}-{re.sub('[^a-z0-9]+', '-', device.lower())}"
    arguments.json = arguments.json or Path(__file__).with_name("results") / f"{stem}.json"
    arguments.plot = arguments.plot or arguments.json.with_suffix(".png")


def journal_of(arguments: argparse.Namespace) -> Journal:
    """The journal of these results."""
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    return Journal(arguments.json.with_suffix(".unfinished.jsonl"))


def keep(arguments: argparse.Namespace, goals: Mapping[str, float | None], results: Mapping[str, Results]) -> None:
    """Write the numbers."""
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "plot", "shards")}
    write_json(arguments.json, {"machine": machine_facts(), "settings": settings, "goals": goals, "results": results})
    print(f"numbers: {arguments.json}, plot: {arguments.plot}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, default=["targets"])
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants of the comparisons")
    arguments = parser.parse_args()
    known = {name for comparison in arguments.compare for name in COMPARISONS[comparison]}
    if unknown := set(arguments.variants or ()) - known:
        parser.error(f"--variants {', '.join(sorted(unknown))}: unknown; there are {', '.join(sorted(known))}")
    settle(arguments, "evidence")
    results: dict[str, Results] = {}
    goals: dict[str, float | None] = {}
    journal = journal_of(arguments)
    for comparison in arguments.compare:
        chosen = {n: v for n, v in COMPARISONS[comparison].items() if n in (arguments.variants or [n])}
        if not chosen:
            continue
        found = run(arguments, chosen, journal)
        results[comparison] = found
        print(f"\n{comparison}\n\n{table(found)}\n")
        if "wavelet" in found and any(name.startswith("pixels") for name in found):
            goals["wavelet_training_to_reach_best_pixel"] = needed(found)
            print(f"wavelet_training_to_reach_best_pixel: {goals['wavelet_training_to_reach_best_pixel']}")
        plot = arguments.plot
        draw(plot if len(results) == 1 else plot.with_stem(f"{plot.stem}-{comparison}"), found)
        keep(arguments, goals, results)
    journal.close()


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        raise SystemExit(f"evidence: {error}") from None
