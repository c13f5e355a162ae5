"""What tests share: a small folder of real JPEGs, a lean Ray, and how they are spread over two processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import smooth_texture

from pipeline.session import SessionInfo

# Two processes of tests on two cores: each computes on one. Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray is imported anywhere: no token file in the home folder, no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of the object store that some tests start; Ray's workers have the environment of their start.
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole, and all that starts a Ray is one process's work, which begins with it: it takes longest."""
    for item in items:
        ray = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if ray else item.path.name))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


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


@pytest.fixture(scope="module")
def ray_local() -> Iterator[SessionInfo]:
    """A private Ray for the tests of a file, as the stages start it: ended before other files start theirs."""
    from pipeline.session import ray_session
    from pipeline.settings import Cluster

    with ray_session(Cluster()) as session:
        yield session
