"""Sums, averages and results over the processes of a group, each by one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

MESSAGE_BYTES = 2**26


def process_count() -> int:
    """The number of processes in the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_rank() -> int:
    """This process's place in the default group; 0 without one."""
    return distributed.get_rank() if process_count() > 1 else 0


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


def told_by_all(told: Any, group: Any = None) -> list[Any]:
    """What each process of a group tells, in their order; it is pickled."""
    everything: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everything, told, group=group)
    return everything


def joined_rows(rows: Tensor, counts: Sequence[int], group: Any = None) -> Tensor:
    """The rows of all processes of a group one after the other, ``[sum(counts), *shape]``, on the CPU.

    Beside the result no more than `MESSAGE_BYTES` are held.

    Args:
        rows: ``[n, *shape]`` of one shape and dtype in all processes.
        counts: of each process's rows.
    """
    whole = torch.empty(sum(counts), *rows.shape[1:], dtype=rows.dtype, device="cpu")
    device = _message_device(group)
    for rank, part in enumerate(whole.split(list(counts))):
        if rank == distributed.get_rank(group):
            part.copy_(rows)
        for piece in part.reshape(-1).view(torch.uint8).split(MESSAGE_BYTES):
            if piece.numel():
                message = piece.to(device)
                distributed.broadcast(message, distributed.get_global_rank(group, rank) if group else rank, group=group)
                piece.copy_(message)
    return whole


def _message_device(group: Any) -> torch.device:
    """Where a group's messages live; those of its objects go there by themselves."""
    if distributed.get_backend(group) not in ("nccl", "xccl"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


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
