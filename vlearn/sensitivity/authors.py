"""What the code published with the memory-perturbation paper computes, to compare with.

It keeps only the diagonal of V and of Λ over classes, and clamps. Softmax ignores a shift of all logits, so V may have
a huge part along 11ᵀ, which V e cancels and diag(V) ∘ e does not: this is no way to predict a leave-one-out loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlearn.linearized.linearization import Linearization

CLAMP = 1e-10


def authors_deviation(lin: Linearization) -> tuple[Tensor, Tensor, Tensor]:
    """(diag(V) ∘ e ``[N, C]``, leave-one-out loss ``[N]``, Σ_c Λ_cc V_cc ``[N]``).

    Raises:
        ValueError: if the loss is not softmax cross-entropy with class labels.
    """
    output, target = lin.output, lin.batch.target
    labels = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
    if not (labels and output.dim() == 2 and torch.allclose(lin.loss, _cross_entropy(output, target))):
        raise ValueError(
            "deviation='authors_diag' with another loss than softmax cross-entropy of class labels, for which alone "
            "the published code is written: use deviation='full'."
        )
    columns = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
    variance = torch.stack(
        [lin.quadratic_and_product(column.expand_as(output), product=False)[0] for column in columns], 1
    )
    p, e = output.softmax(1), lin.residual
    e = torch.where(e >= 0, e.clamp(CLAMP, 1 - CLAMP), e.clamp(CLAMP - 1, -CLAMP))
    change = variance * e
    loss = _cross_entropy(output + change, target).clamp_max(-math.log(CLAMP))
    return change, loss, ((p - p.square()).clamp(CLAMP, 1 - CLAMP) * variance).sum(1)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")
