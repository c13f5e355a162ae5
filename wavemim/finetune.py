"""Fine-tuning of an encoder as a classifier: the model, its parameter groups, and one step on a batch of labelled images.

Mixup, cutmix, soft targets, their loss, random erasing, layer-wise rates and drop path are timm's.

Legend: B images, C channels, H × W pixels, K classes, n images that count.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.optim import param_groups_layer_decay
from torch import nn

from wavemim.augment import resized_crop
from wavemim.constraints import check_image_size
from wavemim.encoders.base import create, is_plain_vit
from wavemim.encoders.pretrained import one_line
from wavemim.inputs import Inputs
from wavemim.optim import NO_DECAY, Average
from wavemim.step import StepResult, apply_gradients, attention_kernels

MIDDLE = 7 / 8  # share of a stored image's side that is evaluated: 224 of 256 pixels
# Pooling of ViTs: the mean of the patch tokens, normalised after pooling by a new norm (MAE); or the class token.
_POOLING = {"mean": {"global_pool": "avg", "fc_norm": True}, "token": {"global_pool": "token", "fc_norm": False}}
_HEAD_STD = 2e-5  # standard deviation of a new head's weights (MAE)


def make_classifier(
    encoder: nn.Module, name: str, arguments: Mapping[str, Any], *, classes: int, drop_path: float, head: str = "mean"
) -> tuple[nn.Module, dict[str, Any]]:
    """Make a classifier of an encoder.

    Args:
        encoder: A timm model without classifier.
        name: Its architecture in timm.
        arguments: Those of ``timm.create_model(name, …)`` that made it.
        classes: Number of classes K.
        drop_path: Drop path rate of the last block; less in earlier ones.
        head: "mean" or "token", for plain ViTs; others have their own pooling.

    Returns:
        A model that returns logits (B, K), all of whose parameters are trainable; and its arguments in timm.

    Raises:
        ValueError: timm cannot build it, it has no drop path, or the weights do not fit.
    """
    if "distilled" in name and head == "mean":
        raise ValueError(f"'{name}' is classified by its class and distillation tokens; set finetune.head=token")
    pooling = _POOLING[head] if is_plain_vit(name) else {}
    given = {**arguments, **pooling, "num_classes": classes}
    given.pop("drop_path_rate", None)
    model = _create(name, given, drop_path)
    own, layers = encoder.state_dict(), _head(model)
    around = [module for name, module in model.named_children() if name in ("head", "head_dist", "classifier")]
    new = {id(value) for layer in (*layers, *around) for value in layer.parameters()}
    if not new:
        raise ValueError(f"'{name}' has no classifier in timm")
    for key, value in model.named_parameters():
        if id(value) not in new and key not in own and not key.startswith("fc_norm."):
            raise ValueError(f"the encoder has no {key}, which '{name}' needs")
    known = {key: own[key] for key in model.state_dict() if key in own}
    model.load_state_dict(known, strict=False)
    for layer in layers:
        for module in layer.modules():  # norms among them start as in timm
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=_HEAD_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model.requires_grad_(True), given


def _create(name: str, arguments: Mapping[str, Any], drop_path: float) -> nn.Module:
    try:
        model = create(name, {**arguments, "drop_path_rate": drop_path})
    except ValueError as error:
        if "drop_path_rate" not in str(error).rpartition("}")[2]:
            raise
        model = create(name, arguments)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    if drop_path and not any(rates):
        raise ValueError(f"'{name}' has no drop path; set finetune.drop_path=0")
    return model


def _head(model: nn.Module) -> list[nn.Module]:
    """The classifier layers; distilled models have two."""
    found = model.get_classifier()  # type: ignore[operator]  # timm's
    return list(found) if isinstance(found, tuple) else [found]


def resize_input(model: nn.Module, arguments: Mapping[str, Any], *, channels: int, size: int) -> dict[str, Any]:
    """Adapt a classifier to another image size.

    Absolute positions are resampled. The windows of a Swin keep their share of the image, and its tables of relative
    positions are resampled: a window of 6 at 192 pixels becomes one of 7 at 224.

    Args:
        model: The classifier; changed in place.
        arguments: Those of ``timm.create_model`` that made it.
        channels: C.
        size: H = W of the images from now on, in pixels.

    Returns:
        The arguments that make it at this size.

    Raises:
        ValueError: The model has no such size, or cannot be changed.
    """
    known: Any = getattr(model, "feature_info", None) or [{}]
    check_image_size(size, int(known[-1].get("reduction", 1)))
    changed = dict(arguments)
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size((size, size))  # type: ignore[operator]  # timm's
            changed["img_size"] = size
        if isinstance(model, SwinTransformer | SwinTransformerV2):
            layers: Any = model.layers
            changed["window_size"] = [int(layer.blocks[0].window_size[0]) for layer in layers]
        mode = model.training
        with torch.inference_mode():
            model.eval()(torch.zeros(1, channels, size, size))
        model.train(mode)
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"the model does not accept images of {size} pixels: {one_line(error)}") from None
    return changed


def freeze_encoder(model: nn.Module) -> None:
    """Freeze all but the head: the classifier and the norm in front of it."""
    model.requires_grad_(False)
    for layer in (*_head(model), getattr(model, "fc_norm", None)):
        if layer is not None:
            layer.requires_grad_(True)


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by timm, with ``lr_scale`` = layer_decay^(layers above); no weight decay on norms, biases, tokens and
    positions."""
    exempt = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_DECAY}
    if hasattr(model, "no_weight_decay"):
        exempt |= set(model.no_weight_decay())  # type: ignore[operator]  # timm's
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)


def make_finetune_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW on `parameter_groups`; fused, so that a step can be skipped on the device."""
    groups = parameter_groups(model, weight_decay=weight_decay, layer_decay=layer_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


@dataclass(frozen=True)
class Mixing:
    """How images and labels of a batch are mixed with each other, and how much is erased."""

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    erasing: float = 0.0

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix and erase.

        timm mixes an image with the one at the mirrored place in the batch, and only an even number of images: of an odd
        number the last one stays as it is.

        Args:
            images: Normalised (n, C, H, W); changed in place.
            labels: Classes (n,).

        Returns:
            The images, and targets (n, K) whose rows sum to one.
        """
        if self.erasing:
            RandomErasing(self.erasing, mode="pixel", device=str(images.device))(images)
        targets = mixup_target(labels, self.classes, smoothing=self.label_smoothing)
        even = len(images) // 2 * 2
        if even and (self.mixup or self.cutmix):
            mixup = Mixup(
                self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.classes, mode="batch"
            )
            images[:even], targets[:even] = mixup(images[:even], labels[:even])
        return images, targets


class FinetuneStep:
    """Does one optimiser step on normalised images and labels. A step without a finite gradient is skipped."""

    def __init__(
        self,
        model: nn.Module,
        mixing: Mixing,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        *,
        seed: int,
        precision: torch.dtype = torch.float32,
        clip_grad: float | None = None,
        accumulate: int = 1,
        averaged: Average | None = None,
        wrapped: nn.Module | None = None,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        """Prepare the step.

        Args:
            model: The classifier.
            mixing: How images and labels are mixed.
            optimizer: A fused one, which can skip a step on the device.
            schedule: The learning-rate schedule, with timm's ``step_update``.
            seed: Of everything random.
            precision: The dtype of the network's arithmetic.
            clip_grad: Largest gradient norm; None: any.
            accumulate: Parts of a batch that are computed one after another (gradient accumulation).
            averaged: Moving average of the weights, which is updated after each step.
            wrapped: The model behind DDP.
            world: Number of data-parallel workers.
            rank: Rank of this worker.
        """
        self.model, self.mixing, self.optimizer, self.schedule = model, mixing, optimizer, schedule
        self.wrapped = wrapped if wrapped is not None else model
        self.averaged, self.accumulate = averaged, accumulate
        self.seed, self.world, self.rank = seed, world, rank
        self.precision = precision
        self.clip_grad = clip_grad if clip_grad is not None else float("inf")
        self.criterion = SoftTargetCrossEntropy()

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, total: float, *, step: int
    ) -> StepResult:
        """Do step number `step`, from 0 on. The other arguments are those of `backward`.

        Returns:
            The loss as a single part (1,), and the gradient norm ().
        """
        self.schedule.step_update(step + 1)  # the first step of a warm-up from 0 must not be a step of 0
        loss = self.backward(images, labels, weight, total, step=step)
        return StepResult(loss[None], apply_gradients(self.model, self.optimizer, self.clip_grad, self.averaged))

    def backward(
        self, images: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, total: float, *, step: int
    ) -> torch.Tensor:
        """Compute the gradients of the loss.

        Images of weight 0 and those without a label are removed before anything is drawn or mixed: they change nothing.

        Args:
            images: Normalised (B, C, H, W), on the device.
            labels: Classes (B,), -1 for none, on the host.
            weight: 1 for images that count, 0 for others (B,), on the host.
            total: Sum of the weights over all workers.
            step: Number of the step; what is random follows from it.

        Returns:
            This worker's share of the loss (), scaled so that the mean over workers is the loss.
        """
        self._seed(step)
        counts = (weight > 0) & (labels >= 0)
        counting = counts.nonzero().flatten()
        # A worker without such images has to take part nevertheless, and batch norm needs two images.
        filling = (~counts).nonzero().flatten()[: max(0, 2 - len(counting))]
        chosen = torch.cat((counting, filling))
        count = len(counting)
        images, labels = images[chosen.to(images.device)], labels[chosen].clamp_min(0).to(images.device)
        total_loss = torch.zeros((), device=images.device)
        parts = _split(len(chosen), self.accumulate) if len(filling) == 0 else [slice(0, len(chosen))]
        for number, part in enumerate(parts, 1):
            exchange = self.wrapped.no_sync() if self.world > 1 and number < len(parts) else contextlib.nullcontext()  # type: ignore[operator]
            with exchange, attention_kernels(images.device, self.precision):
                counted = min(part.stop, count) - part.start
                loss = self._loss(images[part], labels[part], counted) * (counted * self.world / total)
                loss.backward()
            total_loss += loss.detach()
        return total_loss

    def _loss(self, images: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
        """Mean loss of the first `count` images; 0, with gradients, if there are none."""
        mixed, targets = self.mixing(images[:count].clone(), labels[:count])
        images = torch.cat((mixed, images[count:]))
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.wrapped(images)
        return self.criterion(logits[:count].float(), targets) if count else logits.float().sum() * 0

    def _seed(self, step: int) -> None:
        """Seed by the step: timm draws from the generators of Python, numpy and torch."""
        seed = zlib.crc32(f"{self.seed} {step} {self.rank}".encode())
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)


def _split(count: int, parts: int) -> list[slice]:
    """Split `count` images into parts whose sizes differ by one at most; none is empty."""
    ends = [count * number // parts for number in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends) if end > start]


def middle_side(side: int, size: int) -> int:
    """Side in pixels of the middle that is evaluated of a stored image.

    Args:
        side: Side of the stored image in pixels.
        size: Side of the images that the network sees.

    Returns:
        7/8 of `side`, but at least `size`, and at most `side`.
    """
    return min(side, max(size, round(side * MIDDLE)))


def middle(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The middle of whole images (B, C, H, W), `middle_side` pixels wide, resized to (B, C, size, size)."""
    side = pixels.shape[-1]
    kept = middle_side(side, size)
    corner = (side - kept) // 2
    box = torch.tensor([[corner, corner, kept, kept]], dtype=torch.float32, device=pixels.device)
    return resized_crop(pixels, box.expand(len(pixels), 4), size, None)


def count_predictions(
    model: nn.Module,
    inputs: Inputs,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    size: int,
    classes: int,
    precision: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Count predictions by class.

    Args:
        model: The classifier; it is left in evaluation mode.
        inputs: Normalises pixels.
        batches: Whole images in pixel values (B, C, H, W) on the model's device, and labels (B,); -1 is not counted.
        size: Side in pixels of the images that the network sees.
        classes: Number of classes K.
        precision: The dtype of the network's arithmetic.

    Returns:
        Images by true class (rows) and predicted class (columns), int64 (K, K), on the model's device.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for pixels, labels in batches:
            predicted = model(inputs.normalise(middle(pixels, size))).argmax(1)
            places = labels.to(device) * classes + predicted
            counts += torch.bincount(places[labels.to(device) >= 0], minlength=len(counts))
    return counts.reshape(classes, classes)
