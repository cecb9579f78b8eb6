"""For how long gradient descent has trained a network, see `vlearn.gaussians.stopped_training`."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vlearn._torch_internals import begin_schedule

_UNKNOWN = "give training_time as a number: the sum of the learning rates of all steps, divided by 1 - momentum."


def training_time(optimizer: Optimizer, steps: int, scheduler: LRScheduler | None = None) -> float:
    """η = Σ_t lr_t/(1 - momentum), the time of the gradient flow that torch's SGD has followed.

    Args:
        optimizer: torch's SGD, after training.
        steps: how many steps it has taken.
        scheduler: its schedule, after training, stepped equally often; the rates that it has set are computed again.
    Raises:
        TypeError: for another optimizer, whose preconditioner changes the flow.
        ValueError: if the parameter groups differ in their rates or momenta, or the schedule cannot be repeated.
    """
    if not isinstance(optimizer, SGD):
        raise TypeError(f"{type(optimizer).__name__} does not follow the gradient: {_UNKNOWN}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}, but it must be a positive whole number.")
    shared = ("lr", "momentum", "dampening")
    if len({tuple(float(group[name]) for name in shared) for group in optimizer.param_groups}) != 1:
        raise ValueError(
            f"the parameter groups differ in learning rate or momentum, so there is no one training time: {_UNKNOWN}"
        )
    if scheduler is None:
        return steps * _pace(optimizer)
    try:
        paces = _paces(optimizer, scheduler)
    except Exception as error:
        name = type(scheduler).__name__
        raise ValueError(f"the rates of this {name} cannot be computed again ({error}): {_UNKNOWN}") from error
    return steps * sum(paces) / len(paces)


def _pace(optimizer: SGD) -> float:
    """The time of one step: lr/(1 - momentum), of which dampening keeps a part."""
    group = optimizer.param_groups[0]
    rate, momentum = float(group["lr"]), float(group["momentum"])
    return rate * (1 - float(group["dampening"])) / (1 - momentum) if momentum else rate


def _paces(optimizer: SGD, scheduler: LRScheduler) -> list[float]:
    """Those of every setting of a schedule so far, by running it again from its beginning."""
    if scheduler.optimizer is not optimizer:
        raise ValueError("it sets those of another optimizer")
    again: Any = copy.copy(scheduler)
    kept = {key: value for key, value in scheduler.__dict__.items() if key not in ("optimizer", "step")}
    again.__dict__ = copy.deepcopy(kept)
    again.optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    again.optimizer.param_groups[0].update({**group, "lr": group["initial_lr"]})
    again.base_lrs, again.last_epoch = again.base_lrs[:1], -1
    paces: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step of this optimizer comes before
        begin_schedule(again)
        for _ in range(scheduler.last_epoch):
            paces.append(_pace(again.optimizer))
            type(again).step(again)
    if not math.isclose(_pace(again.optimizer), _pace(optimizer), rel_tol=1e-6, abs_tol=1e-12):
        raise ValueError("from its beginning it comes to other rates")
    return paces
