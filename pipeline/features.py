"""Features of a split, read from shards: what evaluation, sweeps and benchmarks judge an encoder by. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.batches import positions_of_part, sequential
from pipeline.shards import ShardSet
from wavemim.inputs import Inputs
from wavemim.taps import Tapped, Taps, extract_taps


def features_of(
    encode: Any, inputs: Inputs, shards: ShardSet, split: str, *, window: int, batch: int, max_rows: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, F) and labels (n,) of a split, images whole and centred, in file order."""
    taps = Taps(encode, blocks=False, tokens=False)
    return tapped_of(taps, inputs, shards, split, window=window, batch=batch, max_rows=max_rows).set


def tapped_of(
    taps: Taps,
    inputs: Inputs,
    shards: ShardSet,
    split: str,
    *,
    window: int,
    batch: int,
    max_rows: int | None = None,
    part: tuple[int, int] = (0, 1),
    token_rows: int = 0,
) -> Tapped:
    """What `taps` read of a split, images whole and centred, in the order of the files.

    `part`: (number, parts), so that several share the split's first `max_rows` rows out; `positions_of_part` says which
    rows those are. Patch tokens are kept of the first `token_rows` of them all.
    """

    def images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for read in sequential(shards, split, batch, window=window, max_rows=max_rows, part=part):
            yield inputs(read.levels, read.crop)[0], read.labels

    kept = int((positions_of_part(shards, split, part, max_rows) < token_rows).sum())
    return extract_taps(taps, images(), most_tokens=kept)
