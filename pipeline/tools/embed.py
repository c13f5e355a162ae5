"""`wavemim embed`: features of any images, written to one Parquet file, through Ray Data.

The inputs of all sources are cut into units in their order. A task decodes a unit, another one (on a GPU an actor that
keeps the encoder, where the cluster has GPUs) makes its features; this process writes them as they come, in order, so
that memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from tqdm import tqdm

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError, StageError
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import SUFFIXES, decode_image
from pipeline.images.plan import SCHEMA, ImagePlan, Origin
from pipeline.images.sources import fetch, plan_source
from pipeline.models.encoder_source import Subject, subject_of
from pipeline.runtime.ray_internals import silence_data_progress
from pipeline.runtime.ray_session import SessionInfo, root_cause
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import is_remote
from wavemim import __version__

UNIT, SMALL_UNIT, UNITS = 256, 32, 16  # images in a task: at most; of a few images so many that UNITS tasks have work
ROW_GROUP = 8192  # images in a row group, about
METADATA = b"wavemim"  # key of the file's metadata: JSON that names the encoder
_ABOUT = ("fingerprint", "image_size", "channels", "pixel_mean", "pixel_std", "images_seen")


@dataclass(frozen=True)
class Source:
    """An argument of the command, planned: which images it names, in their order."""

    name: str  # as it was typed
    plan: ImagePlan

    @property
    def rows(self) -> pa.Table:
        """One row an image, as in `ImagePlan.splits`."""
        return self.plan.splits["train"]


def embed(
    subject: Subject,
    sources: Sequence[Source],
    out: str,
    session: SessionInfo,
    *,
    batch: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the features of all images to `out`, and what could not be read to ``….rejected.parquet`` beside it.

    Columns: source, path, label (null where there is none), embedding; rows in the order of the sources. Ray is
    initialised already. Gives counts and places. Raises StageError, and leaves nothing half-written.
    """
    units = [unit for source in sources for unit in units_of(source)]
    rejects = [(source.name, *reject) for source in sources for reject in source.plan.rejects]
    done = _features(subject, units, session, batch)
    target, name = parent_of(out)
    with Writer(target, name, subject) as writer:
        total = sum(len(unit.rows) for unit in units)
        with tqdm(total=total, desc="embed", unit=" image", disable=not progress) as bar:
            for unit in units:
                rejects += writer.write(unit, done)
                bar.update(len(unit.rows))
        if not writer.rows:
            first = "; the first reject: {}: {}".format(*rejects[0][1:]) if rejects else ""
            raise StageError(f"no image could be embedded of {len(rejects)}{first}")
        writer.finish(rejects)
    listed = target.shown(rejected_of(name)) if rejects else None
    return {"path": target.shown(name), "images": writer.rows, "rejected": len(rejects), "rejects": listed}


def check_out(out: str, *, overwrite: bool) -> None:
    """Raise SettingError where nothing can be written to `out`, or, without `overwrite`, something is there."""
    folder, name = parent_of(out)
    if not name.endswith(".parquet"):
        raise SettingError(f"--out {out}: a name that ends in .parquet is needed")
    kind = folder.kind(name)
    if kind == "folder" or (kind and not overwrite):
        hint = "a folder; give another name" if kind == "folder" else "there already; --overwrite replaces it"
        raise SettingError(f"--out {out}: {folder.shown(name)} is {hint}")
    if folder.local is not None and not folder.local.is_dir():
        raise SettingError(f"--out {out}: no folder '{folder.local}'")


def parent_of(place: str) -> tuple[Folder, str]:
    """The folder of a file, local or in a store, and its name."""
    above, _, name = place.rpartition("/")
    return Folder.at(above or ("/" if place.startswith("/") else ".")), name


def rejected_of(name: str) -> str:
    """The file that lists what could not be embedded."""
    return f"{name.removesuffix('.parquet')}.rejected.parquet"


def subject_named(checkpoint: str) -> Subject:
    """The encoder of a checkpoint or run of ours, ``timm:NAME``, or a folder in timm's format. Raises SettingError."""
    place = Path(checkpoint)
    with_pretrain = place / "pretrain"  # a run's folder
    named = str(with_pretrain) if with_pretrain.is_dir() and not (place / "config.json").is_file() else checkpoint
    return subject_of(with_overrides(load("small"), {"checkpoint": named}), None)


def plan_images(
    images: Sequence[str], *, image_column: str | None = None, label_column: str | None = None
) -> list[Source]:
    """The sources that arguments name: whatever `images=` takes, and single image files. Raises SettingError."""
    sources: list[Source] = []
    single: list[str] = []
    for argument in images:
        if os.path.splitext(argument)[1].lower() in SUFFIXES and (is_remote(argument) or not Path(argument).is_dir()):
            if not is_remote(argument) and not Path(argument).is_file():
                raise SettingError(f"{argument}: no such file")
            single.append(argument)
            continue
        sources += _singles(single)
        plan = plan_source(argument, val_share=None, seed=0, image_column=image_column, label_column=label_column)
        if not plan.rejects and not any(len(rows) for rows in plan.splits.values()):
            raise SettingError(f"{argument}: holds no images")
        sources.append(Source(argument, plan))
        single = []
    return sources + _singles(single)


def _singles(files: Sequence[str]) -> list[Source]:
    """Single files, as one source: a shell's pattern may name thousands."""
    if not files:
        return []
    count = len(files)
    none, nowhere = np.full(count, -1, np.int32), np.full(count, -1, np.int64)
    rows = pa.table([np.arange(count), list(files), none, none, nowhere, nowhere], schema=SCHEMA)
    plan = ImagePlan("files", None, Origin("files", os.getcwd()), {"train": rows, "val": SCHEMA.empty_table()}, [], 0)
    return [Source("", plan)]


# Tasks


@dataclass(frozen=True)
class Unit:
    """Images that one task decodes."""

    source: str
    classes: list[str] | None
    origin: Origin
    rows: pa.Table

    def as_item(self) -> dict[str, bytes | str]:
        """For Ray Data."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_table(self.rows.combine_chunks())
        return {"origin": json.dumps(asdict(self.origin)), "rows": sink.getvalue().to_pybytes()}


def units_of(source: Source) -> Iterator[Unit]:
    """The source, cut into work for tasks."""
    rows = source.rows
    size = min(UNIT, max(SMALL_UNIT, -(-len(rows) // UNITS)))
    for start in range(0, len(rows), size):
        yield Unit(source.name, source.plan.classes, source.plan.origin, rows.slice(start, size))


def _decode(item: dict[str, np.ndarray], wanted: Pixels) -> dict[str, np.ndarray]:
    """One unit → pixels (n, C, H, W), uint8, and for each image the reason why there are none, or ''."""
    origin = json.loads(item["origin"][0])
    origin = Origin(**{**origin, "containers": tuple(origin["containers"])})
    rows = pa.ipc.open_stream(item["rows"][0]).read_all()
    paths = rows.column("path").to_pylist()
    pixels = np.zeros((len(rows), wanted.channels, wanted.size, wanted.size), np.uint8)
    reasons = [""] * len(rows)
    for index, data in fetch(origin, rows):
        try:
            if isinstance(data, str):
                raise RejectedImage(data)
            pixels[index] = decode_image(data, paths[index], wanted)
        except RejectedImage as error:
            reasons[index] = str(error)
    return {"pixels": pixels, "reason": np.array(reasons, object)}


def _encode(part: dict[str, np.ndarray], *, subject: Subject, batch: int, device: str = "cpu") -> dict[str, np.ndarray]:
    """Pixels → features (n, F), float32, where there is no reason against it."""
    if device == "cpu":
        torch.set_num_threads(1)
    model, width = _model_of(subject, torch.device(device))
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (subject.pixel_mean, subject.pixel_std)
    )
    kept = np.flatnonzero(part["reason"] == "")
    features = np.zeros((len(part["reason"]), width), np.float32)
    with torch.inference_mode():
        for start in range(0, len(kept), batch):
            index = kept[start : start + batch]
            pixels = torch.from_numpy(part["pixels"][index]).to(device)
            features[index] = model((pixels.float() - mean) / std).float().cpu().numpy()
    return {"features": features, "reason": part["reason"]}


class _OnGPU:
    """`_encode` in an actor: a task on a GPU would end its process, and with it the encoder."""

    def __init__(self, subject: Subject, batch: int) -> None:
        self._encode = functools.partial(_encode, subject=subject, batch=batch, device="cuda")

    def __call__(self, part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `_encode`."""
        return self._encode(part)


_models: dict[tuple[str, str], tuple[Any, int]] = {}  # the last one of this process, and its number of features


def _model_of(subject: Subject, device: torch.device) -> tuple[Any, int]:
    key = (subject.source, subject.fingerprint)
    if key not in _models:
        _models.clear()
        model = subject.model().to(device).eval()
        with torch.inference_mode():
            blank = torch.zeros(1, subject.channels, subject.image_size, subject.image_size, device=device)
            _, width = model(blank).shape
        _models[key] = model, width
    return _models[key]


def _features(
    subject: Subject, units: Sequence[Unit], session: SessionInfo, batch: int
) -> Iterator[tuple[np.ndarray, str]]:
    """(features, reason) of every image, in order."""
    gpu = session.gpus >= 1
    data = (subject.recipe or load("small").dump())["data"]
    limits = subject.value_range or data["value_range"]
    wanted = Pixels(subject.image_size, subject.channels, data["max_pixels"], data["min_side"], limits)
    with _in_order():
        items = ray.data.from_items([unit.as_item() for unit in units], override_num_blocks=len(units))
        decoded = items.map_batches(
            functools.partial(_decode, wanted=wanted), batch_size=1, batch_format="numpy", num_cpus=1
        )
        if gpu:
            made = decoded.map_batches(
                _OnGPU,
                fn_constructor_args=(subject, batch),
                batch_size=UNIT,
                batch_format="numpy",
                num_gpus=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=int(session.gpus)),
            )
        else:
            made = decoded.map_batches(
                functools.partial(_encode, subject=subject, batch=batch),
                batch_size=None,
                batch_format="numpy",
                num_cpus=1,
            )
        try:
            for part in made.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                yield from zip(part["features"], part["reason"], strict=True)
        except ray.exceptions.RayError as error:
            raise StageError(f"a task failed: {root_cause(error)}; nothing is written") from error


@contextlib.contextmanager
def _in_order() -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    silence_data_progress()
    context.execution_options.preserve_order = True
    try:
        yield
    finally:
        context.execution_options.preserve_order = before


# Writing


class Writer:
    """Writes the file under another name; it gets its own when it is whole."""

    def __init__(self, folder: Folder, name: str, subject: Subject) -> None:
        self.rows = 0
        self._folder, self._name, self._subject = folder, name, subject
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Writer:
        self._stack = contextlib.ExitStack()
        room = self._folder.local
        if room is None:
            room = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="wavemim-")))
        mark = uuid.uuid4().hex[:8]
        self._file, self._rejected = (room / f".{self._name}.{mark}.{part}.tmp" for part in ("features", "rejected"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None and self._writer.is_open:
            self._writer.close()
        for file in (self._file, self._rejected):
            file.unlink(missing_ok=True)
        self._stack.close()

    def write(self, unit: Unit, done: Iterator[tuple[np.ndarray, str]]) -> list[tuple[str, str, str]]:
        """Take the features of a unit from `done`; gives its rejects as (source, path, reason)."""
        found = [next(done) for _ in range(len(unit.rows))]
        paths, labels = (unit.rows.column(name).to_pylist() for name in ("path", "label"))
        kept = [index for index, (_, reason) in enumerate(found) if not reason]
        if kept:
            features = np.stack([found[index][0] for index in kept])
            names = [unit.classes[labels[i]] if unit.classes and labels[i] >= 0 else None for i in kept]
            columns = [
                pa.array([unit.source] * len(kept), pa.string()),
                pa.array([paths[index] for index in kept], pa.string()),
                pa.array(names, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]),
            ]
            self._add(pa.Table.from_arrays(columns, schema=self._schema(features.shape[1])))
        return [(unit.source, path, reason) for path, (_, reason) in zip(paths, found, strict=True) if reason]

    def finish(self, rejects: Sequence[tuple[str, str, str]]) -> None:
        """Give the files their names: the list of rejects first, where there are any."""
        self._flush()
        assert self._writer is not None
        self._writer.close()
        listed = rejected_of(self._name)
        if rejects:
            table = {key: [reject[i] for reject in rejects] for i, key in enumerate(("source", "path", "reason"))}
            pq.write_table(pa.table(table, pa.schema([(key, pa.string()) for key in table])), self._rejected)
            self._folder.put(self._rejected, listed)
        elif self._folder.kind(listed) == "file":  # of the call that this one replaces
            self._folder.remove(listed)
        self._folder.put(self._file, self._name)

    def _add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self.rows += len(table)
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
            self._writer.write_table(table, row_group_size=len(table))
            self._waiting = []

    def _schema(self, width: int) -> pa.Schema:
        subject = self._subject
        about = {"encoder": subject.source, **{key: getattr(subject, key) for key in _ABOUT}, "wavemim": __version__}
        texts = [(key, pa.string()) for key in ("source", "path", "label")]
        return pa.schema([*texts, ("embedding", pa.list_(pa.float32(), width))], {METADATA: json.dumps(about)})
