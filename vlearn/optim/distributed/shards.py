"""Sums over the entries of parameters of which each process has a part, and results that all must have alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlearn.collectives import as_message, from_message
from vlearn.sharded.tensors import is_dtensor


def share(parameter: Tensor, mesh: Any) -> float:
    """What the sum over this process's entries of a parameter counts in a sum over all processes of a mesh.

    It is one over the number of processes that have the same entries: all, if the parameter is not sharded.
    """
    if mesh is None:
        return 1.0
    if not is_dtensor(parameter):
        return 1 / mesh.size()
    copies = (
        size
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True)  # pyright: ignore
        if placement.is_replicate()
    )
    return parameter.device_mesh.size() / mesh.size() / math.prod(copies)  # pyright: ignore


def sum_over(mesh: Any, own: Tensor) -> Tensor:
    """Sums of this process's own numbers, each times its `share`, over all processes of a mesh, in place."""
    for group in mesh.get_all_groups() if mesh is not None else ():
        torch.distributed.all_reduce(own, group=group)
    return own


def of_first(mesh: Any, own: list[Tensor] | None, likes: list[Tensor]) -> list[Tensor] | None:
    """What the first process of a mesh has computed, or None, where others may have rounded otherwise.

    Args:
        own: this process's.
        likes: tensors of the result's shapes, dtype and device; distributed ones stand for the whole.
    """
    message = as_message(own, likes)
    for group in mesh.get_all_groups():
        torch.distributed.broadcast(message, torch.distributed.get_global_rank(group, 0), group=group)
    return from_message(message, likes)
