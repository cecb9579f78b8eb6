"""The training loss as sensitivities need it: per example, with residual and curvature by autograd."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[..., Tensor]


class ExampleLoss:
    """The training loss of each example: (output, target) -> ``[N]``.

    Args:
        loss_fn: a torch-style loss with a `reduction` argument or attribute, whose entries beyond the first axis
            are averaged as reduction="mean" does; or a callable (output, target) -> ``[N]``.
    """

    def __init__(self, loss_fn: LossFunction):
        self.torch_style = True
        if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
            self.unreduced: LossFunction = copy.copy(loss_fn)
            self.unreduced.reduction = "none"  # type: ignore[attr-defined]
        elif "reduction" in _argument_names(loss_fn):
            self.unreduced = partial(loss_fn, reduction="none")
        else:
            self.unreduced, self.torch_style = loss_fn, False

    def __call__(self, output: Any, target: Any) -> Tensor:
        rows = self.unreduced(output, target)
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            raise ValueError(
                "loss_fn gave one number for the whole batch, but sensitivities need each example's own loss: pass a "
                "loss with a `reduction` argument, or a callable (output, target) -> [N]."
            )
        return rows if rows.dim() == 1 else rows.flatten(1).mean(1)


def _argument_names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


@torch.enable_grad()
def curvature(residual: Tensor, output: Tensor) -> Tensor:
    """Λ_n = ∂²ℓ_n/∂f_n² ``[N, C, C]``, C all output entries of an example.

    Args:
        residual: gradient of the summed losses with respect to `output`, made with create_graph=True.
        output: ``[N, ...]`` the leaf it was taken at.
    """
    flat = residual.reshape(residual.shape[0], -1)
    if not flat.requires_grad:  # a loss linear in the output
        return flat.new_zeros(flat.shape[0], flat.shape[1], flat.shape[1])
    rows = [
        torch.autograd.grad(flat[:, c].sum(), output, retain_graph=True)[0].reshape(flat.shape)
        for c in range(flat.shape[1])
    ]
    return torch.stack(rows, 1)


def curvature_root(hessian: Tensor, output: Tensor) -> Tensor:
    """R_n with R_n R_nᵀ = Λ_n ``[N, C, C]``.

    For softmax cross-entropy, whatever its weights and targets, Λ = s·(diag p - p pᵀ) and R = √s·(diag √p - p √pᵀ)
    in closed form; that case is recognised by its value. Else R comes from the eigenvectors of Λ, whose
    negative eigenvalues (a loss that is not convex in the output) are dropped.

    Args:
        hessian: Λ ``[N, C, C]``.
        output: ``[N, ...]`` model outputs.
    """
    p = output.detach().reshape(output.shape[0], -1).softmax(1)
    spread = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    trace = spread.diagonal(dim1=1, dim2=2).sum(1)
    scale = (hessian.diagonal(dim1=1, dim2=2).sum(1) / trace.clamp_min(torch.finfo(p.dtype).tiny)).clamp_min(0)
    tolerance = 100 * torch.finfo(p.dtype).eps * hessian.abs().amax(dim=(1, 2)).clamp_min(torch.finfo(p.dtype).tiny)
    error = (hessian - scale[:, None, None] * spread).abs().amax(dim=(1, 2))
    if bool((error <= tolerance).all()):
        root = p.sqrt()
        return scale.sqrt()[:, None, None] * (torch.diag_embed(root) - p.unsqueeze(2) * root.unsqueeze(1))
    values, vectors = torch.linalg.eigh(hessian)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(1)
