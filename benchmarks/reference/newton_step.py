"""Removing an example by one Newton step of retraining, with the loss's own Hessian.

Δf_i = J_i (H - H_i)⁻¹ g_i. The refined form of the memory-perturbation equation has Gauss-Newton matrices in place of
the Hessians H of the objective and H_i of the example's loss: this shows what that costs, where the network is small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from benchmarks.reference.gauss_newton import gauss_newton, layers_of

LIMIT = 0.95  # of the eigenvalues of H⁻¹H_i, as that of VΛ in the refined form


def deviation(model: nn.Module, x: Tensor, y: Tensor, prior_precision: float) -> Tensor:
    """Change ``[N, C]`` of each example's outputs when it is removed.

    Where an eigenvalue of H⁻¹H_i is above `LIMIT`, the minimum may be gone: there the Gauss-Newton matrices stand in,
    which leave one.

    Args:
        model: of linear layers, at a minimum of Σ_i ℓ(y_i, f_i(θ)) + δ‖θ‖²/2, cross-entropies.
        prior_precision: δ.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(weights: Tensor, x: Tensor) -> Tensor:
        parts = weights.split([shape.numel() for shape in shapes.values()])
        named = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(model, named, (x,))

    def loss(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs(weights, x), y, reduction="sum")

    prior = prior_precision * torch.eye(len(weights), dtype=weights.dtype)
    whole = hessian(loss)(weights, x, y) + prior
    approximate = gauss_newton(layers_of(model, x)) + prior
    changes = []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        own = hessian(loss)(weights, image, label)
        left = whole - own
        _, indefinite = torch.linalg.cholesky_ex(LIMIT * whole - own)
        if indefinite:
            left = approximate - gauss_newton(layers_of(model, image))
        step = torch.linalg.solve(left, grad(loss)(weights, image, label))
        changes.append(jacrev(outputs)(weights, image) @ step)
    return torch.cat(changes)
