"""Features of every block of a timm model from one forward pass.

Legend: B images of a batch, n images in all, C channels, H = W pixels per side, F features, T patch tokens,
E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from timm.layers import global_pool_nlc
from torch import nn

Pool = Literal["mean", "token"]

_TIMM_POOL = {"mean": "avg", "token": "token"}
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Tapped:
    """Features of one or several batches. Blocks are counted from 1; in hierarchical backbones they are the stages.

    Attributes:
        final: (n, F) float32, the features: of the first pooling, or the model's own (its output without a classifier).
        blocks: {block: (n, E)} float32, the mean of its patch tokens.
        tokens: float16, (up to n, T, E), patch tokens of the last block of the images that were chosen.
        labels: (n,) int64, -1 for images without a label.
        others: {pooling: (n, E)} float32, the features of further poolings.
    """

    final: np.ndarray
    blocks: dict[int, np.ndarray]
    tokens: np.ndarray | None
    labels: np.ndarray
    others: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def set(self) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels."""
        return self.final, self.labels

    def pooled(self, pool: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of a further pooling and the labels."""
        return self.others[pool], self.labels

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of a block and the labels."""
        return self.blocks[number], self.labels


def pools_of(model: Any, images: torch.Tensor) -> tuple[Pool, ...]:
    """Return the poolings that a vision transformer of timm can have, whichever it was built with.

    Both poolings are followed by the model's own norms, so that they differ in the pooling alone.

    Args:
        model: The model, without a classifier, in evaluation mode.
        images: Some images (B, C, H, W), to see that pooling its tokens gives its own features.

    Returns:
        "mean" (of the patch tokens) and, if it has one, "token" (the class token). Nothing for other models, which only
        have their own features.
    """
    own = {timm_name: name for name, timm_name in _TIMM_POOL.items()}.get(getattr(model, "global_pool", None) or "")
    parts = ("forward_features", "fc_norm", "num_prefix_tokens")
    if own is None or not all(hasattr(model, part) for part in parts) or getattr(model, "attn_pool", None) is not None:
        return ()
    with torch.inference_mode():
        tokens = model.forward_features(images)
        if tokens.ndim != 3:
            return ()
        pooled, features = _pooled(model, tokens, own), model(images)
        if pooled.shape != features.shape or not torch.allclose(pooled, features, rtol=1e-3, atol=1e-4):
            return ()
    return get_args(Pool) if getattr(model, "cls_token", None) is not None else ("mean",)


def _pooled(model: Any, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Features (B, E) of a model's final tokens (B, R + T, E), with R prefix tokens."""
    pooled: torch.Tensor = model.fc_norm(global_pool_nlc(tokens, _TIMM_POOL[pool], model.num_prefix_tokens))
    return pooled


class Taps:
    """Computes a model's features, pooled patch tokens of each block, and patch tokens of the last block.

    Functions, and models without timm's ``forward_intermediates``, only have their own features.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        *,
        blocks: bool,
        tokens: bool,
        pools: Sequence[str] = (),
    ) -> None:
        """Create the reader.

        Args:
            encode: The model, or a function from images (B, C, H, W) to features.
            blocks: Whether to compute features of every block.
            tokens: Whether to return patch tokens of the last block.
            pools: Poolings out of `pools_of(encode)`; the first one gives the features. Empty: the model's own features.
        """
        self.pools = tuple(pools)
        able = isinstance(encode, nn.Module) and hasattr(encode, "forward_intermediates")
        self.encode = encode
        self.blocks, self.tokens = blocks and able, tokens and able
        self._in_one: bool | None = None  # whether the same pass gives the model's own features

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[list[torch.Tensor], dict[int, torch.Tensor], torch.Tensor | None]:
        """Return features of every pooling (B, F), {block: pooled patch tokens (B, E)}, the last block's tokens (B, T, E).

        Without poolings, the features are the model's own.
        """
        if not (self.blocks or self.tokens):
            return self._features(images), {}, None
        wanted = None if self.blocks else 1  # all, or the last one
        last, maps = self.encode.forward_intermediates(images, indices=wanted, output_fmt="NCHW")  # type: ignore[attr-defined]
        final = self._features(images, last)
        pooled = {number: values.float().mean((2, 3)) for number, values in enumerate(maps, 1)} if self.blocks else {}
        return final, pooled, maps[-1].flatten(2).transpose(1, 2) if self.tokens else None

    def _features(self, images: torch.Tensor, last: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Features of every pooling, from the `last` tokens of another pass where they serve."""
        if not self.pools:
            return [self.encode(images).flatten(1) if last is None else self._final(images, last)]
        if last is not None and self._in_one is None:
            self._final(images, last)  # to see whether the tokens serve
        tokens = last if last is not None and self._in_one else self.encode.forward_features(images)  # type: ignore[attr-defined]
        return [_pooled(self.encode, tokens, pool) for pool in self.pools]

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
        features, pooled, patches = taps(images)
        final.append([values.float().cpu().numpy() for values in features])
        labels.append(label.cpu().numpy())
        for number, values in pooled.items():
            blocks.setdefault(number, []).append(values.cpu().numpy())
        wanted = tokens_of[done : done + len(images)] if tokens_of is not None else np.zeros(0, bool)
        if patches is not None and wanted.any():
            chosen = patches[torch.from_numpy(wanted).to(patches.device)]
            tokens.append(chosen.clamp(-_LARGEST, _LARGEST).half().cpu().numpy())
        done += len(images)
    first, *others = (np.concatenate(values) for values in zip(*final, strict=True))
    return Tapped(
        first,
        {number: np.concatenate(values) for number, values in blocks.items()},
        np.concatenate(tokens) if tokens else None,
        np.concatenate(labels),
        dict(zip(taps.pools[1:], others, strict=True)),
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
        {pool: together(part.others[pool] for part in parts) for pool in parts[0].others},
    )
