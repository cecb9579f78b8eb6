"""Complex parameters as pairs of reals, as torch's own optimizers treat them."""

from __future__ import annotations

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """The tensor; of a complex one a view as real and imaginary parts ``[..., 2]``."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def like(parameter: Tensor, real: Tensor) -> Tensor:
    """Undo of `as_real` for a value of a parameter."""
    return torch.view_as_complex(real) if parameter.is_complex() else real
