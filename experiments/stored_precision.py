"""Table: "What the stored precision costs" in benchmarks/RESULTS.md: targets of stored images beside those of the photos.

    python experiments/stored_precision.py --images PHOTOS

PHOTOS: 600 ImageNet photos of full size (110 kB each), as JPEG. Every photo is stored by the code of `wavemim prepare`, with
different quantisation steps, and its targets are compared with those of the photo itself at the same size. Published on one
core of an Intel Xeon (AVX-512, no GPU), 2026-11-29. About 5 minutes there; --quick takes every tenth photo, in 30 seconds.
The numbers depend on the photos alone; the tolerance is their rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import Call, Expected, Experiment, main

STEPS: dict[str, Any] = {"4, 4, 8": (4, 4, 8), "2": (2,), "1": (1,), "lossless": "lossless"}  # of data.steps
SIZES = {"256": ("localmim_vit_base", {2: 1, 3: 1, 4: 1, 5: 1}, 16), "64": ("small_hog", {3: 1, 4: 1}, 8)}
BATCH = 30


class Precision:
    """Sums, over batches, of what a target loses."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: Any, count: Any) -> None:
        """Add a sum and what it is divided by."""
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0], total[1] = total[0] + float(value), total[1] + float(count)

    def add_error(self, name: str, stored: Any, exact: Any) -> None:
        """Add the squared error of a target and the energy of the exact one."""
        self.add(name, (stored - exact).double().square().sum(), exact.double().square().sum())

    def found(self) -> dict[str, float]:
        """Means; of errors, the root of their share of the energy."""
        ratios = {name: total / count for name, (total, count) in self.sums.items()}
        return {name: value if "cosine" in name else value**0.5 for name, value in ratios.items()}


def measure(call: Call) -> dict[str, Any]:
    """{size: {steps: numbers}}."""
    import torch

    from pipeline.images.decode import Pixels, decode_image

    torch.set_num_threads(1)
    photos = sorted(Path(call.images).glob("*.JPEG"))[:: 10 if call.quick else 1]
    results: dict[str, Any] = {"photos": len(photos)}
    for size in SIZES:
        wanted = Pixels(int(size))
        images = [decode_image(photo.read_bytes(), photo.name, wanted) for photo in photos]
        exact = _stored(call, size, "lossless", images)
        results[size] = {name: _compare(size, exact, _stored(call, size, name, images)) for name in STEPS}
    return results


def _stored(call: Call, size: str, steps: str, images: list[Any]) -> dict[str, Any]:
    """The images as they are stored: integers, bytes of the file and statistics."""
    import numpy as np

    from pipeline.config.load import load, with_overrides
    from pipeline.shards.layout import Layout, PyramidEncoder
    from pipeline.shards.writer import ShardWriter

    recipe = with_overrides(load(SIZES[size][0]), {"data.steps": STEPS[steps]})
    layout = Layout(int(size), 3, recipe.steps_by_level())
    writer = ShardWriter(call.out, layout, recipe.data.rows_per_group)
    for row, image in enumerate(images):
        writer.append(row, f"{row}.jpeg", -1, image)
    closed = writer.close()
    assert closed is not None
    file, about = closed
    file.unlink()
    return {
        "steps": layout.steps,
        "integers": PyramidEncoder(layout).encode(np.stack(images)),
        "kB": about["bytes"] / len(images) / 1e3,
        "statistics": writer.moments.statistics(),
    }


def _compare(size: str, exact: dict[str, Any], stored: dict[str, Any]) -> dict[str, float]:
    """What each target of the stored images loses: a relative error, and for HOG also the mean cosine of a cell."""
    import torch
    from torch.nn.functional import cosine_similarity

    from wavemim.inputs import Inputs
    from wavemim.targets import FourierTarget, HOGTarget, PixelTarget, Statistics, Tap, WaveletTarget

    levels = {int(level): bands for level, bands in exact["statistics"]["levels"].items()}
    statistics = Statistics(
        mean={level: {band: values["mean"] for band, values in bands.items()} for level, bands in levels.items()},
        std={level: {band: values["std"] for band, values in bands.items()} for level, bands in levels.items()},
        pixel_mean=exact["statistics"]["pixels"]["mean"],
        pixel_std=exact["statistics"]["pixels"]["std"],
    )
    _, blocks, token = SIZES[size]
    taps = [Tap(level, block, "AHVD" if level == max(blocks) else "HVD") for level, block in blocks.items()]
    fine = [Tap(level, 1, "HVD") for level in range(1, min(blocks))] + taps
    whole: dict[str, Any] = {"image_size": int(size), "token_sizes": dict.fromkeys(range(6), token)}
    targets = {
        "hog": HOGTarget(taps, statistics, **whole),
        "pixels": PixelTarget([Tap(0, 1)], statistics, normalise="patch", **whole),
        "fourier": FourierTarget([Tap(0, 1)], statistics, normalise="dataset", **whole),
        "wavelet": WaveletTarget(fine, statistics, normalise="patch", **whole),
    }
    sums = Precision()
    count = len(exact["integers"][1])
    for start in range(0, count, BATCH):
        views = []
        for one in (exact, stored):
            inputs = Inputs(one["steps"], statistics)
            part = {level: torch.from_numpy(v[start : start + BATCH]) for level, v in one["integers"].items()}
            views.append(inputs(part))
        for name, target in targets.items():
            truth, found = (target(*view) for view in views)
            for level in truth:
                sums.add_error(f"{name} {2**level if level else token}", found[level], truth[level])
                if name == "hog":
                    cells = [v.reshape(*v.shape[:2], 3, 9, -1) for v in (found[level], truth[level])]
                    sloped = cells[1].square().sum(3) > 0.5  # not flat
                    cosines = cosine_similarity(*cells, dim=3)[sloped]
                    sums.add(f"hog cosine {2**level}", cosines.sum(), sloped.sum())
    return {**sums.found(), "kB": stored["kB"]}


def _row(size: str, key: str, *published: float) -> tuple[Expected, ...]:
    """The published numbers of a target at the steps of `STEPS` but the last, where all of them are exact."""
    return tuple(
        Expected(f"{key}, {size} px, steps {steps}", value, (size, steps, key), 0.0006, f"{value:.3f}")
        for steps, value in zip(STEPS, published, strict=False)
    )


def _size(size: str, *published: float) -> tuple[Expected, ...]:
    return tuple(
        Expected(f"kB an image of {size} px, steps {steps}", value, (size, steps, "kB"), tolerance=0.06 * value)
        for steps, value in zip(STEPS, published, strict=True)
    )


EXPERIMENT = Experiment(
    tables=(("What the stored precision costs", "target"),),
    inputs=("images",),
    measure=measure,
    expected=(
        *_row("256", "hog cosine 4", 0.888, 0.936, 0.962),
        *_row("256", "hog 4", 0.472, 0.361, 0.275),
        *_row("256", "hog cosine 8", 0.959, 0.979, 0.986),
        *_row("256", "hog 8", 0.285, 0.208, 0.166),
        *_row("256", "hog cosine 16", 0.987, 0.994, 0.995),
        *_row("256", "hog 16", 0.162, 0.112, 0.102),
        *_row("256", "hog cosine 32", 0.995, 0.998, 0.997),
        *_row("256", "hog 32", 0.096, 0.062, 0.07),
        *_row("256", "pixels 16", 0.072, 0.037, 0.02),
        *_row("256", "fourier 16", 0.017, 0.009, 0.005),
        *_row("256", "wavelet 2", 0.393, 0.267, 0.154),
        *_row("256", "wavelet 4", 0.241, 0.143, 0.077),
        *_row("256", "wavelet 8", 0.251, 0.088, 0.048),
        *_row("256", "wavelet 16", 0.159, 0.053, 0.028),
        *_row("256", "wavelet 32", 0.013, 0.003, 0.002),
        *_size("256", 92.8, 135.8, 195.5, 234.4),
        *_row("64", "hog cosine 8", 0.977, 0.989, 0.993),
        *_row("64", "hog 8", 0.215, 0.152, 0.119),
        *_row("64", "hog cosine 16", 0.994, 0.997, 0.998),
        *_row("64", "hog 16", 0.113, 0.076, 0.065),
        *_row("64", "pixels 8", 0.065, 0.033, 0.019),
        *_row("64", "fourier 8", 0.018, 0.009, 0.005),
        *_row("64", "wavelet 2", 0.319, 0.219, 0.133),
        *_row("64", "wavelet 4", 0.182, 0.113, 0.065),
        *_row("64", "wavelet 8", 0.172, 0.059, 0.032),
        *_row("64", "wavelet 16", 0.02, 0.005, 0.002),
        *_size("64", 6.8, 9.8, 13.7, 16.0),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
