"""One training step, apart from the loop around it: the same with one worker and with many, on CPU and GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wavemim.inputs import Crop
from wavemim.model import MaskedImageModel
from wavemim.views import Views


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device, so that nothing waits for them."""

    losses: torch.Tensor  # (T,) of this worker's share of the batch, scaled so that their mean over workers is the loss
    grad_norm: torch.Tensor  # () before clipping


class TrainStep:
    """Integers of a shard in, one optimiser step done."""

    def __init__(
        self,
        model: MaskedImageModel,
        views: Views,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        *,
        seed: int,
        total_steps: int,
        clip_grad: float | None,
        precision: torch.dtype,
        wrapped: nn.Module | None = None,
        world: int = 1,
    ) -> None:
        """`wrapped` is the model behind DDP or torch.compile; `schedule` has timm's ``step_update``."""
        self.model, self.views, self.optimizer, self.schedule = model, views, optimizer, schedule
        self.wrapped = wrapped if wrapped is not None else model
        self.device = next(model.parameters()).device
        self.seed, self.total_steps = seed, total_steps
        self.clip_grad = clip_grad if clip_grad is not None else float("inf")
        self.precision, self.world = precision, world

    def backward(
        self,
        stored: Mapping[int, torch.Tensor],
        rows: torch.Tensor,
        weight: torch.Tensor,
        total: float,
        epoch: int,
        progress: float = 0.0,
        crop: Crop | None = None,
    ) -> torch.Tensor:
        """Gradients of the weighted loss; gives the losses (T,). `weight` (B,) counts images, `total` over all workers."""
        view = self.views(stored, rows, epoch=epoch, crop=crop)
        rows = rows.to(self.device, non_blocking=True)
        targets = self.model.target(view.images, view.pyramid)
        index = self.model.chosen(view.mask, rows, seed=self.seed, epoch=epoch)
        # DDP takes the mean over workers of the gradients
        share = weight.to(self.device, non_blocking=True) * (self.world / total)
        scheduled = self.model.level_weights.at(progress)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss, losses = self.wrapped(view.seen, targets, view.mask, share, scheduled, index, view.spectrum)
        loss.backward()
        return losses.detach()

    def __call__(
        self,
        stored: Mapping[int, torch.Tensor],
        rows: torch.Tensor,
        weight: torch.Tensor,
        total: float,
        *,
        epoch: int,
        step: int,
        crop: Crop | None = None,
    ) -> StepResult:
        """Do step number `step` (from 0). `crop`: the windows to cut, where `stored` holds whole images."""
        self.schedule.step_update(step + 1)  # the first step of a warm-up from 0 must not be a step of 0
        losses = self.backward(stored, rows, weight, total, epoch, self.progress(step), crop)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(losses, grad_norm.detach())

    def progress(self, step: int) -> float:
        """Share of training that is done at `step`."""
        return step / max(self.total_steps, 1)
