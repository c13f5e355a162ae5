"""Features of a split, read from shards: what evaluation, sweeps and benchmarks judge an encoder by. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.batches import sequential
from pipeline.shards import ShardSet
from wavemim.evaluate import extract
from wavemim.inputs import Inputs


def features_of(
    encode: Any, inputs: Inputs, shards: ShardSet, split: str, *, window: int, batch: int, max_rows: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, F) and labels (n,) of a split, images whole and centred, in file order."""

    def images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in sequential(shards, split, batch, window=window, max_rows=max_rows):
            yield inputs(part.levels, part.crop)[0], part.labels

    return extract(encode, images())
