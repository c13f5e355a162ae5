"""Measurements of benchmarks/shards.py: public loaders of pre-resized images, each with its own format.

All of them store the same images, as JPEG of quality 90 or as raw bytes, shuffle, and yield batches of random windows,
flipped with probability 0.5, as uint8 tensors, in one process. torchvision decodes the JPEGs, which is faster than PIL.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Missing, installed, rate
from PIL import Image

QUALITY = 90
ROWS_PER_FILE = 1024
FILE_BYTES = 1 << 26
PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}
FORMATS = ("jpeg", "raw")
# Without a library: the upper bound of one core with raw pixels, with a global shuffle in memory.
REFERENCE = "memmap"
UNMEASURED = {
    "ffcv": "not part of this benchmark: pip builds it from source, which needs OpenCV's and libjpeg's headers"
}


def version_of(library: str) -> str | None:
    """The version of a loader; None if it is not installed."""
    return installed(PACKAGES[library]) if library in PACKAGES else f"numpy {np.__version__}"


def _import(library: str) -> Any:
    try:
        return __import__(library)
    except ImportError as error:
        raise Missing(f"{PACKAGES[library]} cannot be imported ({error})") from None


def _samples(photos: str, rows: int, stored: str) -> Iterator[bytes | np.ndarray]:
    """The stored form of every row: JPEG bytes, or an array (3, H, W)."""
    images = np.load(photos)
    encoded: list[Any] = list(images)
    if stored == "jpeg":
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=QUALITY)
            encoded.append(buffer.getvalue())
    return (encoded[row % len(encoded)] for row in range(rows))


def write(library: str, stored: str, photos: str, out: str, rows: int) -> dict[str, Any]:
    """Write the photos in a loader's format; returns its version and bytes per image."""
    folder = Path(out)
    folder.mkdir(parents=True)
    _WRITERS[library](folder, stored, _samples(photos, rows, stored), rows)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"version": version_of(library), "bytes_per_image": size / rows}


def _write_webdataset(folder: Path, stored: str, samples: Iterable[Any], rows: int) -> None:
    library = _import("webdataset")
    pattern = str(folder / "train-%05d.tar")
    with library.ShardWriter(pattern, maxcount=ROWS_PER_FILE, maxsize=1e12, verbose=0) as writer:
        for row, sample in enumerate(samples):
            data = sample if isinstance(sample, bytes) else sample.tobytes()
            writer.write({"__key__": f"{row:08d}", "jpg" if stored == "jpeg" else "bin": data})


def _write_streaming(folder: Path, stored: str, samples: Iterable[Any], rows: int) -> None:
    library = _import("streaming")
    kind = "bytes" if stored == "jpeg" else "ndarray:uint8"
    with library.MDSWriter(out=str(folder), columns={"image": kind}, size_limit=FILE_BYTES) as writer:
        for sample in samples:
            writer.write({"image": sample})


def _write_litdata(folder: Path, stored: str, samples: Iterable[Any], rows: int) -> None:
    _import("litdata")
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes=FILE_BYTES)
    for row, sample in enumerate(samples):
        cache[row] = sample if isinstance(sample, bytes) else torch.from_numpy(sample)
    cache.done()
    cache.merge()


def _write_memmap(folder: Path, stored: str, samples: Iterable[Any], rows: int) -> None:
    if stored != "raw":
        raise Missing("raw pixels")
    out: Any = None
    for row, sample in enumerate(samples):
        if out is None:
            shape = (rows, *sample.shape)
            out = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        out[row] = sample
    out.flush()


class Window:
    """Stored image → window (3, window, window), uint8."""

    def __init__(self, stored: str, side: int, window: int) -> None:
        from torchvision.io import decode_jpeg

        self.stored, self.side, self.window, self._decode = stored, side, window, decode_jpeg

    def __call__(self, stored: Any) -> torch.Tensor:
        if isinstance(stored, np.ndarray):
            image = torch.from_numpy(stored)
        elif isinstance(stored, torch.Tensor):
            image = stored
        else:
            image = torch.frombuffer(stored, dtype=torch.uint8)
        if self.stored == "jpeg":
            image = self._decode(image)
        image = image.view(3, self.side, self.side)
        places = self.side - self.window + 1
        top, left = random.randrange(places), random.randrange(places)
        cut = image[:, top : top + self.window, left : left + self.window]
        return cut.flip(2) if random.random() < 0.5 else cut


def _read_webdataset(folder: Path, cut: Window, batch: int) -> Iterable[Any]:
    library = _import("webdataset")
    files = sorted(str(path) for path in folder.glob("*.tar"))
    name = "jpg" if cut.stored == "jpeg" else "bin"
    dataset = library.WebDataset(files, shardshuffle=len(files), seed=0, empty_check=False).shuffle(512)
    return torch.utils.data.DataLoader(dataset.map(lambda sample: cut(sample[name])), batch_size=batch)


def _read_streaming(folder: Path, cut: Window, batch: int) -> Iterable[Any]:
    library = _import("streaming")

    class Windows(library.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: int) -> Any:
            return cut(super().__getitem__(at)["image"])

    library.base.util.clean_stale_shared_memory()
    dataset = Windows(local=str(folder), shuffle=True, batch_size=batch, shuffle_seed=0)
    return torch.utils.data.DataLoader(dataset, batch_size=batch)


def _read_litdata(folder: Path, cut: Window, batch: int) -> Iterable[Any]:
    library = _import("litdata")
    dataset = library.StreamingDataset(str(folder), shuffle=True, seed=0, transform=cut)
    loader: Iterable[Any] = library.StreamingDataLoader(dataset, batch_size=batch, num_workers=0)
    return loader


def _read_memmap(folder: Path, cut: Window, batch: int) -> Iterable[Any]:
    images = np.load(folder / "images.npy", mmap_mode="r")

    class Windows(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, at: int) -> torch.Tensor:
            return cut(np.asarray(images[at]))

    return torch.utils.data.DataLoader(Windows(), batch_size=batch, shuffle=True)


_WRITERS: dict[str, Callable[[Path, str, Iterable[Any], int], None]] = {
    "webdataset": _write_webdataset,
    "streaming": _write_streaming,
    "litdata": _write_litdata,
    REFERENCE: _write_memmap,
}
_READERS: dict[str, Callable[[Path, Window, int], Iterable[Any]]] = {
    "webdataset": _read_webdataset,
    "streaming": _read_streaming,
    "litdata": _read_litdata,
    REFERENCE: _read_memmap,
}


def read_rate(library: str, stored: str, folder: str, side: int, window: int, batch: int, seconds: float) -> float:
    """Images/s of a public loader."""
    warnings.filterwarnings("ignore")  # about read-only buffers, which are only read
    random.seed(0)
    torch.manual_seed(0)
    loader = _READERS[library](Path(folder), Window(stored, side, window), batch)

    def images(one: Any) -> int:
        assert one.dtype == torch.uint8 and one.shape[1:] == (3, window, window), (one.dtype, one.shape)
        return len(one)

    return rate(lambda number: (images(one) for one in loader), seconds)
