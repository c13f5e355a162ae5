"""What tests share: a small folder of real JPEGs, a lean Ray, and how they are spread over processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import smooth_texture

from pipeline.session import SessionInfo

# Three processes of tests on two cores, since many of them wait: each computes on one. Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray is imported anywhere: no token file in the home folder, no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of the object store that some tests start; Ray's workers have the environment of their start.
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


_session = contextlib.ExitStack()  # the Ray of `ray_local`


@pytest.hookimpl(wrapper=True)  # before xdist puts the groups into the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Files stay whole. What starts a Ray is the work of two processes, which begin with it, since it takes longest: what
    shares one, and what starts its own."""
    for item in items:
        group = "shared ray" if _shares_ray(item) else "own ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, not _shares_ray(item)))
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The shared Ray, and what it needs in the environment, is gone before a test that does not use it."""
    if not _shares_ray(item):
        _session.close()


def _shares_ray(item: pytest.Item) -> bool:
    return "ray_local" in getattr(item, "fixturenames", ())


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
def ray_local() -> Iterator[SessionInfo]:
    """A private Ray as the stages start it, for all tests that ask for it."""
    from pipeline.session import ray_session
    from pipeline.settings import Cluster

    with _session:
        yield _session.enter_context(ray_session(Cluster()))
