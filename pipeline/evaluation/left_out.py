"""What a segmentation did not measure: ignored pixels, classes without val pixels, what the crop removes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.images.plan import some_of


def counted(values: np.ndarray) -> str:
    """Number of pixels of each value of a mask (H, W), as JSON: {value: number}."""
    found, counts = np.unique(values, return_counts=True)
    return json.dumps(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def share_without(counts: Counter[int], classes: Collection[int]) -> float:
    """The share of pixels whose value is no class; `counts` are pixels by value."""
    return sum(count for value, count in counts.items() if value not in classes) / max(counts.total(), 1)


def left_out(result: Mapping[str, Any], ignore: Sequence[int]) -> str:
    """Sentences on what segment did not measure, each with its share.

    Args:
        result: The result of the stage `segment`; those of older versions do not say.
        ignore: The values that are left out, segment.ignore.
    """
    said = ""
    if missing := result.get("classes_without_val"):
        share = len(missing) / result["classes"]
        said += f" {share:.0%} of the classes have no pixel in val and no IoU: {some_of(missing)}."
    ignored = result.get("ignored_share", {})
    if any(ignored.values()):
        said += (
            f" Left out by segment.ignore={list(ignore)}: {ignored['val']:.1%} of the pixels of val and "
            f"{ignored['train']:.1%} of those of train."
        )
    if cropped := result.get("cropped_share"):
        said += f" {cropped:.1%} of an image on average lie outside the central square, and are not evaluated."
    return said
