"""Optimiser and learning-rate schedule of pretraining, from timm's and torch's own parts."""

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
    """AdamW without decay on norms, biases, tokens and positions; fused, so that a step can be left out on the device."""
    exempt = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_DECAY]
    for prefix, module in model.named_modules():  # what timm's models except, such as Swin's position tables
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        exempt += [f"{prefix}.{name}" for name in names]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def make_average(model: nn.Module, decay: float) -> Average:
    """An exponential moving average of the model's weights, from where it begins."""
    return Average(model, decay)


class Average(nn.Module):
    """Weights that follow those of a model; buffers are the model's own.

    torch's AveragedModel keeps a counter that it reads on the host in every step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step: average · decay + weights · (1 - decay)."""
        mine: list[torch.Tensor] = [local(parameter) for parameter in self.module.parameters()]
        theirs: list[torch.Tensor] = [local(parameter) for parameter in model.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)


def make_schedule(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, min_lr: float
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to `min_lr`, by step: ``schedule.step_update(step)`` is a pure function of `step`."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total_steps, 1),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        t_in_epochs=False,
    )
