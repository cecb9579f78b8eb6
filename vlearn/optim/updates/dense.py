"""The two rules by which a dense Hessian moves to its estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn.optim.structures.dense import cholesky


def dense_hessian_step(rule: str, hessian: Tensor, estimate: Tensor, at: Tensor, rate: Tensor, decay: Tensor) -> Tensor:
    """H after a step, positive definite with the weight decay.

        "von"   H ← (1 - ρ)H + ρĤ
        "iblr"  S ← ½(S + UᵀU), U = Lᵀ - ρL⁻¹(H - Ĥ), S = H + wd = LLᵀ, which is at least S/2 whatever Ĥ is

    Args:
        rule: "von" or "iblr".
        hessian: H ``[P, P]``.
        estimate: Ĥ ``[M, M]`` of the rows `at`, those of parameters that have a gradient; the others keep theirs.
        at: ``[M]`` the positions of those rows.
        rate: ρ = 1 - β₂ of those rows ``[M]``.
        decay: wd on the diagonal ``[P, P]``.
    """
    share = rate.sqrt()
    if rule == "von":
        # D H D + √ρ Ĥ √ρ with D = √(1 - ρ) in the rows that move: positive whichever those are.
        scale = torch.ones_like(hessian.diagonal())
        scale[at] = (1 - rate).sqrt()
        moved = scale.unsqueeze(1) * hessian * scale
        moved[at.unsqueeze(1), at] += share.unsqueeze(1) * estimate * share
        return moved
    difference = torch.zeros_like(hessian)  # √ρ G √ρ, so that S - G + ½ G S⁻¹ G is the rule
    inner = hessian[at.unsqueeze(1), at] - estimate
    difference[at.unsqueeze(1), at] = share.unsqueeze(1) * inner * share
    precision = hessian + decay
    factor = cholesky(precision)
    u = factor.mT - torch.linalg.solve_triangular(factor, difference, upper=False)
    moved = (precision + u.mT @ u) / 2
    return (moved + moved.mT) / 2 - (precision - hessian)
