"""Parts of a trial under population-based training: the checkpoint at which a part begins and the one at which it ends.

A part ends at a rung with a checkpoint of training, which is kept aside under the number of the rung. The next part begins
at this checkpoint, or at a copy of the one that another trial, the donor, keeps of the same rung.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.checkpoints.find import name_of
from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.storage.folder import Folder
from pipeline.storage.mirror import Mirror, pushing
from pipeline.sweeps.trials import Fork, trial_name
from wavemim.atomic import new_folder
from wavemim.weights import checkpoint

TRIALS = "trials"  # in the stage's folder: a folder per trial with what it logged
STOPPED = "stopped"  # file in a trial's folder: the scheduler has stopped it
CHECKPOINTS = "checkpoints"  # in a trial's folder until it is known how the trial ended
KEPT = "rung_checkpoints"  # in a trial's folder, until the search has ended: its checkpoints at rungs


@dataclass(frozen=True)
class Part:
    """What of a trial is to be run.

    Attributes:
        begin: The rung at which it begins; 0: the start of training.
        pause: The rung at which it ends; None: the end of training.
        forks: The forks of the trial so far.
    """

    begin: int = 0
    pause: int | None = None
    forks: tuple[Fork, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a trial's configuration; the whole trial if it says nothing."""
        forks = tuple(Fork(**fork) for fork in config.get("forks", ()))
        return cls(config.get("begin", 0), config.get("pause"), forks)

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole trial."""
        return self.begin == 0 and self.pause is None

    @property
    def donor(self) -> int | None:
        """Number of the trial from whose checkpoint it begins; None: from its own."""
        return next((fork.donor for fork in self.forks if fork.rung == self.begin), None)


def folder_of(logs: Path, number: int) -> Path:
    """The folder of a trial."""
    return logs / f"{number:04d}"


def home_of(recipe: Recipe, number: int) -> Folder | None:
    """A trial's folder in the store, if the sweep's out folder is in one."""
    home = recipe.stage_home("tune")
    return None if home is None else Folder.at(home).sub(f"{TRIALS}/{number:04d}")


@contextlib.contextmanager
def trial_folder(recipe: Recipe, logs: Path, number: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder in which a trial works while the block runs.

    Where the sweep's out folder is in a store, that is a copy on the trial's own node of the trial's folder in the store: it
    is fetched first, copied there while the trial runs, and removed at its end.

    Args:
        recipe: That of the sweep.
        logs: The folder of all trials, which all nodes share unless the out folder is in a store.
        number: The trial's number.

    Yields:
        The folder, and a function that copies what is new in it to the store before it returns; a failure is only a warning.
        To be called before each report: a scheduler may then end the trial's process at once.

    Raises:
        OSError: The store does not answer: the trial is to be begun again.
    """
    place = home_of(recipe, number)
    if place is None:
        yield folder_of(logs, number), lambda: None
        return
    folder = folder_of(recipe.stage_dir("tune") / TRIALS, number)
    mirror = Mirror(place, folder)

    def save() -> None:
        mirror.wake()
        mirror.attempt()

    with _as_disk_errors():
        mirror.pull()
    with pushing(mirror):
        yield folder, save
    with _as_disk_errors():
        mirror.finish()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _as_disk_errors() -> Iterator[None]:
    try:
        yield
    except (StageError, SettingError) as error:
        raise OSError(str(error)) from None


def was_stopped(folder: Path, place: Folder | None) -> bool:
    """Whether the scheduler has stopped a trial, by its folder or by that in the store."""
    with contextlib.suppress(StageError, SettingError):
        return (folder / STOPPED).exists() or (place is not None and place.kind(STOPPED) is not None)
    return False


def note_stopped(logs: Path, number: int, place: Folder | None) -> None:
    """Note that the scheduler stops a trial, before it does."""
    folder = folder_of(logs, number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOPPED).touch()
    if place is not None:
        with contextlib.suppress(StageError, SettingError):  # its run in MLflow then ends as KILLED with the sweep
            place.write(STOPPED, b"")


def remove_checkpoints(logs: Path, number: int, place: Folder | None) -> None:
    """Remove the checkpoints of a trial that has ended."""
    shutil.rmtree(folder_of(logs, number) / CHECKPOINTS, ignore_errors=True)
    if place is not None:
        with contextlib.suppress(StageError, SettingError):  # they are only in the way
            place.drop(CHECKPOINTS)


def starting_checkpoint(logs: Path, number: int, part: Part) -> Path | None:
    """The checkpoint from which a trial goes on; None: it begins at the start of training.

    Checkpoints of earlier rungs are removed: once this part has begun, every trial has reached the rung at which it begins.

    Args:
        logs: Folder with the folders of the trials.
        number: The trial's number.
        part: What of it is to be run.

    Raises:
        CheckpointError: There is no complete checkpoint of the rung at which the part begins.
    """
    folder = folder_of(logs, number)
    if part.pause is not None and (done := folder / KEPT / str(part.pause)).exists():
        return done
    for kept in (folder / KEPT).glob("*"):
        if int(kept.name) < part.begin:
            shutil.rmtree(kept, ignore_errors=True)
    latest = checkpoint.latest(folder / CHECKPOINTS)  # of this part, since what an earlier one ended with is kept aside
    if latest is not None or part.begin == 0:
        return latest
    own = folder / KEPT / str(part.begin)
    if part.donor is None:
        return own
    return _copy(folder_of(logs, part.donor) / KEPT / str(part.begin), own, folder / CHECKPOINTS)


def keep_checkpoint(folder: Path, rung: int) -> None:
    """Keep a trial's latest checkpoint aside as that of a rung, unless that is done."""
    target = folder / KEPT / str(rung)
    if not target.exists():
        latest = checkpoint.latest(folder / CHECKPOINTS)
        assert latest is not None, folder
        target.parent.mkdir(exist_ok=True)
        os.replace(latest, target)


def forks_in_words(forks: Sequence[Fork], searched: Sequence[str]) -> str:
    """The forks of a trial as Markdown, a line each."""
    lines = []
    for fork in forks:
        values = trial_name(fork.number, fork.point, searched).partition(" ")[2]
        lines.append(f"- after {fork.images:,} images: continued from a checkpoint of #{fork.donor:02d} with {values}")
    return "\n".join(lines)


def _copy(source: Path, own: Path, folder: Path) -> Path:
    """Copy a donor's checkpoint, with the cost of the trial's own training, into a folder of checkpoints."""
    state, mine = checkpoint.read_state(source), checkpoint.read_state(own, verify=False)
    target = folder / name_of(state["images"])
    with new_folder(target) as partial:
        for name in state["files"]:
            shutil.copyfile(source / name, partial / name)
        state |= {"cost": mine["cost"], "parts": mine["parts"]}
        (partial / checkpoint.STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return target
