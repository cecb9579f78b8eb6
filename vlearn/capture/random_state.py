"""The random number generators that a pass draws from: dropout masks, for a replay."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """State of torch's generators that a forward pass on these tensors' devices can use, by device."""
    devices = {str(tensor.device) for tensor in tensors}
    return random_state_now(["cpu", *filter(_has_generator, devices - {"cpu"})])


def random_state_now(before: Iterable[str]) -> dict[str, Tensor]:
    """State of the same generators as `before`, as it is now."""
    return {
        device: torch.get_rng_state() if device == "cpu" else _generators(device).get_rng_state(device)
        for device in before
    }


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
            _generators(device).set_rng_state(value, device)


@contextmanager
def random_numbers_from(state: dict[str, Tensor]) -> Iterator[None]:
    """Random numbers as from this state of the generators, which go on as if nothing was drawn."""
    now = random_state_now(state)
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(now)


@contextmanager
def untouched_random_numbers() -> Iterator[None]:
    """Whatever is drawn or seeded inside, torch on all devices, numpy and Python go on as if nothing had been."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with random_numbers_from(random_state_now(["cpu", *_accelerators()])):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _accelerators() -> list[str]:
    """Every accelerator with a generator, if torch has begun to use one."""
    try:
        current = torch.accelerator.current_accelerator()
    except RuntimeError:  # of torch 2.6, where there is none
        return []
    if current is None or not _has_generator(current.type):
        return []
    module = _generators(current.type)
    begun = getattr(module, "is_initialized", lambda: True)()
    return [f"{current.type}:{place}" for place in range(module.device_count())] if begun else []


def _generators(device: str) -> Any:
    """torch's module of a device: torch.cuda, torch.mps, torch.xpu."""
    return torch.get_device_module(device)


def _has_generator(device: str) -> bool:
    return hasattr(getattr(torch, torch.device(device).type, None), "get_rng_state")
