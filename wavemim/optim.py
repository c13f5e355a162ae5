"""Optimizer, learning-rate schedule and weight averaging, from parts of timm and torch."""

from __future__ import annotations

import copy

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from wavemim.sharding import local

NO_DECAY = ("cls_token", "reg_token", "pos_embed", "mask_token", "log_variance")


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Create AdamW, without weight decay for norms, biases, tokens and positions.

    It is the fused implementation, in which the device itself can skip a step with non-finite gradients.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Weight decay of the other parameters.
        betas: Decay rates of the moments.

    Returns:
        The optimizer.
    """
    exempt = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_DECAY]
    for prefix, module in model.named_modules():  # exceptions of timm's models, such as Swin's position tables
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        exempt += [f"{prefix}.{name}" for name in names]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def make_average(model: nn.Module, decay: float) -> Average:
    """Start an exponential moving average (EMA) at the model's current weights; see `Average`."""
    return Average(model, decay)


class Average(nn.Module):
    """An exponential moving average of a model's weights. Buffers are copied from the model.

    torch's AveragedModel is not used: it reads a counter on the host in every step, which waits for the device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy the model.

        Args:
            model: The model whose weights are averaged.
            decay: Weight of the average in each update, in [0, 1).
        """
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average: average · decay + weights · (1 - decay)."""
        mine: list[torch.Tensor] = [local(parameter) for parameter in self.module.parameters()]
        theirs: list[torch.Tensor] = [local(parameter) for parameter in model.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_steps: int,
    min_lr: float,
    warmup_prefix: bool = False,
) -> CosineLRScheduler:
    """Create a schedule by step: linear warm-up, then a cosine, which reaches its minimum at `total_steps`.

    Args:
        optimizer: The optimizer; its learning rates are the peak.
        total_steps: Steps of training.
        warmup_steps: Steps of the warm-up, which starts at 0.
        min_lr: The learning rate at the end.
        warmup_prefix: True: the cosine starts at the peak when the warm-up ends (MAE). False: it starts at step 0 and the
            warm-up replaces its first part, so that the rate drops where the warm-up ends (SimMIM).

    Returns:
        timm's scheduler; its ``step_update(step)`` is a pure function of the step.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total_steps - warmup_steps if warmup_prefix else total_steps, 1),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=warmup_prefix,
        t_in_epochs=False,
    )
