"""Lengths of a fine-tuning, where it is, and the arithmetic it is done in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.config import SettingError
from pipeline.settings_finetune import Finetune


@dataclass(frozen=True)
class Plan:
    """Lengths that follow from the settings and the size of the shard set, settled once."""

    batch: int
    batches_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, finetune: Finetune, rows: int, workers: int | None = None) -> Plan:
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
class Progress:
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
    def of(cls, state: dict[str, Any]) -> Progress:
        """From a checkpoint's state."""
        return cls(**{name: state[name] for name in cls.__dataclass_fields__})


def precision_of(finetune: Finetune, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic; the loss is float32 in any case."""
    if finetune.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if finetune.precision == "bfloat16" else torch.float32
