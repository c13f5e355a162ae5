"""Images → shard set, with Ray Data: every image is decoded and transformed once.

The work is cut into units, fixed before it begins: one unit is one shard, made by one task that reads, decodes,
transforms, writes the shard under a temporary name, renames it, and leaves a report in ``units/``. The same call
resumes an interrupted one, wherever it was interrupted: units whose report and shard exist are skipped.
Images and shard set may be local, then all nodes of a cluster have to see them under the same paths, or in object stores.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.config.places import printable
from pipeline.config.recipe import Recipe, identity
from pipeline.errors import SettingError, StageError
from pipeline.images.arrays import Pixels
from pipeline.images.describe import found_in, without_images, without_val
from pipeline.images.observed import cropped_share, narrow_values
from pipeline.images.plan import ImagePlan
from pipeline.images.sources import check_source, plan_source
from pipeline.images.tar import incomplete
from pipeline.runtime import observability, ray_internals
from pipeline.runtime.out_folder import check_writable
from pipeline.runtime.ray_session import SessionInfo, ray_data, root_cause
from pipeline.runtime.stage_folder import StageFolder, as_json, journal_at_home, stage_folder
from pipeline.runtime.usage import Meter, Spent, spent_in
from pipeline.shards.errors import ShardError
from pipeline.shards.layout import Layout
from pipeline.shards.shard_set import MANIFEST, REJECTED, ShardSet
from pipeline.stages.prepare_task import UNITS, Task, Unit, make_shard, make_units
from pipeline.stages.prepare_units import check_rejects, finish_set, finished_reports, write_plan
from pipeline.stages.sequence import local
from pipeline.storage.folder import Folder
from pipeline.tracking.tracker import Tracker

# Bytes that a task asks of Ray: far less than it uses, since every machine offers more. Only nodes that are not to decode
# images offer less, such as those with GPUs in cluster.yaml: the autoscaler then never starts one for `prepare`.
TASK_MEMORY = 2**20
_INSIDE = "lies inside images={}, so its files would be read as images; use a folder outside of it"
FOUND = "found.json"  # beside the manifest: how the images were understood

OnUnit = Callable[[dict[str, Any]], None]  # called with the progress after every shard


def check_given(recipe: Recipe) -> None:
    """Raise SettingError where `images=` is not set."""
    if recipe.images is None:
        check_source(None)


@local
def check_images(recipe: Recipe) -> None:
    """Raise SettingError where `images=` names nothing that can be read."""
    check_source(recipe.images)


def check_layout(recipe: Recipe) -> None:
    """Raise SettingError where `data.steps` are too fine to be stored."""
    try:
        layout = _layout(recipe)
        for level in layout.steps:
            layout.dtype(level)
    except ShardError as error:
        raise SettingError(f"data.steps: {error}; use coarser ones") from None


def check_places(recipe: Recipe) -> None:
    """Raise SettingError where the output would lie among the images, and be read as input."""
    images = Folder.at(recipe.images).local if recipe.images else None
    for key, place in (("out", recipe.out), ("shards", recipe.shards_at)):
        written = Folder.at(place).local
        if images is not None and written is not None and images.resolve() in written.resolve().parents:
            raise SettingError(f"{key}={place}: {_INSIDE.format(recipe.images)}")
        if written is None and recipe.images and place.startswith(recipe.images.rstrip("/") + "/"):
            raise SettingError(f"{key}={place}: {_INSIDE.format(recipe.images)}")


CHECKS = (check_given, check_images, check_layout, check_places)


@dataclass(frozen=True)
class Checked:
    """What `check` determined before Ray is started."""

    plan: ImagePlan | None  # None where the shard set looks finished already: its images are not listed again


def check(recipe: Recipe) -> Checked:
    """List the images before the output folder is locked, so that mistakes in `images=` leave and replace nothing.

    Raises:
        SettingError: The images cannot be listed, their labels or splits are ambiguous, or the set cannot be written.
        StageError: Too many inputs are rejected because of their names, or a store does not answer.
    """
    unfinished = recipe.restart or Folder.at(recipe.shards_at).size(MANIFEST) is None
    if unfinished:
        check_writable("shards", Folder.at(recipe.shards_at))
    return Checked(_plan(recipe) if unfinished else None)


def run(
    recipe: Recipe,
    session: SessionInfo,
    checked: Checked,
    *,
    progress: bool = True,
    on_unit: OnUnit | None = None,
) -> dict[str, Any]:
    """Make the shard set of `recipe.images` at `recipe.shards_at`.

    A finished set with the same settings is kept; an unfinished one is resumed.

    Args:
        recipe: The settings.
        session: The Ray session, which is initialised already.
        checked: What `check` returned.
        progress: Whether a progress bar is shown.
        on_unit: Called after every shard, with what it holds and how many are done.

    Returns:
        What was done, and what is in the shard set.

    Raises:
        SettingError: The folder holds a set of other settings.
        StageError: Too many inputs are rejected, or a shard could not be written.
    """
    same, lease = identity(recipe, "prepare"), None
    if recipe.home is not None:
        lease = recipe.run_dir / ".shards.lease.json"
    with (
        journal_at_home(recipe, "prepare"),
        stage_folder(
            recipe.shards_at, same, restart=recipe.restart, mark=MANIFEST, lease=lease, work=("*.parquet",)
        ) as folder,
    ):
        if folder.finished:
            cost = spent_in(recipe.stage_dir("prepare")).record()
            return _result(folder.folder, "finished already", {"cost": cost, **_found(folder.folder)})
        # With restart=true an earlier call made another set, whose cost does not count.
        meter = Meter(before=spent_in(recipe.stage_dir("prepare")) if folder.state == "unfinished" else None)
        with Tracker.start(recipe, "prepare", log_dir=recipe.stage_dir("prepare"), wait=False) as tracker:

            def unit_done(about: dict[str, Any]) -> None:
                meter.take(_spent(about))
                spent = meter.read()
                tracker.log(spent.metrics(), spent.images_seen)
                if on_unit is not None:
                    on_unit(about)

            result = _make(recipe, session, folder, checked.plan or _plan(recipe), progress, unit_done)
            result["cost"] = meter.read().record()
            _log(tracker, result)
        return result


def summary(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """What prepare wrote where."""
    counts = result["counts"]
    rejected = f", {counts['rejected']} rejected (see rejected.parquet)" if counts["rejected"] else ""
    labels = f"{result['classes']} classes" if result["classes"] else "unlabelled"
    found = result.get("layout", labels)  # how the images were understood: a wrong guess should not go unnoticed
    line = f"prepare: {counts['kept']:,} images ({found}){rejected} → {result['path']} ({result['state']})"
    return "\n".join([line, *(f"prepare: warning: {note}" for note in result.get("notes", ()))])


def dry_run(recipe: Recipe, say: Callable[[str], object] = print) -> None:
    """Say what `images=` holds and how it would be divided. Decodes nothing, starts no Ray and writes nothing.

    Args:
        recipe: The settings.
        say: Called with the text.

    Raises:
        SettingError: Preparing it would be refused.
        StageError: Too many inputs are rejected because of their names, or a store does not answer.
    """
    for check_settings in CHECKS:
        check_settings(recipe)
    plan = _plan(recipe)
    counts = {split: len(rows) for split, rows in plan.splits.items()}
    lines = [f"{counts['train']:,} images for train and {counts['val']:,} for val ({found_in(plan)})"]
    if plan.rejects:
        lines.append(f"{len(plan.rejects)} rejected before decoding; the first: {': '.join(plan.rejects[0])}")
    lines += [f"warning: {note}" for note in (*plan.notes, *incomplete(plan.rejects), *without_val(plan))]
    say(
        "\n".join(f"prepare: {printable(line)}" for line in lines)
        + "\nprepare: nothing was decoded or written (--dry-run)"
    )


def _log(tracker: Tracker, result: Mapping[str, Any]) -> None:
    tracker.tag("wavemim.shards", result["fingerprint"])
    tracker.dataset(ShardSet.open(result["path"], check_files=False).about, "prepare")
    metrics = {f"prepare/{name}": count for name, count in result["counts"].items()}
    if result["images_per_second"]:
        metrics["perf/images_per_second"] = result["images_per_second"]
    metrics |= {"prepare/bytes": result["bytes"], **Spent.of(result["cost"]).metrics()}
    tracker.log(metrics, result["counts"]["inputs"])


def _spent(about: dict[str, Any]) -> Spent:
    """Cost of a unit, by its report: a task holds one core."""
    return Spent(
        images_seen=about["inputs"],
        worker_hours=about["seconds"] / 3600,
        peak_memory_bytes=about["memory"],
        bytes_read=about["bytes_read"],
    )


def _layout(recipe: Recipe) -> Layout:
    data = recipe.data
    return Layout(data.image_size, data.channels, recipe.steps_by_level(), data.wavelet)


def _plan(recipe: Recipe) -> ImagePlan:
    plan = plan_source(
        recipe.images or "",
        val_share=recipe.data.val_share,
        seed=recipe.seed,
        image_column=recipe.data.image_column,
        label_column=recipe.data.label_column,
    )
    check_rejects(recipe, len(plan.rejects), plan.rejects, plan.inputs)
    return plan


def _make(
    recipe: Recipe,
    session: SessionInfo,
    folder: StageFolder,
    plan: ImagePlan,
    progress: bool,
    on_unit: OnUnit | None,
) -> dict[str, Any]:
    data = recipe.data
    task = Task(
        folder=folder.folder,
        origin=plan.origin,
        layout=_layout(recipe),
        pixels=Pixels(data.image_size, data.channels, data.max_pixels, data.min_side, data.value_range, data.nodata),
        rows_per_group=data.rows_per_group,
        compression=data.compression,
    )
    began = time.monotonic()
    units = make_units(plan, data.rows_per_shard)
    reports = finished_reports(task.folder, units)
    todo = [unit for unit in units if unit.name not in reports]
    if todo:
        write_plan(task.folder, plan, units)
    with (
        _Progress(recipe, plan, units, reports, progress, on_unit) as followed,
        contextlib.closing(_run_tasks(todo, task, session)) as fresh_reports,  # while there is a Ray
    ):
        for report in fresh_reports:
            reports[report["unit"]] = report
            followed.done(report)
    ordered = [reports[unit.name] for unit in units]
    rejects = sorted([*plan.rejects, *((path, reason) for report in ordered for path, reason in report["rejects"])])
    check_rejects(recipe, len(rejects), rejects, plan.inputs)
    observed = [report["observed"] for report in ordered if "observed" in report]  # older reports have none
    notes = [
        *plan.notes,
        *incomplete(rejects),
        *without_images(plan, rejects),
        *without_val(plan),
        *narrow_values(observed),
    ]
    found = {
        "layout": found_in(plan),
        "notes": [printable(note) for note in notes],
        "cropped_share": cropped_share(observed),
    }
    task.folder.write(FOUND, as_json(found))
    finish_set(folder, recipe, plan, task.layout, ordered, rejects)
    seconds = time.monotonic() - began
    fresh = sum(unit.inputs for unit in todo)
    extra = {
        **found,
        "units": {"total": len(units), "reused": len(units) - len(todo)},
        "seconds": seconds,
        "images_per_second": fresh / seconds if fresh else None,
    }
    return _result(folder.folder, "continued" if folder.state == "unfinished" else "new", extra)


def _run_tasks(todo: list[Unit], task: Task, session: SessionInfo) -> Generator[dict[str, Any], None, None]:
    """Make the shards of `todo`, in any order; yields the report of each."""
    if not todo:
        return
    # Imported here, so that mistakes in the settings are reported without waiting for Ray.
    import ray.data

    for unit in todo:
        task.folder.remove(f"{UNITS}/{unit.name}.tries")
    items = [{"unit": json.dumps(vars(unit))} for unit in todo]
    try:
        with ray_data(session), ray_internals.prompt_data_scheduling():
            # One block per unit: a task is one unit, and its report arrives when it is done.
            dataset = ray.data.from_items(items, override_num_blocks=len(items))
            shards = dataset.map(functools.partial(make_shard, task=task), num_cpus=1, memory=TASK_MEMORY)
            for row in shards.iter_rows():
                if error := row["error"]:
                    raise StageError(f"a shard could not be written, {error}; run the same command again to resume")
                yield json.loads(row["report"])
    except ray.exceptions.RayError as error:
        raise StageError(f"a task failed: {root_cause(error)}; run the same command again to resume") from error


class _Progress:
    """The progress bar, in images; ends the call as soon as too many inputs are rejected, not after a whole day."""

    def __init__(
        self,
        recipe: Recipe,
        plan: ImagePlan,
        units: list[Unit],
        finished: Mapping[str, Mapping[str, Any]],
        show: bool,
        on_unit: OnUnit | None,
    ) -> None:
        self._recipe, self._inputs, self._units, self._on_unit = recipe, plan.inputs, len(units), on_unit
        self._done_units = len(finished)
        self._rejected = len(plan.rejects) + sum(len(report["rejects"]) for report in finished.values())
        self._first: list[tuple[str, str]] = []  # rejects of this call
        self._total = sum(unit.inputs for unit in units)
        self._seen = sum(report["inputs"] for report in finished.values())
        observability.publish(recipe.name, "prepare", self._seen, self._total, "images")
        self._bar = tqdm(total=self._total, initial=self._seen, unit="image", desc="prepare", disable=not show)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def done(self, report: dict[str, Any]) -> None:
        """Count one more finished unit."""
        self._done_units += 1
        self._bar.update(report["inputs"])
        if self._on_unit is not None:
            about = {key: report[key] for key in ("unit", "split", "inputs", "kept", "seconds", "memory", "bytes_read")}
            rejected = len(report["rejects"])
            self._on_unit({**about, "rejected": rejected, "done": self._done_units, "total": self._units})
        self._rejected += len(report["rejects"])
        self._first = (self._first + report["rejects"])[:10]
        self._seen += report["inputs"]
        numbers = {"wavemim_rejected_images": float(self._rejected)}
        observability.publish(self._recipe.name, "prepare", self._seen, self._total, "images", numbers)
        check_rejects(self._recipe, self._rejected, self._first, self._inputs)


def _found(folder: Folder) -> dict[str, Any]:
    """What the call that made the set found in its images; empty for sets of older versions."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        about: dict[str, Any] = json.loads(folder.read(FOUND))
        return about
    return {}


def _result(folder: Folder, state: str, extra: dict[str, Any]) -> dict[str, Any]:
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
