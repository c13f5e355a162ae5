"""What prepare stores for resuming (plan, reports), how many rejects it allows, and how units become a shard set (manifest)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.recipe import Recipe
from pipeline.errors import StageError
from pipeline.images.inputs import SCHEMA
from pipeline.images.plan import ImagePlan, some_of
from pipeline.runtime.stage_folder import StageFolder
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import REJECTED, SPLITS, make_manifest
from pipeline.shards.statistics import Moments
from pipeline.shards.writer import write_rejected
from pipeline.stages.prepare_task import PLAN, UNITS, Unit, scratch
from pipeline.storage.folder import Folder

ALWAYS_ALLOWED_REJECTS = 10


def write_plan(folder: Folder, plan: ImagePlan, units: Sequence[Unit]) -> None:
    """Write all inputs as one file, one row group per unit, so that a task is told only its row group."""
    with scratch(folder) as room:
        file = room / f".{PLAN}.tmp"
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for unit in units:
                rows = plan.splits[unit.split].slice(unit.start, unit.inputs)
                writer.write_table(rows, row_group_size=unit.inputs)
        folder.put(file, f"{UNITS}/{PLAN}")


def finished_reports(folder: Folder, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    """Reports of the units that an earlier call finished, by the name of the unit.

    A unit counts as finished when its report is whole and is about the same inputs, and its shard has the reported size.
    """
    present, sizes = set(folder.sub(UNITS).names()), folder.sizes()
    found = {}
    for unit in units:
        if f"{unit.name}.json" not in present:
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
            report = json.loads(folder.read(f"{UNITS}/{unit.name}.json"))
            size = report["file"]["bytes"] if report["file"] else None
            if sizes.get(f"{unit.name}.parquet") == size and report["digest"] == unit.digest:
                found[unit.name] = report
    return found


def check_rejects(recipe: Recipe, count: int, first: list[tuple[str, str]], inputs: int) -> None:
    """Raise StageError where more inputs are rejected than `data.max_rejected` allows.

    Args:
        recipe: The settings.
        count: Rejected inputs so far.
        first: Path and reason of the first ones.
        inputs: All inputs.
    """
    allowed = max(ALWAYS_ALLOWED_REJECTS, recipe.data.max_rejected * inputs)
    if count > allowed:
        of_reason: dict[str, list[str]] = {}
        for path, reason in first[:10]:
            of_reason.setdefault(reason, []).append(path)
        shown = "; ".join(f"{some_of(paths)}: {reason}" for reason, paths in of_reason.items())
        raise StageError(
            f"{count} of {inputs} inputs are rejected, data.max_rejected={recipe.data.max_rejected:g} allows "
            f"{int(allowed)}; raise it to continue without them. The first: {shown}"
        )


def finish_set(
    folder: StageFolder,
    recipe: Recipe,
    plan: ImagePlan,
    layout: Layout,
    reports: Sequence[dict[str, Any]],
    rejects: Sequence[tuple[str, str]],
) -> None:
    """Merge the reports of all units into the shard set's manifest, which is written last.

    Args:
        folder: The folder of the shard set.
        recipe: The settings.
        plan: The inputs.
        layout: How images are stored.
        reports: A report per unit, in the order of the units.
        rejects: Path and reason of every rejected input, sorted.

    Raises:
        StageError: No image of the train split could be stored.
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    moments = Moments(layout)
    for report in reports:
        if report["file"]:
            splits[report["split"]].append(report["file"])
        moments.merge(report["moments"])
    if not moments.images:
        path, reason = rejects[0]
        raise StageError(f"no image of {recipe.images} could be stored for train; the first reject: {path}: {reason}")
    with scratch(folder.folder) as room:
        file = room / f".{REJECTED}.tmp"
        write_rejected(file, list(rejects))
        folder.folder.put(file, REJECTED)
    kept = sum(report["kept"] for report in reports)
    counts = {"inputs": plan.inputs, "kept": kept, "rejected": len(rejects), "ignored": plan.ignored}
    manifest = make_manifest(
        layout,
        rows_per_group=recipe.data.rows_per_group,
        classes=plan.classes,
        splits=splits,
        statistics=moments.statistics(),
        counts=counts,
        compression=recipe.data.compression,
    )
    _tidy(folder.folder, {REJECTED, *(entry["name"] for files in splits.values() for entry in files)})
    folder.finish(manifest)
    units = folder.folder.sub(UNITS)
    with contextlib.suppress(OSError):
        units.clear()
        if units.local is not None:
            units.local.rmdir()


def _tidy(folder: Folder, named: set[str]) -> None:
    """Remove files of interrupted calls and of calls on other images; flush the set's own files to the disk."""
    for name in folder.names():
        if name.endswith(".parquet") and name not in named:
            folder.remove(name)
    if folder.local is None:
        return
    for path in folder.local.glob(".*.tmp"):
        path.unlink()
    # Not after each shard, where a worker would wait for the disk: by now most of it has been written.
    for name in sorted(named):
        with open(folder.local / name, "rb") as file:
            os.fsync(file.fileno())
