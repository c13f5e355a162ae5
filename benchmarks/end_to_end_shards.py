"""The shard set of benchmarks/end_to_end.py where none is given: photos of a folder, or synthetic images."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import usable_cores

IMAGES, SYNTHETIC_IMAGES = 2000, 256  # different images in a set, at most: photos, and synthetic ones
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def make_shards(recipe: str, overrides: Sequence[str], out: str, rows: int, images: str | None) -> None:
    """Write a shard set in the recipe's layout, with train rows only; called in a child process.

    Args:
        recipe: name or YAML file of the recipe.
        overrides: settings to override in it, as KEY=VALUE.
        out: folder of the new set.
        rows: rows to write; images repeat where there are fewer.
        images: folder of photos; None for synthetic images.
    """
    import numpy as np
    from shards_reading import decode_photos, finish_set

    from pipeline.config.load import load
    from pipeline.shards.layout import Layout

    data = load(recipe, overrides).data
    layout = Layout(data.image_size, data.channels, load(recipe, overrides).steps_by_level(), data.wavelet)
    folder, photos, workers = Path(out), str(Path(out).with_suffix(".npy")), len(usable_cores())
    folder.mkdir(parents=True)
    if images is None:
        np.save(photos, synthetic_images(min(SYNTHETIC_IMAGES, rows), data.channels, data.image_size))
    else:
        paths = sorted(str(path) for path in Path(images).rglob("*") if path.suffix.lower() in SUFFIXES)
        count = min(IMAGES, len(paths))
        chosen = [paths[i * len(paths) // count] for i in range(count)]
        decode_photos(chosen, photos, workers, data.image_size)
    size = min(data.rows_per_shard, -(-rows // workers))
    parts = [range(first, min(first + size, rows)) for first in range(0, rows, size)]
    tasks = [(out, number, part, layout, data.rows_per_group, photos) for number, part in enumerate(parts)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.map(write_file, tasks, chunksize=1)
    finish_set(folder, layout, data.rows_per_group, [entry for entry, _ in made], made[0][1])


def write_file(task: tuple[str, int, range, Any, int, str]) -> tuple[dict[str, Any], Any]:
    """Write one file of the set; returns its entry in the manifest and the statistics of its rows."""
    import numpy as np

    from pipeline.shards.writer import ShardWriter

    out, number, rows, layout, rows_per_group, photos = task
    images = np.load(photos, mmap_mode="r")
    writer = ShardWriter(Path(out), layout, rows_per_group)
    for row in rows:
        writer.append(row, f"{row}", -1, images[row % len(images)])
    closed = writer.close()
    assert closed is not None, rows
    name = f"train-{number:05d}.parquet"
    closed[0].rename(Path(out) / name)
    return {"name": name, **closed[1]}, writer.moments.statistics()


def synthetic_images(count: int, channels: int, side: int) -> Any:
    """Images (n, C, H, W), uint8, of noise at three scales, about as smooth as photos."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    total = torch.full((count, channels, side, side), 127.5)
    for cells, strength in ((4, 60.0), (max(side // 8, 4), 25.0), (side, 6.0)):
        noise = strength * torch.randn(count, channels, cells, cells, generator=generator)
        total += torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic")
    return total.clamp(0, 255).numpy().astype(np.uint8)
