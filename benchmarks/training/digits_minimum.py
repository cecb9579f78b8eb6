"""The digits by an MLP at a minimum of its loss: IVON's mean, and L-BFGS in float64 from there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import vlearn
from benchmarks.problems.digits import Digits, Settings
from benchmarks.problems.networks import mlp
from benchmarks.reference.removals import Minimum, Retraining
from benchmarks.training.digits import epochs
from vlearn.posterior import Diagonal

PRIOR_PRECISIONS = (1.0, 5.0)  # δ of the comparisons there


def minimum_of(
    settings: Settings, data: Digits, each_epoch: Callable[[int, nn.Module], None] = lambda epoch, model: None
) -> tuple[Retraining, Minimum, nn.Module, Diagonal]:
    """The retraining problem, its minimum near IVON's mean, the float64 model there, and IVON's posterior."""
    model, ivon = train(settings, data, each_epoch)
    problem = Retraining(model, data.x, data.y, settings.prior_precision)
    minimum = problem.from_weights_of(model)
    return problem, minimum, problem.model_at(minimum), ivon


def train(
    settings: Settings, data: Digits, each_epoch: Callable[[int, nn.Module], None] = lambda epoch, model: None
) -> tuple[nn.Module, Diagonal]:
    """A network of 1,210 parameters at IVON's mean, with its posterior."""
    torch.manual_seed(settings.seed)
    model = mlp(64, 16, 10)
    optimizer = vlearn.IVON(
        model,
        lr=settings.lr,
        ess=settings.num_data,
        hess_init=settings.hess_init,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    for epoch in epochs(model, optimizer, settings, data):
        each_epoch(epoch, model)
    optimizer.unwatch()
    return model, optimizer.posterior().clone()


def moved_to(model: nn.Module, posterior: Diagonal) -> Diagonal:
    """The same Σ, in float64, about the weights of a float64 model."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    num_data, names = posterior.num_data, posterior.names
    precision = {name: posterior.precision[name].double() / num_data for name in names}
    zero, ess = dict.fromkeys(names, 0.0), dict.fromkeys(names, float(num_data))
    return Diagonal(mean, precision, zero, ess, num_data)
