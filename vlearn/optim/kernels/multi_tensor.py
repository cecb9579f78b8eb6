"""Work on many tensors by a few operations, however many there are: what an accelerator's host would wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlearn.optim.kernels.compiled import flat


def copied(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of tensors of one device in a dtype."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one device in a dtype: themselves where all have it."""
    return tensors if all(tensor.dtype == dtype for tensor in tensors) else copied(tensors, dtype)


def read(tensors: list[Tensor]) -> list[Any]:
    """The entries of tensors of one shape as Python's numbers, or lists of them, in one read for each device."""
    values: list[Any] = [None] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    for places in by_device.values():
        first, *others = (tensors[place] for place in places)
        rows = torch.stack([first, *others]).tolist() if others else [first.tolist()]
        for place, value in zip(places, rows, strict=True):
            values[place] = value
    return values


def in_memory_order(tensor: Tensor) -> Tensor:
    """The entries of a tensor as one row, in the order that copies none if there is one."""
    rows = flat(tensor)
    return tensor.reshape(-1) if rows is None else rows[0]


def reconcile(masters: list[Tensor], means: list[Tensor]) -> None:
    """Let masters of higher precision follow their means where these are not the masters, rounded: users write them.

    Args:
        masters: float32, changed in place.
        means: in lower precision, in the same shapes.
    """
    on_cpu = masters[0].device.type == "cpu"
    rows = [] if on_cpu or len(masters) == 1 else _alike(masters, means)
    if not rows:
        for master, mean in zip(masters, means, strict=True):
            master.copy_(reconciled(master, mean))
        return
    of_masters, of_means = zip(*rows, strict=True)
    found = reconciled(torch.cat(of_masters), torch.cat(of_means))
    torch._foreach_copy_(of_masters, found.split([len(row) for row in of_masters]))


def reconciled(master: Tensor, mean: Tensor) -> Tensor:
    """The float32 master copy; but where the weights are not it, rounded, the user has written them, and they win."""
    return torch.where(master.to(mean.dtype) == mean, master, mean.float())


def _alike(masters: list[Tensor], means: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Masters and means as rows of their entries in memory; nothing if any differ in layout."""
    rows = []
    for master, mean in zip(masters, means, strict=True):
        left, right = flat(master), flat(mean)
        if left is None or right is None or master.stride() != mean.stride():
            return []
        rows.append((left[0], right[0]))
    return rows
