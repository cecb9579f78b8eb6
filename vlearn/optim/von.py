"""VON: the variational online Newton method with a diagonal Gauss-Newton or Hessian matrix.

Khan et al., 2018, arXiv:1806.04854; Khan and Rue, 2023, "The Bayesian Learning Rule", arXiv:2107.04562.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.examples import sums_of_squares
from vlearn.optim.base import VariationalOptimizer
from vlearn.optim.curvature import CurvatureProbe
from vlearn.optim.draw import Draw, Slot
from vlearn.optim.groups import check
from vlearn.optim.likelihood import Likelihood
from vlearn.optim.newton import NewtonStep, newton_rules
from vlearn.optim.watch import Watch
from vlearn.sensitivity.live import Selector


class VON(CurvatureProbe, NewtonStep, VariationalOptimizer):
    r"""A diagonal Gaussian by online Newton steps: the curvature of the loss, not the size of the gradients.

    With t from 1, ℓ̄ the mean loss, and averages over the step's draws θ = m + ε/√(ess·(h + wd)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  ĥ = mean (1/B) Σᵢ (Jᵢᵀuᵢ)²,  E[uᵢuᵢᵀ] = Λᵢ = ∂²ℓᵢ/∂f²,  E[ĥ] = diag (1/B) Σᵢ JᵢᵀΛᵢJᵢ
        g ← β₁g + (1 - β₁)ĝ,  h ← β₂h + (1 - β₂)ĥ
        m ← m - lr·(g/(1 - β₁ᵗ) + wd·m)/(h + wd + damping)

    The probe u takes one more backward pass through the training step's own graph, without weight gradients; it needs
    no labels and stays informative where the training examples are fitted and their gradients vanish. The posterior
    precision is num_data·(h + wd).

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the
            first step.
        lr: learning rate, 1e-2 for networks and less with a small Hessian; 1 with beta1=0 is a Newton step.
        ess: effective sample size: the number of training examples, unless tempered.
        hess_init: h at the start, per example. Its remaining weight after t steps is β₂ᵗ.
        beta1: momentum of the gradient.
        beta2: momentum of the Hessian, whose estimates carry little noise: 0.99 forgets hess_init in 500 steps, 0.999
            is for long runs.
        weight_decay: wd = δ/N for a prior precision δ and N examples.
        mc_samples: draws per `step(closure)`.
        sync: average gradients and estimates over all processes at `step()`, without a DDP wrapper.
        debias: divide the momentum by 1 - β₁ᵗ.
        likelihood: what the loss is the negative logarithm of: "categorical" (cross-entropy over the last axis of the
            output, without class weights), "gaussian" (`F.mse_loss`), or a callable output -> torch Distribution.
        hessian: "probe" (above, u = R z, RRᵀ = Λ, z random signs), "sampled" (u the residual of labels sampled from the
            model) or "price", ĥ = ess·(h + wd)·mean (θ - m)∘∇ℓ̄(θ), which needs no captures and no likelihood, and
            with which h + wd at most halves in a step.
        output: which of several outputs of the model the likelihood is of: a key, an index or a callable.
        damping: added to the preconditioner alone, never to the posterior.
        num_data: number of training examples N, the scale of sensitivities; default ess.
        generator: of the noise; default torch's global one.
        foreach: multi-tensor operations; default wherever a block has several tensors.
        shared_noise: all processes take one draw, that of rank 0's generator.
        nonfinite: "raise" FloatingPointError at a gradient that is not finite, "skip" the step and count it in
            `nonfinite_count`, or "ignore": do not look.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = VON(model, lr=0.1, ess=100)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([3, 2])
    """

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
        likelihood: Likelihood = "categorical",
        hessian: str = "probe",
        output: Selector = None,
        damping: float = 0.0,
        num_data: float | None = None,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
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
            "damping": damping,
            "num_data": num_data,
            "foreach": foreach,
            "shared_noise": shared_noise,
            "nonfinite": nonfinite,
        }
        self._check_group(defaults)
        self._set_curvature(likelihood, hessian, output)
        super().__init__(params, defaults, generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        check(group, newton_rules(group))

    def _sums_over_examples(
        self, watch: Watch, wanted: Container[Tensor], weights: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        return sums_of_squares(watch.probed_trace(), wanted, weights)

    def _statistic(
        self, draw: Draw, group: dict[str, Any], block: list[Slot], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        if self._needs_captures():
            return super()._statistic(draw, group, block, noise, gradients)
        ess, weight_decay = self._scales(group)
        precisions = torch._foreach_add(self._state_of(block, "hessian"), weight_decay)
        torch._foreach_mul_(precisions, ess)
        torch._foreach_mul_(noise, gradients)
        return list(torch._foreach_mul(precisions, noise))  # E[∇²ℓ] = E[S(θ - m)∇ℓᵀ], Price's theorem
