"""Retraining without one example by SGD with momentum that starts at the trained network, as real images allow.

The objective is (1/N)(Σ_{j≠i} ℓ_j + δ‖θ‖²/2): N and δ stay as they are when example i goes. Every run takes the
minibatches of the run that keeps all examples, its control, and subtracts ℓ_i/N at every step, which is the gradient
without i in the mean. Truth is the difference between the two ends: what training on would have changed anyway, and
nearly all of the minibatches' noise, cancels in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems.batches import CHUNK

MOMENTUM = 0.9


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train on: `lr` is the first and last rate of a cosine."""

    epochs: int
    batch: int
    lr: tuple[float, float]
    prior_precision: float


def without(
    example: int | None, model: nn.Module, x: Tensor, y: Tensor, plan: Plan, seed: int, shown: Tensor
) -> Tensor:
    """Outputs of some examples after each epoch of training on without one.

    Args:
        example: the one to leave out; None is the control.
        model: where to start; left as it is.
        x, y: all ``[N]`` training examples.
        seed: of the minibatches.
        shown: ``[K]`` the examples whose outputs are wanted.

    Returns:
        ``[epochs, K, C]`` outputs.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=plan.lr[0], momentum=MOMENTUM, weight_decay=plan.prior_precision / len(y)
    )
    outputs = []
    for rates, minibatches in _epochs(len(y), plan, seed):
        for rate, index in zip(rates, minibatches, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            if example is not None:
                index = torch.cat([index, torch.tensor([example])])
            index = index.to(y.device)
            losses = F.cross_entropy(model(x[index]), y[index], reduction="none")
            loss = losses.mean() if example is None else losses[:-1].mean() - losses[-1] / len(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            outputs.append(torch.cat([model(x[part]).cpu() for part in shown.split(CHUNK)]))
    return torch.stack(outputs)


def _epochs(num_data: int, plan: Plan, seed: int) -> Iterator[tuple[list[float], list[Tensor]]]:
    """Learning rates and whole minibatches of every epoch."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, num_data // plan.batch)
    first, last = plan.lr
    for epoch in range(plan.epochs):
        shares = ((epoch * count + step) / (plan.epochs * count) for step in range(count))
        rates = [last + (first - last) * (1 + math.cos(math.pi * share)) / 2 for share in shares]
        yield rates, list(torch.randperm(num_data, generator=generator).split(plan.batch))[:count]


def training_time(num_data: int, plan: Plan) -> float:
    """Σ_t lr_t/(1 - momentum) of training on, see `vlearn.posterior.training_time`."""
    return sum(rate for rates, _ in _epochs(num_data, plan, 0) for rate in rates) / (1 - MOMENTUM)
