"""Features of every block of a timm model from one forward pass.

Legend: B images of a batch, n images in all, C channels, H = W pixels per side, F features, T patch tokens,
E embedding width.
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
    """Features of one or several batches. Blocks are counted from 1; in hierarchical backbones they are the stages.

    Attributes:
        final: (n, F) float32, the model's own features: its output without a classifier.
        blocks: {block: (n, E)} float32, the mean of its patch tokens.
        tokens: float16, (up to n, T, E), patch tokens of the last block of the images that were chosen.
        labels: (n,) int64, -1 for images without a label.
    """

    final: np.ndarray
    blocks: dict[int, np.ndarray]
    tokens: np.ndarray | None
    labels: np.ndarray

    @property
    def set(self) -> tuple[np.ndarray, np.ndarray]:
        """The model's own features and the labels."""
        return self.final, self.labels

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of a block and the labels."""
        return self.blocks[number], self.labels


class Taps:
    """Computes a model's own features, pooled patch tokens of each block, and patch tokens of the last block.

    Functions, and models without timm's ``forward_intermediates``, only have their own features.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], *, blocks: bool, tokens: bool) -> None:
        """Create the reader.

        Args:
            encode: The model, or a function from images (B, C, H, W) to features.
            blocks: Whether to compute features of every block.
            tokens: Whether to return patch tokens of the last block.
        """
        able = isinstance(encode, nn.Module) and hasattr(encode, "forward_intermediates")
        self.encode = encode
        self.blocks, self.tokens = blocks and able, tokens and able
        self._in_one: bool | None = None  # whether the same pass gives the model's own features

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor | None]:
        """Return features (B, F), {block: pooled patch tokens (B, E)} and the last block's patch tokens (B, T, E)."""
        if not (self.blocks or self.tokens):
            return self.encode(images).flatten(1), {}, None
        wanted = None if self.blocks else 1  # all, or the last one
        last, maps = self.encode.forward_intermediates(images, indices=wanted, output_fmt="NCHW")  # type: ignore[attr-defined]
        final = self._final(images, last)
        pooled = {number: values.float().mean((2, 3)) for number, values in enumerate(maps, 1)} if self.blocks else {}
        return final, pooled, maps[-1].flatten(2).transpose(1, 2) if self.tokens else None

    def _final(self, images: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The model's own features from its `last` tokens if its head gives the same, which the first batch decides."""
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
    """Compute features over batches.

    Args:
        taps: The reader.
        batches: Normalised images (B, C, H, W) and labels (B,).
        tokens_of: bool (n,), the images whose tokens are kept; None: of none.

    Returns:
        The features of all batches.
    """
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
    """Concatenate parts, without their tokens, in the order of the images.

    Args:
        parts: Features of parts of the images.
        positions: The positions of each part's images; together they cover 0 to n - 1.

    Returns:
        Features of all n images by position.
    """
    parts, order = list(parts), np.argsort(np.concatenate(list(positions)))

    def together(arrays: Iterator[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))[order]

    return Tapped(
        together(part.final for part in parts),
        {number: together(part.blocks[number] for part in parts) for number in parts[0].blocks},
        None,
        together(part.labels for part in parts),
    )
