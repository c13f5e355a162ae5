"""Hierarchical timm backbones as encoders: Swin, ConvNeXt, Hiera, MaxViT, ResNet, EfficientNet, ….

Legend: B images, C channels, H = W pixels per side, N cells of a mask, T tokens, E width of a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from wavemim.constraints import check_image_size
from wavemim.encoders.base import SETTLED as VIT_SETTLED
from wavemim.encoders.base import Encoder, check_name, check_options, create
from wavemim.encoders.pretrained import fill, one_line

REDUCTIONS = (4, 8, 16, 32)  # pixels per side of the tokens of stages 1 to 4
SETTLED = set(VIT_SETTLED) - {"patch_size", "embed_dim", "depth", "num_heads", "class_token"}  # these are options here
HierarchicalSees = Literal["masked", "whole"]


class HierarchicalEncoder(Encoder):
    """Any timm backbone whose last four stages have tokens of 4, 8, 16 and 32 pixels per side; taps are stages 1 to 4.

    Hidden parts are replaced before anything mixes them with their neighbours, so no masked pixel reaches a feature: in
    Swin, whose patches do not overlap, by a learned mask token after the patch embedding (SimMIM, Xie et al. 2022); in
    all other models in the image itself, by a learned value per channel. That value starts at zero, the data set's
    mean; as it is learned, the network can tell a hidden cell from a grey one.
    """

    word = "stage"

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        channels: int = 3,
        sees: HierarchicalSees = "masked",
        options: Mapping[str, Any] | None = None,
        pretrained: bool | str = False,
    ) -> None:
        """Create the encoder. Parameters that the features do not depend on (such as a head's norm) are frozen.

        Args:
            name: timm's name of the model.
            image_size: Pixels per side, H = W, a multiple of 32.
            channels: C.
            sees: "masked" replaces hidden parts, "whole" ignores the mask.
            options: Further arguments of ``timm.create_model``.
            pretrained: As for `wavemim.encoders.factory.make_encoder`.

        Raises:
            ValueError: If the model has no such stages, cannot be built, or `pretrained` does not fit it.
        """
        super().__init__()
        options = options or {}
        check_name(name)
        check_options(options, SETTLED)
        if sees not in get_args(HierarchicalSees):
            raise ValueError(f"encoder.sees={sees!r}: only plain ViTs drop hidden tokens; '{name}' needs masked")
        self.name, self.image_size = name, image_size
        self.depth, self.cell, self.drops, self.prefix = len(REDUCTIONS), REDUCTIONS[0], False, 0
        self.default_unit = REDUCTIONS[-1]
        check_image_size(image_size, self.default_unit)
        self.grid = image_size // self.cell
        plan = _plan(name, image_size, {"in_chans": channels, "num_classes": 0, **options})
        self.arguments, self._plan = dict(plan.arguments), plan
        self.model = create(name, self.arguments)
        if "drop_path_rate" not in options:  # Swin's default in timm is for fine-tuning
            for module in self.model.modules():
                if isinstance(module, DropPath):
                    module.drop_prob = 0.0
        fill(self.model, name, self.arguments, pretrained)
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and key in plan.used)
        self._embeds = isinstance(self.model, SwinTransformer | SwinTransformerV2)
        self._format = torch.contiguous_format
        self.mask_token: nn.Parameter | None = None
        if sees == "masked" and self._embeds:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, self._plan.widths[0]))
            nn.init.normal_(self.mask_token, std=0.02)
        elif sees == "masked":
            self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def width(self, block: int) -> int:
        """Return E of this stage."""
        return self._plan.widths[block - 1]

    def token_size(self, block: int) -> int:
        """Return 4, 8, 16 or 32."""
        return REDUCTIONS[block - 1]

    def normalised(self, block: int) -> bool:
        """Whether it is the last stage of a model whose final norm timm applies to feature maps."""
        return block == self.depth and self._plan.normalised

    def use_channels_last(self, asked: bool | None = None) -> bool:
        """See `Encoder.use_channels_last`."""
        if asked is None:
            asked = sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > len(REDUCTIONS)
        self._format = torch.channels_last if asked else torch.contiguous_format
        self.model.to(memory_format=self._format)
        return asked

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor | None, blocks: Iterable[int]
    ) -> dict[int, torch.Tensor]:
        """Return tokens {stage: (B, T, E)}. Arguments as for `Encoder.forward`."""
        wanted = sorted(set(blocks))
        maps = self._embedded_maps(images, mask, wanted) if self._embeds else self._maps(images, mask, wanted)
        return {stage: one.flatten(2).transpose(1, 2) for stage, one in zip(wanted, maps, strict=True)}

    def _maps(self, images: torch.Tensor, mask: torch.Tensor, stages: Sequence[int]) -> list[torch.Tensor]:
        """Feature maps (B, E, h, w) of images with hidden pixels replaced."""
        if self.mask_token is not None:
            cells = mask.reshape(-1, 1, self.grid, 1, self.grid, 1)
            hidden = cells.expand(-1, -1, -1, self.cell, -1, self.cell).reshape(-1, 1, *images.shape[2:])
            images = torch.where(hidden, self.mask_token.to(images.dtype), images)
        images = images.contiguous(memory_format=self._format)
        return _intermediates(self.model, images, [self._plan.first + stage - 1 for stage in stages], self._plan.norm)

    def _embedded_maps(self, images: torch.Tensor, mask: torch.Tensor, stages: Sequence[int]) -> list[torch.Tensor]:
        """Feature maps of Swin, whose hidden tokens are replaced after the patch embedding."""
        model: Any = self.model
        tokens = model.patch_embed(images)  # (B, h, w, E)
        if self.mask_token is not None:
            hidden = mask.reshape(-1, self.grid, self.grid, 1)
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        maps = []
        for stage, layer in enumerate(model.layers, 1):
            tokens = layer(tokens)
            if stage in stages:
                maps.append((model.norm(tokens) if stage == self.depth else tokens).permute(0, 3, 1, 2))
        return maps


@dataclass(frozen=True)
class _Plan:
    """What must be known about a model before it is built."""

    arguments: dict[str, Any]  # of timm.create_model
    first: int  # index of stage 1 among timm's feature maps
    norm: bool  # whether timm can apply the final norm to feature maps
    normalised: bool  # whether there is one
    widths: list[int]
    used: set[str]  # names of the parameters that the last stage depends on


_plans: dict[str, _Plan] = {}  # a process builds a recipe's model several times: to check, train and evaluate it


def _plan(name: str, image_size: int, arguments: Mapping[str, Any]) -> _Plan:
    key = repr((name, image_size, sorted(arguments.items())))
    if key not in _plans:
        _plans[key] = _new_plan(name, image_size, arguments)
    return _plans[key]


def _new_plan(name: str, image_size: int, arguments: Mapping[str, Any]) -> _Plan:
    """The plan of a model, determined on the meta device, without memory or arithmetic."""
    with torch.device("meta"), torch.enable_grad():
        model, arguments = _build(name, image_size, arguments)
        first = _first_stage(model, name)
        indices = [first + stage for stage in range(len(REDUCTIONS))]
        images = torch.zeros(2, int(arguments["in_chans"]), image_size, image_size)
        try:
            without = _intermediates(model, images, indices, norm=False)
            maps = _normed(model, images, indices)
        except (RuntimeError, AssertionError, TypeError, ValueError, IndexError) as error:
            cannot = f"encoder.image_size={image_size}: '{name}' cannot encode such images"
            raise ValueError(f"{cannot} ({one_line(error)}); try another size, a multiple of 32") from None
        expected = [(image_size // reduction,) * 2 for reduction in REDUCTIONS]
        sizes = [tuple(one.shape[2:]) for one in without]
        if sizes != expected:
            raise ValueError(f"encoder.image_size={image_size}: '{name}' has feature maps {sizes}, not {expected}")
        used = plain = _parameters_of(without[-1], model)
        if maps is not None:
            used = _parameters_of(maps[-1], model)
    widths = [int(one.shape[1]) for one in without]
    return _Plan(arguments, first, maps is not None, used != plain, widths, used)


def _normed(model: nn.Module, images: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor] | None:
    """Feature maps with the final norm; None if timm has none to apply."""
    try:
        return _intermediates(model, images, indices, norm=True)
    except AssertionError:  # of timm: "normalization of features not supported"
        return None


def _build(name: str, image_size: int, arguments: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its arguments, with an image size if it has that argument."""
    sized = {"img_size": image_size, **arguments}
    try:
        return create(name, sized), sized
    except ValueError as error:
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error.__cause__):
            raise
    return create(name, arguments), dict(arguments)


def _first_stage(model: nn.Module, name: str) -> int:
    """Index of the stage with reduction 4, the fourth from the end; ValueError if the stages are different."""
    stages = getattr(model, "feature_info", None) or []
    reductions = [int(stage["reduction"]) for stage in stages]
    if tuple(reductions[-4:]) != REDUCTIONS or not hasattr(model, "forward_intermediates"):
        found = ", ".join(map(str, reductions)) if len(reductions) < 8 else f"{len(reductions)} × {reductions[-1]}"
        raise ValueError(
            f"encoder.name: '{name}' has feature maps of reductions {found or 'unknown'}; use a plain vision "
            "transformer (vit_base_patch16_224) or a backbone with stages of 4, 8, 16, 32 (swin_tiny_patch4_window7_224)"
        )
    return len(reductions) - len(REDUCTIONS)


def _intermediates(model: Any, images: torch.Tensor, indices: Sequence[int], norm: bool) -> list[torch.Tensor]:
    maps: list[torch.Tensor] = model.forward_intermediates(
        images, indices=list(indices), norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    return maps


def _parameters_of(output: torch.Tensor, model: nn.Module) -> set[str]:
    """Names of the parameters that `output` depends on: the leaves of its graph."""
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(names.get(id(node.variable), ""))
        waiting += [before for before, _ in node.next_functions]
    return found
