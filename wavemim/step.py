"""One training step, apart from the loop around it: the same with one worker and with many, on CPU and GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wavemim.inputs import Crop, Inputs
from wavemim.masking import random_mask
from wavemim.model import MaskedImageModel


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
        inputs: Inputs,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        *,
        level_weights: Mapping[int, float],
        mask_ratio: float,
        seed: int,
        clip_grad: float,
        precision: torch.dtype,
        wrapped: nn.Module | None = None,
        world: int = 1,
    ) -> None:
        """`wrapped` is the model behind DDP; `schedule` has timm's ``step_update``."""
        self.model, self.inputs, self.optimizer, self.schedule = model, inputs, optimizer, schedule
        self.wrapped = wrapped if wrapped is not None else model
        self.device = next(model.parameters()).device
        self.level_weights = torch.tensor([level_weights[level] for level in model.levels], device=self.device)
        self.mask_ratio, self.seed, self.clip_grad = mask_ratio, seed, clip_grad
        self.precision, self.world = precision, world

    def masks(self, rows: torch.Tensor, epoch: int) -> torch.Tensor:
        """Masks (B, N) of images by their row numbers (B,)."""
        return random_mask(rows.to(self.device), self.model.encoder.grid, self.mask_ratio, seed=self.seed, epoch=epoch)

    def backward(
        self,
        stored: Mapping[int, torch.Tensor],
        rows: torch.Tensor,
        weight: torch.Tensor,
        total: float,
        epoch: int,
        crop: Crop | None = None,
    ) -> torch.Tensor:
        """Gradients of the weighted loss; gives the losses (T,). `weight` (B,) counts images, `total` over all workers."""
        images, pyramid = self.inputs(stored, crop)
        targets = self.model.target(pyramid)
        share = weight.to(self.device) * (self.world / total)  # DDP takes the mean over workers of the gradients
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            losses = self.wrapped(images, targets, self.masks(rows, epoch), share)
        (losses * self.level_weights).sum().backward()
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
        losses = self.backward(stored, rows, weight, total, epoch, crop)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(losses, grad_norm.detach())
