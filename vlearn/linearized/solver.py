"""Solving A x = g for several right-hand sides at once by conjugate gradients, preconditioned by a posterior's Σ.

    A = S - K            S = Σ⁻¹ the posterior precision, K the curvature of the examples that are removed. The
                         preconditioned matrix I - Σ^½KΣ^½ has eigenvalues 1 except for as many as K has rank. S itself
                         never appears: of the search direction p = Σr + βp the product Sp = r + β Sp is carried along
    A = H [- K]          H = N·GGN + δ the curvature of all training data, which Σ⁻¹ approximates

The first step goes along Σg, by the length that minimises the energy ½xᵀAx - gᵀx, and each step lowers it: from the
first on x is nearer to A⁻¹g than Σg is, in the norm of A. Libraries of linear operators solve with S, which a posterior
may not have, and would be a dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlearn._wide import widened

Vectors = dict[Tensor, Tensor]  # by parameter ``[K, *shape]``, K systems


class Solution(NamedTuple):
    """What `solve` found for each of K systems.

    Attributes:
        x: by parameter ``[K, *shape]``.
        converged: ``[K]`` whether the residual fell below the tolerance.
        indefinite: ``[K]`` whether A was seen not to be positive definite; then x is invalid.
        iterations: ``[K]`` products with A.
        smallest: ``[K]`` smallest eigenvalue of ΣA, an estimate from above.
        residual: ``[K]`` √(rᵀΣr) of the residual r = g - Ax, over √(gᵀΣg).
    """

    x: Vectors
    converged: Tensor
    indefinite: Tensor
    iterations: Tensor
    smallest: Tensor
    residual: Tensor


def solve(
    multiply: Callable[[Vectors], Vectors],
    apply: Callable[[Vectors, Vectors, Tensor], Vectors],
    g: Vectors,
    tolerance: float,
    max_iterations: int,
    agreed: Callable[[Tensor], Tensor] = lambda own: own,
) -> Solution:
    """A⁻¹ g.

    Args:
        multiply: v -> Σ v.
        apply: (v, Σ⁻¹v, active ``[K]``) -> A v of the active systems, anything finite of the others.
        g: right-hand sides.
        tolerance: of √(rᵀΣr) over that of the first residual g.
        max_iterations: largest number of products with A.
        agreed: makes inner products the same in all processes, so that they go on alike.
    """
    x = {p: torch.zeros_like(v) for p, v in g.items()}
    r, direction = dict(g), multiply(g)
    s_direction = dict(g)
    size = first = agreed(dot(r, direction))
    active = first > 0
    converged, indefinite = ~active, torch.zeros_like(active)
    iterations = torch.zeros_like(first, dtype=torch.long)
    steps: list[tuple[Tensor, Tensor]] = []  # (α, β) of each iteration, NaN where it was not active
    while bool(active.any()) and len(steps) < max_iterations:
        product = apply(direction, s_direction, active)
        iterations += active
        curvature = agreed(dot(direction, product))
        indefinite |= active & ~(curvature > 0)
        active &= ~indefinite
        alpha = torch.where(active, size / curvature, torch.zeros_like(size))
        x = combine(x, alpha, direction)
        r = combine(r, -alpha, product)
        moved = multiply(r)
        remaining = agreed(dot(r, moved))
        beta = torch.where(active, remaining / size, torch.zeros_like(size))
        steps.append((torch.where(active, alpha, torch.nan), torch.where(active, beta, torch.nan)))
        direction, s_direction = combine(moved, beta, direction), combine(r, beta, s_direction)
        size = torch.where(active, remaining, size)
        converged |= active & (remaining <= tolerance**2 * first)
        active &= ~converged
    residual = (size / first).clamp_min(0).sqrt().nan_to_num()  # a right-hand side of zeros is solved by zeros
    return Solution(x, converged & ~indefinite, indefinite, iterations, _smallest(steps, first), residual)


def dot(left: Vectors, right: Vectors) -> Tensor:
    """Inner product of each system ``[K]``."""
    products = [(left[p] * right[p]).reshape(len(right[p]), -1).sum(1) for p in left]
    return torch.stack(products).sum(0)


def combine(left: Vectors, factor: Tensor, right: Vectors) -> Vectors:
    """left + factor · right, a factor ``[K]`` for each system."""
    return {p: v + factor.reshape(-1, *[1] * (v.dim() - 1)).to(v.dtype) * right[p] for p, v in left.items()}


def where(chosen: Tensor, left: Vectors, right: Vectors) -> Vectors:
    """The left vectors of the chosen systems ``[K]``, the right ones of the others."""
    return {p: torch.where(chosen.reshape(-1, *[1] * (v.dim() - 1)), left[p].to(v.dtype), v) for p, v in right.items()}


def _smallest(steps: list[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """The smallest Ritz value of Σ^½AΣ^½ ``[K]``, from the Lanczos matrix that α and β make up; 1 without a step."""
    if not steps:
        return torch.ones_like(like)
    alpha, beta = (widened(torch.stack(column, 1)) for column in zip(*steps, strict=True))  # [K, iterations]
    active = ~alpha.isnan()
    inverse = torch.where(active, 1 / alpha, 0.0)
    follows = active[:, 1:]
    beta = torch.where(follows, beta[:, :-1], 0.0)
    diagonal = inverse.clone()
    diagonal[:, 1:] += beta * inverse[:, :-1]
    # A system that has ended is filled up with an entry of its own diagonal, none of which is below its eigenvalues.
    diagonal = torch.where(active, diagonal, diagonal[:, :1])
    beside = beta.sqrt() * inverse[:, :-1]
    matrix = diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)
    smallest = torch.linalg.eigvalsh(matrix)[:, 0]
    return torch.where(active[:, 0], smallest, 1.0).to(like.dtype)
