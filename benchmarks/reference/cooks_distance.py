"""What removing each example of a linear regression does: by refits, in closed form, and as far as a diagonal can know.

Cook's distance of an example is ‖Δθ‖²_S/P, with Δθ the change of the P weights and S the posterior precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problems.linear_regression import Problem
from vlearn import conjugate


@dataclass(frozen=True)
class Removal:
    """What removing each example does: ``[N]`` change of its own prediction, and Cook's distance."""

    change: Tensor
    distance: Tensor


def removal(problem: Problem, moved: Tensor) -> Removal:
    """From ``[N, P]`` changes of θ: Cook's distance is ‖Δθ_i‖²_S/P."""
    distance = ((moved @ problem.precision) * moved).sum(1) / problem.x.shape[1]
    return Removal((problem.x * moved).sum(1), distance)


def refits(problem: Problem) -> Removal:
    """The truth by brute force: every example is deleted in turn, and the rest is fitted from scratch."""
    whole, examples = problem.fit(), torch.arange(len(problem.y))
    return removal(problem, torch.stack([problem.fit(examples != i) - whole for i in examples]))


def closed_form(problem: Problem) -> Removal:
    """The same by one addition to the natural parameters for each example."""
    examples = conjugate.LinearRegression(problem.y, problem.x, problem.noise_variance)
    prior = conjugate.Gaussian.from_standard(torch.zeros(problem.x.shape[1]), problem.prior_precision)
    posterior = conjugate.blr_step(prior, prior, examples)
    return removal(problem, conjugate.leave_one_out(posterior, examples).mean - posterior.mean)


def diagonal_limit(problem: Problem) -> Removal:
    """The refined form with the diagonal of the exact precision at the exact mean: all that a diagonal can know."""
    mean, variance = problem.fit(), problem.precision.diagonal().reciprocal()
    residual = (problem.x @ mean - problem.y) / problem.noise_variance
    leverage = (problem.x.square() @ variance) / problem.noise_variance
    return removal(problem, problem.x * variance * (residual / (1 - leverage)).unsqueeze(1))
