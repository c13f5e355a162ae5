"""How much each level's loss counts: fixed, moving over training, or learned.

Legend: T taps, in the order of the model's levels: from fine to coarse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from wavemim.sharding import whole

Weighting = Literal["fixed", "coarse_to_fine", "fine_to_coarse", "learned"]


class LevelWeights(nn.Module):
    """Weights λ of the levels' losses, and the sum that they make of them.

    "fixed": λ as given. "coarse_to_fine": the coarsest level from the start; each finer one comes in over the next T-th
    of training, linearly, so that all count fully in the last T-th; "fine_to_coarse" the other way round. "learned":
    homoscedastic uncertainty (Kendall, Gal, Cipolla, CVPR 2018, eq. 7): λ/2 · (exp(-s)·loss + s), with s trained.
    """

    def __init__(self, weights: Sequence[float], kind: Weighting = "fixed") -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("given", torch.tensor(weights).float(), persistent=False)
        turns = torch.arange(len(weights)).float()
        self.register_buffer("turn", turns if kind == "fine_to_coarse" else turns.flip(0), persistent=False)
        if kind == "learned":
            self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def at(self, progress: float) -> torch.Tensor:
        """Scheduled weights (T,) at `progress` in [0, 1] of training; without a schedule those that were given."""
        given = self.get_buffer("given")
        if self.kind in ("fixed", "learned"):
            return given
        return given * (progress * len(given) - self.get_buffer("turn") + 1).clamp(0, 1)

    def effective(self, progress: float) -> torch.Tensor:
        """What each loss is multiplied by (T,), for the log. Every worker has to call it."""
        scheduled = self.at(progress)
        return scheduled * (-whole(self.log_variance.detach())).exp() / 2 if self.kind == "learned" else scheduled

    def forward(self, losses: torch.Tensor, scheduled: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The sum () of losses (T,) under `scheduled` weights (T,).

        `share` () is the sum of the images' weights in `losses`: what a regulariser has to count by, so that workers
        and padding add up.
        """
        if self.kind == "learned":
            losses = ((-self.log_variance).exp() * losses + self.log_variance * share) / 2
        return (losses * scheduled).sum()
