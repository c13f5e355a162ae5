"""What tests share: a small folder of real JPEGs, and one lean Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import smooth_texture

# Before Ray is imported anywhere: no token file in the home folder, no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


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
