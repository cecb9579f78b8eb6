"""Sums, averages and agreements over the processes of a group, each by one message."""

from __future__ import annotations

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


def all_reduce_max(code: int, at_step: bool, device: torch.device, group: Any) -> int:
    """The greatest code of all processes of a group, for a decision that they must take alike.

    Raises:
        RuntimeError: if some processes are at `step()` and others begin another draw.
    """
    codes, places = gathered(torch.tensor([code, at_step], dtype=torch.float32, device=device), group).int().unbind(1)
    if len(places.unique()) > 1:
        raise RuntimeError(
            "some processes are at step() while others begin another draw for it: enter "
            "sampled_params(train=True) equally often in all of them."
        )
    return int(codes.max())
