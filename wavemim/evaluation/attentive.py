"""The attentive probe: a classifier on frozen tokens of the last block that learns which of them to attend to.

The form of V-JEPA (Bardes et al. 2024): one cross-attention block with a single learned query, its MLP with a residual
connection, and a linear layer. It is timm's ``AttentionPoolLatent`` behind a norm. V-JEPA adds the query to what it
gathered; timm's block does not, which is the same up to the bias of its projection. CAE (Chen et al. 2022) introduced
such probes for masked image modelling; AIM's has no MLP.

Legend: B images of a batch, n images in all, T tokens, E embedding width, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional

from wavemim.evaluation.probes import held_out

HEAD_WIDTH, WARMUP = 64, 0.1  # channels of a head; share of the steps


class AttentiveClassifier(nn.Module):
    """Classifies tokens (B, T, E): norm, attention pooling, linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        """Create the classifier; its heads have about 64 channels.

        Args:
            width: E.
            classes: c.
        """
        super().__init__()
        near = max(1, round(width / HEAD_WIDTH))
        heads = next(heads for heads in range(near, 0, -1) if width % heads == 0)
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pool.latent, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (B, c) of tokens (B, T, E)."""
        return self.head(self.pool(self.norm(tokens)))


@dataclass(frozen=True)
class AttentiveProbe:
    """A trained attentive probe.

    Attributes:
        classifier: The classifier, on the device it was trained on.
        lr: The learning rate that was chosen.
        held_out: Its accuracy on the held-out part of the training images, in percent; NaN if only one was given.
        loss: Mean cross-entropy of the last epoch.
    """

    classifier: AttentiveClassifier
    lr: float
    held_out: float
    loss: float

    def predict(self, tokens: np.ndarray, batch: int = 256) -> np.ndarray:
        """Predict classes (n,) of tokens (n, T, E), `batch` images at a time."""
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
    """Train an attentive probe with AdamW.

    The learning rate rises linearly over the first tenth of the steps and then falls to 0 along a cosine. Of several
    `lrs`, the one with the best accuracy on a held-out fifth of the images is chosen (the smallest of equals), and the
    probe is trained again with it on all images.

    Args:
        tokens: Frozen tokens (n, T, E), float16 or float32 in host memory.
        labels: Classes (n,).
        lrs: Peak learning rates to choose from.
        epochs: Passes over the images.
        seed: Decides the initial weights, the order of the images and the held-out part.
        device: The device to train on.
        batch: Images per step, at most.
        weight_decay: Weight decay of matrices; biases, norms and the query have none.
        classes: c; by default one more than the largest label.

    Returns:
        The trained probe.
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
    """Train a classifier on the `chosen` images; return it and the mean loss of its last epoch."""
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
    schedule, order = _schedule(optimizer, epochs * per_epoch), np.random.default_rng(seed)
    losses: list[torch.Tensor] = []
    for epoch in range(epochs):
        shuffled, losses = order.permutation(chosen), []
        for number, part in enumerate(np.array_split(shuffled, per_epoch)):
            schedule.step_update(epoch * per_epoch + number + 1)  # the first step must not have a rate of 0
            loss = functional.cross_entropy(
                classifier(_on(tokens, part, device)), torch.from_numpy(labels[part]).long().to(device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return classifier.eval(), float(torch.stack(losses).mean())


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> CosineLRScheduler:
    """Linear warm-up to the full rate, then a cosine that would reach 0 one step after the last."""
    warmup = max(1, round(WARMUP * steps))
    return CosineLRScheduler(
        optimizer, t_initial=steps - warmup + 1, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )


@torch.inference_mode()
def _predict(classifier: nn.Module, tokens: np.ndarray, chosen: np.ndarray, batch: int) -> np.ndarray:
    device = next(classifier.parameters()).device
    parts: Iterable[np.ndarray] = (chosen[i : i + batch] for i in range(0, len(chosen), batch))
    found = [classifier(_on(tokens, part, device)).argmax(1).cpu().numpy() for part in parts]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _on(tokens: np.ndarray, chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(tokens[chosen]).to(device).float()
