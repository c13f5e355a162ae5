"""Shared by the tests: a folder of small JPEGs, a private Ray, an MLflow store, and the distribution over processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_shards import smooth_texture
from xdist.scheduler import LoadScopeScheduling

from pipeline.runtime.ray_session import SessionInfo

# Tests often wait, so three processes of them share two cores, each with one thread. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set before Ray is imported: no token file in the home folder, no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers run at niceness 15: beside other tests they would get next to nothing, and the tests with Ray end last, alone.
os.environ.setdefault("RAY_worker_niceness", "0")
# Credentials of the object store that some tests start; Ray's workers inherit the environment of their start.
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


# Processes that tests start by the method "forkserver" share these imports, which take longer than what they do.
multiprocessing.set_forkserver_preload(["pipeline.training.pretrain_loop"])

_session = contextlib.ExitStack()  # the Ray of `ray_local`


# Files that start a Ray; those of a line run in one process. The first lines have only faults, which run in two processes,
# so that at most two Rays run at a time. They come first, as they take longest.
_WITH_RAY = (
    ("test_pretrain.py", "test_finetune_faults.py"),
    ("test_interrupts_faults.py",),
    ("test_home_faults.py",),
    ("test_secrets_faults.py",),
    ("test_stages.py", "test_specimens.py", "test_tune_search.py", "test_tune_engine.py", "test_tune_faults.py"),
    (
        "test_prepare.py",
        "test_finetune.py",
        "test_finetune_faults.py",
        "test_segmentation.py",
        "test_job_submit.py",
        "test_ray_session.py",
        "test_out_folder.py",
        "test_evaluate_pools.py",
        "test_benchmark_sweep.py",
        "test_unusual_machine.py",
    ),
)


class _Scheduling(LoadScopeScheduling):
    """Keeps the tests of a file in one process, and those of a line of `_WITH_RAY` too."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return next((files[0] for files in _WITH_RAY if file in files), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """xdist 3.8 loses the groups of ``--dist loadgroup`` with pytest 9.2, hence a scheduler."""
    return _Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray come first, and among these the ones that share a Ray."""
    order = [file for files in _WITH_RAY for file in files]
    if strangers := {item.path.name for item in items if item.get_closest_marker("ray")} - set(order):
        raise pytest.UsageError(
            f"{', '.join(sorted(strangers))}: starts a Ray; add it to _WITH_RAY in tests/conftest.py"
        )
    items.sort(
        key=lambda item: (
            item.get_closest_marker("ray") is None,
            not _shares_ray(item),
            order.index(item.path.name) if item.path.name in order else len(order),
        )
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the shared Ray, and restore the environment, before a test that does not use it."""
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
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store for tests that only need one to exist: making one takes seconds."""
    from pipeline.tracking import mlflow_client

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    mlflow_client.import_mlflow()
    mlflow_client.connect(uri, create=True)
    return uri


@pytest.fixture(scope="session")
def ray_local() -> Iterator[SessionInfo]:
    """A private Ray as the stages start it, shared by all tests of the process that use it."""
    from pipeline.config.settings import Cluster
    from pipeline.runtime.ray_session import ray_session

    with _session:
        yield _session.enter_context(ray_session(Cluster()))


@pytest.fixture(autouse=True)
def targets_of_other_tests() -> Iterator[None]:
    """Targets that a test registers are unknown to the next one, as is the file that they came from."""
    from wavemim import registry

    classes, origins, modules = dict(registry._classes), dict(registry._origins), set(sys.modules)
    yield
    if registry._classes != classes:
        for name in set(registry._classes) - set(classes):
            if registry._classes[name].__module__ not in modules:
                sys.modules.pop(registry._classes[name].__module__, None)
        for kept, before in ((registry._classes, classes), (registry._origins, origins)):
            new = set(kept) - set(before) - set(registry.BUILT_IN)
            for name in new:
                del kept[name]
