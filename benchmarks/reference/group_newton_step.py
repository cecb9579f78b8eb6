"""Removing a group by one Newton step with the Gauss-Newton matrix itself: no structure, no first order.

    (Σ_{i∉M} J_iᵀΛ_iJ_i + δI) Δm = Σ_{i∈M} ∇ℓ_i,  Δf_i = J_i Δm

It is what `vlearn.leave_group_out(..., refined=True)` would give if Σ were the inverse of Σ_i J_iᵀΛ_iJ_i + δI, and
shows what of an estimate's error is due to the structure of Σ. Solved by conjugate gradients preconditioned by Σ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from benchmarks.problems.batches import batches
from vlearn.gaussians.protocol import Posterior
from vlearn.linearized.linearization import at_mean

Vector = dict[str, Tensor]  # by parameter name


class Step(NamedTuple):
    """Mean loss ``left_out_loss`` of the group after the step, in nats; products with the matrix that it took."""

    left_out_loss: float
    iterations: int
    converged: bool


@torch.no_grad()
def leave_out(
    model: nn.Module,
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    group: Tensor,
    prior_precision: float,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
) -> Step:
    """One group's mean loss without the group.

    Args:
        model: a classifier at a minimum of its loss.
        posterior: preconditions; any of the model's.
        x, y: all training examples.
        group: ``[N]`` whether each is in the group.
        prior_precision: δ on the scale of the summed loss.
        tolerance: of the residual's norm in Σ, relative.
        max_iterations: after these the step is taken as it then is.
    """
    others, members = batches(x[~group], y[~group]), batches(x[group], y[group])
    plain = copy.deepcopy(model).eval()  # without the hooks of an optimizer that watches it
    weights = {name: p.detach() for name, p in plain.named_parameters()}

    def output_at(inputs: Tensor) -> Callable[[Vector], Tensor]:
        return lambda at: functional_call(plain, at, (inputs,))

    def change(inputs: Tensor, direction: Vector) -> tuple[Tensor, Tensor]:
        """(f, J v), both ``[n, C]``."""
        return jvp(output_at(inputs), (weights,), (direction,))

    def pulled_back(inputs: Tensor, cotangent: Tensor) -> Vector:
        """Jᵀ u, summed over the examples."""
        return vjp(output_at(inputs), weights)[1](cotangent)[0]

    def product(direction: Vector) -> Vector:
        """(Σ_{i∉M} JᵀΛJ + δI) v."""
        image = {name: prior_precision * v for name, v in direction.items()}
        for inputs, _ in others:
            logits, moved = change(inputs, direction)
            p = logits.softmax(1)
            curved = p * (moved - (p * moved).sum(1, keepdim=True))  # Λ = diag p - p pᵀ
            image = _add(image, 1.0, pulled_back(inputs, curved))
        return image

    gradient = {name: torch.zeros_like(w) for name, w in weights.items()}
    for inputs, labels in members:
        logits = output_at(inputs)(weights)
        gradient = _add(gradient, 1.0, pulled_back(inputs, logits.softmax(1) - F.one_hot(labels, logits.shape[1])))

    with at_mean(model, posterior) as covariance:
        by_name = dict(model.named_parameters())

        def precondition(vector: Vector) -> Vector:
            multiplied = covariance.multiply({by_name[name]: v.unsqueeze(0) for name, v in vector.items()})
            return {name: multiplied[by_name[name]].squeeze(0) for name in vector}

        step, residual, iterations = {name: torch.zeros_like(v) for name, v in gradient.items()}, gradient, 0
        direction = precondition(residual)
        size = first = _dot(residual, direction)
        while size > tolerance**2 * first and iterations < max_iterations:
            along = product(direction)
            alpha = size / _dot(direction, along)
            step, residual = _add(step, alpha, direction), _add(residual, -alpha, along)
            preconditioned = precondition(residual)
            before, size = size, _dot(residual, preconditioned)
            direction = _add(preconditioned, size / before, direction)
            iterations += 1

    total = 0.0
    for inputs, labels in members:
        logits, moved = change(inputs, step)
        total += F.cross_entropy(logits + moved, labels, reduction="sum").item()
    return Step(total / int(group.sum()), iterations, size <= tolerance**2 * first)


def _add(left: Vector, factor: float, right: Vector) -> Vector:
    return {name: v + factor * right[name] for name, v in left.items()}


def _dot(left: Vector, right: Vector) -> float:
    return sum(float((left[name] * right[name]).sum()) for name in left)
