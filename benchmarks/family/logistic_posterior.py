"""Each structure of Σ on a posterior that can be drawn: logistic regression with two weights.

The truth is the density on a grid; beside it stand the Gaussians nearest to it, KL(q ‖ p), with a full and with a
diagonal covariance, by quadrature. Every optimizer minimises that divergence within its structure, its rates falling
as 1/t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, kl_divergence

import vlearn
from benchmarks.training.loop import finish

BEST, BEST_DIAGONAL, LAPLACE = "nearest Gaussian", "nearest diagonal Gaussian", "Laplace"
STEPS = 3000


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Binary labels y ``[N]`` of inputs x ``[N, 2]``, a prior N(0, 1/δ) over the two weights."""

    x: Tensor
    y: Tensor
    prior_precision: float

    @classmethod
    def example(cls) -> Logistic:
        """40 points with correlated features."""
        generator = torch.Generator().manual_seed(0)
        mixing = torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=torch.float64)
        x = torch.randn(40, 2, generator=generator, dtype=torch.float64) @ mixing
        chance = torch.sigmoid(x @ torch.tensor([2.0, -1.0], dtype=torch.float64))
        return cls(x, (chance > torch.rand(40, generator=generator)).double(), 0.5)

    def energy(self, weights: Tensor) -> Tensor:
        """Negative log density ``[...]`` of weights ``[..., 2]``, but for a constant."""
        scores = weights @ self.x.mT
        losses = F.softplus(scores) - scores * self.y
        return losses.sum(-1) + self.prior_precision * weights.square().sum(-1) / 2

    def log_normalizer(self, centre: MultivariateNormal) -> float:
        """log ∫ exp(-energy), by a sum over a grid ten standard deviations wide on either side."""
        places = torch.linspace(-10, 10, 801, dtype=torch.float64)
        grid = torch.cartesian_prod(places, places) @ centre.scale_tril.mT + centre.mean
        cell = (places[1] - places[0]).square() * centre.scale_tril.diagonal().prod()
        return float((-self.energy(grid)).logsumexp(0) + cell.log())


def nearest_gaussian(problem: Logistic, diagonal: bool = False) -> MultivariateNormal:
    """The Gaussian q that minimises KL(q ‖ p), by L-BFGS and 24 x 24 Gauss-Hermite nodes."""
    nodes, mass = quadrature()
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    below = torch.zeros(1, dtype=torch.float64, requires_grad=not diagonal)
    moving = [tensor for tensor in (mean, log_scale, below) if tensor.requires_grad]
    search = torch.optim.LBFGS(moving, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def root() -> Tensor:
        return torch.diag(log_scale.exp()) + F.pad(below.reshape(1, 1), (0, 1, 1, 0))

    def objective() -> Tensor:
        search.zero_grad()
        value = mass @ problem.energy(mean + nodes @ root().mT) - log_scale.sum()
        value.backward()
        return value

    for _ in range(3):
        search.step(objective)
    return MultivariateNormal(mean.detach(), scale_tril=root().detach())


def laplace(problem: Logistic) -> MultivariateNormal:
    """The Laplace approximation: the minimum by Newton's method, and the inverse Hessian there."""
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(problem.x @ weights)
        hessian = (problem.x.mT * (p * (1 - p))) @ problem.x + problem.prior_precision * torch.eye(2).double()
        gradient = problem.x.mT @ (p - problem.y) + problem.prior_precision * weights
        weights = weights - torch.linalg.solve(hessian, gradient)
    return MultivariateNormal(weights, precision_matrix=hessian)


def quadrature(count: int = 24) -> tuple[Tensor, Tensor]:
    """Nodes ``[count², 2]`` of the standard normal in the plane, and their masses."""
    nodes, mass = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(count))
    return torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(mass, mass).prod(1) / (2 * math.pi)


def divergence(q: MultivariateNormal, problem: Logistic, log_normalizer: float) -> float:
    """KL(q ‖ p) from the true density, in nats."""
    nodes, mass = quadrature()
    return float(mass @ problem.energy(q.mean + nodes @ q.scale_tril.mT) - q.entropy()) + log_normalizer


def optimizers() -> dict[str, Callable[..., Any]]:
    """By name, functions from a model and settings to an optimizer."""
    bernoulli = {"likelihood": lambda f: Bernoulli(logits=f)}
    makers: dict[str, Callable[..., Any]] = {
        "IVON": lambda model, **settings: vlearn.IVON(model, rescale_lr=False, **settings),
        "VON": lambda model, **settings: vlearn.VON(model, **bernoulli, **settings),
        "VOGN": vlearn.VOGN,
        "FullVON": lambda model, **settings: vlearn.FullVON(model, **bernoulli, **settings),
    }
    for name, corrected in {"KFACVON": False, "EK-FAC": True}.items():
        makers[name] = lambda model, corrected=corrected, **settings: vlearn.KFACVON(
            model, eigenvalue_correction=corrected, **bernoulli, **settings
        )
    return makers


def train(problem: Logistic, name: str, steps: int = STEPS) -> MultivariateNormal:
    """The Gaussian that an optimizer arrives at."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()
    count = len(problem.y)
    optimizer = optimizers()[name](
        model,
        lr=0.1,
        ess=count,
        beta1=0.0,
        weight_decay=problem.prior_precision / count,
        generator=torch.Generator().manual_seed(0),
    )
    for step in range(steps):
        rate = 1 / (10 + step / 4)
        optimizer.param_groups[0].update(lr=rate, beta2=1 - rate)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(problem.x).squeeze(1), problem.y).backward()
        optimizer.step()
    weight = model.weight
    covariance = optimizer.posterior().covariance({"weight": weight})
    columns = covariance.multiply({weight: torch.eye(2, dtype=torch.float64).reshape(2, *weight.shape)})[weight]
    finish(optimizer)
    return MultivariateNormal(weight.detach().flatten().clone(), columns.reshape(2, 2))


def compare(steps: int = STEPS, advance: Callable[[str], None] = lambda said: None) -> dict[str, Any]:
    """Every Gaussian's mean, covariance and divergences.

    Returns:
        {"problem": Logistic, "gaussians": by name, "divergence": KL(q ‖ p) and KL(q ‖ nearest Gaussian) by name}.
    """
    problem = Logistic.example()
    best = nearest_gaussian(problem)
    gaussians = {BEST: best, BEST_DIAGONAL: nearest_gaussian(problem, diagonal=True), LAPLACE: laplace(problem)}
    for name in optimizers():
        gaussians[name] = train(problem, name, steps)
        advance(f"logistic regression: {name} trained")
    constant = problem.log_normalizer(best)
    return {
        "problem": problem,
        "gaussians": gaussians,
        "divergence": {
            name: {"from_truth": divergence(q, problem, constant), "from_nearest": float(kl_divergence(q, best))}
            for name, q in gaussians.items()
        },
    }
