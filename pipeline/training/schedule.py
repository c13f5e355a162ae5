"""Progress and length of training: steps, image sizes, and what a checkpoint stores of them. No Ray in here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

from pipeline.config.recipe import Recipe, for_size
from pipeline.errors import SettingError
from pipeline.runtime.usage import Spent
from pipeline.shards.batches import Batch
from pipeline.shards.shard_set import ShardSet

COUNTED = ("images_seen", "wall_clock_s", "flops", "bytes_read")  # parts of a cost that are counted per image size


@dataclass
class TrainState:
    """Progress of training, as a checkpoint stores it: steps, images, and the mean losses of each epoch so far."""

    step: int = 0
    images: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    streams: int = 0  # chunks of the reading order: the workers that began; 0 before the first step
    history: list[dict[str, float]] = field(default_factory=list)  # per epoch: losses, or what was measured on val
    epoch_sums: list[float] = field(default_factory=list)  # of the losses of this epoch, so that a resume loses none
    window: list[float] = field(default_factory=list)  # the same since metrics were last logged
    skipped: int = 0  # steps without a finite gradient
    skipped_in_a_row: int = 0  # those of them that are the last steps
    parts: list[dict[str, float]] = field(default_factory=list)  # cost per image size so far (train.progressive)

    def count(self, batch: Batch) -> None:
        """Count a finished step over `batch`."""
        self.step += 1
        self.batch += 1
        self.images += round(batch.total)

    def state(self) -> dict[str, Any]:
        """As JSON values: a copy, since it is written while training proceeds."""
        return copy.deepcopy(vars(self))

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """From a checkpoint's state; what an older one lacks has its default."""
        return cls(**{name: state[name] for name in cls.__dataclass_fields__ if name in state})


@dataclass
class FinetuneState(TrainState):
    """The same for fine-tuning."""

    # Row groups mixed with each other, as when the run began: the order of its images must not change. Checkpoints that
    # do not say so were written when it was always 8.
    mix_groups: int = 8


@dataclass(frozen=True)
class TrainSchedule:
    """Lengths that follow from the settings and the size of the shard set, fixed when training begins."""

    batch: int
    streams: int  # chunks of the reading order
    batches_per_epoch: int
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int
    log_steps: int

    @classmethod
    def of(cls, recipe: Recipe, rows: int, workers: int | None = None) -> TrainSchedule:
        """The schedule of pretraining.

        A batch is never larger than the train split; if it would be, it is divided evenly over the workers. Where
        train.batch is no multiple of the workers there are fewer chunks, and the last workers have fewer images.

        Args:
            recipe: The settings.
            rows: Images of the train split.
            workers: Workers that began the run, or the chunks of its reading order; None: train.workers.

        Raises:
            SettingError: There are fewer images than workers.
        """
        workers = workers or recipe.train.workers
        _check_rows("train", rows, workers)
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
            log_steps=recipe.train.log_every,
        )

    @classmethod
    def of_finetuning(cls, recipe: Recipe, rows: int, workers: int | None = None) -> TrainSchedule:
        """The schedule of fine-tuning, with a checkpoint after every epoch. Arguments and errors are those of `of`."""
        finetune = recipe.finetune
        workers = workers or finetune.workers
        _check_rows("finetune", rows, workers)
        batch = max(min(finetune.batch, rows) // workers, 1) * workers
        batches = -(-rows // batch)
        return cls(
            batch=batch,
            streams=workers,
            batches_per_epoch=batches,
            total_steps=max(1, round(finetune.epochs * batches)),
            warmup_steps=round(finetune.warmup_epochs * batches),
            checkpoint_steps=batches,
            log_steps=finetune.log_every,
        )


def _check_rows(section: str, rows: int, workers: int) -> None:
    if rows < workers:
        raise SettingError(
            f"{section}.workers={workers}: the train split has {rows} images; use at most {max(rows, 1)}"
        )


class PhaseCost:
    """What a phase has cost, over all attempts at it."""

    def __init__(self, size: int, began: Spent, known: Sequence[Mapping[str, float]]) -> None:
        """Count the cost of a phase.

        Args:
            size: Image size in pixels.
            began: What was spent before the phase.
            known: The phase's record of earlier attempts, if there is one.
        """
        self._size, self._began = size, began
        self._known = known[0] if known else dict.fromkeys(COUNTED, 0)

    def read(self, spent: Spent) -> dict[str, float]:
        """The image size and what it has cost so far, by what training has cost so far."""
        since = {name: getattr(spent, name) - getattr(self._began, name) for name in COUNTED}
        return {"image_size": self._size, **{name: self._known[name] + value for name, value in since.items()}}


@dataclass(frozen=True)
class Phase:
    """A part of pretraining with one image size (train.progressive); without that setting there is only one."""

    number: int
    recipe: Recipe  # as for a run with only this size
    halvings: int  # of the stored images: so many levels are not read
    end: int  # step behind its last one

    @property
    def size(self) -> int:
        """Side in pixels of the images that the network is given."""
        return self.recipe.encoder.image_size


def phases_of(recipe: Recipe, shards: ShardSet, total_steps: int) -> list[Phase]:
    """The phases of pretraining; each has at least one step while there are enough, and the last one has the rest."""
    if not recipe.train.progressive:
        return [Phase(0, recipe, 0, total_steps)]
    found: list[Phase] = []
    shares = recipe.train.progressive.values()
    for number, (size, share) in enumerate(zip(recipe.train.progressive, accumulate(shares), strict=True)):
        begin = found[-1].end if found else 0
        end = total_steps if number == len(shares) - 1 else min(max(round(share * total_steps), begin + 1), total_steps)
        found.append(Phase(number, *for_size(recipe, size, shards.image_size, shards.levels), end))
    return found
