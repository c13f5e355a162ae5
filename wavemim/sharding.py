"""Fully sharded data parallel (torch's FSDP2): each worker holds a shard of every parameter, gradient and moment.

The parameters of a block are gathered for its computation and freed afterwards; gradients are reduced to the worker that
holds their shard. Losses and gradients equal those of plain data parallel up to the order of summation. A single worker
has nothing to shard and needs none of this.

Unsharded models never pass through ``torch.distributed.checkpoint``: its state dictionaries would copy them to the CPU
synchronously, and drop the memory format (channels last) of their moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


def shard(model: nn.Module, device: torch.device, precision: torch.dtype = torch.float32) -> None:
    """Shard the parameters of a model over all workers, in place.

    Parameters are stored, and gradients reduced, in float32. On a GPU, blocks gather their parameters in `precision`
    (norms still compute in float32 under autocast), except blocks with batch norm, whose statistics are float32.

    Args:
        model: The model. Every worker has to pass the same weights. They may be on the CPU; the device then never holds
            the whole model.
        device: Where this worker's shards end up.
        precision: The dtype in which blocks gather their parameters on a GPU.
    """
    # Imported here: it takes half a second, which most processes need not wait for.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)
    assert dist.group.WORLD is not None, "the process group has to be initialised first"
    model.to(memory_format=torch.contiguous_format)  # the only format that can be sharded
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    # Autocast casts the activations; targets and losses would not stay float32 otherwise.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = replace(exact, param_dtype=precision)
    for block in blocks(model):
        normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules())
        fully_shard(block, mesh=mesh, mp_policy=exact if normed or device.type == "cpu" else mixed)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of encoder and decoders: composite modules in the innermost module lists."""
    for module in model.modules():
        if isinstance(module, _LISTS):
            yield from (part for part in module if _composite(part) and not any(map(_lists_blocks, part.modules())))


def is_sharded(model: nn.Module) -> bool:
    """Whether the workers hold shards of the parameters of `model`."""
    return any(map(_is_dtensor, model.parameters()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor, on its device. Every worker has to call it if the tensor is sharded."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]  # of DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this worker's shard of a tensor, which shares its memory; an unsharded tensor is returned as it is."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]  # of DTensor


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Gather the full state of a sharded model in the host memory of rank 0. Every worker has to call it.

    Tensors are gathered one after another, so no device ever holds the whole state.

    Args:
        model: A sharded model.
        optimizer: Its optimizer.

    Returns:
        The state dictionary of the model, and {parameter: {entry: value}} of the optimizer. Both are copies. They are
        empty on all ranks but 0.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    entries = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    used = {_memory(local(value)) for value in (*model.parameters(), *model.buffers(), *entries)}

    def copied(value: torch.Tensor) -> torch.Tensor:
        """torch does not copy what is whole and on the CPU already, such as buffers and step counts."""
        return value.clone() if _memory(value) in used else value

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    weights = {name: copied(value) for name, value in found.items()}
    if optimizer is None or not optimizer.state:  # torch would initialise a missing state by a step of its own
        return weights, {}
    moments: Any = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return weights, {name: {entry: copied(value) for entry, value in state.items()} for name, state in moments.items()}


def scatter(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load full weights into a sharded model. Every worker has to call it.

    Args:
        model: A sharded model.
        weights: Its full state dictionary, on the CPU. That of rank 0 is loaded by all; others may have none.

    Raises:
        RuntimeError: If names or shapes are not those of the model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    unlike = [name for name, value in weights.items() if name in own and own[name].shape != value.shape]
    # Of a full state dictionary torch itself only refuses unexpected names.
    if weights and (missing or unexpected or unlike):
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}, of other shapes {unlike}")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)


def scatter_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Load a full optimizer state into the optimizer of a sharded model. Every worker has to call it.

    Hyperparameters such as learning rates stay as they are. A parameter without an entry in `moments` has no state
    afterwards.

    Args:
        model: A sharded model.
        optimizer: Its optimizer.
        moments: {parameter: {entry: value}}, on the CPU. Those of rank 0 are loaded by all; others may have none.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    content: dict[str, Any] = {
        "state": {name: dict(entries) for name, entries in moments.items()},
        "param_groups": get_optimizer_state_dict(model, optimizer)["param_groups"],
    }
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_optimizer_state_dict(model, optimizer, content, options=options)
    loaded: list[Any] = [set(moments)]
    dist.broadcast_object_list(loaded, src=0)
    for name, parameter in model.named_parameters():  # torch initialises the state of all by a step of its own
        if name not in loaded[0]:
            optimizer.state.pop(parameter, None)


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # without importing DTensor, which takes time


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _composite(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None and not isinstance(module, _LISTS)
    return has_parts and next(module.parameters(), None) is not None


def _lists_blocks(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) and any(map(_composite, module))
