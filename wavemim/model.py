"""The model: (images, targets, mask) → loss per tap.

Legend: B images, C channels, H = W pixels per side, N = G·G cells of the mask, T taps, P positions per side of a tap,
D values per position, S predicted positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from wavemim.constraints import check_tapped
from wavemim.decoders import TapDecoder, TapHead, Trunk
from wavemim.encoders.base import Encoder
from wavemim.level_weights import LevelWeights
from wavemim.masking import share_at, visible_indices_of
from wavemim.randomness import uniform
from wavemim.targets import Tap, Target


@dataclass(frozen=True)
class DecoderSettings:
    """Settings of the decoder of every tap.

    Attributes:
        width: Embedding width.
        depth: Number of blocks; 0 for a linear decoder.
        heads: Attention heads.
        attention: "self" over all tokens, or "cross" from predicted positions to the encoder's tokens.
        shared: Whether all taps share one set of blocks.
        predict: Fraction of the hidden positions that is predicted.
        per: "tap": every tap has a decoder. "block": taps at the same block share one and have a head each; those whose
            positions differ only if attention is "self" and all positions are predicted.
    """

    width: int = 256
    depth: int = 1
    heads: int = 8
    attention: Literal["self", "cross"] = "self"
    shared: bool = False
    predict: float = 1.0
    per: Literal["tap", "block"] = "tap"


class MaskedImageModel(nn.Module):
    """An encoder, one decoder per tap, and the losses between predictions and targets."""

    def __init__(
        self,
        encoder: Encoder,
        target: Target,
        *,
        hidden: int,
        decoder: DecoderSettings = DecoderSettings(),
        level_weights: LevelWeights | None = None,
    ) -> None:
        """Create the model.

        Args:
            encoder: The encoder.
            target: What the taps predict.
            hidden: Cells of the encoder's grid that a mask hides, the same number in every image.
            decoder: Settings of the decoders.
            level_weights: Weights of the taps' losses; None: all 1.

        Raises:
            ValueError: If a tap names a block that does not exist, or the last block has no tap.
        """
        super().__init__()
        check_taps(encoder, target.taps)
        self.levels = [tap.level for tap in target.taps]  # the order of the losses
        self.encoder, self.target = encoder, target
        self.level_weights = level_weights or LevelWeights([1.0] * len(target.taps))
        self.hide(hidden)
        self.predict_share = decoder.predict
        self.trunk: Trunk | None = None
        if decoder.shared:
            self.trunk = Trunk(
                decoder.width,
                depth=decoder.depth,
                heads=decoder.heads,
                drops=encoder.drops,
                attention=decoder.attention,
            )
        self.leaders = _leaders(target, decoder)
        self.decoders = nn.ModuleDict()
        for tap in target.taps:
            positions, values = target.positions(tap.level), target.values(tap)
            leader = self.leaders[tap.level]
            self.decoders[str(tap.level)] = (
                TapHead(self._decoder(leader), positions=positions, values=values)
                if leader != tap.level
                else TapDecoder(
                    encoder.width(tap.block),
                    tokens=encoder.image_size // encoder.token_size(tap.block),
                    prefix=encoder.prefix,
                    positions=positions,
                    values=values,
                    width=decoder.width,
                    depth=decoder.depth,
                    heads=decoder.heads,
                    normalised=encoder.normalised(tap.block),
                    drops=encoder.drops,
                    attention=decoder.attention,
                    trunk=self.trunk,
                )
            )

    def _decoder(self, leader: int) -> TapDecoder:
        decoder = self.decoders[str(leader)]
        assert isinstance(decoder, TapDecoder)
        return decoder

    def hide(self, hidden: int) -> None:
        """Expect masks that hide `hidden` cells from now on."""
        cells = self.encoder.grid**2
        self.visible, self.hidden_share = cells - hidden, hidden / cells

    def chosen(self, mask: torch.Tensor, rows: torch.Tensor, *, seed: int, epoch: int) -> dict[int, torch.Tensor]:
        """Draw the positions to predict from the hidden ones, as a pure function of (seed, epoch, row, number of the mask).

        Args:
            mask: bool (B, N), True = hidden; or (M·B, N), M masks for each image, as in `wavemim.views`.
            rows: Row numbers (B,) of the images.
            seed: Of the run.
            epoch: Of training.

        Returns:
            {level: (B or M·B, S)}, ascending; empty if all positions are predicted.
        """
        if self.predict_share == 1:
            return {}
        found = {}
        for level in self.levels:
            share = share_at(mask, self.encoder.grid, self.target.positions(level))
            count = max(1, round(share.shape[1] * self.hidden_share * self.predict_share))
            draws = [
                uniform(seed, f"predict {self.leaders[level]}", epoch, rows, share.shape[1], number=number)
                for number in range(len(mask) // len(rows))
            ]
            order = (share > 0) + torch.cat(draws)
            found[level] = order.topk(count, dim=1).indices.sort(dim=1).values
        return found

    def predict(
        self, images: torch.Tensor, mask: torch.Tensor, index: Mapping[int, torch.Tensor] | None = None
    ) -> dict[int, torch.Tensor]:
        """Predict the targets.

        Args:
            images: Normalised images (B, C, H, W).
            mask: bool (B, N), True = hidden.
            index: {level: (B, S)}, the positions to predict; None: all.

        Returns:
            {level: (B, S or P², D)}.
        """
        if index is None and self.predict_share < 1:  # a decoder that was trained on some positions gets an index
            index = {level: self._everywhere(level, mask) for level in self.levels}
        visible = visible_indices_of(mask, self.visible) if self.encoder.drops else None
        tokens = self.encoder(images, mask, visible, [tap.block for tap in self.target.taps])
        index = index or {}
        features: dict[int, torch.Tensor] = {}
        found: dict[int, torch.Tensor] = {}
        for tap in self.target.taps:
            at, leader = index.get(tap.level), self.leaders[tap.level]
            decoder, head = self._decoder(leader), self.decoders[str(tap.level)]
            assert isinstance(head, TapDecoder | TapHead)
            if leader not in features:
                features[leader] = decoder.features(tokens[tap.block], visible, at, self.trunk)
            found[tap.level] = decoder.read(head, features[leader], at, self.trunk)
        return found

    def _everywhere(self, level: int, mask: torch.Tensor) -> torch.Tensor:
        """Indices (B, P²) of all positions."""
        count = self.target.positions(level) ** 2
        return torch.arange(count, device=mask.device).expand(mask.shape[0], -1)

    def forward(
        self,
        images: torch.Tensor,
        targets: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
        weight: torch.Tensor,
        scheduled: torch.Tensor,
        index: Mapping[int, torch.Tensor] | None = None,
        spectrum: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the losses. A tap's loss is the sum over images of weight · error at hidden positions.

        Args:
            images: Normalised images (B, C, H, W).
            targets: The targets, of ``target.forward``.
            mask: bool (B, N), True = hidden.
            weight: (B,), each image's share of the global batch (1/B for a plain mean, 0 for padding).
            scheduled: Weights (T,) of the taps, of ``level_weights.at``.
            index: The predicted positions, of `chosen`.
            spectrum: bool (B, H, W), the frequencies that were removed from the images, if any.

        Returns:
            The training loss () and the loss of each tap (T,) in the order of `levels`.
        """
        predictions = self.predict(images, mask, index)
        index = index or {}
        losses = []
        for level in self.levels:
            share = share_at(mask, self.encoder.grid, self.target.positions(level))
            error = self.target.error(level, predictions[level], targets[level], share, index.get(level), spectrum)
            losses.append((error * weight).sum())
        stacked = torch.stack(losses)
        return self.level_weights(stacked, scheduled, weight.sum()), stacked


def _leaders(target: Target, decoder: DecoderSettings) -> dict[int, int]:
    """{level: the finest level whose decoder it uses}, in the order of the taps: its own, unless decoders are per block."""
    anywhere = decoder.attention == "self" and decoder.predict == 1  # features of all tokens, which any tap can pool
    first: dict[tuple[int, int], int] = {}
    found = {}
    for tap in target.taps:
        place = (tap.block, 0 if anywhere else target.positions(tap.level))
        found[tap.level] = first.setdefault(place, tap.level) if decoder.per == "block" else tap.level
    return found


def check_taps(encoder: Encoder, taps: Iterable[Tap]) -> None:
    """Raise ValueError where a tap names a block that does not exist, or the last block has no tap."""
    check_tapped({tap.level: tap.block for tap in taps}, encoder.depth, word=encoder.word, name=encoder.name)
