"""Inside a Ray job: places that would be lost with it, and the time it gets to save a checkpoint when it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable

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
    _refuse(recipe, lambda place: ray_internals.in_uploaded_folder(os.path.abspath(place)))


def check_absolute(recipe: Recipe) -> None:
    """Refuse relative paths, before a job is submitted.

    Raises:
        SettingError: Naming the first relative path.
    """
    _refuse(recipe, lambda place: not os.path.isabs(place))


def _refuse(recipe: Recipe, lost: Callable[[str], bool]) -> None:
    values = {key: _value(recipe, key) for key in _PLACES}
    if uri := recipe.tracking.uri:  # a SQLite file is created where it does not exist
        path = uri.partition(":///")[2] if uri.startswith("sqlite") else uri
        values["tracking.uri"] = path if path not in ("", ":memory:") else None
    for key, place in values.items():
        if place is None or place.startswith(("timm:", "databricks")) or is_remote(place):
            continue
        if lost(place):
            also = "" if key == "tracking.uri" else ", or a URL where the setting allows one"
            raise SettingError(
                f"{key}={place}: in a Ray job this path is in the job's own folder, which Ray deletes afterwards; give an "
                f"absolute path that all nodes of the cluster can access, such as /mnt/shared/NAME{also}"
            )


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
