"""Finding checkpoints: by folder, by ``best.json``, or by URL, which are downloaded and verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from pipeline.config.recipe import Recipe
from pipeline.errors import SettingError, StageError
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import Address, is_remote, masked
from wavemim.atomic import new_folder
from wavemim.weights import checkpoint

log = logging.getLogger(__name__)

BEST = "best.json"  # which checkpoint was best, and its value
WORK = ("images-*", BEST, "blow-up")  # in a stage's folder: checkpoints, and what `wavemim replay` reads
COPIED = ("images-*/*", BEST)  # patterns of what the writer of checkpoints copies to a store itself
FETCHED = "fetched"  # in the out folder: copies of checkpoints that were given by URL
_NAME = re.compile(r"images-(\d+)")


def name_of(images: int) -> str:
    """Name of the checkpoint's folder after this number of images."""
    return f"images-{images:012d}"


def folders(place: Folder) -> dict[str, bool]:
    """The checkpoints in a folder: name -> whether it has its state.json, which is written last."""
    found: dict[str, bool] = {}
    for below, files in place.tree():
        name = below.partition("/")[0]
        if images_of(name) is not None:
            found[name] = found.get(name, False) or (below == name and checkpoint.STATE in files)
    return found


def seen(place: Folder) -> list[tuple[int, str]]:
    """The checkpoints in a folder that have their state.json, the last one first, as (images seen, name)."""
    return sorted(((images_of(name) or 0, name) for name, whole in folders(place).items() if whole), reverse=True)


def images_of(name: str) -> int | None:
    """Images that the checkpoint with this name has seen; None for other names."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def fetch(source: Folder, target: Path) -> None:
    """Download a checkpoint and verify it; the local folder has all of it or nothing.

    Args:
        source: The checkpoint's folder.
        target: The local folder, which is replaced.

    Raises:
        CheckpointError: The checkpoint is half-written or damaged.
        StorageError: The store does not answer, or failed.
        SettingError: It denies access.
        OSError: The local folder cannot be written.
    """
    with new_folder(target) as partial:
        name = checkpoint.STATE
        try:
            content = source.read(name)
            for name in _files(source, content):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                source.get(name, partial / name)
        except FileNotFoundError:
            raise checkpoint.CheckpointError(f"{source} lacks {name}") from None
        (partial / checkpoint.STATE).write_bytes(content)
        try:
            checkpoint.read_state(partial)
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(str(error).replace(str(partial), str(source))) from None


def _files(source: Folder, content: bytes) -> list[str]:
    """The files that a state.json names. Raises CheckpointError."""
    try:
        names = [str(name) for name in json.loads(content)["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{source.shown(checkpoint.STATE)} cannot be read: {error}") from None
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise checkpoint.CheckpointError(f"{source.shown(checkpoint.STATE)} names a file outside it: '{name}'")
    return names


def local_copy(where: str, out: str | Path) -> Path:
    """The local path of `checkpoint=`: a path unchanged; for a URL, a verified copy in OUT/fetched.

    Args and errors are those of `fetched`.
    """
    return fetched(where, out)[0] if is_remote(where) else Path(where)


def fetched(where: str, out: str | Path, *, near: Path | None = None) -> tuple[Path, str]:
    """A verified local copy of a checkpoint in a store, in OUT/fetched, and its URL.

    Args:
        where: URL of a checkpoint, of a run (or its `pretrain`), whose newest complete checkpoint is used, or of its
            best.json.
        out: The local out folder. A copy that is there already is not downloaded again.
        near: A local folder that may hold the same checkpoints.

    Raises:
        SettingError: There is no checkpoint.
        StorageError: The store does not answer, or failed.
        CheckpointError: All checkpoints there are damaged.
    """
    folder = Folder.at(where)
    address = Address.of(folder.url)
    above, _, last = address.path.rpartition("/")
    if last == BEST:
        parent = Folder(address.at(above))
        return _cached(parent, _best_name(parent), Path(out), near)
    if above and folder.kind(checkpoint.STATE) == "file":
        return _cached(Folder(address.at(above)), last, Path(out), near)
    damaged: checkpoint.CheckpointError | None = None
    for place in (folder, folder.sub("pretrain")):
        for _, name in seen(place):
            try:
                return _cached(place, name, Path(out), near)
            except checkpoint.CheckpointError as error:
                log.warning("%s is skipped, the checkpoint before it is tried: %s", place.shown(name), error)
                damaged = damaged or error
    if damaged is not None:
        raise damaged
    raise SettingError(f"checkpoint={masked(where)}: neither a checkpoint nor a folder with one in it")


def _best_name(parent: Folder) -> str:
    try:
        return str(json.loads(parent.read(BEST))["checkpoint"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        raise SettingError(
            f"{parent.shown(BEST)}: no such file, or not one that pretraining wrote (train.keep_best)"
        ) from None


def _cached(parent: Folder, name: str, out: Path, near: Path | None) -> tuple[Path, str]:
    target = out / FETCHED / hashlib.sha256(parent.url.encode()).hexdigest()[:12] / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{name}.lock"):  # other processes may want the same one
            for place in (target, *([near / name] if near is not None else [])):
                with contextlib.suppress(OSError, checkpoint.CheckpointError):
                    checkpoint.read_state(place)
                    if (place / checkpoint.STATE).read_bytes() == parent.read(f"{name}/{checkpoint.STATE}"):
                        return place, parent.place(name)
            fetch(parent.sub(name), target)
    except OSError as error:
        raise StageError(f"{parent.shown(name)} cannot be downloaded to {target}: {error}") from None
    return target, parent.place(name)


def checkpoint_of(recipe: Recipe) -> Path:
    """The checkpoint that a later stage uses: the one that checkpoint= names, else the last complete one of the run.

    Raises:
        SettingError: checkpoint= names none.
        StageError: The run has none, or the store does not answer.
    """
    return located(recipe)[0]


def located(recipe: Recipe) -> tuple[Path, str]:
    """As `checkpoint_of`, and the URL from which other nodes fetch it; "" where it is not in a store."""
    if recipe.checkpoint:
        try:
            if is_remote(recipe.checkpoint):
                return fetched(recipe.checkpoint, recipe.local_out, near=recipe.stage_dir("pretrain"))
            return found_at(Path(recipe.checkpoint)), ""
        except SettingError as error:
            raise SettingError(f"checkpoint={str(error).removeprefix('checkpoint=')}") from None
    missing = (
        f"{recipe.place_of(recipe.stage_dir('pretrain'))} has no checkpoint; run wavemim pretrain with the same name= "
    )
    missing += "and out= first"
    if (home := recipe.stage_home("pretrain")) is not None:
        where = recipe.train.checkpoints_at
        home = home if where is None else Folder.at(where).sub(f"{recipe.name}/pretrain").url
        try:
            return fetched(home, recipe.local_out, near=recipe.stage_dir("pretrain"))
        except SettingError as error:
            raise StageError(missing if str(error).endswith("with one in it") else str(error)) from None
    found = checkpoint.latest(recipe.stage_dir("pretrain"))
    if found is None:
        raise StageError(missing)
    return found, ""


def find(path: Path) -> Path | None:
    """The checkpoint at a path: its own folder, a `best.json`, or a folder with several, of which the last complete one is used.

    Returns:
        The checkpoint's folder; None if there is none.

    Raises:
        SettingError: `path` is a best.json that does not exist, or that pretraining did not write.
    """
    if path.name == BEST:
        best = best_of(path.parent)
        if best is None:
            raise SettingError(f"checkpoint={path}: no such file, or not one that pretraining wrote (train.keep_best)")
        return path.parent / str(best["checkpoint"])
    return path if (path / checkpoint.STATE).is_file() else checkpoint.latest(path)


def found_at(path: Path) -> Path:
    """As `find`, also in the folder's `pretrain`.

    Raises:
        SettingError: There is no checkpoint.
        CheckpointError: All checkpoints there are damaged.
    """
    if not path.is_dir() and path.name != BEST:
        what = "a file; give the folder of a checkpoint" if path.exists() else "no such folder"
        raise SettingError(f"{path}: {what}")
    damaged: checkpoint.CheckpointError | None = None
    for folder in (path, path / "pretrain"):
        found = find(folder)
        if found is not None:
            return found
        for state in sorted(folder.glob(f"*/{checkpoint.STATE}")):
            try:
                checkpoint.read_state(state.parent)
            except checkpoint.CheckpointError as error:
                damaged = error
    if damaged is not None:
        raise damaged
    raise SettingError(
        f"{path}: no checkpoint in it; give a checkpoint's folder, or that of a run (OUT/runs/NAME) or its pretrain"
    )


def best_of(folder: Path) -> dict[str, Any] | None:
    """Content of a folder's best.json: `checkpoint`, `metric` and `value`; None if it or its checkpoint is missing."""
    try:
        found = json.loads((folder / BEST).read_bytes())
        return found if (folder / found["checkpoint"] / checkpoint.STATE).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a metric's value is better than another: larger for evaluation (eval/…), smaller for losses."""
    return value > than if metric.startswith("eval/") else value < than
