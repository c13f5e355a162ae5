"""A second place for a run's checkpoints: an object store or another folder.

It is `train.checkpoints_at`; where that is not set and the out folder is in a store, it is OUT/runs. For a stage it is
URL/NAME/STAGE. It holds ``settings.json`` (what its checkpoints were trained with), checkpoints as in the
stage's folder, and ``best.json``. A checkpoint's ``state.json`` is uploaded last and names the other files with their
SHA-256: a folder without it, or with files of other checksums, is half-written or damaged, and is skipped.

Checkpoints are written to the stage's folder first and copied from there, so that failures of the store never end training.
But a run starts only if the store answers, since it may hold a newer checkpoint than the folder.
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
from pipeline.storage.folder import Folder
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)

DAMAGED = "state.damaged.json"  # new name of the state.json of a checkpoint that was found damaged


@dataclass(frozen=True)
class CheckpointStore:
    """The second place for one run's checkpoints. Small, and can be pickled."""

    folder: Folder
    owner: str = ""  # id of the mark with which this run owns it; "" for a local folder, which has a lock
    is_home: bool = False  # whether it is the stage's own folder, which is owned and mirrored as a whole

    @classmethod
    def of(cls, recipe: Recipe, stage: str = "pretrain") -> CheckpointStore | None:
        """That of a stage; None if there is none. Raises SettingError if the URL is malformed."""
        if (where := recipe.train.checkpoints_at) is not None:
            return cls(Folder.at(where).sub(f"{recipe.name}/{stage}"))
        home = recipe.stage_home(stage)
        return None if home is None else cls(Folder.at(home), is_home=True)

    def __str__(self) -> str:
        return str(self.folder)

    def check(self, same: Mapping[str, Any], *, restart: bool, force: bool) -> list[str]:
        """Check whether a run with these settings may use the store. Nothing is written.

        Args:
            same: The settings that the checkpoints must have been trained with.
            restart: Whether the checkpoints there are replaced anyway.
            force: Whether to resume even if settings differ that are allowed to change.

        Returns:
            The settings that differ, a line each, which `force` allowed.

        Raises:
            SettingError: It holds checkpoints of other settings, or of unknown ones.
            StorageError: The store does not answer, or failed.
        """
        try:
            content = self.folder.read(SETTINGS)
        except FileNotFoundError:
            content = b""
        if restart or not (content or folders(self.folder)):
            return []
        other = f"give another name= or {'out=' if self.is_home else 'train.checkpoints_at='}"
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
            on = ", resume from them with force=true," if allowed else ","
            more = "; …" if len(changed) > 4 else ""
            raise SettingError(
                f"{self} holds checkpoints of other settings ({'; '.join(changed[:4])}{more}); {other}{on} "
                "or replace them with restart=true"
            )
        return changed

    def restore(self, local: Path, *, best: bool = False) -> str | None:
        """Download the newest complete checkpoint to the folder `local` if it is newer than those there.

        A damaged one is marked as such in the store, with a warning, and the one before it is taken.

        Args:
            local: The stage's folder.
            best: Whether to download the best checkpoint too.

        Returns:
            The name of the newest one; None if nothing was downloaded.

        Raises:
            StorageError: The store does not answer, or failed.
            SettingError: It denies access.
            OSError: A checkpoint cannot be written to `local`.
        """
        last = checkpoint.latest(local)
        reached = int(checkpoint.read_state(last, verify=False)["images"]) if last else -1
        for images, name in seen(self.folder):
            if images <= reached:
                break
            try:
                fetch(self.folder.sub(name), local / name)
            except checkpoint.CheckpointError as error:
                log.warning("%s is skipped, the checkpoint before it is tried: %s", self.folder.shown(name), error)
                self._set_aside(name)
                continue
            log.info("%s: training resumes from it", self.folder.shown(name))
            if best:
                self._restore_best(local)
            return name
        return None

    def _set_aside(self, name: str) -> None:
        """Mark a checkpoint as half-written, so that the next one of this name replaces it or it is removed."""
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
            log.warning("%s: the best checkpoint is not downloaded: %s", self, error)
            return
        Folder.at(local).write(BEST, content)
