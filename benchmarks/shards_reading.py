"""Measurements of benchmarks/shards.py: decoding photos, writing shard sets, reading these or the photos.

n is the number of photos, H = W the side in pixels.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from measure import Missing, rate
from PIL import Image

from pipeline.config.load import load
from pipeline.shards.batches import Batch, sequential
from pipeline.shards.layout import Layout
from pipeline.shards.reader import Reader
from pipeline.shards.shard_set import MANIFEST, ShardSet, make_manifest
from pipeline.shards.writer import ShardWriter, file_entry

RECIPE = "wamim_vit_base"
SIDE, WINDOW, BATCH = 256, 224, 64


def decode_as_prepare(data: bytes, name: str, side: int = SIDE) -> np.ndarray:
    """Decode to uint8 (3, H, W) with the decoder of `wavemim prepare`."""
    try:
        from pipeline.images.arrays import Pixels as Wanted
        from pipeline.images.decode import decode_image
    except ImportError as error:
        raise Missing(str(error)) from None
    return decode_image(data, name, Wanted(size=side))


def decode_plainly(data: bytes, name: str, side: int = SIDE) -> np.ndarray:
    """Decode to uint8 (3, H, W) as usual: the whole JPEG, shorter side resized to `side`, centre crop."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.ascontiguousarray(np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1))


DECODERS = {"prepare": decode_as_prepare, "plain": decode_plainly}


def _decode_file(task: tuple[str, str, int]) -> np.ndarray | None:
    decoder, path, side = task
    try:
        return DECODERS[decoder](Path(path).read_bytes(), path, side)
    except Missing:
        raise
    except Exception:  # a damaged file is not part of the measurement, whatever the decoder raises
        return None


def _decode_and_drop(task: tuple[str, str, int]) -> bool:
    return _decode_file(task) is not None


def decode_rate(decoder: str, paths: Sequence[str], workers: int, side: int = SIDE) -> float:
    """Images/s of reading and decoding only, in a running pool."""
    tasks = [(decoder, path, side) for path in paths]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(_decode_and_drop, tasks[: 4 * workers], chunksize=1)
        began = time.perf_counter()
        kept = sum(pool.imap_unordered(_decode_and_drop, tasks, chunksize=16))
        seconds = time.perf_counter() - began
    if not kept:
        raise Missing("images that can be decoded")
    return kept / seconds


def decode_photos(paths: Sequence[str], out: str, workers: int, side: int = SIDE) -> dict[str, Any]:
    """Decode the photos into a .npy file (n, 3, H, W); returns their number and the bytes of their files."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        images = pool.map(_decode_file, [("prepare", path, side) for path in paths], chunksize=8)
    kept = [(path, image) for path, image in zip(paths, images, strict=True) if image is not None]
    if not kept:
        raise Missing("images that can be decoded")
    np.save(out, np.stack([image for _, image in kept]))
    return {"photos": len(kept), "bytes": sum(Path(path).stat().st_size for path, _ in kept)}


def write_shards(photos: str, out: str, rows: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Write a shard set of `rows` train rows, repeating the photos; returns bytes per image and images/s."""
    recipe = load(RECIPE, overrides)
    images = np.load(photos)
    layout = Layout(images.shape[-1], images.shape[1], recipe.steps_by_level(), recipe.data.wavelet)
    folder, moments = Path(out), None
    files: list[dict[str, Any]] = []
    folder.mkdir(parents=True)
    began = time.perf_counter()
    for first in range(0, rows, recipe.data.rows_per_shard):
        writer = ShardWriter(folder, layout, recipe.data.rows_per_group, compression=recipe.data.compression)
        for row in range(first, min(first + recipe.data.rows_per_shard, rows)):
            writer.append(row, f"{row}.jpg", -1, images[row % len(images)])
        moments = moments or writer.moments
        if closed := writer.close():
            name = f"train-{len(files):05d}.parquet"
            closed[0].rename(folder / name)
            files.append({"name": name, **closed[1]})
    seconds = time.perf_counter() - began
    assert moments is not None, rows
    finish_set(folder, layout, recipe.data.rows_per_group, files, moments.statistics())
    return {"bytes_per_image": sum(entry["bytes"] for entry in files) / rows, "written_per_second": rows / seconds}


def recode_shards(shards: str, out: str, codecs: dict[str, str]) -> dict[str, float]:
    """Write the shard set again with other codecs for some of its columns."""
    source, folder = ShardSet.open(shards), Path(out)
    folder.mkdir(parents=True)
    files = []
    for name, rows in source.files("train"):
        with pq.ParquetFile(Path(shards) / name) as parquet:
            compression = {column: codecs.get(column, "zstd") for column in parquet.schema_arrow.names}
            levels = {column: 1 for column, codec in compression.items() if codec == "zstd"}
            with pq.ParquetWriter(
                folder / name,
                parquet.schema_arrow,
                compression=compression,
                compression_level=levels,
                use_dictionary=False,
                write_statistics=["row", "label"],
                write_page_checksum=True,
                data_page_size=256 * 1024,
            ) as writer:
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group)
                    writer.write_table(table, row_group_size=len(table))
        files.append({"name": name, "rows": rows, **file_entry(folder / name)})
    finish_set(folder, source.layout, source.rows_per_group, files, source.manifest["statistics"])
    return {"bytes_per_image": sum(entry["bytes"] for entry in files) / source.rows["train"]}


def finish_set(
    folder: Path, layout: Layout, rows_per_group: int, files: list[dict[str, Any]], statistics_: Any
) -> None:
    count = sum(entry["rows"] for entry in files)
    manifest = make_manifest(
        layout,
        rows_per_group=rows_per_group,
        classes=None,
        splits={"train": files, "val": []},
        statistics=statistics_,
        counts={"inputs": count, "kept": count, "rejected": 0, "ignored": 0},
    )
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read_rate(
    shards: str,
    seconds: float,
    finest: int = 1,
    threads: int = 1,
    pixels: bool = False,
    window: int = WINDOW,
    batch: int = BATCH,
) -> float:
    """Images/s of the training reader: coefficients ready to be copied to the device, or 8-bit images."""
    opened = ShardSet.open(shards)
    reader = Reader(
        opened, "train", batch=batch, window=window, flip=True, threads=threads, finest=finest, pixels=pixels
    )
    side = window >> (finest - 1)

    def images(one: Batch) -> int:
        if pixels:
            assert one.pixels is not None and one.pixels.dtype == torch.uint8
            assert one.pixels.shape[-2:] == (side, side), one.pixels.shape
        assert all(level.is_contiguous() for level in one.levels.values())
        return int(one.weight.sum())

    return rate(lambda number: (images(one) for one in reader.epoch(number)), seconds)


class _Photos(torch.utils.data.Dataset[torch.Tensor]):
    """Windows of the original files: full decoding, RandomResizedCrop, flipped with probability 0.5."""

    def __init__(self, paths: Sequence[str], window: int) -> None:
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        crop = transforms.RandomResizedCrop(window, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
        self.paths = list(paths)
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            found: torch.Tensor = self.transform(image.convert("RGB"))
        return found


def pil_rate(paths: Sequence[str], seconds: float, window: int = WINDOW, batch: int = BATCH, workers: int = 1) -> float:
    """Images/s of PIL + torchvision through torch's DataLoader: uint8 windows of the original files."""
    random.seed(0)
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        _Photos(paths, window),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return rate(lambda number: (len(one) for one in loader), seconds)


def fidelity(shards: str, photos: str) -> dict[str, float]:
    """PSNR in dB of whole images reconstructed from the shard set, against the originals."""
    opened, images = ShardSet.open(shards), np.load(photos, mmap_mode="r")
    errors = []
    for batch in sequential(opened, "train", 32, window=images.shape[-1], max_rows=len(images), pixels=True):
        assert batch.pixels is not None
        rebuilt = batch.pixels.numpy().astype(np.float64)
        originals = images[batch.rows.numpy() % len(images)]
        errors += ((rebuilt - originals) ** 2).mean((1, 2, 3)).tolist()
    # An exact reconstruction has no finite PSNR: bounded by an error of half a grey level in one value.
    floor = 0.25 / images[0].size
    return {
        "psnr_db": _psnr(max(statistics.fmean(errors), floor)),
        "psnr_db_mean_of_images": statistics.fmean(_psnr(max(error, floor)) for error in errors),
        "psnr_db_lowest": _psnr(max(max(errors), floor)),
    }


def _psnr(error: float) -> float:
    return float(10 * np.log10(255**2 / error))
