"""Mean and standard deviation of the pixels, and of each level and band, of a shard set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STD_FLOOR = 1e-3  # lower bound of the pixels' standard deviation in normalisation: a channel may be constant


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of a shard set.

    Attributes:
        mean: {level: {band: one value per channel}}, in coefficient units.
        std: The same for standard deviations.
        pixel_mean: One value per channel, of pixels in [0, 255].
        pixel_std: The same for standard deviations.
    """

    mean: Mapping[int, Mapping[str, list[float]]]
    std: Mapping[int, Mapping[str, list[float]]]
    pixel_mean: list[float]
    pixel_std: list[float]
