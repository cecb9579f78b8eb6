"""Examples whose likelihoods have the form of a family, log p(y_j | θ) = ⟨φ_j, T(θ)⟩ + const."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlearn.conjugate.checks import check_all, check_positive, numbers
from vlearn.conjugate.families import Beta, Dirichlet, Family, Gamma, Gaussian


@dataclass(frozen=True, eq=False)
class Data:
    """N examples of a conjugate likelihood."""

    y: Tensor
    family: ClassVar[type[Family]]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def width(self) -> int:
        """K, the number of natural parameters."""
        return 2

    def statistics(self, index: Tensor) -> Tensor:
        """φ of some examples, ``[n, K]``."""
        raise NotImplementedError

    def summed_statistics(self, weights: Tensor) -> Tensor:
        """Σ_j weights_j φ_j, ``[K]``."""
        return weights @ self.statistics(torch.arange(len(self), device=self.y.device))

    def log_predictive(self, q: Any) -> Tensor:
        """log E_q[p(y_j | θ)] ``[N]``, q one posterior for all examples or one for each."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Bernoulli(Data):
    """y ``[N]`` zeros and ones."""

    family: ClassVar[type[Family]] = Beta

    def __post_init__(self) -> None:
        _set_targets(self)
        check_all("y", self.y, (self.y == 0) | (self.y == 1), "must be 0 or 1", "use y.round() or Categorical")

    def statistics(self, index: Tensor) -> Tensor:
        """(y, 1 - y) of each toss ``[N, 2]``."""
        return torch.stack([self.y[index], 1 - self.y[index]], 1)

    def log_predictive(self, q: Beta) -> Tensor:
        """log E_q[p(y|π)] of each toss ``[N]``, in nats."""
        return torch.where(self.y == 1, q.alpha, q.beta).log() - (q.alpha + q.beta).log()


@dataclass(frozen=True, eq=False)
class Poisson(Data):
    """y ``[N]`` counts."""

    family: ClassVar[type[Family]] = Gamma

    def __post_init__(self) -> None:
        _set_targets(self)
        whole = (self.y >= 0) & (self.y == self.y.round())
        check_all("y", self.y, whole, "must be a count, 0, 1, 2, ...", "use LinearRegression for real numbers")

    def statistics(self, index: Tensor) -> Tensor:
        """(y, -1) of each count ``[N, 2]``."""
        return torch.stack([self.y[index], -torch.ones_like(self.y[index])], 1)

    def log_predictive(self, q: Gamma) -> Tensor:
        """log E_q[p(y|λ)] of each count ``[N]``, in nats."""
        y = self.y  # the negative binomial distribution
        ways = torch.lgamma(q.shape + y) - torch.lgamma(q.shape) - torch.lgamma(y + 1)
        return ways - q.shape * q.rate.reciprocal().log1p() - y * q.rate.log1p()


@dataclass(frozen=True, eq=False)
class Categorical(Data):
    """y ``[N]`` class numbers below `classes`."""

    classes: int
    family: ClassVar[type[Family]] = Dirichlet

    def __post_init__(self) -> None:
        _set_targets(self)
        known = (self.y >= 0) & (self.y < self.classes) & (self.y == self.y.round())
        check_all("y", self.y, known, f"must be a class number, 0 to {self.classes - 1}", "raise classes=")

    @property
    def width(self) -> int:
        """The number of classes."""
        return self.classes

    def statistics(self, index: Tensor) -> Tensor:
        """One-hot labels ``[N, C]``."""
        return F.one_hot(self.y[index].long(), self.classes).double()

    def log_predictive(self, q: Dirichlet) -> Tensor:
        """log E_q[p(y|π)] of each label ``[N]``, in nats."""
        probability = q.mean.expand(len(self), -1)
        return probability.gather(1, self.y.long().unsqueeze(1)).squeeze(1).log()


@dataclass(frozen=True, eq=False)
class GaussianMean(Data):
    """y ``[N]`` around one unknown mean, with a known noise variance σ²."""

    noise_variance: float
    family: ClassVar[type[Family]] = Gaussian

    def __post_init__(self) -> None:
        _set_targets(self)
        _check_noise_variance(self)

    def statistics(self, index: Tensor) -> Tensor:
        """(y/σ², -1/(2σ²)) of each value, in the natural parameters of the mean's posterior."""
        y = self.y[index]
        return torch.stack([y, -0.5 * torch.ones_like(y)], 1) / self.noise_variance

    def log_predictive(self, q: Gaussian) -> Tensor:
        """log E_q[p(y|μ)] of each value ``[N]``, in nats."""
        return _log_normal(self.y, q.mean.squeeze(-1), self.noise_variance + q.variance.squeeze(-1))


@dataclass(frozen=True, eq=False)
class LinearRegression(Data):
    """y ``[N]`` around xᵀθ, with a known noise variance σ².

    With the prior N(0, I/δ) and σ² = 1, S = XᵀX + δI and removal is Cook's: θ moves by S⁻¹x e/(1 - v), e = xᵀθ - y,
    v = xᵀS⁻¹x.

    Args:
        y: ``[N]`` targets.
        x: ``[N, P]`` features; a column of ones makes an intercept.
        noise_variance: σ².
    """

    x: Tensor
    noise_variance: float
    family: ClassVar[type[Family]] = Gaussian

    def __post_init__(self) -> None:
        _set_targets(self)
        x = numbers("x", self.x)
        if x.dim() != 2 or x.shape[1] == 0 or len(x) != len(self.y):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but it must be [N, P] with N = {len(self.y)} as in y: use x.flatten(1)."
            )
        object.__setattr__(self, "x", x)
        _check_noise_variance(self)

    @property
    def width(self) -> int:
        """The number of natural parameters of the weights' posterior."""
        return self.x.shape[1] + self.x.shape[1] ** 2

    def statistics(self, index: Tensor) -> Tensor:
        """(y x/σ², -x xᵀ/(2σ²)) of each example, in the natural parameters of the weights' posterior."""
        x, y = self.x[index], self.y[index]
        squares = x.unsqueeze(2) * x.unsqueeze(1)  # [n, P, P]
        return torch.cat([x * y.unsqueeze(1), -0.5 * squares.flatten(1)], 1) / self.noise_variance

    def summed_statistics(self, weights: Tensor) -> Tensor:
        """The same summed over the examples, without a matrix for each."""
        weighted = self.x * weights.unsqueeze(1)  # nothing of size N P²
        return torch.cat([weighted.mT @ self.y, -0.5 * (self.x.mT @ weighted).flatten()]) / self.noise_variance

    def log_predictive(self, q: Gaussian) -> Tensor:
        """log E_q[p(y|x, θ)] of each example ``[N]``, in nats."""
        mean = (self.x * q.mean).sum(1)
        spread = (self.x.unsqueeze(1) @ q.covariance).squeeze(1)
        return _log_normal(self.y, mean, self.noise_variance + (spread * self.x).sum(1))


def _set_targets(data: Data) -> None:
    y = numbers("y", data.y)
    if y.dim() != 1 or len(y) == 0:
        raise ValueError(f"y has shape {tuple(y.shape)}, but it must be [N] with N >= 1: give one target per example.")
    object.__setattr__(data, "y", y)


def _check_noise_variance(data: GaussianMean | LinearRegression) -> None:
    noise_variance = numbers("noise_variance", data.noise_variance)
    check_positive("noise_variance", noise_variance, "use the variance of y around its mean, or 1")


def _log_normal(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((2 * math.pi * variance).log() + (y - mean).square() / variance)
