"""Resizing photos, with Pillow as the other implementation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image
from tiny_shards import smooth_texture

from wavemim import upright

SIZES = [(375, 500, 256), (640, 427, 224), (33, 57, 48), (300, 300, 32), (1, 9, 16), (256, 256, 256), (7, 1, 1)]
needs_resizer = pytest.mark.skipif(upright.resizer is None, reason="needs cykooz.resizer")


def by_pillow(image: Image.Image, size: int) -> np.ndarray:
    box = upright.middle_square(*image.size)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


@needs_resizer
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_photos_are_resized_as_by_pillow(width: int, height: int, size: int, mode: str) -> None:
    """Fails with another kernel, without antialiasing, and where the square is off by half a pixel."""
    image = smooth_texture(np.random.default_rng(0), width, height).convert(mode)
    found, wanted = upright.resized_middle(image, size), by_pillow(image, size)
    assert found.shape == wanted.shape and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 3 and difference.mean() < 0.3


@needs_resizer
def test_edges_differ_from_pillow_in_few_pixels() -> None:
    """Black and white cells are the worst case: Pillow clips between its two passes."""
    cells = np.kron(np.random.default_rng(0).integers(0, 2, (40, 40)), np.ones((9, 9))) * 255
    image = Image.fromarray(cells.astype(np.uint8))
    difference = np.abs(upright.resized_middle(image, 224).astype(int) - by_pillow(image, 224))
    assert difference.mean() < 0.5 and np.quantile(difference, 0.99) <= 8


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_plain_image_keeps_its_value(value: int) -> None:
    image = Image.new("RGB", (101, 67), (value,) * 3)
    assert (upright.resized_middle(image, 32) == value).all()


def test_without_the_package_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upright, "resizer", None)
    image = smooth_texture(np.random.default_rng(1), 90, 60)
    np.testing.assert_array_equal(upright.resized_middle(image, 32), by_pillow(image, 32))


def test_threads_do_not_share_memory() -> None:
    images = [smooth_texture(np.random.default_rng(seed), 80, 50) for seed in range(4)]
    wanted = [upright.resized_middle(image, 40) for image in images]
    found: dict[int, list[np.ndarray]] = {}

    def resize(number: int) -> None:
        found[number] = [upright.resized_middle(images[number], 40) for _ in range(50)]

    threads = [threading.Thread(target=resize, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        for result in results:
            np.testing.assert_array_equal(result, wanted[number])
