"""One training step, apart from the loop around it: the same with one worker and with many, on CPU and GPU."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wavemim.inputs import Crop
from wavemim.model import MaskedImageModel
from wavemim.optim import Average
from wavemim.sharding import whole
from wavemim.views import Views


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device, so that nothing waits for them."""

    losses: torch.Tensor  # (T,) of this worker's share of the batch, scaled so that their mean over workers is the loss
    grad_norm: torch.Tensor  # () before clipping; not finite where the step was left out


@dataclass(frozen=True)
class Part:
    """What goes through the network at once: a batch, or a part of one."""

    stored: Mapping[int, torch.Tensor]
    rows: torch.Tensor
    weight: torch.Tensor
    crop: Crop | None

    def __getitem__(self, chosen: slice | torch.Tensor) -> Part:
        """Some of its rows."""
        stored = {level: values[chosen] for level, values in self.stored.items()}
        return Part(stored, self.rows[chosen], self.weight[chosen], self.crop and self.crop[chosen])

    def split(self, count: int) -> Iterator[Part]:
        """It in `count` parts of the same size, or of sizes that differ by one; none is empty."""
        size, rest = divmod(len(self.rows), count)
        end = 0
        for number in range(min(count, len(self.rows))):
            start, end = end, end + size + (number < rest)
            yield self[start:end]

    def without_filling(self, parts: int) -> Part:
        """Only rows that count, two at least in each of `parts`: others would go into the statistics of batch norm.

        On the host. All workers have as many parts to compute: those of a sharded model wait for each other in each.
        """
        count = max(int(self.weight.count_nonzero()), min(2 * parts, len(self.weight)))
        if count == len(self.weight):
            return self
        return self[self.weight.argsort(descending=True, stable=True)[:count]]


class TrainStep:
    """Integers of a shard in, one optimiser step done.

    A step whose gradient is not finite changes nothing: neither weights nor moments. Every worker sees the same
    gradient, so all of them leave it out, and none waits to find out.
    """

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
        accumulate: int = 1,
        averaged: Average | None = None,
        wrapped: nn.Module | None = None,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        """`wrapped` is the model behind DDP or torch.compile; `schedule` has timm's ``step_update``.

        A model may also be shared out in place (`wavemim.sharding.shard`), before its optimiser is made.

        `accumulate`: parts of a batch that are computed one after another. `averaged` follows the weights after each
        step. The optimiser has to be a fused one, which can leave a step out on the device.
        """
        self.model, self.views, self.optimizer, self.schedule = model, views, optimizer, schedule
        self.wrapped = wrapped if wrapped is not None else model
        self.averaged, self.accumulate = averaged, accumulate
        self.device = next(model.parameters()).device
        self.seed, self.total_steps = seed, total_steps
        self.clip_grad = clip_grad if clip_grad is not None else float("inf")
        self.precision, self.world, self.rank = precision, world, rank
        self.mixes_images = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())

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
        losses = torch.zeros(len(self.model.levels), device=self.device)
        batch = Part(stored, rows, weight, crop)
        if self.mixes_images:
            batch = batch.without_filling(self.accumulate)
        parts = list(batch.split(self.accumulate))
        for number, part in enumerate(parts, 1):
            with contextlib.nullcontext() if number == len(parts) else self._apart():
                losses += self._backward(part, total, epoch, progress)
        return losses

    def _backward(self, part: Part, total: float, epoch: int, progress: float) -> torch.Tensor:
        view = self.views(part.stored, part.rows, epoch=epoch, crop=part.crop)
        rows = part.rows.to(self.device, non_blocking=True)
        targets = self.model.target(view.images, view.pyramid)
        index = self.model.chosen(view.mask, rows, seed=self.seed, epoch=epoch)
        # DDP takes the mean over workers of the gradients
        share = part.weight.to(self.device, non_blocking=True) * (self.world / total)
        scheduled = self.model.level_weights.at(progress)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss, losses = self.wrapped(view.seen, targets, view.mask, share, scheduled, index, view.spectrum)
        loss.backward()
        return losses.detach()

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """Gradients are added up here alone; workers exchange them with the last part.

        Those of a sharded model are exchanged with each part: none of the workers has room for all.
        """
        alone = getattr(self.wrapped, "no_sync", None)  # of DDP
        return alone() if alone is not None else contextlib.nullcontext()

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
        # What is still drawn as it goes, such as drop path, follows from the step too: a resumed run draws the same.
        torch.manual_seed(zlib.crc32(f"{self.seed} {step} {self.rank}".encode()))
        self.schedule.step_update(step + 1)  # the first step of a warm-up from 0 must not be a step of 0
        losses = self.backward(stored, rows, weight, total, epoch, self.progress(step), crop)
        grad_norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad))
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]  # as AMP's scaler says it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update(self.model)
        return StepResult(losses, grad_norm.detach())

    def progress(self, step: int) -> float:
        """Share of training that is done at `step`."""
        return step / max(self.total_steps, 1)
