"""Elementwise updates compiled to one kernel per tensor, for tensors large enough to repay the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Entries; below, multi-tensor operations over a block of tensors are faster. A call costs .2 ms on the host, which an
# accelerator has to wait for.
SMALLEST, SMALLEST_ON_ACCELERATOR = 2**14, 2**22


@cache
def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """The function as one kernel, compiled at its first call and again only for another dtype or device.

    Sizes and numbers such as the learning rate are arguments of the kernel: a schedule compiles nothing anew.
    """
    return torch.compile(function, dynamic=True)


def flat(*tensors: Tensor) -> list[Tensor] | None:
    """Tensors of one layout as rows of their entries in memory; None if they differ in layout or dtype."""
    first = tensors[0]
    if any(tensor.stride() != first.stride() or tensor.dtype != first.dtype for tensor in tensors):
        return None
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    if not first.permute(order).is_contiguous():
        return None
    # Through .data: the compiler takes the tensor that a view was made of for part of the input, and its shape too.
    return [tensor.permute(order).view(-1).data for tensor in tensors]
