"""What tests share: a small folder of real JPEGs, a lean Ray, and how they are spread over processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_shards import smooth_texture
from xdist.scheduler import LoadScopeScheduling

from pipeline.runtime.ray_session import SessionInfo

# Three processes of tests on two cores, since many of them wait: each computes on one. Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray is imported anywhere: no token file in the home folder, no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of the object store that some tests start; Ray's workers have the environment of their start.
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


_session = contextlib.ExitStack()  # the Ray of `ray_local`


# Files that start a Ray; each line is one process's work, so that there are two of them at a time. They come first,
# since they take longest.
_WITH_RAY = (
    ("test_stages.py", "test_prepare.py", "test_specimens.py"),  # they share one
    ("test_pretrain.py", "test_job_submit.py", "test_ray_session.py", "test_finetune.py", "test_segmentation.py"),
)


class _Scheduling(LoadScopeScheduling):
    """Files stay whole, and those of a line of `_WITH_RAY` together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return next((files[0] for files in _WITH_RAY if file in files), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Groups by mark (``--dist loadgroup``) are lost in xdist 3.8 with pytest 9.2."""
    return _Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a Ray first, of these those that share one; what needs none waits for no Ray's end."""
    order = [file for files in _WITH_RAY for file in files]
    items.sort(
        key=lambda item: (
            item.get_closest_marker("ray") is None,
            not _shares_ray(item),
            order.index(item.path.name) if item.path.name in order else len(order),
        )
    )


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
    from pipeline.config.settings import Cluster
    from pipeline.runtime.ray_session import ray_session

    with _session:
        yield _session.enter_context(ray_session(Cluster()))
