"""Mean and standard deviation of pixels and of each level and band of a shard set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STD_FLOOR = 1e-3  # of the deviation of pixels that images are divided by: a channel may never vary


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of a shard set, in coefficient units.

    `mean` and `std` map level -> band -> one value a channel; `pixel_mean` and `pixel_std` are those of the pixels.
    """

    mean: Mapping[int, Mapping[str, list[float]]]
    std: Mapping[int, Mapping[str, list[float]]]
    pixel_mean: list[float]
    pixel_std: list[float]
