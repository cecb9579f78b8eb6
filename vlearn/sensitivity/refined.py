"""Removal without the first-order approximation: Δf = (I - VΛ)⁻¹ V e, Cook's formula for one output.

The Gaussian removal of Nickl et al. (2023, arXiv:2310.19273, Eq. 10) divides by the precision that is left,
S - JᵀΛJ, where Eq. 12 divides by S. In output space, with Λ = R D Rᵀ, D a diagonal of signs, W = V R, B = Rᵀ W,

    Δf = V e + W D (I - B D)⁻¹ Rᵀ V e,  and VΛ and BD have the same eigenvalues.

It is the rescaled influence function (arXiv:2506.06656). A Kronecker Σ averages over the examples, so that none stands
out in its V, which is then already the variance without the example: V e is its best prediction, and (I - VΛ)⁻¹ counts
the example out twice.

Working with the columns of R instead of V keeps the digits that V's large part along 11ᵀ (which a softmax
ignores, and R with it) would cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlearn.linearized.linearization import Linearization
from vlearn.losses.output_hessian import signed_root


class Refined(NamedTuple):
    """Output changes of one batch.

    Attributes:
        deviation: ``[N, ...]`` (I - VΛ)⁻¹ V e, or V e where that is not to be trusted.
        used_first_order: ``[N]`` where it is V e.
        leverage: ``[N]`` tr(ΛV).
        largest_eigenvalue: ``[N]`` of VΛ.
    """

    deviation: Tensor
    used_first_order: Tensor
    leverage: Tensor
    largest_eigenvalue: Tensor


def check_threshold(threshold: float) -> None:
    """Raises ValueError unless 0 < threshold <= 1."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}, but it must be in (0, 1]: use .95.")


def refine(lin: Linearization, deviation: Tensor, threshold: float) -> Refined:
    """Turn V e into (I - VΛ)⁻¹ V e for each example whose eigenvalues of VΛ stay below the threshold.

    Costs one backward and one forward-mode pass per output.

    Args:
        at: a batch, its residuals with their graph.
        deviation: V e ``[N, ...]``.
        threshold: in (0, 1].
    """
    root, signs = signed_root(lin.hessian(), lin.output)  # [N, C, C], [N, C]
    flat = deviation.reshape(deviation.shape[0], -1)
    moved = root_products(lin, root)
    block = root.mT @ moved
    block = (block + block.mT) / 2 * signs.unsqueeze(1)  # B D
    if bool((signs > 0).all()):
        largest = torch.linalg.eigvalsh(block).amax(1)
    else:
        largest = torch.linalg.eigvals(block).real.amax(1)
    used_first_order = ~(largest < threshold)  # NaN too
    identity = torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
    safe = torch.where(used_first_order[:, None, None], torch.zeros_like(block), block)
    inner = torch.linalg.solve(identity - safe, root.mT @ flat.unsqueeze(2))
    refined = flat + (moved @ (signs.unsqueeze(2) * inner)).squeeze(2)
    chosen = torch.where(used_first_order.unsqueeze(1), flat, refined)
    leverage = block.diagonal(dim1=1, dim2=2).sum(1)
    return Refined(chosen.reshape(deviation.shape), used_first_order, leverage, largest)


def root_products(lin: Linearization, columns: Tensor) -> Tensor:
    """V times each column of ``[N, C, K]``: ``[N, C, K]``, by one backward and one forward-mode pass each."""
    products = []
    for column in columns.unbind(2):
        product = lin.quadratic_and_product(column)[1]
        assert product is not None
        products.append(product.reshape(column.shape))
    return torch.stack(products, 2)


def function_variance(lin: Linearization) -> Tensor:
    """V ``[N, C, C]``, the posterior covariance of the linearised output."""
    flat = lin.output.reshape(lin.output.shape[0], -1)
    unit = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device).expand(len(flat), -1, -1)
    variance = root_products(lin, unit)
    return (variance + variance.mT) / 2
