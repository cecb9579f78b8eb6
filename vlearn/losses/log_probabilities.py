"""Outputs that are log-probabilities, as of a model that ends in log_softmax.

A negative log-likelihood, as `F.nll_loss`, is linear in them: ∂²ℓ/∂f² = 0, though in the logits it curves. Since
log_softmax(log p) = log p, they serve as logits: of ℓ(log_softmax(f)) the values, and the gradients in the weights, are
the same, while Λ = s (diag p - p pᵀ), and the losses at moved outputs are of probabilities that sum to one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_of_log_probabilities(output: Tensor) -> int | None:
    """The axis along which exp(output ``[N, ...]``) sums to one everywhere; None if there is no such axis."""
    tolerance = min(100 * torch.finfo(output.dtype).eps, 0.05)
    for axis in range(1, output.dim()):
        # Of the first example first: hardly any output is looked at beyond it.
        if output.shape[axis] > 1 and all(_sum_to_one(some, axis, tolerance) for some in (output[:1], output)):
            return axis
    return None


def _sum_to_one(log_p: Tensor, axis: int, tolerance: float) -> bool:
    return log_p.is_floating_point() and bool((log_p.detach().logsumexp(axis).abs() <= tolerance).all())
