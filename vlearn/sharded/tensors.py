"""Tensors that are spread over a mesh of processes: torch's DTensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from vlearn._torch_internals import global_offset


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over a mesh of processes, as FSDP2 and tensor parallelism spread parameters."""
    return type(tensor) not in (Tensor, Parameter) and getattr(tensor, "device_mesh", None) is not None


def placement(tensor: Tensor) -> Any:
    """How a distributed tensor is spread over its processes, something to compare; None of any other."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None  # pyright: ignore


def shard(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # pyright: ignore


def part_of(like: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a tensor that it has whole, a view: the entries that it has of a distributed one."""
    if is_dtensor(like):
        for axis, (begin, size) in enumerate(zip(global_offset(like), shard(like).shape, strict=True)):
            tensor = tensor.narrow(axis, begin, size)
    return tensor


def sharded_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that each process has whole, sharded as a parameter of its shape is, if that is."""
    if not is_dtensor(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)  # pyright: ignore


def placed_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient spread over the processes as its parameter is; all of them must ask for it.

    Where each process has used a whole parameter on its part of a sequence, as sequence parallelism does, its gradient
    is the sum of theirs, not formed yet.
    """
    if not is_dtensor(gradient) or placement(gradient) == placement(parameter):
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)  # pyright: ignore


def whole(tensor: Tensor) -> Tensor:
    """All entries of a distributed tensor, which all of its processes must ask for; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # pyright: ignore
