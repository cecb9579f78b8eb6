"""Sums in float64, on devices that have it, and in nothing narrower than float32."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or what a device has in its place."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float64, or what its device has in its place."""
    return tensor.to(wide_dtype(tensor.device))


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32, if its dtype is narrower."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
