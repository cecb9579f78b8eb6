"""FullVON: variational online Newton with a dense precision, for models of up to a few thousand parameters.

Khan and Rue, 2023, "The Bayesian Learning Rule", arXiv:2107.04562; the positive-definite rule is Lin, Schmidt, Khan,
2020, "Handling the Positive-Definite Constraint in the Bayesian Learning Rule", arXiv:2002.10060.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.examples import sums_of_products
from vlearn.optim.base import Part, VariationalOptimizer
from vlearn.optim.curvature import CurvatureProbe
from vlearn.optim.dense import DenseState, cholesky, positions, rows_of, split
from vlearn.optim.draw import Draw, Slot
from vlearn.optim.groups import check, common_rules, lasting_precision
from vlearn.optim.likelihood import Likelihood
from vlearn.optim.watch import Watch
from vlearn.sensitivity.live import Selector


class FullVON(CurvatureProbe, DenseState, VariationalOptimizer):
    r"""A Gaussian with a dense covariance, by one of two rules.

    With H the Hessian of the mean loss, S = H + wd, averages over the step's draws θ ~ N(m, (ess·S)⁻¹), and
    Ĥ = mean (1/B) Σᵢ JᵢᵀuᵢuᵢᵀJᵢ, E[uᵢuᵢᵀ] = ∂²ℓᵢ/∂f², a Gauss-Newton matrix (or Price's estimate of the Hessian):

        g ← β₁g + (1 - β₁) mean ∇ℓ̄(θ)
        "von"   H ← β₂H + (1 - β₂)Ĥ, then m ← m - lr·S⁻¹(g/(1 - β₁ᵗ) + wd·m) with the new S
        "iblr"  m ← m - lr·S⁻¹(g/(1 - β₁ᵗ) + wd·m) with the old S, and
                S ← ½(S + UᵀU), U = Lᵀ - (1 - β₂)L⁻¹(H - Ĥ), S = LLᵀ, which is at least S/2 whatever Ĥ is

    The posterior precision is num_data·S. Memory and time of a step grow with the square and the cube of the number of
    parameters.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the
            first step.
        lr: learning rate, 0.03 to 0.1 for networks; 1 with beta1=0 is a Newton step.
        ess: effective sample size: the number of training examples, unless tempered.
        hess_init: H at the start is this times the identity, per example.
        beta1: momentum of the gradient.
        beta2: momentum of the Hessian.
        weight_decay: wd = δ/N for a prior precision δ and N examples.
        mc_samples: draws per `step(closure)`.
        sync: average gradients and estimates over all processes at `step()`, without a DDP wrapper.
        debias: divide the momentum by 1 - β₁ᵗ.
        rule: "von" or "iblr", as above; "von" needs a Hessian estimate that is never negative.
        likelihood: what the loss is the negative logarithm of, see `VON`.
        hessian: "probe", "sampled" or, with the rule "iblr", "price", see `VON`.
        output: which of several outputs of the model the likelihood is of: a key, an index or a callable.
        num_data: number of training examples N, the scale of sensitivities; default ess.
        generator: of the noise; default torch's global one.
        shared_noise: all processes take one draw, that of rank 0's generator.
        nonfinite: "raise" FloatingPointError at a gradient that is not finite, "skip" the step and count it in
            `nonfinite_count`, or "ignore": do not look.

    Raises:
        ValueError: if an argument breaks its rule, or there are too many parameters.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = FullVON(model, lr=0.1, ess=100)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([3, 2])
    """

    _copied = (*CurvatureProbe._copied, "rule")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        sync: bool = False,
        debias: bool = True,
        *,
        rule: str = "von",
        likelihood: Likelihood = "categorical",
        hessian: str = "probe",
        output: Selector = None,
        num_data: float | None = None,
        generator: torch.Generator | None = None,
        shared_noise: bool = False,
        nonfinite: str = "raise",
    ):
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "betas": (beta1, beta2),
            "weight_decay": weight_decay,
            "mc_samples": mc_samples,
            "sync": sync,
            "debias": debias,
            "num_data": num_data,
            "shared_noise": shared_noise,
            "nonfinite": nonfinite,
        }
        if rule not in ("von", "iblr"):
            raise ValueError(f"rule={rule!r}, but it must be 'von' or 'iblr': use 'von'.")
        if rule == "von" and hessian == "price":
            raise ValueError(
                "hessian='price' with rule='von', but its estimate may be negative, and the precision with it: "
                "use rule='iblr'."
            )
        self.rule = rule
        self._check_group(defaults)
        self._set_curvature(likelihood, hessian, output)
        super().__init__(params, defaults, generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        check(group, [*common_rules(group), lasting_precision(group)])

    def _sums_over_examples(
        self, watch: Watch, wanted: Container[Tensor], weights: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        joint = self._joint()
        products = sums_of_products(watch.probed_trace(), joint, wanted, weights)
        return {p: rows.reshape(*p.shape, len(products)) for p, rows in zip(joint, split(products, joint), strict=True)}

    def _statistic(
        self, draw: Draw, group: dict[str, Any], block: list[Slot], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """Rows of one draw's Ĥ; on steps without captures those of H, which then stays."""
        rows = [slot.of(self.state[slot.parameter]["hessian"]) for slot in block]
        if draw.captured is None:
            return self._price(draw, block, gradients)
        if not draw.captured.count:
            return rows
        return [draw.captured.mean(slot, row) for slot, row in zip(block, rows, strict=True)]

    def _price(self, draw: Draw, block: list[Slot], gradients: list[Tensor]) -> list[Tensor]:
        """∇ℓ (ess·S(θ - m))ᵀ, whose mean is the Hessian by Price's theorem; symmetric once averaged."""
        joint, moving = self._joint(), draw.parameters
        at = positions(moving, joint).to(joint[0].device)
        precision = self._hessian(joint)[at.unsqueeze(1), at]
        precision.diagonal().add_(self._by_entry(moving, "weight_decay"))
        root = self._by_entry(moving, "ess").sqrt()
        moves = [slot.sample - self._exact_mean(slot) for slot in draw.slots]
        score = precision.new_zeros(sum(p.numel() for p in joint))
        score[at] = root * (precision @ (root * torch.cat([move.reshape(-1).to(precision) for move in moves])))
        return [torch.outer(g.reshape(-1).to(score), score).reshape(*g.shape, len(score)).to(g) for g in gradients]

    def _update_all(self, parts: Iterator[Part], joint: dict[Any, list[Tensor]]) -> None:
        if self._draw is not None:
            self._draw.finish()  # the sample stays in the buffers: Price's estimate wants all of it for every block
        found = list(parts)
        if found:
            self._update_jointly(found)

    def _update_jointly(self, parts: list[Part]) -> None:
        slots = [slot for part in parts for slot in part.block]
        joint, moving = self._joint(), [slot.parameter for slot in slots]
        at = positions(moving, joint).to(joint[0].device)
        gradients = [gradient for part in parts for gradient in part.gradients]
        statistics = [statistic for part in parts for statistic in part.statistics]
        hessian, rho = self._hessian(joint), 1 - self._by_entry(moving, "beta2")
        estimate = torch.cat([rows_of(rows).to(hessian) for rows in statistics])[:, at]
        estimate = (estimate + estimate.mT) / 2
        decay = self._by_entry(joint, "weight_decay")
        old = hessian + decay.diag()
        moved = self._moved_hessian(hessian, estimate, at, rho, old)
        used = old if self.rule == "iblr" else moved + decay.diag()
        factor = cholesky(used[at.unsqueeze(1), at])

        means, directions = [self._exact_mean(slot) for slot in slots], []
        momenta = [self.state[p]["momentum"] for p in moving]
        groups = [part.group for part in parts for _ in part.block]
        for group, p, mean, momentum, gradient in zip(groups, moving, means, momenta, gradients, strict=True):
            self.state[p]["step"] += 1
            momentum.lerp_(gradient, 1 - float(group["beta1"]))
            correction = 1 - group["beta1"] ** float(self.state[p]["step"]) if group["debias"] else 1.0
            directions.append((momentum / correction + group["weight_decay"] * mean).reshape(-1).to(hessian))
        steps = torch.cholesky_solve(torch.cat(directions).unsqueeze(1), factor).squeeze(1)
        for group, mean, step in zip(groups, means, split(steps, moving), strict=True):
            mean.sub_(step.reshape(mean.shape).to(mean), alpha=float(group["lr"]))
        self._round_means(slots)
        self._write_hessian(joint, moved)

    def _moved_hessian(self, hessian: Tensor, estimate: Tensor, at: Tensor, rho: Tensor, old: Tensor) -> Tensor:
        """H after the step, positive definite with the weight decay.

        Args:
            estimate: Ĥ of the rows `at`, those of parameters that have a gradient; the others keep theirs.
            rho: 1 - β₂ of those rows.
            old: S.
        """
        kept = (1 - rho).sqrt()
        share = rho.sqrt()
        if self.rule == "von":
            # D H D + √ρ Ĥ √ρ with D = √(1 - ρ) in the rows that move: positive whichever those are.
            scale = torch.ones_like(hessian.diagonal())
            scale[at] = kept
            moved = scale.unsqueeze(1) * hessian * scale
            moved[at.unsqueeze(1), at] += share.unsqueeze(1) * estimate * share
            return moved
        difference = torch.zeros_like(hessian)  # √ρ G √ρ, so that S - G + ½ G S⁻¹ G is the rule
        inner = hessian[at.unsqueeze(1), at] - estimate
        difference[at.unsqueeze(1), at] = share.unsqueeze(1) * inner * share
        factor = cholesky(old)
        u = factor.mT - torch.linalg.solve_triangular(factor, difference, upper=False)
        moved = (old + u.mT @ u) / 2
        return (moved + moved.mT) / 2 - (old - hessian)
