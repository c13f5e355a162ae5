"""Checkpoints as plain files: safetensors and JSON, verified by SHA-256, complete or absent.

A checkpoint folder holds ``model.safetensors`` (the whole masked image model), ``optimizer.safetensors``, where an
average of the weights is kept ``averaged.safetensors``, and ``state.json``, which is written last and lists the others
with their checksums. Folders whose names begin with a dot are incomplete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from wavemim.atomic import new_folder
from wavemim.positions import fitted
from wavemim.sharding import gather, is_sharded, scatter, scatter_moments

_log = logging.getLogger(__name__)

FORMAT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
AVERAGED = "averaged.safetensors"


class CheckpointError(ValueError):
    """The folder is not a checkpoint of this project, or it is damaged."""


@dataclass
class Snapshot:
    """The content of a checkpoint in host memory, independent of the model, which may train on."""

    tensors: dict[str, dict[str, torch.Tensor]]  # file: name: values
    state: dict[str, Any]
    copied: torch.cuda.Event | None = None  # until then the device is still copying

    def write(self, folder: Path) -> None:
        """Write a checkpoint folder.

        It is written under another name and renamed, so that `folder` is never incomplete.

        Args:
            folder: The checkpoint folder. An existing one is replaced.

        Raises:
            OSError: If it cannot be written.
        """
        if self.copied is not None:
            self.copied.synchronize()
        with new_folder(folder) as partial:
            for name, tensors in self.tensors.items():
                save_file(tensors, partial / name)
                _to_disk(partial / name)
            content = {
                "format": FORMAT,
                "files": {name: checksum(partial / name) for name in self.tensors},
                **self.state,
            }
            (partial / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _to_disk(partial / STATE)


@dataclass
class Saver:
    """Takes checkpoints of a model in training. Called with a folder, it writes one there at once.

    One worker calls it. If the model is sharded, every other worker has to call `take_part` at the same time.

    Attributes:
        model: The model, sharded or not.
        optimizer: Its optimizer; None writes no ``optimizer.safetensors``.
        averaged: The average of the weights; None writes no ``averaged.safetensors``.
        state: Returns further content of ``state.json``, for example the number of images seen.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    averaged: nn.Module | None = None
    state: Callable[[], Mapping[str, Any]] = dict
    _buffers: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def __call__(self, folder: Path) -> None:
        """Write a checkpoint into `folder`, completely or not at all."""
        self.snapshot().write(folder)

    def take_part(self) -> None:
        """Contribute this worker's shards to the snapshot of another worker. Does nothing if the model is not sharded."""
        if is_sharded(self.model):
            self._gathered()

    def snapshot(self, *, reuse: bool = False) -> Snapshot:
        """Copy the model, the optimizer and the average to host memory.

        On a GPU this does not wait for the copies, unless the model is sharded.

        Args:
            reuse: Copy into the memory of the last such snapshot, which must have been written by then. Saves the
                allocation; a sharded model does without.

        Returns:
            The snapshot. Of a sharded model it is complete on rank 0 and empty on all others.
        """
        if is_sharded(self.model):
            return Snapshot(self._gathered(), dict(self.state()))
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        on_gpu = False
        for file, values in self._values().items():
            tensors[file] = {}
            for name, value in values.items():
                buffer = self._buffers.get((file, name)) if reuse else None
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                if reuse:
                    self._buffers[file, name] = buffer
                tensors[file][name] = buffer.copy_(value, non_blocking=True)
                on_gpu |= value.is_cuda
        copied = None
        if on_gpu:  # further training is queued behind the copies
            copied = torch.cuda.Event()
            copied.record()
        return Snapshot(tensors, dict(self.state()), copied)

    def _values(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors {file: {name: values}} of an unsharded model, where they are."""
        files = {MODEL: self.model.state_dict()}
        if self.optimizer is not None:
            state = self.optimizer.state
            files[OPTIMIZER] = {
                f"{name}/{entry}": torch.as_tensor(value)
                for name, parameter in self.model.named_parameters()
                for entry, value in state.get(parameter, {}).items()
            }
        if self.averaged is not None:
            files[AVERAGED] = self.averaged.state_dict()
        return {file: {name: value.detach() for name, value in values.items()} for file, values in files.items()}

    def _gathered(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors {file: {name: values}} of a sharded model in host memory: of rank 0, empty on all others."""
        weights, moments = gather(self.model, self.optimizer)
        files = {MODEL: weights}
        if self.optimizer is not None:
            files[OPTIMIZER] = {
                f"{name}/{entry}": value for name, entries in moments.items() for entry, value in entries.items()
            }
        if self.averaged is not None:
            files[AVERAGED], _ = gather(self.averaged)
        return files


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    averaged: nn.Module | None = None,
) -> None:
    """Write a checkpoint into `folder`, completely or not at all.

    Args:
        folder: The checkpoint folder. An existing one is replaced.
        model: The model.
        optimizer: Its optimizer, if its state is to be saved.
        state: Further content of ``state.json``.
        averaged: The average of the weights, if there is one.
    """
    Saver(model, optimizer, averaged, lambda: state)(folder)


def read_state(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read ``state.json`` of a complete checkpoint.

    Args:
        folder: The checkpoint folder.
        verify: Whether to compare the files with their checksums, which reads all of them.

    Returns:
        The content of ``state.json``.

    Raises:
        CheckpointError: If the folder is not a checkpoint of this format, or a file is missing or damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(f"{folder / STATE} was not written by this project")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {state['format']}, this version reads {FORMAT}; train again")
    if not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{folder / STATE} lists no files")
    for name, expected in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}")
        try:
            sound = not verify or checksum(path) == expected
        except OSError as error:  # a failing disk, or the file was removed meanwhile
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        if not sound:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one in {STATE}")
    return state


def load_model(source: Path | Snapshot, model: nn.Module, *, name: str = MODEL) -> None:
    """Load the weights of a checkpoint into a model, strictly.

    Positions of a model for another image size are resampled (`wavemim.positions.fitted`). If the model is sharded,
    every worker has to call this; the weights are those of rank 0.

    Args:
        source: A checkpoint folder or a snapshot.
        model: The model.
        name: The file of the checkpoint, ``model.safetensors`` or ``averaged.safetensors``.

    Raises:
        RuntimeError: If names or shapes are not those of the model.
    """
    own = model.state_dict()
    weights = {key: fitted(key, value, own[key]) if key in own else value for key, value in _stored(source, name)}
    if is_sharded(model):
        scatter(model, weights)
    else:
        model.load_state_dict(weights, strict=True)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Load the weights to evaluate or export: the average if the checkpoint has one, the model's weights otherwise.

    Args:
        folder: A checkpoint folder.
        model: The model.

    Raises:
        RuntimeError: If names or shapes are not those of the model.
    """
    load_model(folder, model, name=AVERAGED if (folder / AVERAGED).is_file() else MODEL)


def load_optimizer(source: Path | Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state of a checkpoint, by parameter names.

    Learning rates stay as they are: the schedule sets them. Parameters whose shape has changed (positions of another
    image size) start without moments.

    Args:
        source: A checkpoint folder or a snapshot.
        model: The model of the optimizer. If it is sharded, every worker has to call this.
        optimizer: The optimizer.
    """
    parameters = dict(model.named_parameters())
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _stored(source, OPTIMIZER):
        name, _, entry = key.rpartition("/")
        moments.setdefault(name, {})[entry] = value
    moments = {
        name: entries
        for name, entries in moments.items()
        if name in parameters and all(v.shape == parameters[name].shape for v in entries.values() if v.ndim)
    }
    if is_sharded(model):
        scatter_moments(model, optimizer, moments)
        return
    for name, entries in moments.items():
        parameter = parameters[name]
        for entry, value in entries.items():
            if entry == "step":
                placed = value.to(parameter.device)
            else:  # in the parameter's memory format, which the fused optimizer relies on
                placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
            optimizer.state[parameter][entry] = placed


def _stored(source: Path | Snapshot, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, values) of the tensors of one file, one after another, on the CPU."""
    if isinstance(source, Snapshot):
        if source.copied is not None:
            source.copied.synchronize()
        yield from source.tensors[name].items()
        return
    with safe_open(source / name, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a dictionary
            yield key, file.get_tensor(key)


def seen(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints below a folder, complete or not.

    Args:
        folder: The folder with the checkpoint folders.

    Returns:
        (number of images seen, checkpoint folder), the latest first.
    """
    found: list[tuple[int, Path]] = []
    for state_file in folder.glob(f"[!.]*/{STATE}"):
        try:
            found.append((int(json.loads(state_file.read_bytes())["images"]), state_file.parent))
        except (OSError, ValueError, KeyError, TypeError):
            _warn_unreadable(state_file.parent)
    return sorted(found, reverse=True)


@functools.cache
def _warn_unreadable(folder: Path) -> None:
    """Warn once per process: online evaluation looks every second."""
    _log.warning("%s is skipped: it cannot be read", folder)


def latest(folder: Path) -> Path | None:
    """Find the complete checkpoint below a folder that has seen the most images.

    Damaged checkpoints are skipped with a warning.

    Args:
        folder: The folder with the checkpoint folders.

    Returns:
        The checkpoint folder, or None if there is none.
    """
    for _, path in seen(folder):
        try:
            read_state(path)
        except CheckpointError as error:
            _log.warning("%s is skipped, the checkpoint before it is used: %s", path, error)
            continue
        return path
    return None


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous copies on the CPU, as safetensors writes them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
