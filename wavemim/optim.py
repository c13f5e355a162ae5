"""Optimizer, learning-rate schedule and weight averaging, from parts of timm and torch."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from wavemim.decoders import TapDecoder, TapHead
from wavemim.sharding import is_sharded, local

NO_DECAY = ("cls_token", "reg_token", "pos_embed", "mask_token", "log_variance")


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    kind: Literal["adamw", "muon"] = "adamw",
) -> torch.optim.Optimizer:
    """Create AdamW, or Muon with AdamW, without weight decay for norms, biases, tokens and positions.

    AdamW is the fused implementation, in which the device itself can skip a step with non-finite gradients.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Weight decay of the other parameters.
        betas: Decay rates of AdamW's moments.
        kind: "muon" trains `hidden_matrices` with Muon and the rest with AdamW; see `MuonAdamW`.

    Returns:
        The optimizer.

    Raises:
        ValueError: Muon has nothing to train, or the model is sharded.
    """
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_exempt(model))
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if is_sharded(model):
        raise ValueError("Muon needs whole matrices, and the model is sharded")
    matrices = set(hidden_matrices(model))
    parts = [
        [{**group, "params": [value for value in group["params"] if (value in matrices) == chosen]} for group in groups]
        for chosen in (True, False)
    ]
    of_muon, of_adamw = ([group for group in part if group["params"]] for part in parts)
    return MuonAdamW(of_muon, of_adamw, lr=lr, betas=betas)


def _exempt(model: nn.Module) -> list[str]:
    """Names of the tokens, positions and the like that have no weight decay."""
    exempt = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_DECAY]
    for prefix, module in model.named_modules():  # exceptions of timm's models, such as Swin's position tables
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        exempt += [f"{prefix}.{name}" for name in names]
    return exempt


def hidden_matrices(model: nn.Module) -> list[torch.Tensor]:
    """The parameters that Muon trains: weights of linear layers, except those that make the predictions.

    Embeddings of images are convolutions, and tokens and tables of positions belong to no linear layer: all of these
    are left to AdamW. What timm exempts from weight decay is too.

    Args:
        model: The model.

    Returns:
        Parameters with two dimensions.

    Raises:
        ValueError: There are none.
    """
    left_out = {name.removesuffix(".weight") for name in _exempt(model)}
    heads = {module.head for module in model.modules() if isinstance(module, TapDecoder | TapHead)}
    found = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and module not in heads
        and name not in left_out
    ]
    if not found:
        raise ValueError("Muon trains linear layers, and the model has none in front of those that predict")
    return found


class MuonAdamW(torch.optim.Optimizer):
    """Muon (torch's) for some matrices and AdamW for all other parameters, as one optimizer.

    Both share its parameter groups and its state, so that schedules and checkpoints see a single optimizer. Muon's
    updates are scaled to the size of AdamW's ("match_rms_adamw": Liu et al., Muon is scalable for LLM training, 2025),
    so that learning rates and weight decay for AdamW hold for it too. Its momentum is torch's default, 0.95 with
    Nesterov's update. A matrix is orthogonalised as it is stored: that of queries, keys and values as one.
    """

    found_inf: torch.Tensor | None = None  # (); above 0, the next step is skipped, as in torch's fused optimizers

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
    ) -> None:
        """Create both optimizers.

        Args:
            matrices: Parameter groups of Muon, whose parameters have two dimensions.
            others: Parameter groups of AdamW.
            lr: Learning rate of both.
            betas: Decay rates of AdamW's moments.
        """
        self.muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do a step of both, or none where `found_inf` says so. Nothing waits for the device.

        torch's Muon always changes weights and momentum. For a step to be skipped, each gradient is replaced by the
        momentum, an average that then stays as it is, and the weights are put back. Their copies are held during the step
        only; with them, Muon needs as much memory as AdamW.
        """
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]  # as AMP's scaler sets it
        self.adamw.step()
        if self.found_inf is None:
            self.muon.step()
            return
        skip = self.found_inf > 0
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        for value in (value for group in self.muon.param_groups for value in group["params"]):
            if value.grad is not None:
                state = self.state[value]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(value)
                value.grad.copy_(torch.where(skip, state["momentum_buffer"], value.grad))
                before.append((value, value.clone()))
        self.muon.step()
        for value, old in before:
            value.copy_(torch.where(skip, old, value))


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
