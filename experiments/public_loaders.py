"""Table: the second one under "Shards" in benchmarks/RESULTS.md: loaders of images that were resized before.

    pip install --target LIBRARIES webdataset==1.0.2 mosaicml-streaming==0.13.0 litdata==0.2.76
    python experiments/public_loaders.py --images PHOTOS --libraries LIBRARIES

PHOTOS: 600 ImageNet photos of full size, as JPEG. Published on one core of an AMD EPYC (no GPU), 24 GiB, 2026-11-30,
commit ec8c93c. About 6 minutes there, 10 GB of disk; --quick takes three. Speeds depend on the machine and
are shown; checked are bytes per image and the ratio of speeds, which changes by a fifth from run to run. A loader that
cannot be imported is reported by the benchmark as left out.
"""

from __future__ import annotations

import sys

from harness import Call, Expected, Experiment, benchmark, main


def commands(call: Call) -> list[list[str]]:
    """One call of the benchmark: every loader, and this project's reader."""
    return [
        benchmark(
            *("shards", "--images", call.images, "--libraries", call.libraries, "--work", call.out),
            *("--json", call.out / "result.json"),
            *call.either(("--repeats", 3, "--rows", 4096), ("--repeats", 1, "--rows", 1024, "--seconds", 1)),
            *("--only", "bytes_vs_jpeg", "read_vs_best_public", "read_vs_best_public_jpeg"),
        )
    ]


def _loader(name: str, key: str, size: int, rate: int) -> tuple[Expected, Expected]:
    return (
        Expected(f"{name}: bytes an image", size, ("numbers", f"bytes_per_image {key}"), 0.02 * size, f"{size:,}"),
        Expected(f"{name}: images/s", rate, ("images_per_second", key)),
    )


EXPERIMENT = Experiment(
    tables=(("Shards: `benchmarks/shards.py`", "loader of pre-resized images"),),
    inputs=("images", "libraries"),
    commands=commands,
    expected=(
        Expected("wavemim: bytes an image", 92818, ("numbers", "shard_bytes_per_image"), 1900, "92,818"),
        Expected("wavemim: images/s", 7195, ("images_per_second", "reader")),
        Expected("wavemim, fast: images/s", 33484, ("images_per_second", "reader_fast")),
        *_loader("litdata, JPEG", "litdata jpeg", 22348, 3038),
        *_loader("webdataset, JPEG", "webdataset jpeg", 24131, 2498),
        *_loader("mosaicml-streaming, JPEG", "streaming jpeg", 22348, 1902),
        *_loader("litdata, raw", "litdata raw", 196636, 11170),
        *_loader("webdataset, raw", "webdataset raw", 198150, 7726),
        *_loader("mosaicml-streaming, raw", "streaming raw", 196624, 6600),
        *_loader("numpy.memmap, raw", "memmap raw", 196608, 33035),
        Expected("read_vs_best_public", 3.0, ("numbers", "read_vs_best_public"), tolerance=0.75, published="3.0"),
        Expected("read_vs_best_public_jpeg", 2.37, ("numbers", "read_vs_best_public_jpeg"), tolerance=0.6),
    ),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
