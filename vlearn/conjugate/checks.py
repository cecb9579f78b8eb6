"""What every family and every data set asks of the numbers that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def numbers(name: str, value: Any) -> Tensor:
    """A float64 copy, all of it finite."""
    value = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    check_all(name, value, value.isfinite(), "must be finite", "drop or impute what is missing")
    return value


def check_all(name: str, value: Tensor, holds: Tensor, rule: str, remedy: str) -> None:
    """Raise with the first number for which the rule does not hold."""
    if not bool(holds.all()):
        first = float(value[~holds].flatten()[0])
        raise ValueError(f"{name} holds {first:g}, but it {rule}: {remedy}.")


def check_positive(name: str, value: Tensor, remedy: str) -> None:
    """Raise unless all are positive."""
    if not bool((value > 0).all()):
        raise ValueError(f"{name}={float(value.min()):g}, but it must be positive: {remedy}.")
