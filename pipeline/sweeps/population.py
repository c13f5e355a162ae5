"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): what becomes of the trials of a search at a rung.

All trials of the search are one population. Each waits at a rung until all others have measured it, or have failed. Then
each of the worst goes on from the checkpoint of one of the best, with perturbed values of its settings.

Ray Tune's `PopulationBasedTraining` is not used. It exploits Ray's own checkpoints, where trials here write those of
training; it draws from Python's global random numbers, and keeps what it decided in memory, so that after a kill of the
driver it would decide otherwise. Here a decision is a function of the measurements in the ledger and the seed. The rule
(truncation selection with quantiles, values kept, shifted or drawn anew) is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from pipeline.sweeps.ledger import Generation, Measured
from pipeline.sweeps.trials import Fork

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Population:
    """How population-based training decides.

    Attributes:
        rungs: Measurements of a trial, the one at its end included, at which nothing is decided.
        quantile: Share of the population that is replaced at a rung, and share of those that replace it; at most 0.5.
        seed: Of the choice of donors and of the perturbations.
        perturb: Returns a point with changed values, by a point and random numbers.
    """

    rungs: int
    quantile: float
    seed: int
    perturb: Callable[[Point, Random], Point]

    def decide(self, rung: int, measured: Mapping[int, Measured], points: Mapping[int, Point]) -> Generation:
        """Decide which trials go on from the checkpoints of others.

        A trial whose objective is not finite is worse than all others. The decision about a trial does not depend on the order
        in which trials measured.

        Args:
            rung: The rung.
            measured: What each trial of the population measured there, by its number.
            points: The values of its searched settings.

        Returns:
            The decision.
        """

        def score(number: int) -> float:
            value = measured[number].objective
            return value if math.isfinite(value) else -math.inf

        ranked = sorted(measured, key=lambda number: (-score(number), number))
        count = replaced(len(ranked), self.quantile)
        best, worst = ranked[:count], ranked[len(ranked) - count :]
        forks = []
        for number in sorted(worst):
            random = Random(f"{self.seed} {rung} {number}")
            donor = random.choice(best)
            point = self.perturb(points[donor], random)
            forks.append(Fork(number, donor, rung, measured[number].images, point))
        return Generation(rung, tuple(forks))


def replaced(size: int, quantile: float) -> int:
    """How many trials of a population are replaced at a rung: never more than a half."""
    return min(math.ceil(size * quantile), size // 2)
