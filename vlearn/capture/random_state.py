"""The random number generators that a forward pass draws from: dropout masks, for a replay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def random_state(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """State of the random number generators that a forward pass on these tensors' devices can use."""
    state = {"cpu": torch.get_rng_state()}
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        state[str(device)] = torch.cuda.get_rng_state(device)
    return state


def random_state_now(before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as `before`, as it is now."""
    return {device: torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device) for device in before}


def has_drawn(before: dict[str, Tensor]) -> bool:
    """Whether a generator has been drawn from since."""
    now = random_state_now(before)
    # By bytes: a recorded pass adds no operator to the user's.
    return any(bool((state.numpy() != now[device].numpy()).any()) for device, state in before.items())


def set_random_state(state: dict[str, Tensor]) -> None:
    """Undo of `random_state`."""
    for device, value in state.items():
        if device == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)
