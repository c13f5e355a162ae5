"""What tests share: a small folder of real JPEGs, and one lean Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before Ray is imported anywhere: no token file in the home folder, no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def smooth_texture(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random picture with a photo's smoothness: noise at three scales, (H, W, 3) uint8."""
    total = np.zeros((height, width, 3))
    for cells, strength in ((3, 80.0), (10, 40.0), (40, 12.0)):
        noise = generator.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        bands = [Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(band) for band in bands], -1)
    return Image.fromarray(np.clip(total + generator.uniform(60, 190, 3), 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 40 JPEGs of 96 × 80 pixels: a labelled folder, ``CLASS/NN.jpg``."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("bark", "moss", "sand"):
        (root / name).mkdir()
        for number in range(40):
            smooth_texture(generator, 96, 80).save(root / name / f"{number:02d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of two CPUs for the whole session, without a dashboard. What is initialised already is left alone."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(num_cpus=2, object_store_memory=int(300e6), include_dashboard=False, log_to_driver=False)
    yield
    if mine:
        ray.shutdown()
