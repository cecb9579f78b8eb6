"""Where the entries of a slice are in their whole parameter: what noise that does not depend on sharding hangs on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlearn._torch_internals import global_offset
from vlearn.optim.kernels.entries import as_real
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.sharded.tensors import is_dtensor

ROWS = 2**22  # entries whose numbers are held at once


def fill(
    piece: ParameterSlice, noise: Tensor, run: Callable[[int, int], Tensor], anywhere: Callable[[Tensor], Tensor]
) -> None:
    """Fill a tensor with a number for each entry of a slice, which depends on its place in the whole parameter alone.

    Args:
        noise: to be filled, contiguous, with as many entries as the slice.
        run: the numbers of consecutive entries, from the first one and their count.
        anywhere: those of entries by their numbers, int64, in the same shape.
    """
    sharded, here = is_dtensor(piece.parameter), piece.weights.shape
    shape = piece.parameter.shape if sharded else as_real(piece.parameter.data).shape
    offset = list(global_offset(piece.parameter)) if sharded else [0] * len(shape)
    if piece.rows is not None:
        offset[0] += piece.rows[0]
    if noise.numel() == 0:
        return
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(at * stride for at, stride in zip(offset, strides, strict=True))
    # Below the last axis of which only a part is here, entries are consecutive.
    split = max((axis for axis in range(len(shape)) if here[axis] != shape[axis]), default=0)
    starts = torch.zeros((), dtype=torch.int64)
    for axis in range(split):
        starts = starts.unsqueeze(-1) + torch.arange(here[axis]) * strides[axis]
    starts, length = starts.flatten() + first, math.prod(here[split:])
    if len(starts) == 1:
        noise.view(-1).copy_(run(first, length))
        return
    rows = noise.view(len(starts), length)
    step = max(1, ROWS // length)
    for begin in range(0, len(rows), step):
        entries = starts[begin : begin + step].to(noise.device).unsqueeze(1) + torch.arange(length, device=noise.device)
        rows[begin : begin + step] = anywhere(entries)
