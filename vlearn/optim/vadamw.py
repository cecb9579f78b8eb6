"""VAdamW: AdamW with a posterior, by perturbed weights.

Khan et al., 2018, "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", arXiv:1806.04854; AdamW is
Loshchilov, Hutter, 2019, arXiv:1711.05101.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.gaussians import Diagonal
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.parameters.options import check, common_rules
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.diagnostics import Diagnostics
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.updates.adam import Scale, ScaleEstimate, adam_step, rate_of_step
from vlearn.optim.updates.block_update import BlockUpdate, split_by_step


class VAdamW(VariationalOptimizer[DiagonalStructure, Diagonal]):
    r"""AdamW's steps, with AdamW's settings, around a posterior precision that is kept on the scale of the data.

    With t from 1, ℓ̄ the mean loss, and the average over the step's draws θ = m + ε/√(ess·(h + wd)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  g ← β₁g + (1 - β₁)ĝ,  v ← β₂v + (1 - β₂)ĝ²
        m ← (1 - lr·λ)m - lr·(g/(1 - β₁ᵗ))/(√v̂ + eps),  v̂ = v/(1 - β₂ᵗ)
        h = c·v̂

    The second moments of the minibatch gradient have the shape of the curvature, not its scale: c is measured. By
    Price's theorem E[ess·Σ(θ - m)∘∇ℓ̄(θ)] = Σ H/(h + wd), H the diagonal of the Hessian of ℓ̄, so one inner product of
    noise and gradient a step tells by how much h is wrong on average. c is the mean of these estimates by their
    precision, plus one standard deviation. The posterior precision is num_data·(h + wd) with wd = δ/num_data, δ the
    prior precision.

    The draws are narrower than the posterior, so that training is AdamW's: ess = n·c/ρ, n = Σ h/(h + wd) the effective
    number of parameters. Then they add at most the share ρ to the variance of the minibatch's gradient, however the
    weights are correlated: Σⱼ Hᵢⱼ²/(ess·hⱼ) ≤ hᵢ·n/ess = ρ·hᵢ/c = ρ·v̂ᵢ. They are never wider than the posterior. The
    first step is taken at the mean.

    Args:
        params: a model, which is then watched (training forwards draw, `sensitivities()` works), or anything that
            torch.optim takes.
        lr, betas, eps, weight_decay: AdamW's; weight_decay λ acts on the weights alone and is not the prior.
        num_data: number of training examples N, the scale of the posterior.
        prior_precision: δ of the Gaussian prior N(0, 1/δ) that the posterior has beside the data.
        draw_variance: ρ, the share of the gradient's variance that the draws may add.
        ess: effective sample size of the draws in place of ρ; N draws from the posterior itself.
        mc_samples: draws per `step(closure)`.
        sync: average gradients and statistics over all processes at `step()`, without a DDP wrapper.
        generator: of the noise; default torch's global one. Of several processes each has its own noise, also if
            their generators are alike.
        foreach: multi-tensor operations; default wherever a block has several tensors.
        nonfinite: "raise" FloatingPointError at a gradient that is not finite, "skip" the step and count it in
            `nonfinite_count`, or "ignore": do not look.
        shared_noise: all processes take one draw, that of rank 0's generator. Under DistributedDataParallel this
            supports clipping and GradScaler, which their own draws do not; one draw instead of one per process.
        batch_norm: "refuse" rows of examples that meet in a BatchNorm in train mode, or take the batch's statistics as
            "constant", an approximation: see `watch`.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = VAdamW(model, lr=1e-3, num_data=100)
        >>> loss = model(torch.ones(3, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.sensitivities().self_influence.shape
        torch.Size([3])
    """

    _takes_complex = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        num_data: float,
        prior_precision: float = 1.0,
        draw_variance: float = 0.02,
        ess: float | None = None,
        mc_samples: int = 1,
        sync: bool = False,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
        nonfinite: str = "raise",
        shared_noise: bool = False,
        batch_norm: str = "refuse",
    ):
        beta1, beta2 = betas
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "num_data": num_data,
            "prior_precision": prior_precision,
            "draw_variance": draw_variance if ess is None or draw_variance <= 0 else None,
            "ess": math.inf if ess is None else ess,
            "scale": None,
            "hess_init": 0.0,
            "debias": True,
            "mc_samples": mc_samples,
            "sync": sync,
            "foreach": foreach,
            "nonfinite": nonfinite,
            "shared_noise": shared_noise,
        }
        super().__init__(params, defaults, generator, batch_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; a group with an `ess` of its own takes no `draw_variance`."""
        if isinstance(param_group, dict) and "ess" in param_group:
            param_group = {"draw_variance": None, **param_group}
        super().add_param_group(param_group)

    def _check_group(self, group: Group) -> None:
        rho = group["draw_variance"]
        own = [
            ("num_data", group["num_data"] is not None, "must be given: use the number of training examples"),
            ("eps", group["eps"] >= 0, "must not be negative: try 1e-8"),
            ("beta2", group["beta2"] < 1, "must be below 1: try 0.999"),
            ("prior_precision", group["prior_precision"] > 0, "must be positive: use 1"),
            ("draw_variance", rho is None or rho > 0, "must be positive: try 0.02"),
        ]
        check(group, [*own, *(rule for rule in common_rules(group) if rule[0] != "hess_init")])

    def _new_structure(self, parameters: Parameters, processes: Processes) -> DiagonalStructure:
        return DiagonalStructure(parameters)

    def _new_curvature(self, structure: DiagonalStructure) -> ScaleEstimate:
        return ScaleEstimate()

    @property
    def _estimate(self) -> ScaleEstimate:
        curvature = self._runtime.curvature
        assert isinstance(curvature, ScaleEstimate)
        return curvature

    def _prepare_update(self, draw: Draw, layer_statistics: dict[Any, Any]) -> None:
        self._estimate.start_step()
        for group in self.param_groups:  # one that was added later
            group["scale"] = self.param_groups[0]["scale"]

    def _update_block(self, update: BlockUpdate) -> None:
        group, estimate = update.group, self._estimate
        known = group["scale"] is not None
        for (means, momenta, hessians, gradients, statistics), correction, rate in split_by_step(
            self._structure, update, rate_of_step
        ):
            if known:
                prior = group["prior_precision"] / group["num_data"]
                estimate.add(hessians, gradients, statistics, group["ess"], prior)
            else:
                estimate.add_first(means, gradients)
            adam_step(
                means,
                momenta,
                hessians,
                gradients,
                scale=group["scale"][0] if known else 1.0,
                lr=float(group["lr"]),
                beta1=float(group["beta1"]),
                rate=rate,
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                correction=correction,
            )

    def _update_jointly(self, updates: list[BlockUpdate], prepared: Any) -> None:
        """Move the scale, and with it the Hessians and the width of the draws."""
        estimate, before = self._estimate, self.param_groups[0]["scale"]
        if before is None:
            scale = Scale.first(estimate.squared_gradient, estimate.squared_weight, estimate.count)
        else:
            scale = estimate.next(Scale(*before), float(self.param_groups[0]["beta2"]))
        if scale is None:
            return
        factor = scale.scale / (1.0 if before is None else before[0])
        torch._foreach_mul_(list(self._structure.diagonal_hessian().values()), factor)
        effective = estimate.effective or estimate.count
        for group in self.param_groups:
            group["scale"] = tuple(scale)
            if group["draw_variance"] is not None:
                group["ess"] = max(float(group["num_data"]), effective * scale.scale / group["draw_variance"])

    def root_second_moments(self) -> dict[Tensor, Tensor]:
        """√v̂ of each parameter that has been moved, as `vlearn.posterior.training_time` wants it."""
        scale = self.param_groups[0]["scale"]
        if scale is None:
            return {}
        hessians = self._structure.diagonal_hessian().items()
        return {p: (h / scale[0]).sqrt() for p, h in hessians if int(self.state[p]["step"])}

    def diagnostics(self) -> Diagnostics:
        """As every optimizer's; nothing of the Hessian is left from its start once the first step is done."""
        found = super().diagnostics()
        return dataclasses.replace(found, hess_init_weight=float(found.step == 0))
