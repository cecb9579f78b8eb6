"""One training step by whichever optimizer, and its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor


def training_step(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    """One step in the loop that the optimizer is made for: `loss` runs the model."""
    own = optimizer.__module__.startswith("ivon")  # ivon-opt draws in a context, vlearn in the model's forward pass
    with optimizer.sampled_params(train=True) if own else nullcontext():
        optimizer.zero_grad()
        loss().backward()
    optimizer.step()


def finish(optimizer: Any) -> None:
    """Leave the model as a plain one."""
    if hasattr(optimizer, "unwatch"):
        optimizer.unwatch()
