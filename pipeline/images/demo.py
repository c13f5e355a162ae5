"""Demo images: a small labelled data set that is drawn rather than downloaded.

A class is a shape filled with a texture ("disc-stripes"). Colours, position, size, rotation, brightness, clutter and
noise are random and independent of the class: it cannot be recognised by the mean colour, and hardly by raw pixels. The
textures have periods of 6 to 14 pixels, which the middle wavelet levels represent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.errors import SettingError
from wavemim.atomic import new_folder

VERSION = 1
MARK = ".demo-images.json"  # hidden: not one of the images
_EARLIER_MARK = "demo-images.json"  # of folders that were written before that
QUALITY = 92
_SPLITS = ("train", "val")

# (y, x) → values, float arrays of one shape; for shapes in units of the radius
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


# Negative inside. The areas are similar, so that the amount of foreground says little about the shape.
SHAPES: dict[str, Field] = {
    "disc": lambda y, x: np.hypot(y, x) - 0.82,
    "cross": lambda y, x: np.maximum(np.minimum(np.abs(y), np.abs(x)) - 0.32, np.maximum(np.abs(y), np.abs(x)) - 1.0),
}
# Phases in radians → values, positive for the light colour.
TEXTURES: dict[str, Field] = {
    "stripes": lambda v, u: np.sin(u),
    "checks": lambda v, u: np.sin(u) * np.sin(v) * 1.6,
    "dots": lambda v, u: (np.cos(u) + np.cos(v)) * 1.5 - 0.7,
    "waves": lambda v, u: np.sin(u + 1.8 * np.sin(v * 0.6)),
    "plain": lambda v, u: np.ones_like(u),
}
CLASSES: tuple[str, ...] = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)


def write_demo_images(
    folder: Path, *, train: int = 2000, val: int = 500, size: int = 64, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Write ``folder/{train,val}/CLASS/00000.jpg``. A repeated call does nothing. No incomplete folder is left behind.

    Args:
        folder: The folder to write; it must not exist, unless it holds these images.
        train: Number of train images.
        val: Number of val images.
        size: Side of the images in pixels.
        seed: Seed of the images.
        progress: Whether to show a progress bar.

    Returns:
        The settings of the data set.

    Raises:
        SettingError: The folder holds something else.
    """
    settings = {
        "version": VERSION,
        "train": train,
        "val": val,
        "size": size,
        "seed": seed,
        "classes": list(CLASSES),
    }
    folder = folder.absolute()
    if folder.exists():
        if _settings_in(folder) == settings:
            return settings
        raise SettingError(f"{folder} exists and does not hold these demo images; remove it or give another out=")
    with new_folder(folder, replace=False) as partial:
        with tqdm(total=train + val, desc="demo images", unit=" images", disable=not progress) as bar:
            for split, count in zip(_SPLITS, (train, val), strict=True):
                _write_split(partial / split, split, count, size, seed, bar)
        (partial / MARK).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return settings


def draw(class_index: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one image (size, size, 3), uint8, of a class."""
    shape, texture = divmod(class_index, len(TEXTURES))
    side = np.arange(size, dtype=np.float32) + 0.5
    y, x = side[:, None] * (64 / size), side[None, :] * (64 / size)  # lengths below are those of a 64-pixel image
    background, light, dark = _colours(rng)
    image = background + _shading(y, x, rng)[..., None]
    for _ in range(rng.integers(0, 3)):
        image = _clutter(image, y, x, rng)
    radius = rng.uniform(20, 27)
    centre_y, centre_x = 32 + rng.uniform(-8, 8, 2)
    inside = _coverage(list(SHAPES.values())[shape], y - centre_y, x - centre_x, radius, rng)
    cells = _texture(list(TEXTURES.values())[texture], y, x, rng)
    filling = dark + (light - dark) * cells[..., None]
    image = image + (filling - image) * inside[..., None]
    image = image * rng.uniform(0.75, 1.2) + rng.normal(0, rng.uniform(2, 5), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _rotated(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(-0.5, 0.5)
    return np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x


def _coverage(shape: Field, y: np.ndarray, x: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Share of each pixel that the shape covers, 0 to 1, with edges one pixel wide."""
    y, x = _rotated(y / radius, x / radius, rng)
    return np.clip(0.5 - shape(y, x) * radius, 0, 1)


def _texture(texture: Field, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(6, 14)
    v, u = _rotated(y * (2 * np.pi / period), x * (2 * np.pi / period), rng)
    phase_v, phase_u = rng.uniform(0, 2 * np.pi, 2)
    return np.clip(0.5 + 1.2 * texture(v + phase_v, u + phase_u), 0, 1)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The background and the two colours of the texture, which have some contrast."""
    background = rng.uniform(30, 225, 3)
    middle, contrast = rng.uniform(80, 175, 3), rng.uniform(35, 75, 3) * rng.choice([-1.0, 1.0], 3)
    return background, middle + contrast, middle - contrast


def _shading(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A brightness gradient, and a wave with a longer period than that of any texture."""
    v, u = _rotated(y - 32, x - 32, rng)
    return rng.uniform(-0.6, 0.6) * v + rng.uniform(0, 18) * np.sin(u * (2 * np.pi / rng.uniform(24, 48)))


def _clutter(image: np.ndarray, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a small plain or textured patch behind the shape: a texture or an edge by itself is not the class."""
    radius = rng.uniform(4, 9)
    centre_y, centre_x = rng.uniform(0, 64, 2)
    shape = list(SHAPES.values())[rng.integers(len(SHAPES))]
    inside = _coverage(shape, y - centre_y, x - centre_x, radius, rng)
    _, light, dark = _colours(rng)
    colour: np.ndarray = light
    if rng.random() < 0.3:
        texture = list(TEXTURES.values())[rng.integers(len(TEXTURES))]
        colour = dark + (light - dark) * _texture(texture, y, x, rng)[..., None]
    return image + (colour - image) * inside[..., None]


def _write_split(folder: Path, split: str, count: int, size: int, seed: int, bar: tqdm) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for index in range(count):
        label, number = index % len(CLASSES), index // len(CLASSES)
        # depends only on (seed, split, index): a larger set begins with the smaller one
        rng = np.random.default_rng([seed, _SPLITS.index(split), index])
        path = folder / CLASSES[label] / f"{number:05d}.jpg"
        Image.fromarray(draw(label, size, rng)).save(path, quality=QUALITY)
        bar.update()


def _settings_in(folder: Path) -> Any:
    mark = folder / MARK
    try:
        return json.loads((mark if mark.exists() else folder / _EARLIER_MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
