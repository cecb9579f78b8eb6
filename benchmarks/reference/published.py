"""Estimates of the memory-perturbation paper that are known to be wrong in size, to compare with.

The paper's code keeps only the diagonal of V and of Λ over the classes, and clamps. Softmax ignores a shift of all
logits, so V may have a huge part along 11ᵀ, which V e cancels and diag(V) ∘ e does not. The paper's estimate for a
class that is left out takes each example as if it alone were removed (Nickl et al., 2023, arXiv:2310.19273).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlearn.gaussians.protocol import Posterior
from vlearn.linearized.batches import batches
from vlearn.linearized.linearization import Linearization, at_mean, linearize
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.sensitivity.table import SensitivityTable

CLAMP = 1e-10


class DiagonalTable(NamedTuple):
    """One row per example, on the CPU, in loader order.

    Attributes:
        index: ``[N]`` example numbers.
        deviation: ``[N, C]`` diag(V) ∘ e in the output's units.
        loo_loss: ``[N]`` loss in nats at the output moved by that, at most -log 1e-10.
        leverage: ``[N]`` Σ_c Λ_cc V_cc.
    """

    index: Tensor
    deviation: Tensor
    loo_loss: Tensor
    leverage: Tensor


@torch.no_grad()
def diagonal_sweep(
    model: nn.Module, posterior: Posterior, loader: Iterable[Any], loss_fn: LossFunction
) -> DiagonalTable:
    """The sensitivities of the paper's code for a whole data set, at the posterior mean in eval mode.

    Args:
        model: a softmax classifier; it is left as it was.
        posterior: Σ over its parameters, summed over num_data.
        loader: yields (x, y) or (x, y, index).
        loss_fn: the training loss, which must be softmax cross-entropy of class labels.

    Raises:
        ValueError: if the loss is another one.
        RuntimeError: if Σ has an arbitrary scale.
    """
    posterior.require_calibrated("leave-one-out loss")
    losses = ExampleLoss(loss_fn)
    tables = []
    with at_mean(model, posterior) as covariance:
        for batch in batches(loader, model):
            at = linearize(model, covariance, batch, losses, None, second_order=False)
            tables.append((batch.index, *(column.cpu() for column in diagonal_deviation(at))))
    return DiagonalTable(*(torch.cat(columns) for columns in zip(*tables, strict=True)))


def diagonal_deviation(at: Linearization) -> tuple[Tensor, Tensor, Tensor]:
    """Deviation ``[N, C]``, leave-one-out loss ``[N]`` and leverage ``[N]`` of one batch, as in `DiagonalTable`."""
    output, target = at.output, at.batch.target
    labels = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
    if not (labels and output.dim() == 2 and torch.allclose(at.loss, _cross_entropy(output, target))):
        raise ValueError(
            "diagonal_sweep with another loss than softmax cross-entropy of class labels, for which alone the "
            "published code is written: use vlearn.sweep."
        )
    columns = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
    variance = torch.stack(
        [at.quadratic_and_product(column.expand_as(output), product=False)[0] for column in columns], 1
    )
    p, e = output.softmax(1), at.residual
    e = torch.where(e >= 0, e.clamp(CLAMP, 1 - CLAMP), e.clamp(CLAMP - 1, -CLAMP))
    change = variance * e
    loss = _cross_entropy(output + change, target).clamp_max(-math.log(CLAMP))
    return change, loss, ((p - p.square()).clamp(CLAMP, 1 - CLAMP) * variance).sum(1)


def leave_class_out(table: SensitivityTable, labels: Tensor) -> Tensor:
    """The paper's leave-class-out estimate: ℓ(y_i, f_i + V_i e_i) averaged over each class.

    Args:
        table: what `vlearn.sweep` gives for all examples.
        labels: ``[N]`` class of example 0, 1, ... by its number.

    Returns:
        ``[K]`` mean losses in the loss's units, of the classes in ascending order.
    """
    classes = labels[table.index]
    return torch.stack([table.loo_loss[classes == k].double().mean() for k in labels.unique()])


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")
