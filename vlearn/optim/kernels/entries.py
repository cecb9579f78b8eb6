"""The entries of a tensor that this process works on: its shard of a distributed one, complex numbers as real pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn.sharded.tensors import is_dtensor, shard


def as_real(tensor: Tensor) -> Tensor:
    """The tensor; of a complex one a view as real and imaginary parts ``[..., 2]``, as torch's optimizers have it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


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


def matrix_like(parameter: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A matrix ``[O, I]`` of one value, of a parameter ``[O, ...]`` of real numbers, spread over processes as that."""
    rows, columns = len(parameter), parameter.numel() // len(parameter)
    if not is_dtensor(parameter):
        return torch.full((rows, columns), value, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import DTensor

    own = shard(parameter)
    entries = own.new_full(own.shape if own.dim() == 2 else (len(own), columns), value, dtype=dtype)
    mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore
    shape, stride = torch.Size((rows, columns)), (columns, 1)
    return DTensor.from_local(entries, mesh, placements, run_check=False, shape=shape, stride=stride)


def square_like(parameter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """A zero matrix ``[size, size]``; of a distributed parameter each process has some of its rows."""
    if not is_dtensor(parameter):
        return torch.zeros(size, size, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import Replicate, Shard, zeros

    placements = [Replicate() if each.is_replicate() else Shard(0) for each in parameter.placements]  # pyright: ignore
    return zeros(size, size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)  # pyright: ignore
