"""Sums, averages and results over the processes of a group, each by one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed


def process_count() -> int:
    """The number of processes in the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def averaged(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Averages over the processes of a group.

    Args:
        tensors: of one dtype and device.
        group: None for the default one.
    """
    return [total.div_(distributed.get_world_size(group)) for total in summed(tensors, group)]


def summed(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Sums over the processes of a group, as `averaged`."""
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(message, group=group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def gathered(row: Tensor, group: Any = None) -> Tensor:
    """The rows of all processes of a group, ``[process, *shape]``, on the CPU."""
    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(rows, row, group=group)
    return torch.stack(rows).cpu()


def compute_on_one_rank(
    tasks: list[Callable[[], list[Tensor] | None]], likes: list[list[Tensor]], group: Any
) -> list[list[Tensor] | None]:
    """Results that one process computes for all, where the processes share the tasks.

    Each computing its own would not do: eigenvectors of repeated eigenvalues are arbitrary, and others differ between
    processes that round differently, by the number of their threads alone.

    Args:
        tasks: the same in all processes; each gives tensors, or None.
        likes: tensors of the results' shapes, dtype and device.
        group: the processes; None for this one alone.
    """
    if group is None:
        return [task() for task in tasks]
    count, rank = distributed.get_world_size(group), distributed.get_rank(group)
    own = {i: task() for i, task in enumerate(tasks) if i % count == rank}
    results: list[list[Tensor] | None] = []
    for i, like in enumerate(likes):
        result = own.get(i)
        message = like[0].new_zeros(1 + sum(tensor.numel() for tensor in like))
        if result is not None:
            torch.cat([message.new_ones(1), *(tensor.reshape(-1) for tensor in result)], out=message)
        distributed.broadcast(message, distributed.get_global_rank(group, i % count), group=group)
        succeeded, *parts = message.split([1, *(tensor.numel() for tensor in like)])
        parts = [part.view(tensor.shape).clone() for part, tensor in zip(parts, like, strict=True)]
        results.append(parts if bool(succeeded) else None)
    return results
