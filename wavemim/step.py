"""One step of pretraining, apart from the loop around it: the same with one worker and with many, on CPU and GPU."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wavemim.inputs import Crop
from wavemim.model import MaskedImageModel
from wavemim.optim import Average
from wavemim.sharding import whole
from wavemim.views import Views, repeated


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device, so that nothing waits for them."""

    losses: (
        torch.Tensor
    )  # (T,) parts of the loss over this worker's share, scaled so that their mean over workers is the loss
    grad_norm: torch.Tensor  # () before clipping; not finite if the step was skipped


def apply_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float, averaged: Average | None
) -> torch.Tensor:
    """Clip the gradients and do an optimiser step, which is skipped on the device if the gradient is not finite.

    Args:
        model: The model, whose gradients are then deleted.
        optimizer: One of `wavemim.optim`, which can skip a step on the device.
        clip_grad: Largest gradient norm; infinity: any.
        averaged: Moving average of the weights, which is updated.

    Returns:
        The gradient norm () before clipping, on the device.
    """
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), clip_grad))
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]  # as AMP's scaler sets it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if averaged is not None:
        averaged.update(model)
    return grad_norm.detach()


def attention_kernels(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Choose the kernels of attention for the forward and backward passes within the block.

    On CPUs, the backward pass of the fused kernel is so slow in bfloat16 that it costs all that bfloat16 gains elsewhere;
    plain matrix products are used there. Only training needs this: in forward passes alone the fused kernel is fast.

    Args:
        device: Where the network is.
        precision: The dtype of its arithmetic.

    Returns:
        A context manager. The choice holds for the whole process while it is active.
    """
    if device.type == "cpu" and precision == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Part:
    """What goes through the network at once: a batch, or with gradient accumulation a part of one.

    Legend: B images; weight 0 marks images that only fill up the batch.
    """

    stored: Mapping[int, torch.Tensor]  # level -> integers of a shard (B, C, K, h, w)
    rows: torch.Tensor  # (B,) row numbers, on the host
    weight: torch.Tensor  # (B,) float32, on the host
    crop: Crop | None  # windows to cut, where `stored` holds whole images

    def __getitem__(self, chosen: slice | torch.Tensor) -> Part:
        """Some of its images."""
        stored = {level: values[chosen] for level, values in self.stored.items()}
        return Part(stored, self.rows[chosen], self.weight[chosen], self.crop and self.crop[chosen])

    def split(self, count: int) -> Iterator[Part]:
        """Split it into at most `count` parts whose sizes differ by one at most; none is empty."""
        size, rest = divmod(len(self.rows), count)
        end = 0
        for number in range(min(count, len(self.rows))):
            start, end = end, end + size + (number < rest)
            yield self[start:end]

    def without_filling(self, parts: int) -> Part:
        """Only images that count, but at least two for each of `parts`: others would distort the statistics of batch norm.

        All workers have the same number of parts, since those of a sharded model wait for each other in each part.
        """
        count = max(int(self.weight.count_nonzero()), min(2 * parts, len(self.weight)))
        if count == len(self.weight):
            return self
        return self[self.weight.argsort(descending=True, stable=True)[:count]]


class TrainStep:
    """Does one optimiser step on integers of a shard.

    A step whose gradient is not finite is skipped: it changes neither weights nor moments. Every worker has the same
    gradient, so all of them skip it, and none waits to find out.
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
        """Prepare the step.

        Args:
            model: The model; it may be sharded in place (`wavemim.sharding.shard`), before its optimiser is made.
            views: Makes what the network sees of a batch. With several masks for each image, the network computes them
                together, and the loss is their mean.
            optimizer: One of `wavemim.optim`, which can skip a step on the device.
            schedule: The learning-rate schedule, with timm's ``step_update``.
            seed: Of everything random.
            total_steps: Steps of the whole training.
            clip_grad: Largest gradient norm; None: any.
            precision: The dtype of the network's arithmetic.
            accumulate: Parts of a batch that are computed one after another (gradient accumulation).
            averaged: Moving average of the weights, which is updated after each step.
            wrapped: The model behind DDP or torch.compile.
            world: Number of data-parallel workers.
            rank: Rank of this worker.
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
        """Compute the gradients of the weighted loss.

        Args:
            stored: level -> integers of a shard (B, C, K, h, w).
            rows: Row numbers (B,), on the host.
            weight: 1 for images that count, 0 for others (B,), on the host.
            total: Sum of the weights over all workers.
            epoch: From 0; masks are drawn by it.
            progress: Share of training that is done.
            crop: The windows to cut, where `stored` holds whole images.

        Returns:
            The losses (T,) of this worker, one per tap.
        """
        losses = torch.zeros(len(self.model.levels), device=self.device)
        batch = Part(stored, rows, weight, crop)
        if self.mixes_images:
            batch = batch.without_filling(self.accumulate)
        parts = list(batch.split(self.accumulate))
        for number, part in enumerate(parts, 1):
            exchange = contextlib.nullcontext() if number == len(parts) else self._without_exchange()
            with exchange, attention_kernels(self.device, self.precision):
                losses += self._backward(part, total, epoch, progress)
        return losses

    def _backward(self, part: Part, total: float, epoch: int, progress: float) -> torch.Tensor:
        view = self.views(part.stored, part.rows, epoch=epoch, crop=part.crop)
        rows = part.rows.to(self.device, non_blocking=True)
        masks = self.views.masks
        once = self.model.target(view.images, view.pyramid)
        targets = {level: repeated(values, masks) for level, values in once.items()}
        index = self.model.chosen(view.mask, rows, seed=self.seed, epoch=epoch)
        # DDP averages the gradients over the workers
        share = repeated(part.weight.to(self.device, non_blocking=True) * (self.world / total), masks) / masks
        scheduled = self.model.level_weights.at(progress)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss, losses = self.wrapped(view.seen, targets, view.mask, share, scheduled, index, view.spectrum)
        loss.backward()
        return losses.detach()

    def _without_exchange(self) -> contextlib.AbstractContextManager[None]:
        """Within the block gradients are only accumulated; workers exchange them with the last part.

        Those of a sharded model are exchanged with each part: no worker has memory for all of them.
        """
        no_sync = getattr(self.wrapped, "no_sync", None)  # of DDP
        return no_sync() if no_sync is not None else contextlib.nullcontext()

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
        """Do step number `step`, from 0 on. The other arguments are those of `backward`."""
        # Drop path and the like draw from torch's generator: seeded by the step, so that a resumed run draws the same.
        torch.manual_seed(zlib.crc32(f"{self.seed} {step} {self.rank}".encode()))
        self.schedule.step_update(step + 1)  # the first step of a warm-up from 0 must not be a step of 0
        losses = self.backward(stored, rows, weight, total, epoch, self.progress(step), crop)
        return StepResult(losses, apply_gradients(self.model, self.optimizer, self.clip_grad, self.averaged))

    def progress(self, step: int) -> float:
        """Share of training that is done before `step`."""
        return step / max(self.total_steps, 1)
