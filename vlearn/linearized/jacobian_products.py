"""Products with the Jacobian of a whole batch, all examples along one direction in parameter space.

    J v  one forward-mode pass,    Σ_n J_nᵀ u_n  one backward pass,    Λ u  one backward pass through the loss

No example's gradient is needed on its own here, so nothing of the layers is captured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlearn.capture.pytrees import plain, tensor_leaves
from vlearn.linearized.batches import Batch
from vlearn.linearized.linearization import Linearization
from vlearn.per_example.replay import as_recorded, call_with, forward_mode, tangents_in_reverse

Vector = dict[Tensor, Tensor]  # by parameter, in its shape; a parameter that is missing stands for zeros


def summed_gradient(lin: Linearization, cotangents: list[Tensor | None], last: bool = False) -> Vector:
    """Σ_n J_nᵀ u_n.

    Args:
        cotangents: u ``[N, ...]`` of every output, None for zeros.
        last: no other product follows, so that the graph may go.
    """
    pairs = [(o, u.detach()) for o, u in zip(lin.outputs, cotangents, strict=True) if u is not None]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(lin.weights), [u for _, u in pairs], retain_graph=not last, allow_unused=True
    )
    return {p: g for p, g in zip(lin.weights, gradients, strict=True) if g is not None}


def jacobian_vector_product(lin: Linearization, direction: Vector) -> list[Tensor]:
    """J v ``[N, ...]`` of every output."""
    root = lin.trace.root
    assert root is not None
    moves = {p: v.to(p.dtype) for p, v in direction.items()}
    with as_recorded(lin.trace):
        try:
            with forward_mode(root.modules()), forward_ad.dual_level():
                weights = lin.weights | {p: forward_ad.make_dual(lin.weights[p], v) for p, v in moves.items()}
                leaves = tensor_leaves(call_with(root, weights, lin.batch.args, lin.batch.kwargs))
                pairs = [forward_ad.unpack_dual(output) for output in _outputs(lin, leaves)]
                return [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]
        except NotImplementedError:  # an operation without forward derivative
            whole = lin.batch
            numbers = torch.arange(len(whole.index), device="cpu").split(1)
            rows = [
                _in_reverse(lin, part, moves) for part in ([whole] if whole.example_rows else map(whole.rows, numbers))
            ]
            return [torch.cat(column, 1).squeeze(0) for column in zip(*rows, strict=True)]


@torch.enable_grad()
def hessian_vector_product(lin: Linearization, changes: list[Tensor]) -> list[Tensor | None]:
    """Λ u ``[N, ...]`` for u of every output; the residuals need their graph (`second_order`)."""
    pairs = [(e, u) for e, u in zip(lin.residuals, changes, strict=True) if e is not None and e.requires_grad]
    if not pairs:
        return [None if e is None else torch.zeros_like(e) for e in lin.residuals]
    return list(
        torch.autograd.grad(
            [e for e, _ in pairs], lin.leaves, [u for _, u in pairs], retain_graph=True, allow_unused=True
        )
    )


def _in_reverse(lin: Linearization, batch: Batch, direction: Vector) -> list[Tensor]:
    """J v of a batch's outputs ``[1, N, ...]``."""
    root = lin.trace.root
    assert root is not None
    live = {p: lin.weights[p].detach().requires_grad_() for p in direction}
    leaves = tensor_leaves(call_with(root, lin.weights | live, batch.args, batch.kwargs))
    outputs = [output.unsqueeze(0) for output in _outputs(lin, leaves)]
    return tangents_in_reverse(outputs, list(live.values()), list(direction.values()))


def _outputs(lin: Linearization, leaves: list[Tensor]) -> list[Tensor]:
    """Of the tensors of a model's output those that the Jacobian is of, and of the examples that count."""
    outputs, members = [plain(leaves[position]) for position in lin.trace.positions], lin.batch.members
    return outputs if members is None else [output[members.to(output.device)] for output in outputs]
