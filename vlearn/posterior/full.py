"""Gaussian posteriors with a dense covariance, for models of up to a few thousand parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vlearn.posterior.covariance import Covariance


class Full:
    """q = N(m, S⁻¹) with a dense precision S.

    Args:
        mean: posterior mean of each parameter by name; the order gives that of the precision's rows.
        precision: S ``[P, P]``, summed over the training data, prior included.
        num_data: number of training examples N.

    Raises:
        ValueError: if the precision's shape does not fit, or it is not symmetric and positive definite.
    """

    def __init__(self, mean: Mapping[str, Tensor], precision: Tensor, num_data: float):
        count = sum(tensor.numel() for tensor in mean.values())
        if precision.shape != (count, count):
            raise ValueError(
                f"precision has shape {tuple(precision.shape)}, but the {count} entries of the mean need "
                f"({count}, {count})."
            )
        scale = precision.diagonal().abs().max()
        if bool((precision - precision.mT).abs().max() > 1e-5 * scale):  # cholesky reads one triangle alone
            raise ValueError("precision is not symmetric: use (S + S.mT) / 2 if it is so but for rounding.")
        factor, info = torch.linalg.cholesky_ex(precision)
        if int(info) != 0:
            raise ValueError("precision is not positive definite: add the prior precision to its diagonal.")
        self.mean = dict(mean)
        self.num_data = num_data
        self.parameters: dict[str, Tensor] = {}
        self._factor = factor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.mean)

    @property
    def variance(self) -> dict[str, Tensor]:
        """Diagonal of Σ by parameter name, in the parameter's shape."""
        diagonal = torch.cholesky_inverse(self._factor).diagonal()
        parts = diagonal.split([tensor.numel() for tensor in self.mean.values()])
        return {name: part.reshape(self.mean[name].shape) for name, part in zip(self.mean, parts, strict=True)}

    def at_mean(self) -> AbstractContextManager[None]:
        """The posterior does not own the model's weights: they are taken as they are."""
        return nullcontext()

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of every parameter by name."""
        noise = torch.randn(
            self._factor.shape[0], 1, dtype=self._factor.dtype, device=self._factor.device, generator=generator
        )
        # S = L Lᵀ, so L⁻ᵀ z has covariance S⁻¹
        moves = torch.linalg.solve_triangular(self._factor.mT, noise, upper=True).squeeze(1)
        parts = moves.split([tensor.numel() for tensor in self.mean.values()])
        return {
            name: mean + part.reshape(mean.shape).to(mean.dtype)
            for (name, mean), part in zip(self.mean.items(), parts, strict=True)
        }

    def covariance(self, parameters: Mapping[str, Tensor]) -> Covariance:
        """Σ keyed by the given parameters.

        Raises:
            ValueError: if a parameter of the posterior is missing: a dense Σ cannot be cut.
        """
        missing = [name for name in self.mean if name not in parameters]
        if missing:
            raise ValueError(f"the model has no trainable parameter {missing[0]!r}, but the posterior has.")
        return Covariance({}, tuple(parameters[name] for name in self.mean), self._factor)
