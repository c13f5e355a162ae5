"""Which target, decoder, mask or weighting gives the better encoder? One shard set, seed, data order, masks and budget.

    python benchmarks/evidence.py --shards SHARDS --compare targets --images-seen 50000 --json FILE --plot FILE.png

Trains every variant of a comparison from the same seed on the same rows with the same masks (they are a function of
seed, epoch and row), without Ray, and judges the frozen encoder by a linear probe on val at several points in training.
Variants take turns, seed by seed. Training time is that of the training process alone: neither probes nor the writing of
checkpoints count. States `wavelet_training_to_reach_best_pixel` where wavelets and pixels are compared: the images that
the wavelet target needs to reach the pixel target's best accuracy, as a share of those that pixels needed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import machine_facts, write_json

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
        "levels 3, 4": ("small_wavelet", {}),
        "level 4 alone": ("small_wavelet", {"target.taps": {4: 8}}),
        "levels 2, 3, 4": ("small_wavelet", {"target.taps": {2: 4, 3: 6, 4: 8}}),
        "details alone": ("small_wavelet", {"target.bands": {3: "HVD", 4: "HVD"}}),
        "all bands": ("small_wavelet", {"target.bands": {3: "AHVD", 4: "AHVD"}}),
        "per patch": ("small_wavelet", {"target.normalise": "patch"}),
        "not normalised": ("small_wavelet", {"target.normalise": "none"}),
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


def run(
    shards_at: str, name: str, overrides: Mapping[str, Any], *, seed: int, images_seen: int, points: int, device: str
) -> list[dict[str, float]]:
    """Train one variant; a line a point: images seen, seconds of training, top-1 with its interval, losses' history."""
    import torch

    from pipeline.build import build_inputs, build_model
    from pipeline.config import load, with_overrides
    from pipeline.loop import Plan, train
    from pipeline.shards import ShardSet
    from wavemim import checkpoint

    shards = ShardSet.open(shards_at)
    epochs = images_seen / shards.rows["train"]
    settings = {"train.epochs": epochs, "train.workers": 1, "train.warmup_epochs": epochs / 10, "seed": seed}
    settings |= {"train.checkpoint_every": epochs / points, "train.log_every": 50}
    if isinstance(overrides.get("target.taps"), dict):
        settings["target.bands"] = {}
    recipe = with_overrides(load(name), {**settings, **overrides})
    inputs = build_inputs(shards).to(device)
    with tempfile.TemporaryDirectory() as temporary:
        lines: list[dict[str, float]] = []
        kept: list[Path] = []
        apart, began = 0.0, time.perf_counter()

        def keep(write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
            nonlocal apart
            stopped = time.perf_counter()
            path = Path(temporary) / str(state["images"])
            write(path)
            kept.append(path)
            apart += time.perf_counter() - stopped
            lines.append({"images": state["images"], "seconds": time.perf_counter() - began - apart})

        total = Plan.of(recipe, shards.rows["train"]).total_steps
        assert total >= points, f"{total} steps are fewer than {points} points"
        train(recipe, shards, device=torch.device(device), on_checkpoint=keep)
        model = build_model(recipe, shards).to(device)
        lines = [{"images": 0, "seconds": 0.0} | probe(model.encoder.model.eval(), inputs, shards, recipe)] + [
            line | probe(_with(model, path, checkpoint).encoder.model.eval(), inputs, shards, recipe)
            for line, path in zip(lines, kept, strict=True)
        ]
    return lines


def _with(model: Any, path: Path, checkpoint: Any) -> Any:
    checkpoint.load_trained(path, model)
    return model


def probe(encode: Any, inputs: Any, shards: Any, recipe: Any) -> dict[str, float]:
    """Linear probe on val of at most 10,000 train images."""
    from pipeline.features import features_of
    from wavemim.evaluate import linear_probe

    sets = [
        features_of(encode, inputs, shards, split, window=recipe.encoder.image_size, batch=256, max_rows=10_000)
        for split in ("train", "val")
    ]
    accuracy, _ = linear_probe(sets[0], sets[1], strengths=(0.01, 0.1, 1.0), seed=0)
    return {"top1": accuracy.top1, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n}


def training_to_reach(curves: Sequence[Sequence[Mapping[str, float]]], goal: float) -> float | None:
    """Images at which the mean curve over seeds first reaches `goal`, between its points by a straight line."""
    mean = [(line["images"], statistics.mean(curve[i]["top1"] for curve in curves)) for i, line in enumerate(curves[0])]
    if mean[0][1] >= goal:
        return 0.0
    for (before, low), (after, high) in itertools.pairwise(mean):
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low)
    return None


def needed(results: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> float | None:
    """`wavelet_training_to_reach_best_pixel`; None where wavelets never reach it."""
    pixels = [name for name in results if name.startswith("pixels")]
    best = {
        name: max(statistics.mean(c[i]["top1"] for c in results[name]) for i in range(len(results[name][0])))
        for name in pixels
    }
    name = max(best, key=best.__getitem__)
    own, ours = training_to_reach(results[name], best[name]), training_to_reach(results["wavelet"], best[name])
    return ours / own if own and ours is not None else None


def table(results: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> str:
    """Accuracy at the end of each variant: mean over seeds, spread, interval of the first seed, images/s."""
    lines = ["| variant | top-1, % | seeds | 95 % of one | images/s |", "|---|---|---|---|---|"]
    for name, curves in results.items():
        ends = [curve[-1] for curve in curves]
        each = ", ".join(f"{end['top1']:.1f}" for end in ends)
        rate = statistics.median(end["images"] / end["seconds"] for end in ends)
        mean = statistics.mean(end["top1"] for end in ends)
        lines.append(f"| {name} | {mean:.1f} | {each} | {ends[0]['low']:.1f}-{ends[0]['high']:.1f} | {rate:.0f} |")
    untrained = next(iter(results.values()))[0][0]
    lines.append(f"| untrained | {untrained['top1']:.1f} | | {untrained['low']:.1f}-{untrained['high']:.1f} | |")
    return "\n".join(lines)


def draw(path: Path, results: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    """Accuracy against images seen, and against seconds of training; a line a variant, its seeds as a band."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="a labelled shard set of 64-px images (wavemim prepare)")
    parser.add_argument("--compare", choices=COMPARISONS, default="targets")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of the comparison alone")
    parser.add_argument("--images-seen", type=int, default=50_000)
    parser.add_argument("--points", type=int, default=4, help="probes during training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    chosen = {n: v for n, v in COMPARISONS[arguments.compare].items() if n in (arguments.variants or [n])}
    results: dict[str, list[list[dict[str, float]]]] = {name: [] for name in chosen}
    for seed in range(arguments.seeds):
        for name, (recipe, overrides) in chosen.items():
            curve = run(
                arguments.shards,
                recipe,
                overrides,
                seed=seed,
                images_seen=arguments.images_seen,
                points=arguments.points,
                device=arguments.device,
            )
            results[name].append(curve)
            print(
                f"{name}, seed {seed}: " + ", ".join(f"{p['top1']:.1f} % at {p['images']:,.0f}" for p in curve),
                flush=True,
            )
    print(table(results))
    goals = {}
    if "wavelet" in results and any(name.startswith("pixels") for name in results):
        goals["wavelet_training_to_reach_best_pixel"] = needed(results)
        print(f"wavelet_training_to_reach_best_pixel: {goals['wavelet_training_to_reach_best_pixel']}")
    if arguments.plot:
        draw(arguments.plot, results)
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "plot", "shards")}
        write_json(
            arguments.json, {"machine": machine_facts(), "settings": settings, "goals": goals, "results": results}
        )


if __name__ == "__main__":
    main()
