"""Outputs that are log-probabilities, as of a model that ends in log_softmax.

A negative log-likelihood, as `F.nll_loss`, is linear in them: ∂²ℓ/∂f² = 0, though in the logits it curves. Since
log_softmax(log p) = log p, they serve as logits: of ℓ(log_softmax(f)) the values, and the gradients in the weights, are
the same, while e = s (p - y), Λ = s (diag p - p pᵀ), and the losses at moved outputs are of probabilities that sum to
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.05  # of Σ p; bfloat16 rounds by as much
SAMPLE = 64  # positions that are looked at first, an eighth of which must do: others may be padding


@dataclass(frozen=True)
class LogProbabilities:
    """Where an output has log-probabilities.

    Attributes:
        axis: of the classes.
        there: ``[N, ...]``, of size 1 along it, the positions whose probabilities sum to one.
        log_sum: likewise, log Σ p, which is nought up to rounding.
    """

    axis: int
    there: Tensor
    log_sum: Tensor

    @staticmethod
    def of(output: Tensor) -> LogProbabilities | None:
        """Those of an output ``[N, ...]``; None if it has none."""
        for axis in range(1, output.dim()) if output.is_floating_point() and output.numel() else ():
            if output.shape[axis] > 1 and _may_be(output.detach(), axis):
                log_sum = output.detach().logsumexp(axis, keepdim=True)
                there = log_sum.abs() <= TOLERANCE
                return LogProbabilities(axis, there, log_sum.where(there, 0.0))
        return None

    def as_logits(self, output: Tensor) -> Tensor:
        """log_softmax of the output, there; it takes the same value where that is the output it was found in."""
        # Elsewhere a row may be infinite, whose gradient would be NaN.
        scores = output.where(self.there, 0.0)
        return torch.where(self.there, scores.log_softmax(self.axis) + self.log_sum, output)

    def residual(self, output: Tensor, residual: Tensor) -> Tensor:
        """The gradient with respect to the output as logits, from that with respect to the output."""
        p = output.where(self.there, -torch.inf).exp()
        return residual - p * residual.sum(self.axis, keepdim=True)


def _may_be(output: Tensor, axis: int) -> bool:
    """Whether enough of some positions have probabilities that sum to one."""
    rows = output.movedim(axis, -1)
    count = rows[..., 0].numel()
    chosen = torch.linspace(0, count - 1, min(count, SAMPLE), device=output.device).long()
    some = rows[torch.unravel_index(chosen, rows.shape[:-1])]
    return int((some.logsumexp(-1).abs() <= TOLERANCE).sum()) * 8 >= len(some)
