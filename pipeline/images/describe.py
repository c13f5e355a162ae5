"""What was found in a source of images, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.places import printable
from pipeline.images.plan import ImagePlan, some_of

SPLITS = ("train", "val")
_MOST_KINDS = 6  # of what was left out


def found_in(plan: ImagePlan) -> str:
    """One sentence on a plan: splits and where from, classes, images in the smallest, what was left out and why."""
    parts = [plan.layout]
    if plan.classes:
        parts.append(_smallest(plan))
    if plan.left_out:
        kinds = sorted(plan.left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        shown = [_number_of(count, kind) for kind, count in kinds[:_MOST_KINDS]]
        rest = sum(count for _, count in kinds[_MOST_KINDS:])
        parts.append("left out: " + ", ".join([*shown, *([f"{rest:,} others"] if rest else [])]))
    return printable("; ".join(parts))


def _number_of(count: int, kind: str) -> str:
    shown = kind if count > 1 else re.sub("(file|image|mask)s", r"\1", kind, count=1)
    return f"{count:,} {shown}"


def without_images(plan: ImagePlan, rejects: Iterable[tuple[str, str]]) -> list[str]:
    """Notes on classes that lost all of their images of a split: all were rejected.

    Args:
        plan: The plan, in which each class has images.
        rejects: Path and reason of all rejected inputs.
    """
    if not plan.classes:
        return []
    paths = pa.array([path for path, _ in rejects], pa.string())
    notes = []
    for split in SPLITS:
        label = plan.splits[split]["label"].to_numpy()
        before = np.bincount(label, minlength=len(plan.classes))
        lost = np.zeros(len(plan.classes), int)
        if len(paths):
            np.add.at(lost, label[pc.is_in(plan.splits[split]["path"], paths).to_numpy()], 1)
        gone = [plan.classes[number] for number in np.flatnonzero((before > 0) & (lost == before))]
        if gone:
            notes.append(f"every image of {some_of(gone)} in {split} is rejected")
    return notes


def without_val(plan: ImagePlan) -> list[str]:
    """A note on classes of which val has no image, if it has others."""
    counts = class_counts(plan)
    if not plan.classes or not counts["val"].any():
        return []
    missing = [name for name, count in zip(plan.classes, counts["val"], strict=True) if not count]
    share = len(missing) / len(plan.classes)
    return [f"{share:.0%} of the classes have no image in val: {some_of(missing)}"] if missing else []


def class_counts(plan: ImagePlan) -> Mapping[str, np.ndarray]:
    """Images of each class (c,) in each split, as planned."""
    size = len(plan.classes or ())
    labels = {split: plan.splits[split]["label"].to_numpy() for split in SPLITS}
    return {split: np.bincount(found[found >= 0], minlength=size) for split, found in labels.items()}


def _smallest(plan: ImagePlan) -> str:
    classes = plan.classes or []
    train = class_counts(plan)["train"]
    least = int(train.argmin())
    return f"{train[least]:,} {'image' if train[least] == 1 else 'images'} of train in the smallest ({classes[least]})"
