"""One unit of prepare as a Ray task: read, decode, transform and write one shard."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SettingError, StageError
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import decode_image
from pipeline.images.observed import Observed
from pipeline.images.plan import ImagePlan, Origin
from pipeline.images.sources import fetch
from pipeline.runtime.stage_folder import as_json
from pipeline.runtime.usage import peak_memory
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import SMALL, SPLITS
from pipeline.shards.statistics import Moments
from pipeline.shards.writer import ShardWriter
from pipeline.storage.folder import Folder

UNITS = "units"
PLAN = "plan.parquet"  # in UNITS: all inputs, one row group per unit
# A small set is cut finer than rows_per_shard, so that several cores have work: about SMALL_UNIT images per unit.
SMALL_UNIT, SMALL_SET_UNITS = 50, 8
MAX_TRIES = 4  # of a unit in one call; by default Ray Data retries a task whose worker is lost for ever


@dataclass(frozen=True)
class Unit:
    """One shard to be made, from consecutive rows of a split's plan."""

    name: str  # of the file, without suffix
    split: str
    number: int  # its row group in the plan
    start: int
    stop: int
    digest: str  # of its inputs: a report with another digest belongs to other images

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.stop - self.start


@dataclass(frozen=True)
class Task:
    """What all units of a call have in common."""

    folder: Folder
    origin: Origin
    layout: Layout
    pixels: Pixels
    rows_per_group: int
    compression: str = SMALL


def make_units(plan: ImagePlan, rows_per_shard: int) -> list[Unit]:
    """Cut every split into units of nearly equal size.

    Args:
        plan: The inputs.
        rows_per_shard: Largest number of inputs per unit.

    Returns:
        The units of all splits, in order.
    """
    units: list[Unit] = []
    for split in SPLITS:
        inputs = plan.splits[split]
        count = max(-(-len(inputs) // rows_per_shard), min(len(inputs) // SMALL_UNIT, SMALL_SET_UNITS), 1)
        for number in range(count if len(inputs) else 0):
            start, stop = number * len(inputs) // count, (number + 1) * len(inputs) // count
            digest = _digest(inputs.slice(start, stop - start))
            units.append(Unit(f"{split}-{number:05d}", split, len(units), start, stop, digest))
    return units


def _digest(inputs: pa.Table) -> str:
    digest = hashlib.sha256()
    for name, column in zip(inputs.column_names, inputs.columns, strict=True):
        digest.update(json.dumps(column.to_pylist()).encode() if name == "path" else column.to_numpy().tobytes())
    return digest.hexdigest()


def make_shard(item: dict[str, Any], task: Task) -> dict[str, Any]:
    """Make one unit: a task of Ray Data, which passes rows in and out.

    Args:
        item: The unit as JSON, under "unit".
        task: What all units have in common.

    Returns:
        The report as JSON under "report", or one line under "error"; the other one is empty.
    """
    unit = Unit(**json.loads(item["unit"]))
    try:
        if _count_try(task.folder, unit) > MAX_TRIES:
            return {"report": "", "error": f"{unit.name}: its worker was lost {MAX_TRIES} times (out of memory?)"}
        with task.folder.open(f"{UNITS}/{PLAN}") as source, pq.ParquetFile(source) as plan:
            inputs = plan.read_row_group(unit.number)
        report = _write_shard(unit, inputs, task)
        task.folder.write(f"{UNITS}/{unit.name}.json", as_json(report))
    except Exception as error:  # unreadable images are rejects; no other error would go away if Ray tried again
        return {"report": "", "error": f"{unit.name}: {_one_line(error)}"}
    return {"report": json.dumps(report), "error": ""}


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | pa.ArrowException | StageError | SettingError) else f"{error!r}"


def _count_try(folder: Folder, unit: Unit) -> int:
    name = f"{UNITS}/{unit.name}.tries"
    tries = (folder.size(name) or 0) + 1
    folder.write(name, b"." * tries)
    return tries


@contextlib.contextmanager
def scratch(folder: Folder) -> Iterator[Path]:
    """Where to write a file before it goes into `folder`: in the folder itself if it is local, else a temporary one."""
    if folder.local is not None:
        yield folder.local
        return
    with tempfile.TemporaryDirectory(prefix="wavemim-") as room:
        yield Path(room)


def _write_shard(unit: Unit, inputs: pa.Table, task: Task) -> dict[str, Any]:
    began = time.monotonic()
    observed = Observed()
    pixels = dataclasses.replace(task.pixels, observed=observed)
    rows, labels = (inputs.column(name).to_numpy() for name in ("row", "label"))
    paths = inputs.column("path").to_pylist()
    rejects = []
    entry, bytes_read = None, 0
    with scratch(task.folder) as room:
        writer = ShardWriter(room, task.layout, task.rows_per_group, compression=task.compression)
        try:
            for index, data in fetch(task.origin, inputs):
                try:
                    if isinstance(data, str):
                        raise RejectedImage(data)
                    bytes_read += len(data)
                    image = decode_image(data, paths[index], pixels)
                except RejectedImage as error:
                    rejects.append([paths[index], str(error)])
                    continue
                observed.add(image, mapped=pixels.value_range is not None)
                writer.append(int(rows[index]), paths[index], int(labels[index]), image)
            if closed := writer.close():
                file, about = closed
                entry = {"name": f"{unit.name}.parquet", **about}
                task.folder.put(file, entry["name"])
        finally:
            writer.abort()
    return {
        "unit": unit.name,
        "split": unit.split,
        "digest": unit.digest,
        "inputs": unit.inputs,
        "kept": writer.rows,
        "rejects": rejects,
        "file": entry,
        # statistics are those of the train split
        "moments": (writer.moments if unit.split == "train" else Moments(task.layout)).state(),
        "seconds": time.monotonic() - began,
        "memory": peak_memory(),
        "bytes_read": bytes_read,
        "observed": observed.state(),
    }
