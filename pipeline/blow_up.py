"""What is kept of a run that blew up: the model as it was, and the steps that changed nothing, for `wavemim replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.stage import write_json
from pipeline.watch import BlowUpError
from wavemim import checkpoint

FOLDER, CHECKPOINT, STEPS = "blow-up", "checkpoint", "steps.json"


def keep_blow_up(
    folder: Path, saver: checkpoint.Saver, error: BlowUpError, *, shards: str, rank: int = 0, world: int = 1
) -> None:
    """Write ``blow-up/`` into the stage's folder. Every rank has to call it; `error.args` then names the place.

    ``checkpoint/`` is the model, and ``steps.json`` has of each step its number (from 1), the epoch, and the row numbers
    of all ranks, in their order. `shards` is where the shard set is.
    """
    mine = [step["rows"] for step in error.steps]
    rows: list[Any] = [mine]
    if world > 1:
        rows = [None] * world
        dist.all_gather_object(rows, mine)
    place = folder / FOLDER
    if rank == 0:
        steps = [
            {"step": step["step"], "epoch": step["epoch"], "rows": [row for part in rows for row in part[number]]}
            for number, step in enumerate(error.steps)
        ]
        try:
            saver(place / CHECKPOINT)
            write_json(place / STEPS, {"error": str(error), "shards": shards, "workers": world, "steps": steps})
        except Exception as problem:  # of the disk, of safetensors: the run ends by its own reason
            error.args = (f"{error} ({place} could not be written: {problem})",)
            return
    else:
        saver.take_part()
    error.args = (f"{error}; wavemim replay {place} looks into these steps",)
