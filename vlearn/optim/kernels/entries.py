"""The entries of a tensor that this process works on: its shard of a distributed one, complex numbers as real pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over a mesh of processes, as FSDP2 and tensor parallelism spread parameters."""
    return type(tensor) not in (Tensor, Parameter) and getattr(tensor, "device_mesh", None) is not None


def as_real(tensor: Tensor) -> Tensor:
    """The tensor; of a complex one a view as real and imaginary parts ``[..., 2]``, as torch's optimizers have it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def placement(tensor: Tensor) -> Any:
    """How a distributed tensor is spread over its processes, something to compare; None of any other."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None  # pyright: ignore


def shard(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # pyright: ignore


def address(tensor: Tensor) -> int:
    """Where in memory the entries that this process has of a tensor begin."""
    return shard(tensor.data).data_ptr() if is_dtensor(tensor) else tensor.data_ptr()


def is_same_memory(left: Tensor, right: Tensor) -> bool:
    """Whether the entries that this process has of two tensors begin at one place in memory."""
    return address(left) == address(right)


def own_entries(tensor: Tensor) -> Tensor:
    """The shard of a tensor in real numbers: what is drawn and updated here."""
    return as_real(shard(tensor))


def like(parameter: Tensor, entries: Tensor) -> Tensor:
    """Undo of `own_entries` for a value of a parameter."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import DTensor  # loaded already

        mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore
        return DTensor.from_local(
            entries, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return torch.view_as_complex(entries) if parameter.is_complex() else entries


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
