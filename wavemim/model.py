"""The model: (images, targets, mask) → loss per tap.

Legend: B images, N = G·G tokens, V visible tokens, T taps, P positions a side, D values a position.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from wavemim.decoders import TapDecoder
from wavemim.encoders import ViTEncoder
from wavemim.masking import hidden_count, share_at, visible_indices_of
from wavemim.targets import WaveletTarget


def masked_loss(prediction: torch.Tensor, target: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image (B,) over hidden positions, in float32.

    `prediction` and `target` (B, P², D), `share` (B, P²): the hidden share of a position is its weight, so that visible
    positions count nothing (LocalMIM, Wang et al. 2023, eq. 3, weights cells that are partly hidden in the same way).
    """
    error = (prediction.float() - target).square().mean(-1)
    return (error * share).sum(1) / share.sum(1)


class MaskedImageModel(nn.Module):
    """Encoder, one decoder a tap, and the losses between predictions and targets."""

    def __init__(
        self,
        encoder: ViTEncoder,
        target: WaveletTarget,
        *,
        mask_ratio: float,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
    ) -> None:
        """Raises ValueError where a tap names a block that does not exist, or the last block has no tap."""
        super().__init__()
        for tap in target.taps:
            if not 1 <= tap.block <= encoder.depth:
                raise ValueError(
                    f"target.taps.{tap.level}={tap.block}: block {tap.block} does not exist, "
                    f"{encoder.name} has blocks 1 to {encoder.depth} here"
                )
        if encoder.depth not in {tap.block for tap in target.taps}:
            last = max(tap.block for tap in target.taps)
            raise ValueError(
                f"target.taps: the last block, {encoder.depth}, has no tap, so blocks after {last} would never be "
                f"trained; give a level to block {encoder.depth} or set encoder.depth={last}"
            )
        self.encoder, self.target = encoder, target
        self.visible = encoder.grid**2 - hidden_count(encoder.grid**2, mask_ratio)
        self.decoders = nn.ModuleDict(
            {
                str(tap.level): TapDecoder(
                    encoder.width,
                    grid=encoder.grid,
                    positions=target.positions(tap.level),
                    values=target.values(tap),
                    width=decoder_width,
                    depth=decoder_depth,
                    heads=decoder_heads,
                )
                for tap in target.taps
            }
        )

    @property
    def levels(self) -> list[int]:
        """Levels in the order of the losses."""
        return [tap.level for tap in self.target.taps]

    def predict(self, images: torch.Tensor, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        """Predictions {level: (B, P², D)} of normalised images (B, C, H, W) under masks (B, N)."""
        visible = visible_indices_of(mask, self.visible)
        tokens = self.encoder(images, visible, [tap.block for tap in self.target.taps])
        return {tap.level: self.decoders[str(tap.level)](tokens[tap.block], visible) for tap in self.target.taps}

    def forward(
        self, images: torch.Tensor, targets: Mapping[int, torch.Tensor], mask: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each tap (T,), in the order of `levels`: the sum over images of weight · masked mean squared error.

        `weight` (B,) is each image's share of the global batch (1/B for a plain mean; 0 for padding).
        """
        predictions = self.predict(images, mask)
        losses = []
        for tap in self.target.taps:
            share = share_at(mask, self.encoder.grid, self.target.positions(tap.level))
            losses.append((masked_loss(predictions[tap.level], targets[tap.level], share) * weight).sum())
        return torch.stack(losses)
