"""What evaluate's Ray tasks do: read features of a part of a split, and evaluate a protocol on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch.nn import functional

from pipeline.config.load import validate
from pipeline.evaluation.features import tapped_of, with_tokens
from pipeline.models.encoder_source import EncoderSource
from pipeline.shards.shard_set import ShardSet
from wavemim.evaluation.features import Tapped, Taps, joined
from wavemim.evaluation.metrics import confusion
from wavemim.evaluation.protocols import (
    Evaluation,
    evaluate_attentive,
    evaluate_block,
    evaluate_few_labels,
    evaluate_knn,
    evaluate_linear,
    evaluate_rank,
)

PIXELS_SIDE = 32  # raw pixels are averaged to this side: a probe on more of them is slower and no better

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # float16 (n, T, E); labels (n,); places in the split (n,)
Evaluated = tuple[dict[str, float], np.ndarray | None]  # metrics; confusion matrix


def read_part(
    which: str,
    subject: EncoderSource,
    settings: dict[str, Any],
    shards_at: str,
    split: str,
    part: tuple[int, int],
    max_rows: int | None,
    *,
    blocks: bool,
    token_rows: int,
    pools: tuple[str, ...],
    use_gpu: bool,
) -> tuple[Tapped, Tokens | None]:
    """Read features of a part of a split, and its patch tokens with labels and places where `token_rows` > 0."""
    torch.set_num_threads(1)
    shards, device = ShardSet.open(shards_at, check_files=False), torch.device("cuda" if use_gpu else "cpu")
    found = tapped_of(
        Taps(_encoder(which, subject, device), blocks=blocks, tokens=token_rows > 0, pools=pools),
        subject.inputs(shards).to(device),
        shards,
        split,
        window=subject.image_size,
        batch=validate(settings).evaluate.batch,
        max_rows=max_rows,
        part=part,
        token_rows=token_rows,
    )
    if found.tokens is None:
        return found, None
    kept, places = with_tokens(shards, split, part, max_rows, token_rows)
    return replace(found, tokens=None), (found.tokens, found.labels[kept], places)


_last: dict[tuple[str, str, str], Any] = {}  # the encoder of this worker's last task, which may read several parts


def _encoder(which: str, subject: EncoderSource, device: torch.device) -> Any:
    if which == "pixels":
        side = min(PIXELS_SIDE, subject.image_size)
        return lambda images: functional.interpolate(images, size=(side, side), mode="area")
    key = (which, f"{subject.source} {subject.fingerprint} {subject.image_size} {subject.channels}", str(device))
    if key not in _last:
        _last.clear()
        model = subject.model() if which == "trained" else subject.beginning()
        _last[key] = model.to(device).eval()
    return _last[key]


def evaluate_features(
    protocol: str,
    block: int,
    settings: dict[str, Any],
    classes: int,
    places: dict[str, list[np.ndarray]],
    *parts: Tapped,
    pool: str = "",
) -> Evaluated:
    """Evaluate one protocol on all parts of train, then of val: on the features of a further `pool`, if one is named."""
    recipe, cut = validate(settings), len(places["train"])
    train = joined(parts[:cut], places["train"])
    if protocol == "rank":
        return evaluate_rank(train.final).values, None
    test = joined(parts[cut:], places["val"])
    own = recipe.evaluate
    fitted: dict[str, Any] = {
        "strengths": own.probe_strengths,
        "seed": recipe.seed,
        "max_iterations": own.probe_iterations,
    }
    found: Evaluation
    if pool:
        sets = train.pooled(pool), test.pooled(pool)
        if protocol == "linear":
            return evaluate_linear(*sets, pool=pool, **fitted).values, None
        return evaluate_knn(*sets, k=own.knn_k, curve=(), pool=pool).values, None
    if protocol == "linear":
        found = evaluate_linear(train.set, test.set, **fitted)
    elif protocol == "blocks":
        found = evaluate_block(train.block(block), test.block(block), number=block, **fitted)
    elif protocol == "knn":
        found = evaluate_knn(train.set, test.set, k=own.knn_k)
    else:
        assert protocol == "few_labels", protocol
        found = evaluate_few_labels(train.set, test.set, shares=own.few_shares, draws=own.few_draws, **fitted)
    if found.predicted is None or protocol == "blocks":
        return found.values, None
    return found.values, confusion(test.labels, found.predicted, classes)


def evaluate_tokens(
    settings: dict[str, Any],
    classes: int,
    use_gpu: bool,
    train: list[ray.ObjectRef],
    val: list[ray.ObjectRef],
    *_: Tapped,
) -> Evaluated:
    """Evaluate the attentive probe on tokens: those of train in memory together, those of val part by part."""
    torch.set_num_threads(1)
    recipe, labels = validate(settings), []
    own = recipe.evaluate
    tokens, fitted = _gathered(train, own.attentive_images)

    def test() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ref in val:
            part, part_labels, _ = ray.get(ref)
            labels.append(part_labels)
            yield part, part_labels

    found = evaluate_attentive(
        tokens,
        fitted,
        test(),
        lrs=own.attentive_lrs,
        epochs=own.attentive_epochs,
        batch=own.attentive_batch,
        seed=recipe.seed,
        device=torch.device("cuda" if use_gpu else "cpu"),
    )
    assert found.predicted is not None
    return found.values, confusion(np.concatenate(labels), found.predicted, classes)


def _gathered(refs: list[ray.ObjectRef], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Collect tokens and labels of at most `most` images from all parts, in the split's order, one part at a time."""
    tokens, labels = np.zeros((0, 0, 0), np.float16), np.zeros(most, np.int64)
    count = 0
    for ref in refs:
        part = ray.get(ref)
        if part is None:
            continue
        values, part_labels, places = part
        if not len(tokens):
            tokens = np.empty((most, *values.shape[1:]), np.float16)
        tokens[places], labels[places] = values, part_labels
        count += len(places)
    return tokens[:count], labels[:count]
