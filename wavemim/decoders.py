"""The light decoder of a tap: from the encoder's tokens to predictions for all positions, or some of them.

Taps at the same block may share one decoder: the first of them has it (`TapDecoder`), the others are heads on its features
(`TapHead`).

Legend: B images, G tokens per side of the encoder at this tap, R prefix tokens (class, registers), V visible tokens,
T tokens of a context, E encoder width, W decoder width, P positions per side, S chosen positions, D values per position.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp  # this LayerNorm has MAE's eps, 1e-6
from timm.models.vision_transformer import Block
from torch import nn

from wavemim.constraints import check_decoder_depth, check_decoder_width
from wavemim.initial_weights import xavier
from wavemim.positions import sincos

Attention = Literal["self", "cross"]


class CrossBlock(nn.Module):
    """Attention from queries to a context, then an MLP, pre-norm with residuals (CrossMAE, Fu et al., TMLR 2024).

    Queries do not attend to each other, so a prediction does not depend on which others are made. The context is the
    tap's tokens at width W plus their positions; in the paper it is the encoder's output itself, of width E.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Create a block of `width` W with `heads` heads, which have to divide W."""
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return queries (B, S, W) after attention to the context (B, T, W)."""
        b, s, width = queries.shape
        q = self.query(self.norm1(queries)).reshape(b, s, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(context).reshape(b, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, width)
        queries = queries + self.proj(attended)
        return queries + self.mlp(self.norm2(queries))


class Trunk(nn.Module):
    """What taps may share: the mask token, the blocks and the final norm. Positions depend on the grid of the tap."""

    def __init__(self, width: int, *, depth: int, heads: int, drops: bool, attention: Attention = "self") -> None:
        """Create the trunk. It only has a mask token if the encoder drops hidden tokens, or queries are made of it.

        Args:
            width: W.
            depth: Number of blocks, at least 1.
            heads: Attention heads.
            drops: Whether the encoder drops hidden tokens.
            attention: "self" or "cross".

        Raises:
            ValueError: If `depth` is 0, or `width` is not a multiple of `heads` and of 4.
        """
        super().__init__()
        check_decoder_depth(depth, attention=attention, shared=True)
        check_decoder_width(width, heads)
        self.attention = attention
        self.made_for = (width, depth, heads, drops, attention)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if drops or attention == "cross" else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.blocks = nn.ModuleList(
            CrossBlock(width, heads) if attention == "cross" else Block(width, heads, qkv_bias=True)
            for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.apply(xavier)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Return tokens (B, S, W) after all blocks, not yet normalised; `context` (B, T, W) is for cross-attention."""
        assert (context is not None) == (self.attention == "cross"), self.attention
        for block in self.blocks:
            tokens = block(tokens) if context is None else block(tokens, context)
        return tokens


class TapDecoder(nn.Module):
    """Linear embedding, fixed positions, `depth` transformer blocks, and a linear map to all values of a position.

    - `attention="self"`: over all tokens, with mask tokens for dropped ones, as in MAE (He et al. 2022). If an index
      selects positions and the encoder drops hidden tokens, only selected positions get a mask token.
    - `attention="cross"`: mask tokens at the selected positions attend to the encoder's tokens (CrossMAE).
    - `depth=0`: only the linear map, on the encoder's tokens (SimMIM, Xie et al. 2022).
    """

    def __init__(
        self,
        encoder_width: int,
        *,
        tokens: int,
        prefix: int,
        positions: int,
        values: int,
        width: int,
        depth: int,
        heads: int,
        normalised: bool,
        drops: bool,
        attention: Attention = "self",
        trunk: Trunk | None = None,
    ) -> None:
        """Create the decoder.

        Args:
            encoder_width: E.
            tokens: G.
            prefix: R.
            positions: P, which divides G.
            values: D.
            width: W.
            depth: Number of blocks.
            heads: Attention heads.
            normalised: Whether the tokens have gone through a norm.
            drops: Whether the encoder drops hidden tokens.
            attention: "self" or "cross".
            trunk: The trunk, if several taps share one. It belongs to the model and is not stored here, so that its
                weights are saved once; pass it to every call of `forward`.

        Raises:
            ValueError: If `depth` is 0 and the encoder drops hidden tokens.
        """
        super().__init__()
        assert tokens % positions == 0, (tokens, positions)
        check_decoder_depth(depth, drops=drops)
        self.tokens, self.prefix, self.pool = tokens, prefix, tokens // positions
        self.depth, self.drops, self.attention = depth, drops, attention
        self.norm_in = nn.Identity() if normalised else LayerNorm(encoder_width)
        self.trunk: Trunk | None = None
        if depth:
            if trunk is None:
                self.trunk = trunk = Trunk(width, depth=depth, heads=heads, drops=drops, attention=attention)
            assert trunk.made_for == (width, depth, heads, drops, attention), trunk.made_for
            self.places = nn.Parameter(sincos(tokens, width, prefix), requires_grad=False)
        self.embed = nn.Linear(encoder_width, width) if depth else nn.Identity()
        self.head = nn.Linear(width if depth else encoder_width, values)
        if depth:  # as in MAE; a linear decoder keeps torch's initial weights, as in SimMIM and MFM
            xavier(self.embed)
            xavier(self.head)

    def forward(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> torch.Tensor:
        """Predict the values of positions.

        Predictions for an index equal those of the full prediction, unless self-attention has fewer tokens (`drops`):
        the mask tokens of other positions are missing then.

        Args:
            tokens: (B, R + V, E) if the encoder drops hidden tokens, otherwise (B, R + G², E), in row-major order.
            visible: (B, V), indices of the visible tokens; only if the encoder drops hidden tokens.
            index: (B, S), positions to predict, row-major on the P·P grid; None: all.
            trunk: The shared trunk, if the decoder was made for one.

        Returns:
            (B, S, D), or (B, P², D) without an index.
        """
        return self.read(self, self.features(tokens, visible, index, trunk), index, trunk)

    def features(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> torch.Tensor:
        """Compute what the heads map to values. Arguments as for `forward`.

        Returns:
            (B, S or P², W) if only queries at positions leave the blocks, otherwise (B, G², W).
        """
        assert (visible is not None) == self.drops, "visible indices are for encoders that drop tokens"
        tokens = self.embed(self.norm_in(tokens))
        if self.depth == 0:
            return tokens[:, self.prefix :]
        trunk = self.trunk if trunk is None else trunk
        assert trunk is not None, "this decoder was made for a shared trunk"
        if self.attention == "cross":
            return trunk(self._queries(tokens, index, trunk), self._placed(tokens, visible))
        if visible is not None and index is not None:
            queries = self._queries(tokens, index, trunk)
            return trunk(torch.cat((self._placed(tokens, visible), queries), 1))[:, tokens.shape[1] :]
        if visible is not None:
            tokens = self._filled(tokens, visible, trunk)
        return trunk(self._placed(tokens, None))[:, self.prefix :]

    def read(
        self,
        head: TapDecoder | TapHead,
        features: torch.Tensor,
        index: torch.Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> torch.Tensor:
        """Map `features` to the values of a tap (B, S or P², D): with the head of this decoder, or of one that shares it."""
        if not self.depth or not (self.attention == "cross" or (self.drops and index is not None)):
            # of all tokens; otherwise of queries, which were made for positions
            features = _chosen(_pooled(features, self.tokens, head.pool), index)
        trunk = self.trunk if trunk is None else trunk
        return head.head(features if self.depth == 0 or trunk is None else trunk.norm(features))

    def _placed(self, tokens: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """Tokens (B, R + V or R + G², W) plus their positions; zero for the prefix."""
        places = self.places.to(tokens.dtype)
        if visible is None:
            return tokens + places
        front, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        patches = patches + F.embedding(visible, places[0, self.prefix :])
        return torch.cat((front, patches), 1) if self.prefix else patches

    def _filled(self, tokens: torch.Tensor, visible: torch.Tensor, trunk: Trunk) -> torch.Tensor:
        """All tokens (B, R + G², W) from visible ones (B, R + V, W), with the mask token for dropped ones."""
        assert trunk.mask_token is not None
        batch, _, width = tokens.shape
        whole = trunk.mask_token.to(tokens.dtype).expand(batch, self.tokens**2, width)
        whole = whole.scatter(1, visible[:, :, None].expand(-1, -1, width), tokens[:, self.prefix :])
        return torch.cat((tokens[:, : self.prefix], whole), 1) if self.prefix else whole

    def _queries(self, tokens: torch.Tensor, index: torch.Tensor | None, trunk: Trunk) -> torch.Tensor:
        """Mask tokens plus positions (B, S or P², W); of a coarse position, those of its tokens are averaged."""
        assert trunk.mask_token is not None
        places = _pooled(self.places[:, self.prefix :], self.tokens, self.pool)
        places = places.expand(tokens.shape[0], -1, -1) if index is None else F.embedding(index, places[0])
        return (trunk.mask_token + places).to(tokens.dtype)


class TapHead(nn.Module):
    """The head of a tap that shares the decoder of another tap at the same block."""

    def __init__(self, decoder: TapDecoder, *, positions: int, values: int) -> None:
        """Create the head.

        Args:
            decoder: The decoder that is shared. It is not stored here, so that its weights are saved once.
            positions: P of this tap.
            values: D of this tap.
        """
        super().__init__()
        assert decoder.tokens % positions == 0, (decoder.tokens, positions)
        self.pool = decoder.tokens // positions
        self.head = nn.Linear(decoder.head.in_features, values)
        if decoder.depth:
            xavier(self.head)


def _pooled(tokens: torch.Tensor, side: int, pool: int) -> torch.Tensor:
    """Tokens (B, side², W) averaged over cells of pool·pool tokens: (B, (side/pool)², W)."""
    if pool == 1:
        return tokens
    cells = tokens.reshape(tokens.shape[0], side // pool, pool, side // pool, pool, tokens.shape[2])
    return cells.mean((2, 4)).flatten(1, 2)


def _chosen(tokens: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Tokens (B, S, W) at an index (B, S) into tokens (B, P², W); all of them without an index."""
    return tokens if index is None else tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
