"""A second place for a run's checkpoints, an object store or another folder: copied there beside training, found again.

The place of a stage is URL/NAME/STAGE, of pretraining URL/NAME/pretrain. It holds ``settings.json`` (what its checkpoints were trained with), checkpoints as in
the stage's folder, and ``best.json``. A checkpoint's ``state.json`` is uploaded last and names the other files with their
SHA-256: a folder without it, or with files of other checksums, is half-written or damaged, and is passed over.

The stage's folder comes first: checkpoints are written there and copied from there. What the store lacks costs nothing but
the copy, so that its failures never end training; but a run begins only where the store answers, since it might hold more
than the folder does.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints.find import BEST, fetch, folders, images_of, seen
from pipeline.config.recipe import CHANGEABLE, Recipe, differences
from pipeline.errors import SettingError
from pipeline.runtime.stage_folder import SETTINGS
from pipeline.storage.folder import OWNER, Folder
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)

DAMAGED = "state.damaged.json"  # what state.json of a checkpoint is called that was found damaged


@dataclass(frozen=True)
class CheckpointStore:
    """The place of one run's checkpoints. Small, and can be pickled."""

    folder: Folder
    owner: str = ""  # id of the mark under which this run owns it; "": a local folder, which has a lock

    @classmethod
    def of(cls, recipe: Recipe, stage: str = "pretrain") -> CheckpointStore | None:
        """As train.checkpoints_at says; None without. Raises SettingError for a malformed URL."""
        where = recipe.train.checkpoints_at
        return None if where is None else cls(Folder.at(where).sub(f"{recipe.name}/{stage}"))

    def __str__(self) -> str:
        return str(self.folder)

    def check(self, same: Mapping[str, Any], *, restart: bool, force: bool) -> list[str]:
        """Raise SettingError where what it holds was trained with settings other than `same`, and may not be gone on with.

        Gives the lines of what differs and may (`force`); nothing is written. Raises StorageError if it does not answer.
        """
        try:
            content = self.folder.read(SETTINGS)
        except FileNotFoundError:
            content = b""
        if restart or not (content or folders(self.folder)):
            return []
        other = "give another name= or train.checkpoints_at="
        try:
            known = dict(json.loads(content))
        except (ValueError, TypeError):
            raise SettingError(
                f"{self} holds checkpoints, but no {SETTINGS} that says how they were trained; {other}, "
                "or replace them with restart=true"
            ) from None
        changed = differences(known, same)
        allowed = all(line.partition(":")[0] in CHANGEABLE for line in changed)
        if changed and not (allowed and force):
            on = ", go on with them with force=true," if allowed else ","
            more = "; …" if len(changed) > 4 else ""
            raise SettingError(
                f"{self} holds checkpoints of other settings ({'; '.join(changed[:4])}{more}); {other}{on} "
                "or replace them with restart=true"
            )
        return changed

    def restore(self, local: Path, *, best: bool = False) -> str | None:
        """Bring the newest whole checkpoint to `local` if it is newer than those there; gives its name.

        A damaged one is set aside in the store, with a warning, for the one before. `best`: also that of best.json.
        Raises StorageError, SettingError and OSError.
        """
        last = checkpoint.latest(local)
        reached = int(checkpoint.read_state(last, verify=False)["images"]) if last else -1
        for images, name in seen(self.folder):
            if images <= reached:
                break
            try:
                fetch(self.folder.sub(name), local / name)
            except checkpoint.CheckpointError as error:
                log.warning("%s is passed over for the checkpoint before: %s", self.folder.shown(name), error)
                self._set_aside(name)
                continue
            log.info("%s: training goes on from it", self.folder.shown(name))
            if best:
                self._restore_best(local)
            return name
        return None

    def _set_aside(self, name: str) -> None:
        """So that it counts as half-written: the next one of this name replaces it, or it is removed."""
        with contextlib.suppress(FileNotFoundError):
            self.folder.write(f"{name}/{DAMAGED}", self.folder.read(f"{name}/{checkpoint.STATE}"))
            self.folder.remove(f"{name}/{checkpoint.STATE}")

    def _restore_best(self, local: Path) -> None:
        try:
            content = self.folder.read(BEST)
            name = str(json.loads(content)["checkpoint"])
            if images_of(name) is not None and not (local / name).is_dir():
                fetch(self.folder.sub(name), local / name)
        except FileNotFoundError:
            return
        except (checkpoint.CheckpointError, json.JSONDecodeError, KeyError, TypeError) as error:
            log.warning("%s: the best checkpoint is not taken from there: %s", self, error)
            return
        Folder.at(local).write(BEST, content)


def lease_mark(folder: Folder) -> str | None:
    """The id of whose the store is; None where that cannot be told."""
    try:
        return str(json.loads(folder.read(OWNER))["id"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
