"""Parameters and floating-point operations of models, counted on the meta device without memory or computation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wavemim.model import MaskedImageModel

Model = TypeVar("Model", bound=nn.Module)

BACKWARD = 2  # a backward pass costs as much as two forward passes: gradients of inputs and of weights


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of the forward pass of one image, where a multiply-add counts as 2.

    Matrix products, convolutions and attention are counted; element-wise arithmetic, norms, Fourier transforms, masks
    and targets are not.

    Attributes:
        parameters: Of the whole model, including those that are not trained (fixed positions).
        encoder_parameters: Of the timm model, which is exported.
        forward_flops: Of the whole model.
        encoder_flops: Of the encoder.
        decoder_flops: Of everything else.
        masks: Masks for each image in training, each of which takes a pass of its own.
    """

    parameters: int
    encoder_parameters: int
    forward_flops: int
    encoder_flops: int
    decoder_flops: int
    masks: int = 1

    @property
    def training_flops(self) -> int:
        """FLOPs of training for each image: a forward and a backward pass with each of its masks."""
        return self.masks * (1 + BACKWARD) * self.forward_flops

    def __str__(self) -> str:
        """Return one line, as in the headers of recipes."""
        parameters, encoder = (f"{count / 1e6:.1f} M" for count in (self.parameters, self.encoder_parameters))
        return (
            f"{parameters} parameters, encoder {encoder}, {_giga(self.forward_flops)} GFLOP forward per image (counted)"
        )


def cost_of(model: MaskedImageModel, masks: int = 1) -> Cost:
    """Compute the cost of a model.

    Args:
        model: It is not changed and may be on the meta device.
        masks: Masks for each image in training.
    """
    blank = _on_meta(model)
    encoder, channels = blank.encoder, blank.target.channels
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(1, channels, encoder.image_size, encoder.image_size)
        mask = torch.empty(1, encoder.grid**2, dtype=torch.bool)
        rows = torch.empty(1, dtype=torch.int64)
        index = blank.chosen(mask, rows, seed=0, epoch=0)
        with _Counter() as counter:
            around: list[int] = []  # counts before and after the encoder
            encoder.register_forward_pre_hook(lambda *_: around.append(counter.get_total_flops()))
            encoder.register_forward_hook(lambda *_: around.append(counter.get_total_flops()))
            blank.predict(images, mask, index)
    forward, of_encoder = counter.get_total_flops(), around[1] - around[0]
    return Cost(
        parameters=_count(model),
        encoder_parameters=_count(model.encoder.model),
        forward_flops=forward,
        encoder_flops=of_encoder,
        decoder_flops=forward - of_encoder,
        masks=masks,
    )


def forward_flops(model: nn.Module, channels: int, image_size: int) -> int:
    """Count the FLOPs of a forward pass of one image, as in `Cost`.

    Args:
        model: Any model of images; it is not changed.
        channels: C.
        image_size: H = W, in pixels.

    Returns:
        FLOPs.
    """
    blank = _on_meta(model)
    with torch.device("meta"), torch.no_grad(), _Counter() as counter:
        blank(torch.empty(1, channels, image_size, image_size))
    return counter.get_total_flops()


class _Counter(FlopCounterMode):
    """Counts FLOPs; attention as two matrix products, whichever kernel the device would use."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self._plain = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> _Counter:
        self._plain.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._plain.__exit__(*error)  # type: ignore[arg-type]


def _on_meta(model: Model) -> Model:
    """A copy on the meta device; the model's own tensors are never copied."""
    tensors: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, tensors).eval()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _giga(flops: int) -> str:
    """GFLOP with about three significant digits; one decimal from 10 on."""
    value = flops / 1e9
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
