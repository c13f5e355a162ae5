"""Images → shard set, with Ray Data: every image is decoded and transformed once.

The work is cut into units, fixed before it begins: one unit is one shard, made by one task that reads, decodes,
transforms, writes the shard under a temporary name, renames it, and leaves a report in ``units/``. A call that was
interrupted, wherever, is continued by the same call: it leaves out the units whose report and shard are there.
Images and shard set may be local, then all nodes of a cluster have to see them under the same paths, or in object stores.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.data
from tqdm import tqdm

from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.images.arrays import Pixels
from pipeline.images.plan import ImagePlan
from pipeline.images.sources import plan_source
from pipeline.runtime.ray_internals import silence_data_progress
from pipeline.runtime.stage_folder import StageFolder, stage_folder
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.layout import Layout, ShardError
from pipeline.shards.shard_set import MANIFEST, REJECTED, SPLITS, ShardSet, make_manifest
from pipeline.shards.statistics import Moments
from pipeline.shards.writer import write_rejected
from pipeline.stages.prepare_task import PLAN, UNITS, Task, Unit, make_shard, make_units, scratch
from pipeline.storage.folder import Folder
from pipeline.tracking.tracker import Tracker

ALWAYS_ALLOWED_REJECTS = 10


def prepare(
    recipe: Recipe, *, progress: bool = True, on_unit: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Make the shard set of `recipe.images` at `recipe.shards_at`; Ray is initialised already. Returns a summary.

    A finished set of the same settings is left as it is, an unfinished one is continued. `on_unit` is called with the
    progress after every shard. Raises SettingError and StageError.
    """
    _check_places(recipe)
    # Planned before the folder is taken: a mistake in images= leaves nothing behind, and throws nothing away.
    plan = None
    if recipe.restart or not recipe.images or Folder.at(recipe.shards_at).size(MANIFEST) is None:
        plan = _plan(recipe)
    with stage_folder(recipe.shards_at, identity(recipe, "prepare"), restart=recipe.restart, mark=MANIFEST) as folder:
        if folder.finished:
            cost = spent_in(recipe.stage_dir("prepare")).record()
            return _summary(folder.folder, "finished already", {"cost": cost})
        # With restart=true another set was made before, which is no part of this one.
        meter = Meter(before=spent_in(recipe.stage_dir("prepare")) if folder.state == "unfinished" else None)
        with Tracker.start(recipe, "prepare", log_dir=recipe.stage_dir("prepare")) as tracker:

            def unit_done(about: dict[str, Any]) -> None:
                meter.take(_spent(about))
                spent = meter.read()
                tracker.log(spent.metrics(), spent.images_seen)
                if on_unit is not None:
                    on_unit(about)

            summary = _make(recipe, folder, plan or _plan(recipe), progress, unit_done)
            summary["cost"] = meter.read().record()
            tracker.tag("wavemim.shards", summary["fingerprint"])
            counts = {f"prepare/{name}": count for name, count in summary["counts"].items()}
            if summary["images_per_second"]:
                counts["perf/images_per_second"] = summary["images_per_second"]
            counts |= {"prepare/bytes": summary["bytes"], **Spent.of(summary["cost"]).metrics()}
            tracker.log(counts, summary["counts"]["inputs"])
        return summary


def _spent(about: dict[str, Any]) -> Spent:
    """What a unit cost, by its report: a task holds one core."""
    return Spent(
        images_seen=about["inputs"],
        worker_hours=about["seconds"] / 3600,
        peak_memory_bytes=about["memory"],
        bytes_read=about["bytes_read"],
    )


def _check_places(recipe: Recipe) -> None:
    """Raise SettingError where steps are too fine to be stored, or where what is written would be taken for input."""
    try:
        layout = _layout(recipe)
        for level in layout.steps:
            layout.dtype(level)
    except ShardError as error:
        raise SettingError(f"data.steps: {error}; give coarser ones") from None
    images = Folder.at(recipe.images).local if recipe.images else None
    for key, place in (("out", recipe.out), ("shards", recipe.shards_at)):
        written = Folder.at(place).local
        if images is not None and written is not None and images.resolve() in written.resolve().parents:
            raise SettingError(
                f"{key}={place}: lies in images={recipe.images}, so what is written would be taken for images; "
                "give a folder beside it"
            )


def _layout(recipe: Recipe) -> Layout:
    data = recipe.data
    return Layout(data.image_size, data.channels, recipe.steps_by_level(), data.wavelet)


def _make(
    recipe: Recipe,
    folder: StageFolder,
    plan: ImagePlan,
    progress: bool,
    on_unit: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    data = recipe.data
    task = Task(
        folder=folder.folder,
        origin=plan.origin,
        layout=_layout(recipe),
        pixels=Pixels(data.image_size, data.channels, data.max_pixels, data.min_side, data.value_range),
        rows_per_group=data.rows_per_group,
    )
    began = time.monotonic()
    units = make_units(plan, data.rows_per_shard)
    finished = {unit.name: report for unit, report in zip(units, _reports(task.folder, units), strict=True) if report}
    todo = [unit for unit in units if unit.name not in finished]
    rejects = len(plan.rejects) + sum(len(report["rejects"]) for report in finished.values())
    watch = _Watch(recipe, plan.inputs, rejects, _Progress(units, finished, progress, on_unit))
    if todo:
        _write_plan(task.folder, plan, units)
    reports = {**finished, **_run(todo, task, watch)}
    _finish(folder, recipe, plan, task.layout, [reports[unit.name] for unit in units])
    seconds = time.monotonic() - began
    fresh = sum(unit.inputs for unit in todo)
    extra = {
        "layout": plan.layout,
        "units": {"total": len(units), "reused": len(finished)},
        "seconds": seconds,
        "images_per_second": fresh / seconds if fresh else None,
    }
    return _summary(folder.folder, "continued" if folder.state == "unfinished" else "new", extra)


def _write_plan(folder: Folder, plan: ImagePlan, units: list[Unit]) -> None:
    """All inputs as one file, so that a task is told no more than which part of it is its own."""
    with scratch(folder) as room:
        file = room / f".{PLAN}.tmp"
        schema = next(inputs.schema for inputs in plan.splits.values() if len(inputs))
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for unit in units:
                rows = plan.splits[unit.split].slice(unit.start, unit.inputs)
                writer.write_table(rows, row_group_size=unit.inputs)
        folder.put(file, f"{UNITS}/{PLAN}")


def _run(todo: list[Unit], task: Task, watch: _Watch) -> dict[str, dict[str, Any]]:
    """Make the shards of `todo`, in any order: reports by the name of the unit."""
    reports: dict[str, dict[str, Any]] = {}
    for unit in todo:
        task.folder.remove(f"{UNITS}/{unit.name}.tries")
    try:
        for result in _results(todo, task) if todo else ():
            if result["error"]:
                raise StageError(f"a shard could not be written, {result['error']}; the same call continues")
            report = json.loads(result["report"])
            reports[report["unit"]] = report
            watch.done(report)
    finally:
        watch.progress.close()
    return reports


def _results(todo: list[Unit], task: Task) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    silence_data_progress()
    items = [{"unit": json.dumps(vars(unit))} for unit in todo]
    # A block a unit: a task is one unit, and what it gives back arrives when it is done.
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    shards = dataset.map(functools.partial(make_shard, task=task), num_cpus=1)
    try:
        yield from shards.iter_rows()
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise StageError(
            f"a task failed ({type(error).__name__}: {lines[-1].strip()}); the same call continues"
        ) from error


class _Watch:
    """Ends the call as soon as too many inputs are rejected: a mistake should not take the whole day to show."""

    def __init__(self, recipe: Recipe, inputs: int, rejects: int, progress: _Progress) -> None:
        self.progress = progress
        self._recipe, self._inputs, self._count = recipe, inputs, rejects
        self._first: list[tuple[str, str]] = []

    def done(self, report: dict[str, Any]) -> None:
        """One more unit is finished."""
        self.progress.done(report)
        self._count += len(report["rejects"])
        self._first = (self._first + report["rejects"])[:10]
        _check_rejects(self._recipe, self._count, self._first, self._inputs)


class _Progress:
    """The progress bar, in images, and the caller's `on_unit`."""

    def __init__(
        self,
        units: list[Unit],
        finished: dict[str, Any],
        show: bool,
        on_unit: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._total, self._units, self._on_unit = sum(unit.inputs for unit in units), len(units), on_unit
        self._done_units = len(finished)
        initial = sum(report["inputs"] for report in finished.values())
        self._bar = tqdm(total=self._total, initial=initial, unit="image", desc="prepare", disable=not show)

    def done(self, report: dict[str, Any]) -> None:
        """One more unit is finished."""
        self._done_units += 1
        self._bar.update(report["inputs"])
        if self._on_unit is not None:
            summary = {
                key: report[key] for key in ("unit", "split", "inputs", "kept", "seconds", "memory", "bytes_read")
            }
            rejected = len(report["rejects"])
            self._on_unit({**summary, "rejected": rejected, "done": self._done_units, "total": self._units})

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _plan(recipe: Recipe) -> ImagePlan:
    plan = plan_source(
        recipe.images or "",
        val_share=recipe.data.val_share,
        seed=recipe.seed,
        image_column=recipe.data.image_column,
        label_column=recipe.data.label_column,
    )
    _check_rejects(recipe, len(plan.rejects), plan.rejects, plan.inputs)
    return plan


def _reports(folder: Folder, units: list[Unit]) -> list[dict[str, Any] | None]:
    """The reports of units that an earlier call finished; None for those that have to be done (again)."""
    there, sizes = set(folder.sub(UNITS).names()), folder.sizes()
    found: list[dict[str, Any] | None] = []
    for unit in units:
        report = None
        if f"{unit.name}.json" in there:
            with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
                report = json.loads(folder.read(f"{UNITS}/{unit.name}.json"))
                size = report["file"]["bytes"] if report["file"] else None
                if sizes.get(f"{unit.name}.parquet") != size or report["digest"] != unit.digest:
                    report = None
        found.append(report)
    return found


def _check_rejects(recipe: Recipe, count: int, first: list[tuple[str, str]], inputs: int) -> None:
    allowed = max(ALWAYS_ALLOWED_REJECTS, recipe.data.max_rejected * inputs)
    if count > allowed:
        shown = "; ".join(f"{path}: {reason}" for path, reason in first[:10])
        raise StageError(
            f"{count} of {inputs} inputs are rejected, data.max_rejected={recipe.data.max_rejected:g} allows "
            f"{int(allowed)}; raise it to go on without them. The first: {shown}"
        )


def _finish(
    folder: StageFolder, recipe: Recipe, plan: ImagePlan, layout: Layout, reports: list[dict[str, Any]]
) -> None:
    """Merge the reports: rejected.parquet, the manifest last of all, and away with what is not part of the set."""
    rejects = sorted([*plan.rejects, *((path, reason) for report in reports for path, reason in report["rejects"])])
    _check_rejects(recipe, len(rejects), rejects, plan.inputs)
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
        write_rejected(file, rejects)
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
    )
    named = {REJECTED, *(entry["name"] for files in splits.values() for entry in files)}
    _tidy(folder.folder, named)
    folder.finish(manifest)
    units = folder.folder.sub(UNITS)
    with contextlib.suppress(OSError):
        units.clear()
        if units.local is not None:
            units.local.rmdir()


def _tidy(folder: Folder, named: set[str]) -> None:
    """Remove what interrupted calls left, or a call when the images were others; bring the rest to the disk."""
    for name in folder.names():
        if name.endswith(".parquet") and name not in named:
            folder.remove(name)
    if folder.local is None:
        return
    for path in folder.local.glob(".*.tmp"):
        path.unlink()
    # Not after each shard, where a worker would wait for the disk: by now most of it is there.
    for name in sorted(named):
        with open(folder.local / name, "rb") as file:
            os.fsync(file.fileno())


def _summary(folder: Folder, state: str, extra: dict[str, Any]) -> dict[str, Any]:
    """What the call did, and what is in the shard set."""
    shards = ShardSet.open(folder.url)
    with folder.open(REJECTED) as source:
        rejects = pq.read_table(source).to_pylist()
    return {
        "state": state,
        "path": str(folder),
        "fingerprint": shards.fingerprint,
        "rows": shards.rows,
        "classes": len(shards.classes) if shards.classes else None,
        "counts": shards.manifest["counts"],
        "bytes": sum(entry["bytes"] for entry in shards.entries()),
        # Details in brackets differ from file to file.
        "rejects": dict(Counter(reject["reason"].partition(" (")[0] for reject in rejects).most_common()),
        "first_rejects": [f"{reject['path']}: {reject['reason']}" for reject in rejects[:10]],
        **extra,
    }


def prepare_line(result: Mapping[str, Any]) -> str:
    """What prepare wrote where."""
    counts = result["counts"]
    rejected = f", {counts['rejected']} rejected (see rejected.parquet)" if counts["rejected"] else ""
    labels = f"{result['classes']} classes" if result["classes"] else "unlabelled"
    found = result.get("layout", labels)  # what the folder was taken for: a wrong guess should not pass in silence
    return f"prepare: {counts['kept']:,} images ({found}){rejected} → {result['path']} ({result['state']})"
