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
from wavemim.views import Views


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device, so that nothing waits for them."""

    losses: torch.Tensor  # (T,) of this worker's share of the batch, scaled so that their mean over workers is the loss
    grad_norm: torch.Tensor  # () before clipping; not finite where the step was left out


@dataclass(frozen=True)
class Part:
    """What goes through the network at once: a batch, or a part of one."""

    stored: dict[int, torch.Tensor]
    rows: torch.Tensor
    weight: torch.Tensor
    crop: Crop | None

    def without_filling(self) -> Part:
        """Only rows that count (two at least): others would go into the statistics of batch norm. On the host."""
        kept = self.weight.nonzero().flatten()
        if len(kept) == len(self.weight):
            return self
        kept = kept if len(kept) > 1 else torch.arange(min(2, len(self.weight)))
        crop = self.crop and Crop(self.crop.corners[kept], self.crop.mirrored[kept], self.crop.size)
        return Part({level: v[kept] for level, v in self.stored.items()}, self.rows[kept], self.weight[kept], crop)


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
        whole = Part(dict(stored), rows, weight, crop)
        if self.mixes_images:
            whole = whole.without_filling()
        parts = list(_parts(whole, self.accumulate))
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
        """Gradients are added up here alone; workers exchange them with the last part."""
        return self.wrapped.no_sync() if self.world > 1 else contextlib.nullcontext()  # type: ignore[operator]

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
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]  # as AMP's scaler says it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update(self.model)
        return StepResult(losses, grad_norm.detach())

    def progress(self, step: int) -> float:
        """Share of training that is done at `step`."""
        return step / max(self.total_steps, 1)


def _parts(whole: Part, count: int) -> Iterator[Part]:
    """The batch in `count` parts of the same size, or sizes that differ by one."""
    if count == 1:
        yield whole
        return
    splits = [values.tensor_split(count) for values in whole.stored.values()]
    corners, mirrored = (whole.crop.corners, whole.crop.mirrored) if whole.crop else (whole.rows, whole.rows)
    for number, (rows, weight, where, mirror) in enumerate(
        zip(*(values.tensor_split(count) for values in (whole.rows, whole.weight, corners, mirrored)), strict=True)
    ):
        if len(rows):
            crop = Crop(where, mirror, whole.crop.size) if whole.crop else None
            yield Part(
                {level: split[number] for level, split in zip(whole.stored, splits, strict=True)}, rows, weight, crop
            )
