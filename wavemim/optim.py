"""Optimiser and learning-rate schedule of pretraining, from timm's and torch's own parts."""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NO_DECAY = ("cls_token", "reg_token", "pos_embed", "mask_token", "log_variance")


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW without decay on norms, biases, tokens and positions; fused, so that a step can be left out on the device."""
    exempt = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_DECAY]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the model's weights; buffers are those of the model."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


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
