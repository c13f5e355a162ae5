"""Inside a Ray job: places that would be lost with it, and the time it gets to save a checkpoint when it is stopped."""

from __future__ import annotations

import contextlib
import json
import os

from pipeline.config.recipe import BEHAVIOURS, Recipe
from pipeline.errors import SettingError
from pipeline.runtime import interrupts, ray_internals
from pipeline.storage.object_stores import is_remote

# Files that may come with a job: they are only read, and by their content or name they mean the same in another job.
_SENT = frozenset({"target.module", "encoder.pretrained"})
_PLACES = tuple(key for key, behaviour in BEHAVIOURS.items() if behaviour.place and key not in _SENT)
STOP_SECONDS = int(interrupts.LONGEST) + 10


def check_places(recipe: Recipe) -> None:
    """In a Ray job with an uploaded folder, refuse paths that lie in it: Ray deletes it when the job has ended.

    Raises:
        SettingError: Naming the first such path.
    """
    for key, place in _places(recipe).items():
        check_kept(f"{key}={place}", place, url=key != "tracking.uri")
    if not recipe.tracking.uri:
        check_tracking("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", "").strip())


def check_absolute(recipe: Recipe) -> None:
    """Refuse relative paths, before a job is submitted.

    Raises:
        SettingError: Naming the first relative path.
    """
    for key, place in _places(recipe).items():
        if not os.path.isabs(place):
            raise _lost(f"{key}={place}", url=key != "tracking.uri")


def check_kept(what: str, place: str, *, url: bool) -> None:
    """In a Ray job with an uploaded folder, refuse a path that lies in it.

    Args:
        what: What the message begins with, such as ``out=…``.
        place: The path or URL.
        url: Whether it may be a URL.

    Raises:
        SettingError: Naming the path.
    """
    if not is_remote(place) and ray_internals.in_uploaded_folder(os.path.abspath(os.path.expanduser(place))):
        raise _lost(what, url=url)


def check_tracking(name: str, uri: str) -> None:
    """As `check_kept`, for the URI of an MLflow store, which may be a file, under the name of its setting."""
    if place := _store_path(uri):
        check_kept(f"{name}={place}", place, url=False)


def _lost(what: str, *, url: bool) -> SettingError:
    return SettingError(
        f"{what}: in a Ray job this path is in the job's own folder, which Ray deletes afterwards; give an "
        "absolute path that all nodes of the cluster can access, such as /mnt/shared/NAME"
        f"{', or a URL where the setting allows one' if url else ''}"
    )


def _places(recipe: Recipe) -> dict[str, str]:
    """The local paths among the settings, with ~ expanded."""
    values = {key: _value(recipe, key) for key in _PLACES}
    if recipe.tracking.uri:  # a SQLite file is created where it does not exist
        values["tracking.uri"] = _store_path(recipe.tracking.uri)
    return {
        key: place
        for key, place in values.items()
        if place is not None and not place.startswith("timm:") and not is_remote(place)
    }


def _store_path(uri: str) -> str | None:
    """The path of an MLflow store on a disk."""
    path = uri.partition(":///")[2] if uri.startswith("sqlite") else uri
    return None if path in ("", ":memory:") or path.startswith("databricks") or is_remote(path) else path


def _value(recipe: Recipe, key: str) -> str | None:
    value: object = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return os.path.expanduser(value) if isinstance(value, str) else None


def submission_id() -> str | None:
    """The ID of the Ray job whose command this process is; None outside of a job."""
    with contextlib.suppress(ValueError, AttributeError):
        config = json.loads(os.environ.get(ray_internals.JOB_CONFIG, "{}"))
        return (config.get("metadata") or {}).get("job_submission_id")
    return None


def wait_for_checkpoint_on_stop() -> None:
    """Give this job `STOP_SECONDS` to end when it is stopped; otherwise Ray kills it 3 seconds after SIGTERM.

    A value of RAY_JOB_STOP_WAIT_TIME_S that the user has set, for the cluster or in the job's runtime environment, stays.
    Does nothing outside of a job. Call it after connecting to Ray.
    """
    if job := submission_id():
        ray_internals.set_stop_wait(job, STOP_SECONDS)
