"""The two rules by which a dense Hessian moves to its estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn.optim.structures.dense import cholesky


def dense_hessian_step(
    rule: str, hessian: Tensor, estimate: Tensor, at: Tensor, rate: Tensor, decay: Tensor, bounded: bool = False
) -> Tensor:
    """H after a step, positive definite with the weight decay.

        "von"   H ← (1 - ρ)H + ρĤ
        "iblr"  S ← ½(S + UᵀU), U = Lᵀ - ρL⁻¹(H - Ĥ), S = H + wd = LLᵀ, which is at least S/2 whatever Ĥ is

    The rule "iblr" is S ← Lf(X)Lᵀ with f(x) = 1 - x + x²/2 of the eigenvalues x of X = ρL⁻¹(H - Ĥ)L⁻ᵀ; bounded, f is ½
    for x > 1 and ½ + 2|x| for x < -1, as in `vlearn.optim.updates.riemannian.move_bounded`.

    Args:
        rule: "von" or "iblr".
        hessian: H ``[P, P]``.
        estimate: Ĥ ``[M, M]`` of the rows `at`, those of parameters that have a gradient; the others keep theirs.
        at: ``[M]`` the positions of those rows.
        rate: ρ = 1 - β₂ of those rows ``[M]``.
        decay: wd on the diagonal ``[P, P]``.
        bounded: see above.
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
    if bounded:
        scaled = torch.linalg.solve_triangular(factor, difference, upper=False)  # X = L⁻¹(L⁻¹D)ᵀ, D symmetric
        x, basis = torch.linalg.eigh(torch.linalg.solve_triangular(factor, scaled.mT, upper=False))
        within = x.clamp(-1, 1)
        root = (1 - within + within.square() / 2 + 2 * (-1 - x).clamp_min(0)).sqrt()
        u = (factor @ basis * root).mT
        return u.mT @ u - (precision - hessian)
    u = factor.mT - torch.linalg.solve_triangular(factor, difference, upper=False)
    moved = (precision + u.mT @ u) / 2
    return (moved + moved.mT) / 2 - (precision - hessian)
