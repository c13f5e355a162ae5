"""Where training is and what is before it: lengths, image sizes, and what a checkpoint remembers of them. No Ray in here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from pipeline.config.downstream import Finetune
from pipeline.config.recipe import Recipe, for_size
from pipeline.errors import SettingError
from pipeline.runtime.usage import Spent
from pipeline.shards.shard_set import ShardSet

COUNTED = ("images_seen", "wall_clock_s", "flops", "bytes_read")  # of a cost, for each image size by itself


@dataclass
class TrainState:
    """Where training is: what a checkpoint has to remember, and the loss of each epoch so far."""

    step: int = 0
    images: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    streams: int = 0  # chunks of the reading order: the workers that began; 0 before the first step
    history: list[dict[str, float]] = field(default_factory=list)
    epoch_sums: list[float] = field(default_factory=list)  # of the losses of this epoch, so that a resume loses none
    window: list[float] = field(default_factory=list)  # the same since metrics were last logged
    skipped: int = 0  # steps left out
    parts: list[dict[str, float]] = field(
        default_factory=list
    )  # what each image size has cost so far (train.progressive)

    def state(self) -> dict[str, Any]:
        """As JSON values: a copy, since it is written while training goes on."""
        return copy.deepcopy(vars(self))

    @classmethod
    def of(cls, state: dict[str, Any]) -> TrainState:
        """From a checkpoint's state."""
        return cls(**{name: state[name] for name in cls.__dataclass_fields__ if name in state})


@dataclass(frozen=True)
class TrainSchedule:
    """Lengths that follow from the settings and the size of the shard set, settled once."""

    batch: int
    streams: int  # chunks of the reading order
    batches_per_epoch: int
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int

    @classmethod
    def of(cls, recipe: Recipe, rows: int, workers: int | None = None) -> TrainSchedule:
        """A batch is never larger than the train split; then it is divided evenly over the workers that begin.

        `workers`: those, or the chunks of the reading order of a run that is gone on with. Where train.batch is no
        multiple of them there are fewer chunks, and the last workers have fewer images.
        """
        workers = workers or recipe.train.workers
        if rows < workers:
            raise SettingError(
                f"train.workers={workers}: the train split has {rows} images; use at most {max(rows, 1)}"
            )
        batch, streams = recipe.train.batch, workers
        if batch > rows:
            batch = rows // workers * workers
        while batch % streams:
            streams -= 1
        batches = -(-rows // batch)
        return cls(
            batch=batch,
            streams=streams,
            batches_per_epoch=batches,
            total_steps=max(1, round(recipe.train.epochs * batches)),
            warmup_steps=round(recipe.train.warmup_epochs * batches),
            checkpoint_steps=max(1, round(recipe.train.checkpoint_every * batches)),
        )


class PartMeter:
    """What a phase has cost, over all attempts at it."""

    def __init__(self, size: int, began: Spent, known: Sequence[Mapping[str, float]]) -> None:
        """`began`: what was spent before it; `known`: its record of earlier attempts, if there is one."""
        self._size, self._began = size, began
        self._known = known[0] if known else dict.fromkeys(COUNTED, 0)

    def read(self, spent: Spent) -> dict[str, float]:
        """Image size, and what it has cost up to now."""
        since = {name: getattr(spent, name) - getattr(self._began, name) for name in COUNTED}
        return {"image_size": self._size, **{name: self._known[name] + value for name, value in since.items()}}


@dataclass(frozen=True)
class Phase:
    """A part of training with one image size (train.progressive); without that setting there is one."""

    number: int
    recipe: Recipe  # as for a run with this size alone
    halvings: int  # of the stored images: as many levels are not read
    end: int  # step behind its last one

    @property
    def size(self) -> int:
        """Pixels a side of what the network is given."""
        return self.recipe.encoder.image_size


def phases_of(recipe: Recipe, shards: ShardSet, total_steps: int) -> list[Phase]:
    """The parts of training; each has a step at least while there are enough, and the last one has the rest."""
    if not recipe.train.progressive:
        return [Phase(0, recipe, 0, total_steps)]
    found: list[Phase] = []
    shares = recipe.train.progressive.values()
    for number, (size, share) in enumerate(zip(recipe.train.progressive, accumulate(shares), strict=True)):
        begin = found[-1].end if found else 0
        end = total_steps if number == len(shares) - 1 else min(max(round(share * total_steps), begin + 1), total_steps)
        found.append(Phase(number, *for_size(recipe, size, shards.image_size, shards.levels), end))
    return found


@dataclass(frozen=True)
class FinetuneSchedule:
    """Lengths that follow from the settings and the size of the shard set, settled once."""

    batch: int
    batches_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, finetune: Finetune, rows: int, workers: int | None = None) -> FinetuneSchedule:
        """A batch is never larger than the train split, and is divided evenly over the workers."""
        workers = workers or finetune.workers
        if rows < workers:
            raise SettingError(
                f"finetune.workers={workers}: the train split has {rows} images; use at most {max(rows, 1)}"
            )
        batch = max(min(finetune.batch, rows) // workers, 1) * workers
        batches = -(-rows // batch)
        return cls(
            batch=batch,
            batches_per_epoch=batches,
            total_steps=max(1, round(finetune.epochs * batches)),
            warmup_steps=round(finetune.warmup_epochs * batches),
        )


@dataclass
class FinetuneState:
    """Where fine-tuning is: what a checkpoint has to remember."""

    step: int = 0
    images: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    streams: int = 0  # chunks of the reading order: the workers that began; 0 before the first step
    skipped: int = 0  # steps left out
    skipped_in_a_row: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # what was measured on val

    @classmethod
    def of(cls, state: dict[str, Any]) -> FinetuneState:
        """From a checkpoint's state."""
        return cls(**{name: state[name] for name in cls.__dataclass_fields__})


def precision_of(finetune: Finetune, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic; the loss is float32 in any case."""
    if finetune.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if finetune.precision == "bfloat16" else torch.float32
