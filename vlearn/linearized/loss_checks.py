"""Whether a loss gives each example its own: it must depend on that example's output and target alone.

A loss that compares the examples of a batch (contrastive losses, losses over statistics of the batch) gives rows that
depend on who else is in it. Looked at once for each shape of output:

    gradients   with c_n on example n's loss, the gradient of its output must be c_n times that with 1; powers of two,
                so that rounding makes no difference. It also shows an output that has its examples along another axis.
    values      of some of the examples alone, they must be what they are within the batch, and also where copies of the
                first take the places of the others; not asked of a loss that draws random numbers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlearn.capture.pytrees import rows_of
from vlearn.capture.trace import is_close
from vlearn.per_example.independence import powers_of_two

AGREE = 1e-4
FEW = 4


def check_own_losses(
    loss: Tensor,
    leaves: list[Tensor],
    residuals: list[Tensor | None],
    parameters: list[Tensor],
    given: tuple[Any, Any],
    losses: Callable[[Any, Any], Tensor],
) -> None:
    """Raise RuntimeError unless each example's loss depends on its own output alone.

    Args:
        loss: ``[N]`` or ``[N, T]``, with the graph of the leaves, which stays.
        leaves: the tensors of the model's output.
        residuals: gradients of the summed losses with respect to them.
        parameters: those of the posterior.
        given: what the losses were computed from, output and target.
        losses: (output, target) -> the losses again.
    """
    count = len(loss)
    for leaf, residual in zip(leaves, residuals, strict=True):
        if residual is not None and leaf.shape[:1] != (count,):
            raise RuntimeError(
                f"the loss gives {count} examples, but dimension 0 of the model's output of shape "
                f"{tuple(leaf.shape)} is not that of the examples: let the model return it with the examples first, as "
                "by output.transpose(0, 1), and what belongs to all examples expanded to a row for each."
            )
    factors = powers_of_two(count, loss.device).to(loss.dtype)
    ends = [*leaves, *parameters]
    weights = _by_row(factors, loss).expand_as(loss)
    weighted = torch.autograd.grad(loss, ends, weights, retain_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in weighted[len(leaves) :]):
        raise RuntimeError(
            "loss_fn reads a parameter of the posterior itself, beside the model's output, which no example's gradient "
            "would count: compute what needs it in the model's forward pass."
        )
    for with_factors, residual in zip(weighted, residuals, strict=False):
        if residual is not None and with_factors is not None:
            expected = residual.detach() * _by_row(factors.to(residual.dtype), residual)
            if not is_close(with_factors, expected, AGREE):
                raise RuntimeError(_COMPARES)
    few = min(FEW, count - 1)
    alone = torch.arange(few, device=loss.device)
    among_copies = torch.cat([alone, alone.new_zeros(count - few)])
    if any(_differs(loss, given, losses, rows, few) for rows in (alone, among_copies) if few):
        raise RuntimeError(_COMPARES)


@torch.no_grad()
def _differs(
    loss: Tensor, given: tuple[Any, Any], losses: Callable[[Any, Any], Tensor], rows: Tensor, few: int
) -> bool:
    """Whether the first losses are others when computed from these rows, and that not by chance."""
    count = len(loss)
    try:
        axes = [0 if isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) else None for leaf in tree_leaves(given)]
        part = losses(*rows_of(given, axes, rows))
        if part.shape != (len(rows), *loss.shape[1:]) or is_close(part[:few], loss[:few].detach(), AGREE):
            return False
        return is_close(losses(*given), loss.detach(), AGREE)  # else it draws random numbers
    except Exception:  # a target that is cut to pieces may be none
        return False


_COMPARES = (
    "the loss of an example depends on the other examples of the batch (or on an axis of the output that is not its "
    "own), so no example has a loss of its own: use a loss of each example's output and target alone, and a model that "
    "returns the examples along dimension 0."
)


def _by_row(factors: Tensor, like: Tensor) -> Tensor:
    return factors.reshape(-1, *[1] * (like.dim() - 1))
