"""Pictures with a photo's smoothness, and tiny shard sets of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import MANIFEST, REJECTED, SMALL, ShardSet, make_manifest
from pipeline.shards.statistics import Moments
from pipeline.shards.writer import ShardWriter, write_rejected

SIDE, LEVELS = 64, 4
LAYOUT = Layout(SIDE, 3, {1: 4, 2: 2, 3: 1, 4: 1})


def smooth_texture(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random picture with a photo's smoothness: noise at three scales, (H, W, 3) uint8."""
    total = np.zeros((height, width, 3))
    for cells, strength in ((3, 80.0), (10, 40.0), (40, 12.0)):
        noise = generator.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        bands = [Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(band) for band in bands], -1)
    return Image.fromarray(np.clip(total + generator.uniform(60, 190, 3), 0, 255).astype(np.uint8))


def photos(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """uint8 (n, 3, H, W)."""
    generator = np.random.default_rng(seed)
    images = [np.asarray(smooth_texture(generator, side, side)).transpose(2, 0, 1) for _ in range(count)]
    return np.stack(images)


def write_set(
    folder: Path,
    images: np.ndarray,
    layout: Layout = LAYOUT,
    rows_per_group: int = 4,
    classes: Sequence[str] | None = ("a", "b", "c"),
    compression: str = SMALL,
) -> ShardSet:
    """A shard set of these images, row numbers with gaps, the last third for val."""
    moments, files = Moments(layout), {"train": [], "val": []}
    cut = len(images) - len(images) // 3
    folder.mkdir(exist_ok=True)
    for split, part in (("train", range(cut)), ("val", range(cut, len(images)))):
        writer = ShardWriter(folder, layout, rows_per_group, compression=compression)
        for i in part:
            writer.append(2 * i + 5, f"{i}.jpg", -1 if classes is None else i % 3, images[i])
        closed = writer.close()
        if split == "train":
            moments.merge(writer.moments.state())
        if closed:
            name = f"{split}-00000.parquet"
            closed[0].rename(folder / name)
            files[split].append({"name": name, **closed[1]})
    write_rejected(folder / REJECTED, [("bad.jpg", "empty file")])
    manifest = make_manifest(
        layout,
        rows_per_group=rows_per_group,
        classes=None if classes is None else list(classes),
        splits=files,
        statistics=moments.statistics(),
        counts={"inputs": len(images) + 1, "kept": len(images), "rejected": 1, "ignored": 0},
        compression=compression,
    )
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ShardSet.open(folder)
