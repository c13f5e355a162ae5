"""Perturbs a point of a search space, for population-based training.

Each searched setting is drawn anew with a probability of 1/4, and otherwise moved a little: a number from a logarithmic
range, and each share of a simplex, by a factor of 0.8 or 1.25; another number by a fifth of its range; a value of a grid to
a neighbouring one. A value of a `choice`, which has no order, is kept unless it is drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from pipeline.stages.tune_distributions import Choice, RandomTrial, Range, Simplex
from pipeline.stages.tune_space import Space

_DRAWN_ANEW = 0.25  # as usual, as are the factors
_FACTORS = (0.8, 1.25)
_SHARE_OF_RANGE = 0.2


def perturbed(space: Space, point: Mapping[str, Any], random: Random) -> dict[str, Any]:
    """A point near another one.

    Args:
        space: The space, without conditions.
        point: A value for each setting.
        random: Random numbers.

    Returns:
        A point of the space.
    """
    new = space.suggest(RandomTrial(random.getrandbits(32)))
    found: dict[str, Any] = {}
    for dimension in space.dimensions:
        keys = [key for key in dimension.settings if key in point and key not in found]
        anew = random.random() < _DRAWN_ANEW
        if anew and all(key in new for key in keys):
            found |= {key: new[key] for key in keys}
        elif isinstance(dimension.distribution, Simplex):
            found |= dict(zip(keys, _moved_shares([point[key] for key in keys], random), strict=True))
        else:
            found |= {key: _moved(dimension.distribution, point[key], random) for key in keys}
    return {key: found[key] for key in space.settings if key in found}


def _moved(distribution: Range | Choice, value: Any, random: Random) -> Any:
    """One of the two values beside a value; the one that there is, at an end of a range or a grid."""
    if isinstance(distribution, Range):
        if distribution.log:
            near = [value * factor for factor in _FACTORS]
        else:
            least = distribution.step or (1 if distribution.whole else 0)
            far = max(_SHARE_OF_RANGE * (distribution.high - distribution.low), least)
            near = [value - far, value + far]
        candidates = [distribution.nearest(number) for number in near]
    elif distribution.grid:
        at = distribution.values.index(value)
        candidates = [distribution.values[i] for i in (at - 1, at + 1) if 0 <= i < len(distribution.values)]
    else:
        candidates = []
    candidates = [candidate for candidate in candidates if candidate != value]
    return random.choice(candidates) if candidates else value


def _moved_shares(shares: Sequence[float], random: Random) -> list[float]:
    """Shares, each changed by a factor, scaled so that they sum to 1."""
    return Simplex.divided([share * random.choice(_FACTORS) for share in shares])
