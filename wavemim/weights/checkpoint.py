"""Checkpoints as plain files: safetensors and JSON, checked by SHA-256, whole or absent; and the export to timm.

A checkpoint folder holds ``model.safetensors`` (the whole masked image model), ``optimizer.safetensors``, with an average
of the weights ``averaged.safetensors``, and ``state.json``, which is written last and names the others with their
checksums. Names of folders that begin with a dot are half-written ones.
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
from wavemim.sharding import is_shared, shared_as, whole

_log = logging.getLogger(__name__)

FORMAT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
AVERAGED = "averaged.safetensors"


class CheckpointError(ValueError):
    """A folder is no checkpoint of ours, or a damaged one."""


@dataclass
class Snapshot:
    """A checkpoint's content in host memory, apart from the model, which may train on."""

    tensors: dict[str, dict[str, torch.Tensor]]  # file: name: values
    state: dict[str, Any]
    copied: torch.cuda.Event | None = None  # until then the device is still copying

    def write(self, folder: Path) -> None:
        """Write it into `folder`: made under another name and renamed, so that it is never there by half."""
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

    One worker does so. Where the model is shared out, each of the others has to call `take_part` at the same time:
    tensors are put together one after another, and only the first worker keeps them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    averaged: nn.Module | None = None
    state: Callable[[], Mapping[str, Any]] = dict
    _buffers: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def __call__(self, folder: Path) -> None:
        """Write a checkpoint into `folder`, whole or not at all."""
        self.snapshot().write(folder)

    def take_part(self) -> None:
        """Give another worker, which takes a snapshot, the parts of tensors that this one holds; nothing without any."""
        if any(map(is_shared, self.model.parameters())):
            for _ in self._values():
                pass

    def snapshot(self, *, reuse: bool = False) -> Snapshot:
        """Copy everything to host memory: as long as the copy takes on a CPU, without waiting on a GPU.

        `reuse`: into the memory of the last such snapshot, which must be written by then.
        """
        files = {MODEL: True, OPTIMIZER: self.optimizer is not None, AVERAGED: self.averaged is not None}
        tensors: dict[str, dict[str, torch.Tensor]] = {file: {} for file, there in files.items() if there}
        on_gpu = False
        for file, name, value in self._values():
            buffer = self._buffers.get((file, name)) if reuse else None
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            if reuse:
                self._buffers[file, name] = buffer
            tensors[file][name] = buffer.copy_(value, non_blocking=True)
            on_gpu |= value.is_cuda
        copied = None
        if on_gpu:  # what trains on is queued behind the copies
            copied = torch.cuda.Event()
            copied.record()
        return Snapshot(tensors, dict(self.state()), copied)

    def _values(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, value in self.model.state_dict().items():
            yield MODEL, name, whole(value.detach())
        if self.optimizer is not None:
            for name, value in _optimizer_tensors(self.model, self.optimizer).items():
                yield OPTIMIZER, name, whole(value)
        if self.averaged is not None:
            for name, value in self.averaged.state_dict().items():
                yield AVERAGED, name, whole(value.detach())


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    averaged: nn.Module | None = None,
) -> None:
    """Write a checkpoint into `folder`, whole or not at all."""
    Saver(model, optimizer, averaged, lambda: state)(folder)


def read_state(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """`state.json` of a checkpoint whose files are whole. Raises CheckpointError otherwise."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(f"{folder / STATE} is not of this project")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {state['format']}, this version reads {FORMAT}; train again")
    if not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{folder / STATE} names no files")
    for name, expected in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}")
        try:
            sound = not verify or checksum(path) == expected
        except OSError as error:  # of the disk, or it was removed meanwhile
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        if not sound:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one in {STATE}")
    return state


def load_model(source: Path | Snapshot, model: nn.Module, *, name: str = MODEL) -> None:
    """Load the weights of a checkpoint into `model`, strictly: into the parts that are here, where it is shared out.

    Positions of a model for another image size are resampled (`wavemim.positions.fitted`).
    """
    own, tensors = model.state_dict(), {}
    for key, stored in _stored(source, name):
        value = fitted(key, stored, own[key]) if key in own else stored
        fits = key in own and own[key].shape == value.shape  # others are the model's to refuse
        tensors[key] = shared_as(value, own[key]) if fits else value
    model.load_state_dict(tensors, strict=True)


def load_trained(folder: Path, model: nn.Module) -> None:
    """As `load_model`, for those who use what was trained: the average of the weights where there is one."""
    load_model(folder, model, name=AVERAGED if (folder / AVERAGED).is_file() else MODEL)


def load_optimizer(source: Path | Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state of a checkpoint, by parameter names. Learning rates are the schedule's business.

    Moments of a parameter that now has another shape (positions of another image size) begin anew.
    """
    parameters = dict(model.named_parameters())
    resized = {
        key.rpartition("/")[0]
        for key, value in _stored(source, OPTIMIZER)
        if value.ndim and (own := parameters.get(key.rpartition("/")[0])) is not None and own.shape != value.shape
    }
    for key, value in _stored(source, OPTIMIZER):
        name, _, entry = key.rpartition("/")
        if name in parameters and name not in resized:
            parameter = parameters[name]
            placed = value.to(parameter.device) if entry == "step" else shared_as(value, parameter)
            optimizer.state[parameter][entry] = placed


def _stored(source: Path | Snapshot, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of the tensors of one file, one after another, on the CPU."""
    if isinstance(source, Snapshot):
        if source.copied is not None:
            source.copied.synchronize()
        yield from source.tensors[name].items()
        return
    with safe_open(source / name, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # no dictionary
            yield key, file.get_tensor(key)


def seen(folder: Path) -> list[tuple[int, Path]]:
    """(images seen, folder) of the checkpoints below `folder`, whole or not, the last one first."""
    found: list[tuple[int, Path]] = []
    for state_file in folder.glob(f"[!.]*/{STATE}"):
        try:
            found.append((int(json.loads(state_file.read_bytes())["images"]), state_file.parent))
        except (OSError, ValueError, KeyError, TypeError):
            _say_unreadable(state_file.parent)
    return sorted(found, reverse=True)


@functools.cache
def _say_unreadable(folder: Path) -> None:
    """Once a process: a monitor looks every second."""
    _log.warning("%s is passed over: it cannot be read", folder)


def latest(folder: Path) -> Path | None:
    """The whole checkpoint below `folder` that has seen the most images; None where there is none.

    What is damaged is passed over for the one before, with a warning.
    """
    for _, path in seen(folder):
        try:
            read_state(path)
        except CheckpointError as error:
            _log.warning("%s is passed over for the checkpoint before: %s", path, error)
            continue
        return path
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, as safetensors writes them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{entry}": torch.as_tensor(value).detach()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
