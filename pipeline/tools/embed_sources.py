"""The images that `wavemim embed` is given, cut into units of work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config.places import printable
from pipeline.errors import SettingError
from pipeline.images.decode import SUFFIXES
from pipeline.images.inputs import SourceInputs
from pipeline.images.names import NOT_UTF8
from pipeline.images.plan import NO_SPLIT, ImagePlan, Origin, PlanOptions, make_plan
from pipeline.images.sources import plan_source
from pipeline.storage.object_stores import is_remote

UNIT, SMALL_UNIT, UNITS = 256, 32, 16  # images per task at most; few images are cut so that UNITS tasks have work


@dataclass(frozen=True)
class Source:
    """An argument of the command, and the images that it names, in order."""

    name: str  # as it was typed
    plan: ImagePlan

    @property
    def rows(self) -> pa.Table:
        """One row per image, as in `ImagePlan.splits`."""
        return self.plan.splits["train"].slice()


@dataclass(frozen=True)
class Unit:
    """Images that one task decodes."""

    source: str
    classes: list[str] | None
    origin: Origin
    rows: pa.Table

    def as_item(self) -> dict[str, bytes | str]:
        """As a row of Ray Data."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_table(self.rows.combine_chunks())
        return {"origin": json.dumps(asdict(self.origin)), "rows": sink.getvalue().to_pybytes()}


def plan_images(
    images: Sequence[str], *, image_column: str | None = None, label_column: str | None = None
) -> list[Source]:
    """Find the images that arguments name.

    Args:
        images: Whatever `images=` takes, and single image files.
        image_column: Column of a list or of Parquet that names or holds the image.
        label_column: Column of a list or of Parquet that holds the label.

    Returns:
        The sources, in order; consecutive single files are one source.

    Raises:
        SettingError: A source does not exist or holds no images.
    """
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
            raise SettingError(f"{argument}: contains no images")
        sources.append(Source(argument, plan))
        single = []
    return sources + _singles(single)


def _singles(files: Sequence[str]) -> list[Source]:
    """Single files, as one source: a pattern of the shell may name thousands."""
    if not files:
        return []
    rejects = [(printable(name), NOT_UTF8) for name in files if printable(name) != name]
    files = [name for name in files if printable(name) == name]
    paths = pa.chunked_array([list(files)], pa.large_string())
    inputs = SourceInputs(
        paths, np.full(len(files), -1, np.int32), np.full(len(files), NO_SPLIT, np.int8), rejects=rejects
    )
    options = PlanOptions("", val_share=None, seed=0)
    plan = make_plan(inputs, None, Origin("files", os.getcwd()), "files", options)
    return [Source("", plan)]


def units_of(source: Source) -> Iterator[Unit]:
    """Cut a source into the work of tasks."""
    rows = source.rows
    size = min(UNIT, max(SMALL_UNIT, -(-len(rows) // UNITS)))
    for start in range(0, len(rows), size):
        yield Unit(source.name, source.plan.classes, source.plan.origin, rows.slice(start, size))
