"""Features of a split, read from shards: what evaluation, sweeps and benchmarks judge an encoder by. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.shards.batches import chosen_evenly, positions_of_part, sequential
from pipeline.shards.shard_set import ShardSet
from wavemim.evaluation.features import Tapped, Taps, extract_taps
from wavemim.inputs import Inputs


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

    `part`: (number, parts), so that several share `max_rows` rows from all over the split out; `positions_of_part` says
    which rows those are. Patch tokens are kept of `token_rows` of them all: see `with_tokens`.
    """

    def images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for read in sequential(shards, split, batch, window=window, max_rows=max_rows, part=part):
            yield inputs(read.levels, read.crop)[0], read.labels

    return extract_taps(taps, images(), tokens_of=with_tokens(shards, split, part, max_rows, token_rows)[0])


def with_tokens(
    shards: ShardSet, split: str, part: tuple[int, int], max_rows: int | None, token_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of a part keep their patch tokens (n,), evenly over all parts, and the places of these among all kept."""
    total = min(shards.rows[split], max_rows or shards.rows[split])
    places = positions_of_part(shards, split, part, max_rows)
    kept = chosen_evenly(places, token_rows, total)
    return kept, places[kept] * min(token_rows, total) // total
