"""Σ of a Gaussian posterior as sensitivities use it: keyed by the model's parameters, summed over num_data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """Posterior covariance of the parameters that move.

    Attributes:
        diagonal: variance of each entry of a parameter, in the parameter's shape.
        joint: parameters with one dense covariance, in the order of its rows.
        joint_factor: lower Cholesky factor L of their precision, ``[P, P]``.
    """

    diagonal: dict[Tensor, Tensor] = field(default_factory=dict)
    joint: tuple[Tensor, ...] = ()
    joint_factor: Tensor | None = None

    def covers(self, parameter: Tensor) -> bool:
        return parameter in self.diagonal or any(parameter is p for p in self.joint)

    def zeros(self, count: int) -> Tensor:
        """``[count]`` zeros where the covariance lives and as wide as it is."""
        some = next(iter(self.diagonal.values())) if self.diagonal else self.joint_factor
        assert some is not None
        return some.new_zeros(count)

    def multiply(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Σ g of each example.

        Args:
            gradients: by parameter ``[n, *shape]``; a joint parameter that is missing counts as zero.
        Returns:
            By parameter ``[n, *shape]``.
        """
        moved = {p: g * self.diagonal[p] for p, g in gradients.items() if p in self.diagonal}
        if self.joint_factor is None or len(moved) == len(gradients):
            return moved
        n = next(iter(gradients.values())).shape[0]
        columns = [
            gradients[p].reshape(n, -1) if p in gradients else self.joint_factor.new_zeros(n, p.numel())
            for p in self.joint
        ]
        solved = torch.cholesky_solve(torch.cat(columns, 1).to(self.joint_factor.dtype).mT, self.joint_factor).mT
        parts = solved.split([p.numel() for p in self.joint], 1)
        return moved | {p: part.reshape(n, *p.shape) for p, part in zip(self.joint, parts, strict=True)}
