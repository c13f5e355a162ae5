"""Images → shard set, with Ray Data: every image is decoded and transformed once.

The work is cut into units, fixed before it begins: one unit is one shard, made by one task that reads, decodes,
transforms, writes the shard under a temporary name, renames it, and leaves a report in ``units/``. A call that was
interrupted, wherever, is continued by the same call: it leaves out the units whose report and shard are there.
All nodes of a cluster have to see the folder of images and the shard set under the same paths.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data
from tqdm import tqdm

from pipeline.config import Recipe, identity
from pipeline.image_decoding import RejectedImage, read_image
from pipeline.image_folder import Input, Plan, check_folder, plan_folder
from pipeline.moments import Moments
from pipeline.shards import MANIFEST, REJECTED, SPLITS, Layout, ShardSet, ShardWriter, make_manifest, write_rejected
from pipeline.stage import StageError, StageFolder, read_json, stage_folder, write_json
from pipeline.tracking import Tracker
from wavemim.wavelets import haar_sums

UNITS = "units"
ALWAYS_ALLOWED_REJECTS = 10
# A small set is cut finer than rows_per_shard says, so that more than one core has work: about this many images a unit.
SMALL_UNIT, SMALL_SET_UNITS = 50, 8
MAX_TRIES = 4  # of a unit in one call; Ray Data by itself repeats a task for ever whose worker is lost


@dataclass(frozen=True)
class Unit:
    """One shard to be made."""

    name: str  # of the file, without suffix
    split: str
    inputs: list[Input]

    def digest(self) -> str:
        """What the unit consists of: a report with another digest is one of another folder of images."""
        content = json.dumps([asdict(entry) for entry in self.inputs])
        return hashlib.sha256(content.encode()).hexdigest()


def prepare(
    recipe: Recipe, *, progress: bool = True, on_unit: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Make the shard set of `recipe.images` at `recipe.shards_dir`; Ray is initialised already. Returns a summary.

    A finished set of the same settings is left as it is, an unfinished one is continued. `on_unit` is called with the
    progress after every shard. Raises SettingError and StageError.
    """
    # Planned before the folder is taken: a mistake in images= leaves nothing behind, and throws nothing away.
    plan = None
    if recipe.restart or not recipe.images or not (recipe.shards_dir / MANIFEST).is_file():
        plan = _plan(recipe)
    with stage_folder(recipe.shards_dir, identity(recipe, "prepare"), restart=recipe.restart, mark=MANIFEST) as folder:
        if folder.finished:
            return _summary(folder.path, "finished already", {})
        with Tracker.start(recipe, "prepare", log_dir=recipe.stage_dir("prepare")) as tracker:
            summary = _make(recipe, folder, plan or _plan(recipe), progress, on_unit)
            tracker.tag("wavemim.shards", summary["fingerprint"])
            counts = {f"prepare/{name}": count for name, count in summary["counts"].items()}
            if summary["images_per_second"]:
                counts["perf/images_per_second"] = summary["images_per_second"]
            tracker.log({**counts, "prepare/bytes": summary["bytes"]}, summary["counts"]["inputs"])
        return summary


def _make(
    recipe: Recipe,
    folder: StageFolder,
    plan: Plan,
    progress: bool,
    on_unit: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    layout = Layout(recipe.data.image_size, recipe.data.channels, recipe.steps_by_level(), recipe.data.wavelet)
    began = time.monotonic()
    (folder.path / UNITS).mkdir(exist_ok=True)
    units = make_units(plan, recipe.data.rows_per_shard)
    finished = {unit.name: report for unit in units if (report := _report(folder.path, unit)) is not None}
    todo = [unit for unit in units if unit.name not in finished]
    task = {
        "images": str(Path(recipe.images or "").absolute()),
        "folder": str(folder.path),
        "layout": layout,
        "rows_per_group": recipe.data.rows_per_group,
    }
    reports = {**finished, **_run(todo, task, _Progress(units, finished, progress, on_unit))}
    seconds = time.monotonic() - began
    _finish(folder, recipe, plan, layout, [reports[unit.name] for unit in units])
    fresh = sum(len(unit.inputs) for unit in todo)
    extra = {
        "layout": plan.layout,
        "units": {"total": len(units), "reused": len(finished)},
        "seconds": seconds,
        "images_per_second": fresh / seconds if fresh else None,
    }
    return _summary(folder.path, "continued" if folder.state == "unfinished" else "new", extra)


def make_units(plan: Plan, rows_per_shard: int) -> list[Unit]:
    """Cut every split into units of nearly equal size, at most `rows_per_shard` inputs each."""
    units = []
    for split in SPLITS:
        inputs = plan.splits[split]
        count = max(-(-len(inputs) // rows_per_shard), min(len(inputs) // SMALL_UNIT, SMALL_SET_UNITS), 1)
        for number in range(count if inputs else 0):
            part = inputs[number * len(inputs) // count : (number + 1) * len(inputs) // count]
            units.append(Unit(f"{split}-{number:05d}", split, part))
    return units


def make_shard(item: dict[str, Any], images: str, folder: str, layout: Layout, rows_per_group: int) -> dict[str, Any]:
    """The task of one unit (Ray Data hands over and takes back a row): {"report": JSON} or {"error": text}."""
    content = json.loads(item["unit"])
    unit = Unit(content["name"], content["split"], [Input(**entry) for entry in content["inputs"]])
    target = Path(folder)
    if _count_try(_tries(target, unit)) > MAX_TRIES:
        return {"report": "", "error": f"{unit.name}: its worker was lost {MAX_TRIES} times (out of memory?)"}
    writer = ShardWriter(target / f"{unit.name}.parquet", layout, rows_per_group)
    try:
        report = _write_shard(unit, Path(images), layout, writer)
        write_json(target / UNITS / f"{unit.name}.json", report)
    except OSError as error:  # of writing: those of reading an image are rejects
        return {"report": "", "error": f"{unit.name}: {error}"}
    finally:
        writer.abort()
    return {"report": json.dumps(report), "error": ""}


def _tries(folder: Path, unit: Unit) -> Path:
    return folder / UNITS / f"{unit.name}.tries"


def _count_try(path: Path) -> int:
    with open(path, "ab") as file:
        file.write(b".")
    return path.stat().st_size


def _write_shard(unit: Unit, images: Path, layout: Layout, writer: ShardWriter) -> dict[str, Any]:
    began = time.monotonic()
    moments = Moments(layout)
    rejects = []
    for entry in unit.inputs:
        try:
            pixels = read_image(images / entry.path, layout.image_size)
        except RejectedImage as error:
            rejects.append([entry.path, str(error)])
            continue
        sums = haar_sums(pixels.astype(np.int32), layout.levels)
        if unit.split == "train":  # statistics are those of the train split
            moments.add(sums)
        writer.append(entry.row, entry.path, entry.label, layout.quantise(sums))
    return {
        "unit": unit.name,
        "split": unit.split,
        "digest": unit.digest(),
        "inputs": len(unit.inputs),
        "kept": writer.rows,
        "rejects": rejects,
        "file": writer.close(),
        "moments": moments.state(),
        "seconds": time.monotonic() - began,
    }


def _run(todo: list[Unit], task: dict[str, Any], progress: _Progress) -> dict[str, dict[str, Any]]:
    """Make the shards of `todo`, in any order: reports by the name of the unit."""
    reports: dict[str, dict[str, Any]] = {}
    for unit in todo:
        _tries(Path(task["folder"]), unit).unlink(missing_ok=True)
    try:
        for result in _results(todo, task) if todo else ():
            if result["error"]:
                raise StageError(f"a shard could not be written, {result['error']}; the same call continues")
            report = json.loads(result["report"])
            reports[report["unit"]] = report
            progress.done(report)
    finally:
        progress.close()
    return reports


def _results(todo: list[Unit], task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # One bar is enough: this logger warns that Ray Data's own are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    items = [{"unit": json.dumps(asdict(unit))} for unit in todo]
    # A block a unit: a task is one unit, and what it gives back arrives when it is done.
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    shards = dataset.map(functools.partial(make_shard, **task), num_cpus=1)
    try:
        yield from shards.iter_rows()
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise StageError(
            f"a task failed ({type(error).__name__}: {lines[-1].strip()}); the same call continues"
        ) from error


class _Progress:
    """The progress bar, in images, and the caller's `on_unit`."""

    def __init__(
        self,
        units: list[Unit],
        finished: dict[str, Any],
        show: bool,
        on_unit: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._total, self._units, self._on_unit = sum(len(unit.inputs) for unit in units), len(units), on_unit
        self._done_units = len(finished)
        initial = sum(report["inputs"] for report in finished.values())
        self._bar = tqdm(total=self._total, initial=initial, unit="image", desc="prepare", disable=not show)

    def done(self, report: dict[str, Any]) -> None:
        """One more unit is finished."""
        self._done_units += 1
        self._bar.update(report["inputs"])
        if self._on_unit is not None:
            summary = {key: report[key] for key in ("unit", "split", "inputs", "kept", "seconds")}
            rejected = len(report["rejects"])
            self._on_unit({**summary, "rejected": rejected, "done": self._done_units, "total": self._units})

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _plan(recipe: Recipe) -> Plan:
    plan = plan_folder(check_folder(recipe.images), val_share=recipe.data.val_share, seed=recipe.seed)
    _check_rejects(recipe, plan.rejects, plan.inputs)
    return plan


def _report(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """The report of a unit that an earlier call finished; None if it has to be done (again)."""
    path = folder / UNITS / f"{unit.name}.json"
    if not path.is_file():
        return None
    try:
        report = read_json(path)
        size = report["file"]["bytes"] if report["file"] else None
    except (StageError, KeyError, TypeError):
        return None
    shard = folder / f"{unit.name}.parquet"
    found = shard.stat().st_size if shard.is_file() else None
    return report if found == size and report["digest"] == unit.digest() else None


def _check_rejects(recipe: Recipe, rejects: list[tuple[str, str]], inputs: int) -> None:
    allowed = max(ALWAYS_ALLOWED_REJECTS, recipe.data.max_rejected * inputs)
    if len(rejects) > allowed:
        first = "; ".join(f"{path}: {reason}" for path, reason in rejects[:10])
        raise StageError(
            f"{len(rejects)} of {inputs} inputs are rejected, data.max_rejected={recipe.data.max_rejected:g} allows "
            f"{int(allowed)}; raise it to go on without them. The first: {first}"
        )


def _finish(folder: StageFolder, recipe: Recipe, plan: Plan, layout: Layout, reports: list[dict[str, Any]]) -> None:
    """Merge the reports: rejected.parquet, the manifest last of all, and away with what is not part of the set."""
    rejects = sorted([*plan.rejects, *((path, reason) for report in reports for path, reason in report["rejects"])])
    _check_rejects(recipe, rejects, plan.inputs)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    moments = Moments(layout)
    for report in reports:
        if report["file"]:
            splits[report["split"]].append(report["file"])
        moments.merge(report["moments"])
    if not moments.images:
        path, reason = rejects[0]
        raise StageError(f"no image of {recipe.images} could be stored for train; the first reject: {path}: {reason}")
    write_rejected(folder.path / REJECTED, rejects)
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
    for path in folder.path.iterdir():  # of interrupted calls, or of a folder that had other images then
        if path.is_file() and (path.suffix == ".tmp" or (path.suffix == ".parquet" and path.name not in named)):
            path.unlink()
    folder.finish(manifest)
    shutil.rmtree(folder.path / UNITS, ignore_errors=True)


def _summary(path: Path, state: str, extra: dict[str, Any]) -> dict[str, Any]:
    """What the call did, and what is in the shard set."""
    shards = ShardSet.open(path)
    rejects = pq.read_table(path / REJECTED).to_pylist()
    files = [entry for split in SPLITS for entry in shards.manifest["splits"][split]["files"]]
    return {
        "state": state,
        "path": str(path),
        "fingerprint": shards.fingerprint,
        "rows": shards.rows,
        "classes": len(shards.classes) if shards.classes else None,
        "counts": shards.manifest["counts"],
        "bytes": sum(entry["bytes"] for entry in files),
        # Details in brackets differ from file to file.
        "rejects": dict(Counter(reject["reason"].partition(" (")[0] for reject in rejects).most_common()),
        "first_rejects": [f"{reject['path']}: {reject['reason']}" for reject in rejects[:10]],
        **extra,
    }
