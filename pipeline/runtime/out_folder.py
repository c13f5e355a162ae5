"""Checks of the out folder before a stage begins: whether it can be used, and whether every node sees it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator

from pipeline.config.places import CACHE
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.retry import attempts
from pipeline.runtime.ray_session import SessionInfo
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import check_scheme

_PAUSES = (1.0, 2.0)  # seconds between looks at a local folder
_PATIENCE = 60.0  # seconds for the answers of all nodes; one that does not answer by then is not known to lack anything


def prepare_out(recipe: Recipe, say: Callable[[str], object] = print) -> None:
    """Check that a local out folder can be written, or one in a store be reached, and say what is on this machine only.

    Args:
        recipe: The settings.
        say: Called with a line.

    Raises:
        SettingError: The folder cannot be written; the store cannot be used, or denies access.
        StorageError: It does not answer.
    """
    if recipe.home is None:
        check_writable("out", Folder.at(recipe.out))
        return
    check_scheme(recipe.home)
    home = Folder.at(recipe.home)
    home.kind()
    try:
        recipe.local_out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"{recipe.local_out}: this machine's copy of out={home} cannot be written ({error.strerror or error}); name another "
            f"folder in the environment variable {CACHE}"
        ) from None
    copy = f"out={home}: this machine's copy is {recipe.local_out}"
    if recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        say(copy)
    else:
        say(f"{copy}, with MLflow's mlflow.db; wavemim sync {home} tracking.uri=URI sends its runs to a server")


def check_writable(what: str, folder: Folder) -> None:
    """Raise SettingError where a local folder cannot be written; one that does not exist is not left behind.

    Args:
        what: The setting that names it.
        folder: The folder.
    """
    if folder.local is not None:
        with _token(folder, what):
            pass


def check_nodes(recipe: Recipe, session: SessionInfo) -> None:
    """Check that all nodes that can run workers see the out folder, with one small task on each of them.

    Args:
        recipe: The settings.
        session: The running Ray.

    Raises:
        SettingError: A node does not see the folder, or may not read the store, or the folder cannot be written.
    """
    if session.private or session.nodes < 2:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with _token(Folder.at(recipe.out)) as (folder, token):
        task = ray.remote(num_cpus=0, max_retries=1)(_problem)
        asked = {}
        for node in ray.nodes():
            if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU")):
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[task.options(scheduling_strategy=there).remote(folder, token)] = node["NodeManagerAddress"]
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
        problems = {}
        for answer in ready:
            with contextlib.suppress(ray.exceptions.RayError):  # the node is gone
                if problem := ray.get(answer):
                    problems[asked[answer]] = problem
    if not problems:
        return
    where, problem = min(problems.items())
    others = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    if recipe.home is not None:
        raise SettingError(f"out={recipe.home} cannot be read on node {where}{others}: {problem}")
    raise SettingError(
        f"out={recipe.out} is not visible on node {where}{others}: use a folder that all nodes share, or out=s3://BUCKET/RUNS"
    )


@contextlib.contextmanager
def _token(folder: Folder, what: str = "out") -> Iterator[tuple[Folder, str]]:
    """A small file in the folder while the block runs; a local folder that did not exist is gone afterwards."""
    name = f".node-check-{uuid.uuid4().hex}"
    made = [] if folder.local is None else [path for path in (folder.local, *folder.local.parents) if not path.exists()]
    try:
        try:
            folder.write(name, b"")
        except FileNotFoundError:  # another command, which is checking the same folder, has just removed it again
            folder.write(name, b"")
    except OSError as error:
        raise SettingError(
            f"{what}={folder} cannot be written ({error.strerror or error}); give a folder in which files can be made"
        ) from None
    try:
        yield folder, name
    finally:
        folder.remove(name)
        for path in made:
            with contextlib.suppress(OSError):  # not empty any more
                path.rmdir()


def _problem(folder: Folder, token: str) -> str:
    """In a task: why the token cannot be read on this node; "" if it can."""
    try:
        if folder.local is None:
            folder.read(token)
            return ""
        if os.path.exists(folder.place(token)):
            return ""
        for attempt in attempts(_PAUSES):  # a network disk may remember an older state of the folder
            if attempt and folder.local.is_dir() and token in os.listdir(folder.local):
                return ""
        return "not there"
    except (OSError, StageError, SettingError) as error:
        return str(error)
