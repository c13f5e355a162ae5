"""What a model costs: parameters, and floating-point operations counted on the meta device, so without memory or time."""

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

BACKWARD = 2  # a backward pass costs two forward ones: gradients of inputs and of weights


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of a forward pass of one image; a multiply-add counts as 2.

    Matrix products, convolutions and attention are counted. Element by element arithmetic, norms, Fourier transforms,
    masks and targets are not.
    """

    parameters: int  # all of the model: those that are not trained (fixed positions) too
    encoder_parameters: int  # of the timm model alone: what is exported
    forward_flops: int
    encoder_flops: int
    decoder_flops: int

    @property
    def training_flops(self) -> int:
        """Of a forward and a backward pass."""
        return (1 + BACKWARD) * self.forward_flops

    def __str__(self) -> str:
        """One line, as in the headers of recipes."""
        parameters, encoder = (f"{count / 1e6:.1f} M" for count in (self.parameters, self.encoder_parameters))
        return (
            f"{parameters} parameters, encoder {encoder}, {_giga(self.forward_flops)} GFLOP forward an image (counted)"
        )


def cost_of(model: MaskedImageModel) -> Cost:
    """The cost of a model, which may itself be on the meta device. It is left as it is."""
    blank = _on_meta(model)
    encoder, channels = blank.encoder, blank.target.channels
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(1, channels, encoder.image_size, encoder.image_size)
        mask = torch.empty(1, encoder.grid**2, dtype=torch.bool)
        rows = torch.empty(1, dtype=torch.int64)
        index = blank.chosen(mask, rows, seed=0, epoch=0)
        with _Counter() as counter:
            around: list[int] = []  # what is counted before and after the encoder
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
    )


def forward_flops(model: nn.Module, channels: int, image_size: int) -> int:
    """FLOPs of a forward pass of one image (C, H, W) through any model of images, counted as in `Cost`; it is left as it is."""
    blank = _on_meta(model)
    with torch.device("meta"), torch.no_grad(), _Counter() as counter:
        blank(torch.empty(1, channels, image_size, image_size))
    return counter.get_total_flops()


class _Counter(FlopCounterMode):
    """Counts FLOPs; attention as two matrix products, whatever kernel the device would take for it."""

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
    """A copy with tensors that have no memory; the model's own are never copied."""
    tensors: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, tensors).eval()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _giga(flops: int) -> str:
    """Three digits, or one after the point from 10 on."""
    value = flops / 1e9
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
