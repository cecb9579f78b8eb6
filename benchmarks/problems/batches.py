"""Data in memory as the batches that vlearn's sweeps read."""

from __future__ import annotations

from torch import Tensor

Batches = list[tuple[Tensor, Tensor]]
CHUNK = 500  # examples of a pass that only reads


def batches(x: Tensor, y: Tensor, size: int = CHUNK) -> Batches:
    """The examples in their order, ``size`` at a time."""
    return list(zip(x.split(size), y.split(size), strict=True))
