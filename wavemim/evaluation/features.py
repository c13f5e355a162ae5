"""Features of every block of a timm model, out of one forward pass.

Legend: B images, n all of them, C channels, H = W pixels a side, F features, T patch tokens, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Tapped:
    """What one or several batches gave. Blocks are counted from 1; of backbones with stages they are its stages."""

    final: np.ndarray  # (n, F) float32: what the model itself gives, without a classifier
    blocks: dict[int, np.ndarray]  # block: (n, E) float32, the mean of its patch tokens
    tokens: np.ndarray | None  # (n, T, E) float16, patch tokens of the last block, of the first images at most
    labels: np.ndarray  # (n,) int64, -1 for none

    @property
    def set(self) -> tuple[np.ndarray, np.ndarray]:
        """The model's own features, and labels."""
        return self.final, self.labels

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Features of a block, and labels."""
        return self.blocks[number], self.labels


class Taps:
    """Reads a model's features, pooled patch tokens of each block and tokens of the last one.

    Models in which timm finds no intermediate maps (``forward_intermediates``), and functions, have final features alone.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], *, blocks: bool, tokens: bool) -> None:
        """`encode`: images (B, C, H, W) → features. `blocks`, `tokens`: whether they are wanted."""
        able = isinstance(encode, nn.Module) and hasattr(encode, "forward_intermediates")
        self.encode = encode
        self.blocks, self.tokens = blocks and able, tokens and able
        self._in_one: bool | None = None  # whether the model's own features come of the same pass

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor | None]:
        """Features (B, F), {block: pooled patch tokens (B, E)} and the last block's patch tokens (B, T, E)."""
        if not (self.blocks or self.tokens):
            return self.encode(images).flatten(1), {}, None
        wanted = None if self.blocks else 1  # all, or the last one
        last, maps = self.encode.forward_intermediates(images, indices=wanted, output_fmt="NCHW")  # type: ignore[attr-defined]
        final = self._final(images, last)
        pooled = {number: values.float().mean((2, 3)) for number, values in enumerate(maps, 1)} if self.blocks else {}
        return final, pooled, maps[-1].flatten(2).transpose(1, 2) if self.tokens else None

    def _final(self, images: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The model's own features out of its `last` tokens, where its head does that; found out on the first batch."""
        if self._in_one is None:
            own = self.encode(images).flatten(1)
            try:
                again = self.encode.forward_head(last).flatten(1)  # type: ignore[attr-defined]
                self._in_one = own.shape == again.shape and torch.allclose(own, again, rtol=1e-3, atol=1e-4)
            except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
                self._in_one = False
            return own
        return self.encode.forward_head(last).flatten(1) if self._in_one else self.encode(images).flatten(1)  # type: ignore[attr-defined]


def extract_taps(
    taps: Taps, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, tokens_of: np.ndarray | None = None
) -> Tapped:
    """All of it over batches of normalised images and labels; tokens of the images alone that `tokens_of` (n,) names."""
    final, labels, tokens, blocks = [], [], [], dict[int, list[np.ndarray]]()
    done = 0
    for images, label in batches:
        own, pooled, patches = taps(images)
        final.append(own.float().cpu().numpy())
        labels.append(label.cpu().numpy())
        for number, values in pooled.items():
            blocks.setdefault(number, []).append(values.cpu().numpy())
        wanted = tokens_of[done : done + len(images)] if tokens_of is not None else np.zeros(0, bool)
        if patches is not None and wanted.any():
            chosen = patches[torch.from_numpy(wanted).to(patches.device)]
            tokens.append(chosen.clamp(-_LARGEST, _LARGEST).half().cpu().numpy())
        done += len(images)
    return Tapped(
        np.concatenate(final),
        {number: np.concatenate(values) for number, values in blocks.items()},
        np.concatenate(tokens) if tokens else None,
        np.concatenate(labels),
    )


def joined(parts: Iterable[Tapped], positions: Iterable[np.ndarray]) -> Tapped:
    """Parts put together without their tokens, each image at its position; `positions` cover 0 to n - 1."""
    parts, order = list(parts), np.argsort(np.concatenate(list(positions)))

    def together(arrays: Iterator[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))[order]

    return Tapped(
        together(part.final for part in parts),
        {number: together(part.blocks[number] for part in parts) for number in parts[0].blocks},
        None,
        together(part.labels for part in parts),
    )
