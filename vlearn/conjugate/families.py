"""Exponential families in natural parameters, q(θ) = exp(⟨λ, T(θ)⟩ - A(λ))."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlearn.conjugate.checks import check_positive, numbers

REMEDY = "give a proper prior, and remove only examples that are in the posterior"


@dataclass(frozen=True, eq=False)
class Family:
    """A distribution q(θ) = exp(⟨λ, T(θ)⟩ - A(λ)), or a batch of them.

    Attributes:
        natural: λ, ``[K]``, or ``[..., K]`` for a batch.
    """

    natural: Tensor

    def __post_init__(self) -> None:
        natural = numbers("natural", self.natural)
        if natural.dim() == 0:
            raise ValueError("natural is a single number, but it must be [K] or [..., K]: use from_standard(...).")
        object.__setattr__(self, "natural", natural)
        self._check()

    def _check(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Beta(Family):
    """Beta(α, β) over the probability of a one."""

    @classmethod
    def from_standard(cls, alpha: float | Tensor, beta: float | Tensor) -> Beta:
        """From α > 0 and β > 0; tensors give a batch."""
        return cls(_pairs(numbers("alpha", alpha) - 1, numbers("beta", beta) - 1))

    def _check(self) -> None:
        _check_width(self, 2)
        check_positive("alpha", self.alpha, REMEDY)
        check_positive("beta", self.beta, REMEDY)

    @property
    def alpha(self) -> Tensor:
        """α ``[...]``."""
        return self.natural[..., 0] + 1

    @property
    def beta(self) -> Tensor:
        """β ``[...]``."""
        return self.natural[..., 1] + 1

    @property
    def mean(self) -> Tensor:
        """α/(α + β) ``[...]``."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def variance(self) -> Tensor:
        """αβ/((α + β)²(α + β + 1)) ``[...]``."""
        return self.mean * (1 - self.mean) / (self.alpha + self.beta + 1)


@dataclass(frozen=True, eq=False)
class Gamma(Family):
    """Gamma(shape, rate) over the rate of a Poisson distribution."""

    @classmethod
    def from_standard(cls, shape: float | Tensor, rate: float | Tensor) -> Gamma:
        """From shape > 0 and rate > 0; tensors give a batch."""
        return cls(_pairs(numbers("shape", shape) - 1, -numbers("rate", rate)))

    def _check(self) -> None:
        _check_width(self, 2)
        check_positive("shape", self.shape, REMEDY)
        check_positive("rate", self.rate, REMEDY)

    @property
    def shape(self) -> Tensor:
        """The shape α ``[...]``."""
        return self.natural[..., 0] + 1

    @property
    def rate(self) -> Tensor:
        """The rate β ``[...]``."""
        return -self.natural[..., 1]

    @property
    def mean(self) -> Tensor:
        """α/β ``[...]``."""
        return self.shape / self.rate

    @property
    def variance(self) -> Tensor:
        """α/β² ``[...]``."""
        return self.shape / self.rate.square()


@dataclass(frozen=True, eq=False)
class Dirichlet(Family):
    """Dirichlet(concentration) over the probabilities of C classes."""

    @classmethod
    def from_standard(cls, concentration: Sequence[float] | Tensor) -> Dirichlet:
        """From ``[C]`` positive concentrations."""
        return cls(numbers("concentration", concentration) - 1)

    def _check(self) -> None:
        if self.natural.shape[-1] < 2:
            raise ValueError(f"a Dirichlet of {self.natural.shape[-1]} classes, but it needs two or more.")
        check_positive("concentration", self.concentration, REMEDY)

    @property
    def concentration(self) -> Tensor:
        """α ``[..., C]``."""
        return self.natural + 1

    @property
    def mean(self) -> Tensor:
        """α_c/Σα ``[..., C]``."""
        return self.concentration / self.concentration.sum(-1, keepdim=True)

    @property
    def variance(self) -> Tensor:
        """The variance of each probability ``[..., C]``."""
        return self.mean * (1 - self.mean) / (self.concentration.sum(-1, keepdim=True) + 1)


@dataclass(frozen=True, eq=False)
class Gaussian(Family):
    """N(m, S⁻¹) over P weights; λ holds Sm and then the rows of -S/2, so K = P + P²."""

    @classmethod
    def from_standard(cls, mean: Sequence[float] | Tensor, precision: float | Sequence[Any] | Tensor) -> Gaussian:
        """From ``[P]`` means and S: ``[P, P]``, symmetric and positive definite, or δ > 0 for δI."""
        mean, precision = numbers("mean", mean), numbers("precision", precision)
        if mean.dim() != 1 or mean.numel() == 0:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, but it must be [P]: give one mean for each weight.")
        if precision.dim() == 0:
            check_positive("precision", precision, REMEDY)
            precision = precision * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        if precision.shape != (len(mean), len(mean)):
            raise ValueError(
                f"precision has shape {tuple(precision.shape)}, but the {len(mean)} entries of the mean need "
                f"({len(mean)}, {len(mean)}), or one number for all."
            )
        return cls(torch.cat([precision @ mean, -0.5 * precision.flatten()]))

    def _check(self) -> None:
        _check_width(self, self.size + self.size**2)
        S = self.precision
        if bool((S - S.mT).abs().max() > 1e-9 * S.abs().max()):  # cholesky reads one triangle alone
            raise ValueError("precision is not symmetric: use (S + S.mT) / 2 if it is so but for rounding.")
        if bool(torch.linalg.cholesky_ex(S).info.any()):
            raise ValueError(
                "precision is not positive definite: give a prior that is, and remove only examples that are in it."
            )

    @property
    def size(self) -> int:
        """P."""
        return (math.isqrt(4 * self.natural.shape[-1] + 1) - 1) // 2

    @property
    def precision(self) -> Tensor:
        """S, ``[..., P, P]``."""
        return -2 * self.natural[..., self.size :].unflatten(-1, (self.size, self.size))

    @property
    def covariance(self) -> Tensor:
        """S⁻¹, ``[..., P, P]``."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision))

    @property
    def mean(self) -> Tensor:
        """m, ``[..., P]``."""
        weighted = self.natural[..., : self.size, None]  # Sm
        return torch.cholesky_solve(weighted, torch.linalg.cholesky(self.precision)).squeeze(-1)

    @property
    def variance(self) -> Tensor:
        """Diagonal of S⁻¹, ``[..., P]``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(first, second), -1)


def _check_width(family: Family, width: int) -> None:
    if family.natural.shape[-1] != width:
        raise ValueError(
            f"natural has shape {tuple(family.natural.shape)}, but a {type(family).__name__} needs {width} along the "
            "last dimension: use from_standard(...)."
        )
