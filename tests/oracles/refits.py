"""Models whose leave-one-out refits are exact: ridge regression in closed form, logistic regression by Newton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def ridge(x: Tensor, y: Tensor, prior_precision: float) -> Tensor:
    """argmin ½Σ(xᵀθ - y)² + ½δ‖θ‖² ``[P]`` for x ``[N, P]``, y ``[N]``."""
    return torch.linalg.solve(x.mT @ x + prior_precision * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y)


def ridge_left_out(x: Tensor, y: Tensor, prior_precision: float) -> Tensor:
    """Prediction for each example by the refit without it ``[N]``."""
    keep = ~torch.eye(len(x), dtype=torch.bool)
    return torch.stack([x[i] @ ridge(x[k], y[k], prior_precision) for i, k in enumerate(keep)])


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression, Σ_i -log softmax(Wx_i)_{y_i} + ½δ‖W‖², W ``[C, D]``."""

    x: Tensor
    y: Tensor
    classes: int
    prior_precision: float

    def _value(self, weight: Tensor, keep: Tensor) -> Tensor:
        loss = F.cross_entropy(self.x[keep] @ weight.mT, self.y[keep], reduction="sum")
        return loss + 0.5 * self.prior_precision * weight.square().sum()

    def _terms(self, weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(value, gradient [CD], Hessian [CD, CD])."""
        x, y = self.x[keep], self.y[keep]
        logits = x @ weight.mT
        p = logits.softmax(1)
        value = self._value(weight, keep)
        gradient = (p - F.one_hot(y, self.classes)).mT @ x + self.prior_precision * weight
        curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        weighted = torch.einsum("ncd,ni->cidn", curvature, x)
        hessian = (weighted @ x).reshape(weight.numel(), weight.numel())
        return value, gradient.flatten(), hessian + self.prior_precision * torch.eye(weight.numel(), dtype=x.dtype)

    def fit(self, keep: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """W by Newton's method with halved steps, to a gradient of 1e-12."""
        keep = torch.ones(len(self.x), dtype=torch.bool) if keep is None else keep
        weight = torch.zeros(self.classes, self.x.shape[1], dtype=self.x.dtype) if start is None else start
        for _ in range(100):
            value, gradient, hessian = self._terms(weight, keep)
            if float(gradient.abs().max()) < 1e-12 * len(self.x):
                return weight
            step, size = torch.linalg.solve(hessian, gradient).reshape(weight.shape), 1.0
            while size > 1e-8 and float(self._value(weight - size * step, keep)) > float(value) + 1e-12:
                size /= 2
            weight = weight - size * step
        raise ArithmeticError("Newton's method did not converge")

    def hessian(self, weight: Tensor) -> Tensor:
        return self._terms(weight, torch.ones(len(self.x), dtype=torch.bool))[2]

    def left_out_logits(self) -> Tensor:
        """Logits of each example by the refit without it ``[N, C]``."""
        whole = self.fit()
        keep = ~torch.eye(len(self.x), dtype=torch.bool)
        return torch.stack([self.x[i] @ self.fit(k, whole).mT for i, k in enumerate(keep)])


def diagonal_over_classes(residual: Tensor, output_covariance: Tensor) -> Tensor:
    """The published code's shortcut diag(V)∘e ``[N, C]``."""
    return output_covariance.diagonal(dim1=1, dim2=2) * residual
