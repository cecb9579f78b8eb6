"""Solving (S - K) x = g for several right-hand sides at once where only Σ = S⁻¹ can be multiplied with.

S is the posterior precision and K the curvature of the examples that are removed. Conjugate gradients preconditioned
by Σ see the matrix I - Σ^½ K Σ^½, whose eigenvalues are 1 except for as many as K has rank. S itself never appears: of
the search direction p = Σr + βp the product Sp = r + β Sp is carried along. Libraries of linear operators solve with S,
which a posterior may not have, and would be a dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Vectors = dict[Tensor, Tensor]  # by parameter ``[K, *shape]``, K systems


class Solution(NamedTuple):
    """What `solve` found for each of K systems.

    Attributes:
        x: by parameter ``[K, *shape]``.
        converged: ``[K]`` whether the residual fell below the tolerance.
        indefinite: ``[K]`` whether S - K was seen not to be positive definite; then x is invalid.
        iterations: ``[K]`` products with K.
        largest: ``[K]`` largest eigenvalue of ΣK, an estimate from below.
    """

    x: Vectors
    converged: Tensor
    indefinite: Tensor
    iterations: Tensor
    largest: Tensor


def solve(
    multiply: Callable[[Vectors], Vectors],
    curve: Callable[[Vectors, Tensor], Vectors],
    g: Vectors,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """(S - K)⁻¹ g.

    Args:
        multiply: v -> Σ v.
        curve: (v, active ``[K]``) -> K v of the active systems, zeros of the others.
        g: right-hand sides.
        tolerance: of √(rᵀΣr) over that of the first residual g.
        max_iterations: largest number of products with K.
    """
    x = {p: torch.zeros_like(v) for p, v in g.items()}
    residual, direction = dict(g), multiply(g)
    s_direction = dict(g)
    size = first = dot(residual, direction)
    active = first > 0
    converged, indefinite = ~active, torch.zeros_like(active)
    iterations = torch.zeros_like(first, dtype=torch.long)
    steps: list[tuple[Tensor, Tensor]] = []  # (α, β) of each iteration, NaN where it was not active
    while bool(active.any()) and len(steps) < max_iterations:
        curved = curve(direction, active)
        product = {p: v - curved[p] if p in curved else v for p, v in s_direction.items()}
        iterations += active
        curvature = dot(direction, product)
        indefinite |= active & ~(curvature > 0)
        active &= ~indefinite
        alpha = torch.where(active, size / curvature, torch.zeros_like(size))
        x = combine(x, alpha, direction)
        residual = combine(residual, -alpha, product)
        moved = multiply(residual)
        remaining = dot(residual, moved)
        beta = torch.where(active, remaining / size, torch.zeros_like(size))
        steps.append((torch.where(active, alpha, torch.nan), torch.where(active, beta, torch.nan)))
        direction, s_direction = combine(moved, beta, direction), combine(residual, beta, s_direction)
        size = remaining
        converged |= active & (remaining <= tolerance**2 * first)
        active &= ~converged
    return Solution(x, converged & ~indefinite, indefinite, iterations, _largest(steps, first))


def dot(left: Vectors, right: Vectors) -> Tensor:
    """Inner product of each system ``[K]``."""
    products = [(left[p] * right[p]).reshape(len(right[p]), -1).sum(1) for p in left]
    return torch.stack(products).sum(0)


def combine(left: Vectors, factor: Tensor, right: Vectors) -> Vectors:
    """left + factor · right, a factor ``[K]`` for each system."""
    return {p: v + factor.reshape(-1, *[1] * (v.dim() - 1)).to(v.dtype) * right[p] for p, v in left.items()}


def _largest(steps: list[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """1 - the smallest Ritz value of I - Σ^½KΣ^½ ``[K]``, from the Lanczos matrix that α and β make up."""
    if not steps:
        return torch.zeros_like(like)
    alpha, beta = (torch.stack(column, 1).double() for column in zip(*steps, strict=True))  # [K, iterations]
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
    return torch.where(active[:, 0], 1 - smallest, 0.0).to(like.dtype)
