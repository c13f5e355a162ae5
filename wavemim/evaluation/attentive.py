"""The attentive probe: a classifier that learns where to look, on frozen tokens of the last block.

The form of V-JEPA (Bardes et al. 2024): one cross-attention block whose only query is learned. The query attends to the
normalised tokens, is added to what it gathered, goes through an MLP with a residual connection, and a linear layer
classifies it. CAE (Chen et al. 2022) introduced such probes for masked image modelling; AIM's has no MLP.

Legend: B images, n all of them, T tokens, E embedding width, c classes, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from wavemim.evaluation.probes import held_out

MLP_RATIO, HEAD_WIDTH, WARMUP = 4, 64, 0.1  # of widths; channels of a head; share of the steps


class AttentiveClassifier(nn.Module):
    """Tokens (B, T, E) → logits (B, c)."""

    def __init__(self, width: int, classes: int) -> None:
        """Heads of about 64 channels."""
        super().__init__()
        near = max(1, round(width / HEAD_WIDTH))
        self.heads = next(heads for heads in range(near, 0, -1) if width % heads == 0)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm_tokens, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))
        self.head = nn.Linear(width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, c) of tokens (B, T, E)."""
        b, t, width = tokens.shape
        key, value = self.kv(self.norm_tokens(tokens)).reshape(b, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = self.q(self.query).reshape(1, 1, self.heads, -1).transpose(1, 2).expand(b, -1, -1, -1)  # (B, h, 1, E/h)
        gathered = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, 1, width)
        pooled = self.query + self.out(gathered)
        return self.head((pooled + self.mlp(self.norm(pooled)))[:, 0])


@dataclass(frozen=True)
class AttentiveProbe:
    """A trained attentive probe."""

    classifier: AttentiveClassifier  # on the device it was trained on
    lr: float  # the learning rate that was chosen
    held_out: float  # its accuracy on the held-out part of train, percent; NaN where there was one rate only
    loss: float  # mean cross-entropy of the last epoch

    def predict(self, tokens: np.ndarray, batch: int = 256) -> np.ndarray:
        """Classes (n,) of tokens (n, T, E)."""
        return _predict(self.classifier, tokens, np.arange(len(tokens)), batch)


def fit_attentive(
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    lrs: Sequence[float],
    epochs: int,
    seed: int,
    device: torch.device,
    batch: int = 256,
    weight_decay: float = 0.05,
    classes: int | None = None,
) -> AttentiveProbe:
    """Train on frozen tokens (n, T, E), float16 or float32 in host memory, and labels (n,), by AdamW.

    The learning rate rises over the first tenth of the steps and falls to 0 along a cosine. Of several `lrs` the best
    on a held-out fifth of the images is taken, the smaller one of equals, and trained anew on all of them.
    """
    everything, best, score = np.arange(len(labels)), lrs[0], float("nan")
    train = partial(
        _train,
        tokens,
        labels,
        epochs=epochs,
        seed=seed,
        device=device,
        batch=batch,
        weight_decay=weight_decay,
        classes=classes or int(labels.max()) + 1,
    )
    if len(lrs) > 1 and len(labels) > 1:
        out = held_out(len(labels), seed)
        scores = []
        for lr in lrs:
            classifier, _ = train(everything[~out], lr=lr)
            right = _predict(classifier, tokens, everything[out], batch) == labels[out]
            scores.append((100 * float(right.mean()), -lr))
        score, best = max(scores)[0], -max(scores)[1]
    classifier, loss = train(everything, lr=best)
    return AttentiveProbe(classifier, float(best), score, loss)


def _train(
    tokens: np.ndarray,
    labels: np.ndarray,
    chosen: np.ndarray,
    *,
    lr: float,
    epochs: int,
    seed: int,
    device: torch.device,
    batch: int,
    weight_decay: float,
    classes: int,
) -> tuple[AttentiveClassifier, float]:
    """A classifier trained on the `chosen` images, and the mean loss of its last epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = AttentiveClassifier(tokens.shape[2], classes).to(device).train()
    decayed = [p for p in classifier.parameters() if p.ndim == 2]
    plain = [p for p in classifier.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.999),
    )
    batch = min(batch, len(chosen))
    per_epoch = math.ceil(len(chosen) / batch)
    total, order = epochs * per_epoch, np.random.default_rng(seed)
    losses: list[torch.Tensor] = []
    for epoch in range(epochs):
        shuffled, losses = order.permutation(chosen), []
        for number, part in enumerate(np.array_split(shuffled, per_epoch)):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(epoch * per_epoch + number, total)
            loss = functional.cross_entropy(
                classifier(_on(tokens, part, device)), torch.from_numpy(labels[part]).long().to(device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return classifier.eval(), float(torch.stack(losses).mean())


def _schedule(step: int, total: int) -> float:
    """Share of the learning rate: up over the warm-up, then down a cosine."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.inference_mode()
def _predict(classifier: nn.Module, tokens: np.ndarray, chosen: np.ndarray, batch: int) -> np.ndarray:
    device = next(classifier.parameters()).device
    parts: Iterable[np.ndarray] = (chosen[i : i + batch] for i in range(0, len(chosen), batch))
    found = [classifier(_on(tokens, part, device)).argmax(1).cpu().numpy() for part in parts]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _on(tokens: np.ndarray, chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(tokens[chosen]).to(device).float()
