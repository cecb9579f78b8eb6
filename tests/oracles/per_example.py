"""Sensitivities by explicit per-example gradients and Jacobians, one backward pass each. Slow and plain.

Everything follows from the definition: g_i = ∇ℓ_i, J_i = ∂f_i/∂θ, V_i = J_i Σ J_iᵀ, with Σ a dense matrix
over the parameters in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap


@dataclass(frozen=True)
class PerExample:
    output: Tensor  # [N, C]
    loss: Tensor  # [N]
    residual: Tensor  # [N, C]
    hessian: Tensor  # [N, C, C] Λ
    gradients: Tensor  # [N, P]
    jacobian: Tensor  # [N, C, P]

    def self_influence(self, covariance: Tensor) -> Tensor:
        return torch.einsum("np,pq,nq->n", self.gradients, covariance, self.gradients)

    def deviation(self, covariance: Tensor) -> Tensor:
        return torch.einsum("ncp,pq,nq->nc", self.jacobian, covariance, self.gradients)

    def output_covariance(self, covariance: Tensor) -> Tensor:
        """V ``[N, C, C]``."""
        return torch.einsum("ncp,pq,ndq->ncd", self.jacobian, covariance, self.jacobian)

    def leverage(self, covariance: Tensor) -> Tensor:
        return torch.einsum("ncd,ndc->n", self.hessian, self.output_covariance(covariance))

    def ggn(self) -> Tensor:
        """Σ_i J_iᵀ Λ_i J_i ``[P, P]``."""
        return torch.einsum("ncp,ncd,ndq->pq", self.jacobian, self.hessian, self.jacobian)


def moving(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def per_example(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    loss: Callable[[Tensor], Tensor],
    whole_loss: Callable[[nn.Module], Tensor] | None = None,
) -> PerExample:
    """Linearise a model at its weights.

    Args:
        model: its parameters that require grad are the θ of g and J.
        forward: gives the output ``[N, ...]`` that residual and deviation speak of.
        loss: of that output, per example ``[N]``.
        whole_loss: the loss per example where it also depends on other outputs.
    """
    parameters = list(moving(model).values())
    output = forward(model)
    flat = output.reshape(output.shape[0], -1)
    jacobian = torch.stack([torch.stack([_flat_grad(entry, parameters) for entry in row]) for row in flat])

    leaf = output.detach().requires_grad_()
    rows = loss(leaf)
    (residual,) = torch.autograd.grad(rows.sum(), leaf, create_graph=True)
    hessian = torch.stack([_gradient(r, leaf) for r in residual.reshape(-1)]).reshape(*flat.shape, *flat.shape)
    own = torch.arange(len(flat))
    losses = loss(output) if whole_loss is None else whole_loss(model)
    return PerExample(
        output=output.detach(),
        loss=losses.detach(),
        residual=residual.detach(),
        hessian=hessian[own, :, own].detach(),
        gradients=torch.stack([_flat_grad(value, parameters) for value in losses]),
        jacobian=jacobian,
    )


def by_functorch(
    model: nn.Module, x: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor], variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Self-influence and deviation under Σ = diag(variance) by vmap(grad) and jvp, one example at a time."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in weights.values()]
    by_name = dict(zip(weights, variance.split(sizes), strict=True))

    def one(row: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        def output(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, values, (row.unsqueeze(0),))

        g = grad(lambda values: loss(output(values), label.unsqueeze(0)).sum())(weights)
        moved = {name: by_name[name].reshape(value.shape) * value for name, value in g.items()}
        influence = torch.stack([(g[name] * moved[name]).sum() for name in g]).sum()
        return influence, jvp(output, (weights,), (moved,))[1].squeeze(0)

    return vmap(one)(x, target)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest entry."""
    assert value.shape == truth.shape, f"{tuple(value.shape)} is not {tuple(truth.shape)}"
    return float((value - truth).abs().max() / truth.abs().max().clamp_min(torch.finfo(truth.dtype).tiny))


def _flat_grad(scalar: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])


def _gradient(scalar: Tensor, leaf: Tensor) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(scalar, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found
