"""VOGN: the variational online Gauss-Newton method.

Khan et al., 2018, "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", arXiv:1806.04854;
tempering, damping and the augmentation factor are Osawa et al., 2019, arXiv:1906.02506.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.examples import sums_of_squares
from vlearn.optim.base import VariationalOptimizer
from vlearn.optim.groups import check
from vlearn.optim.newton import NewtonStep, newton_rules
from vlearn.optim.watch import Watch


class VOGN(NewtonStep, VariationalOptimizer):
    r"""A diagonal Gaussian whose Hessian is the mean of the examples' squared gradients.

    With t from 1, ∇ℓᵢ the gradient of one example's own loss, and averages over the step's draws
    θ = m + ε/√(N̂·(h + wd̂)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  ĥ = mean (1/B) Σᵢ ∇ℓᵢ(θ)²
        g ← β₁g + (1 - β₁)ĝ,  h ← β₂h + (1 - β₂)ĥ
        m ← m - lr·(g/(1 - β₁ᵗ) + wd̂·m)/(h + wd̂ + γ)

    N̂ = ess·ρ/τ and wd̂ = wd·τ/ρ with tempering τ, augmentation factor ρ and damping γ, which never enters the posterior.
    The squares come from the captured training pass without a gradient per example (layers at one position: one
    matrix product). The posterior precision is num_data·(h + wd̂).

    Squared gradients stand for the curvature where the loss is the negative log-likelihood of a model that fits, as
    cross-entropy's. With squared errors on a scale that is not the noise's, and where all examples are fitted, they do
    not: use VON there.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the first
            step. Where the loss is divided (accumulation, a gradient scaler), say so by `watch(..., loss_scale=)`.
        lr: learning rate α, 1e-2 for networks.
        ess: effective sample size: the number of training examples.
        hess_init: h at the start, per example. Its remaining weight after t steps is β₂ᵗ.
        beta1: momentum of the gradient.
        beta2: momentum of the Hessian, whose estimates carry little noise: 0.99 forgets hess_init in 500 steps, 0.999
            is for long runs.
        weight_decay: wd = δ/N for a prior precision δ and N examples.
        mc_samples: draws per `step(closure)`.
        sync: average gradients and squares over all processes at `step()`, without a DDP wrapper.
        debias: divide the momentum by 1 - β₁ᵗ.
        damping: γ, added to the preconditioner alone.
        tempering: τ, the weight of the KL divergence in the objective: below 1 for a colder posterior.
        augmentation: ρ, by how much data augmentation multiplies the examples.
        num_data: number of training examples N, the scale of sensitivities; default ess.
        generator: of the noise; default torch's global one.
        foreach: multi-tensor operations; default wherever a block has several tensors.
        shared_noise: all processes take one draw, that of rank 0's generator.
        nonfinite: "raise" FloatingPointError at a gradient that is not finite, "skip" the step and count it in
            `nonfinite_count`, or "ignore": do not look.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = VOGN(model, lr=0.01, ess=100)
        >>> loss = model(torch.ones(3, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([1, 2])
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
        damping: float = 0.0,
        tempering: float = 1.0,
        augmentation: float = 1.0,
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
            "tempering": tempering,
            "augmentation": augmentation,
            "num_data": num_data,
            "foreach": foreach,
            "shared_noise": shared_noise,
            "nonfinite": nonfinite,
        }
        self._check_group(defaults)
        super().__init__(params, defaults, generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        check(
            group,
            [
                *newton_rules(group),
                ("tempering", group["tempering"] > 0, "must be positive: use 1"),
                ("augmentation", group["augmentation"] > 0, "must be positive: use 1"),
            ],
        )

    def _needs_captures(self) -> bool:
        return True

    def _scales(self, group: dict[str, Any]) -> tuple[float, float]:
        ratio = group["tempering"] / group["augmentation"]
        return group["ess"] / ratio, group["weight_decay"] * ratio

    def _sums_over_examples(
        self, watch: Watch, wanted: Container[Tensor], weights: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        squares = sums_of_squares(watch.checked_trace(), wanted, weights)
        return {p: found * watch.scale**2 for p, found in squares.items()}
