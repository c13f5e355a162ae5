"""Features of a split of a shard set, for evaluation, sweeps and benchmarks. No Ray in here."""

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
    """Extract the features of a split.

    Args:
        encode: The encoder: a function of inputs that returns features.
        inputs: Turns stored integers into the encoder's inputs.
        shards: The shard set.
        split: "train" or "val".
        window: Side in pixels of the central window that is used of the stored images.
        batch: Images in a batch.
        max_rows: Number of images, taken from all over the split; None for all.

    Returns:
        Features (n, F) and labels (n,), in the order of the files.
    """
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
    """Extract what `taps` select of a split.

    Args:
        taps: The encoder, and which of its outputs to keep.
        inputs: Turns stored integers into the encoder's inputs.
        shards: The shard set.
        split: "train" or "val".
        window: Side in pixels of the central window that is used of the stored images.
        batch: Images in a batch.
        max_rows: Number of images over all parts, taken from all over the split; None for all.
        part: (index, number of parts), to divide the images among workers; see `positions_of_part`.
        token_rows: Number of images over all parts of which patch tokens are kept; see `with_tokens`.

    Returns:
        The features, in the order of the files.
    """

    def images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for read in sequential(shards, split, batch, window=window, max_rows=max_rows, part=part):
            yield inputs(read.levels, read.crop)[0], read.labels

    return extract_taps(taps, images(), tokens_of=with_tokens(shards, split, part, max_rows, token_rows)[0])


def with_tokens(
    shards: ShardSet, split: str, part: tuple[int, int], max_rows: int | None, token_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which images of a part keep their patch tokens, evenly spaced over all parts.

    Returns:
        Whether each image of the part is kept (n,), bool, and the positions of these among all kept images (k,).
    """
    total = min(shards.rows[split], max_rows or shards.rows[split])
    places = positions_of_part(shards, split, part, max_rows)
    kept = chosen_evenly(places, token_rows, total)
    return kept, places[kept] * min(token_rows, total) // total
