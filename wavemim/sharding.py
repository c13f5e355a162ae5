"""Fully sharded data parallel (torch's FSDP2): each worker holds a part of every parameter, gradient and moment.

The parameters of a block are gathered when it computes, and given up again behind it; gradients are summed up where
their part is held. Losses and gradients are those of plain data parallel but for the order of sums. With one worker
there is nothing to share out, and nothing in here is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


def shard(model: nn.Module, device: torch.device, precision: torch.dtype = torch.float32) -> None:
    """Share the parameters of `model` out over all workers, in place; each of them ends up on `device`.

    Every worker has to call it, with the same weights: they may be on the CPU, then the device never holds them all.
    Parameters are held, and gradients summed up, in float32. Blocks gather them in `precision` on a GPU, where autocast
    has norms compute in float32 all the same, unless they have batch norm, whose statistics are float32.
    """
    # Half a second that most processes need not wait for.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)
    assert dist.group.WORLD is not None, "workers have to be connected first"
    model.to(memory_format=torch.contiguous_format)  # the only one that can be shared out
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    # Activations are autocast's business; targets and losses would not stay float32 otherwise.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = replace(exact, param_dtype=precision)
    for block in blocks(model):
        normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules())
        fully_shard(block, mesh=mesh, mp_policy=exact if normed or device.type == "cpu" else mixed)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of encoder and decoders: what stands in the innermost lists of modules that have parts themselves."""
    for module in model.modules():
        if isinstance(module, _LISTS):
            yield from (part for part in module if _composite(part) and not any(map(_lists_blocks, part.modules())))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full, on its device. Every worker has to call it where it is a shared one."""
    return tensor.full_tensor() if is_shared(tensor) else tensor  # type: ignore[attr-defined]  # of DTensor


def held(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this worker holds; the same memory."""
    return tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]  # of DTensor


def shared_as(full: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A full tensor shared out and stored as `model` is, on its device: of what every worker has, so nothing is sent."""
    if is_shared(model):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]  # of DTensor
        return distribute_tensor(full.to(model.device), mesh, placements, src_data_rank=None)
    return torch.empty_like(model, dtype=full.dtype).copy_(full)  # in the same order of memory


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether workers hold parts of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor, without importing what has it


def _composite(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None and not isinstance(module, _LISTS)
    return has_parts and next(module.parameters(), None) is not None


def _lists_blocks(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) and any(map(_composite, module))
