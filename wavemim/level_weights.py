"""Weights of the levels' losses: fixed, tilted between coarse and fine levels, scheduled, or learned.

Legend: T taps, in the order of the model's levels, from fine to coarse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from wavemim.sharding import whole

Weighting = Literal["fixed", "coarse_to_fine", "fine_to_coarse", "learned"]


class LevelWeights(nn.Module):
    """Weights λ of the levels' losses, and their weighted sum.

    "fixed": λ as given. "coarse_to_fine": the coarsest level has its full weight from the start; each finer one is
    faded in linearly over the next T-th of training, so that all have their full weight in the last T-th.
    "fine_to_coarse": the reverse. "learned": homoscedastic uncertainty (Kendall, Gal, Cipolla, CVPR 2018, eq. 7),
    λ/2 · (exp(-s) · loss + s) with a learned s per level.

    With a tilt t, λ is in addition multiplied by the level's share of all predicted coefficients to the power of t, where
    these factors are scaled to sum to 1. A level's loss is a mean over its coefficients, of which each finer level has four
    times as many; so by Parseval, t = 1 is the loss on pixels where the levels together are an orthonormal transform of each
    patch. t = 0 weighs all levels equally, which is coarser; t > 1 is finer than pixels.
    """

    def __init__(
        self,
        weights: Sequence[float],
        kind: Weighting = "fixed",
        *,
        tilt: float | Mapping[float, float] | None = None,
        coefficients: Sequence[int] = (),
    ) -> None:
        """Create the weights.

        Args:
            weights: λ of the T levels.
            kind: How they change.
            tilt: t, or {share of training that is done: t}, linear between these points and constant outside; None: no
                tilt, so that the factors are 1.
            coefficients: Number of coefficients per image of each level, for a tilt.
        """
        super().__init__()
        self.kind = kind
        self.tilt = None if tilt is None else sorted(({0.0: tilt} if isinstance(tilt, float | int) else tilt).items())
        if self.tilt is not None:
            assert len(coefficients) == len(weights), (coefficients, weights)
            counts = torch.tensor(coefficients).double()
            self.register_buffer("log_share", (counts / counts.sum()).log().float(), persistent=False)
        self.register_buffer("given", torch.tensor(weights).float(), persistent=False)
        turns = torch.arange(len(weights)).float()
        self.register_buffer("turn", turns if kind == "fine_to_coarse" else turns.flip(0), persistent=False)
        if kind == "learned":
            self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def at(self, progress: float) -> torch.Tensor:
        """Return the scheduled weights (T,) at `progress`, the fraction of training that is done."""
        given = self.get_buffer("given")
        if self.tilt is not None:
            done, tilts = zip(*self.tilt, strict=True)
            given = given * (self.get_buffer("log_share") * float(np.interp(progress, done, tilts))).softmax(0)
        if self.kind in ("fixed", "learned"):
            return given
        return given * (progress * len(given) - self.get_buffer("turn") + 1).clamp(0, 1)

    def effective(self, progress: float) -> torch.Tensor:
        """Return the factor (T,) of each loss at `progress`, for logging. Every worker has to call it."""
        scheduled = self.at(progress)
        return scheduled * (-whole(self.log_variance.detach())).exp() / 2 if self.kind == "learned" else scheduled

    def forward(self, losses: torch.Tensor, scheduled: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Compute the weighted sum of losses.

        Args:
            losses: (T,).
            scheduled: (T,), of `at`.
            share: (), the sum of the images' weights in `losses`. It scales the regulariser, so that the sum over
                workers is right whatever padding they have.

        Returns:
            The loss ().
        """
        if self.kind == "learned":
            losses = ((-self.log_variance).exp() * losses + self.log_variance * share) / 2
        return (losses * scheduled).sum()
