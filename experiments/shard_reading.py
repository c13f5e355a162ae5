"""Table: the first one under "Shards" in benchmarks/RESULTS.md: preparing, storing and reading a shard set.

    python experiments/shard_reading.py --images PHOTOS

PHOTOS: 600 ImageNet photos of full size (110 kB each), as JPEG. Published on two cores of an AMD EPYC (no GPU), 24 GiB,
2026-11-30, commits ec8c93c (reading) and e23e684 (`read_threads`, preparing). About 22 minutes there, 16 GB of disk;
--quick measures the size alone, in two minutes. The machine's speed changes by a fifth within minutes, so ratios of speeds have a tolerance of a quarter.
`bytes_vs_jpeg` and `psnr_db` depend on the photos alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import Call, Expected, Experiment, benchmark, main, read_json

SIZE = ("bytes_vs_jpeg", "psnr_db")
READING = ("read_vs_pil_rrc", "read_threads", "coarse_vs_full_read", "pixels_vs_pil_rrc")
PARTS = {  # part -> numbers, settings; the published table has 100 copies of every photo for prepare: 60,000 images
    "size": (SIZE, ("--repeats", 1)),
    "reading": (READING, ("--repeats", 3, "--rows", 4096)),
    "prepare": (("prepare_vs_decode", "prepare_vs_pil"), ("--repeats", 3, "--copies", 100)),
    "plan": (("plan_memory_gb", "plan_time_exponent"), ("--repeats", 1)),
}


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark a part."""
    quick = ("--repeats", 1, "--rows", 1024)
    return [
        benchmark(
            *("shards", "--images", call.images, "--work", call.out, "--json", call.out / f"{part}.json"),
            *call.either(settings, quick),
            *("--only", *numbers),
        )
        for part, (numbers, settings) in PARTS.items()
        if part == "size" or not call.quick
    ]


def read(out: Path) -> dict[str, Any]:
    """The named numbers and the rates of all parts together."""
    numbers: dict[str, Any] = {}
    rates: dict[str, Any] = {}
    for part in PARTS:
        if (out / f"{part}.json").exists():
            found = read_json(out, f"{part}.json")
            numbers |= found["numbers"]
            rates |= found["images_per_second"]
    return {"numbers": numbers, "rates": rates}


EXPERIMENT = Experiment(
    tables=(("Shards: `benchmarks/shards.py`", "name"),),
    inputs=("images",),
    commands=commands,
    read=read,
    expected=(
        Expected("bytes_vs_jpeg", 0.845, ("numbers", "bytes_vs_jpeg"), tolerance=0.02, exact=True),
        Expected("psnr_db", 46.2, ("numbers", "psnr_db"), tolerance=0.2, exact=True),
        Expected("prepare_vs_decode", 0.599, ("numbers", "prepare_vs_decode"), tolerance=0.14),
        Expected("prepare_vs_pil", 1.25, ("numbers", "prepare_vs_pil"), tolerance=0.3),
        Expected("read_vs_pil_rrc", 15.9, ("numbers", "read_vs_pil_rrc"), tolerance=4),
        Expected("read_threads", 1.81, ("numbers", "read_threads"), tolerance=0.3),
        Expected("coarse_vs_full_read", 5.5, ("numbers", "coarse_vs_full_read"), tolerance=1.4),
        Expected("pixels_vs_pil_rrc", 7.6, ("numbers", "pixels_vs_pil_rrc"), tolerance=2),
        Expected("plan_memory_gb", 0.45, ("numbers", "plan_memory_gb"), tolerance=0.15),
        Expected("reading, images/s", 7195, ("rates", "reader")),
        Expected("decode + RandomResizedCrop + flip, images/s", 453, ("rates", "pil_rrc")),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
