"""What is noticed while images are decoded: values that fill little of their type's range, and what the crop removes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

NARROW = 1 / 16  # of the range of a type: less is hardly visible in 8 bits


class Observed:
    """Collects what is noticed of images, one after another; its `state` can be merged with others."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None  # of the current image: width and height in pixels
        self._span: tuple[float, float, float] | None = None  # of the current image: lowest, highest, largest possible
        self._pixels = self._kept = 0
        self._ranges: dict[str, list[float]] = {}  # largest possible value → images, narrow ones, their extremes

    @property
    def cropped(self) -> float:
        """The share of the current image outside its central square."""
        width, height = self.size or (1, 1)
        return 1 - min(width, height) ** 2 / (width * height)

    def values(self, bands: Sequence[np.ndarray], hidden: Sequence[np.ndarray | None], largest: float) -> None:
        """Note the values of an image whose range is that of its type.

        Args:
            bands: Arrays (H, W).
            hidden: Where each has no data, (H, W), bool; None for nowhere.
            largest: The largest value of the type.
        """
        shown = [band if out is None else band[~out] for band, out in zip(bands, hidden, strict=True)]
        self._span = float(min(b.min() for b in shown)), float(max(b.max() for b in shown)), largest

    def add(self, image: np.ndarray, *, mapped: bool) -> None:
        """Count the image that was decoded last.

        Args:
            image: Its pixels (C, S, S), uint8.
            mapped: Whether a value range is set: then the values are as they should be.
        """
        if self.size is not None:
            self._pixels += self.size[0] * self.size[1]
            self._kept += min(self.size) ** 2
        if not mapped:
            low, high, largest = self._span or _span(image)
            found = self._ranges.setdefault(f"{largest:g}", [0, 0, np.inf, -np.inf])
            found[0] += 1
            if high - low < NARROW * largest:
                found[1:] = [found[1] + 1, min(found[2], low), max(found[3], high)]
        self.size = self._span = None

    def state(self) -> dict[str, Any]:
        """Everything as JSON values."""
        ranges = {key: values if values[1] else values[:2] for key, values in self._ranges.items()}
        return {"pixels": self._pixels, "kept_pixels": self._kept, "ranges": ranges}


def _span(image: np.ndarray) -> tuple[float, float, float]:
    """Lowest and highest value of 8-bit pixels, or of some of them if these already span enough; and the largest possible."""
    for pixels in (image[..., ::16, ::16], image):
        low, high = float(pixels.min()), float(pixels.max())
        if high - low >= NARROW * 255:
            break
    return low, high, 255.0


def cropped_share(states: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of all pixels that lies outside the central squares; None if that is not known."""
    pixels, kept = 0, 0
    for state in states:
        pixels, kept = pixels + state["pixels"], kept + state["kept_pixels"]
    return 1 - kept / pixels if pixels else None


def narrow_values(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """Notes on types of which most images fill less than a sixteenth of the range, with the setting that helps."""
    totals: dict[str, list[list[float]]] = {}
    for state in states:
        for largest, values in state["ranges"].items():
            totals.setdefault(largest, []).append(values)
    notes = []
    for largest, parts in totals.items():
        images, narrow = sum(part[0] for part in parts), sum(part[1] for part in parts)
        spans = [part[2:] for part in parts if part[1]]
        if 2 * narrow < images or not spans:
            continue
        low, high = min(0, *(span[0] for span in spans)), max(span[1] for span in spans)
        if min(span[0] for span in spans) > float(largest) / 4:  # far from zero: a range of its own
            low = min(span[0] for span in spans)
        if low == high:
            notes.append(
                f"{narrow:,.0f} of {images:,.0f} images have the value {high:g} in every pixel: check the files"
            )
        elif high - low < NARROW * float(largest):
            notes.append(
                f"the values of {narrow:,.0f} of {images:,.0f} images reach {high:g} of {largest} and fill less than a "
                f"sixteenth of the range: nearly black or flat; set data.value_range=[{low:g}, {high:g}]"
            )
    return notes
