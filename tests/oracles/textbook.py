"""Conjugate posteriors as textbooks have them, log-partition functions, and expected losses in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beta(alpha: float, beta: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """(α, β) after zeros and ones y."""
    return alpha + y.sum(), beta + (1 - y).sum()


def gamma(shape: float, rate: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """(shape, rate) after counts y."""
    return shape + y.sum(), torch.as_tensor(rate + len(y), dtype=torch.float64)


def dirichlet(concentration: Tensor, y: Tensor) -> Tensor:
    """Concentration after class numbers y."""
    return concentration + torch.stack([(y == c).sum() for c in range(len(concentration))])


def gaussian_mean(mean: float, precision: float, y: Tensor, noise_variance: float) -> tuple[Tensor, Tensor]:
    """(mean ``[1]``, precision) after y."""
    after = precision + len(y) / noise_variance
    return ((precision * mean + y.sum() / noise_variance) / after).reshape(1), torch.as_tensor(
        after, dtype=torch.float64
    )


def regression(mean: Tensor, precision: Tensor, x: Tensor, y: Tensor, noise_variance: float) -> tuple[Tensor, Tensor]:
    """(mean, precision) after y ``[N]`` at x ``[N, P]``."""
    after = precision + x.mT @ x / noise_variance
    return torch.linalg.solve(after, precision @ mean + x.mT @ y / noise_variance), after


def log_partition_beta(natural: Tensor) -> Tensor:
    return torch.lgamma(natural + 1).sum() - torch.lgamma((natural + 1).sum())


log_partition_dirichlet = log_partition_beta


def log_partition_gamma(natural: Tensor) -> Tensor:
    return torch.lgamma(natural[0] + 1) - (natural[0] + 1) * (-natural[1]).log()


def log_partition_gaussian(natural: Tensor, size: int) -> Tensor:
    linear, square = natural[:size], natural[size:].reshape(size, size)
    square = (square + square.mT) / 2
    quadratic = linear @ torch.linalg.solve(square, linear)
    return -0.25 * quadratic - 0.5 * (-2 * square).logdet() + 0.5 * size * math.log(2 * math.pi)


def expected_loss_bernoulli(natural: Tensor, y: Tensor) -> Tensor:
    """E[-y log θ - (1 - y) log(1 - θ)] under a Beta."""
    alpha, beta = natural + 1
    whole = torch.digamma(alpha + beta)
    return -y * (torch.digamma(alpha) - whole) - (1 - y) * (torch.digamma(beta) - whole)


def expected_loss_poisson(natural: Tensor, y: Tensor) -> Tensor:
    """E[θ - y log θ] under a Gamma."""
    shape, rate = natural[0] + 1, -natural[1]
    return shape / rate - y * (torch.digamma(shape) - rate.log())


def expected_loss_categorical(natural: Tensor, y: int) -> Tensor:
    """E[-log θ_y] under a Dirichlet."""
    return torch.digamma((natural + 1).sum()) - torch.digamma(natural[y] + 1)


def expected_loss_gaussian(natural: Tensor, x: Tensor, y: Tensor, noise_variance: float) -> Tensor:
    """E[(y - xᵀθ)²/(2σ²)] under a Gaussian."""
    size = len(x)
    square = natural[size:].reshape(size, size)
    covariance = torch.linalg.inv(-(square + square.mT))  # a function of the symmetric part alone
    mean = covariance @ natural[:size]
    return ((y - x @ mean).square() + x @ covariance @ x) / (2 * noise_variance)
