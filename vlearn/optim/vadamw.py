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
from vlearn.gaussians.gaussian import Gaussian
from vlearn.optim.diagnostics.diagnostics import Diagnostics
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.distributed.shards import share
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.parameters.options import check, common_rules
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.structures.prior import Decay
from vlearn.optim.updates.adam import Scale, ScaleEstimate, adam_step, rate_of_step
from vlearn.optim.updates.block_update import BlockUpdate, split_by_step
from vlearn.sharded.tensors import shard

DRAW_VARIANCE = 0.02


class VAdamW(VariationalOptimizer[DiagonalStructure, Diagonal]):
    r"""AdamW's steps, with AdamW's settings, around a posterior precision that is kept on the scale of the data.

    With t from 1, ℓ̄ the mean loss, and the average over the step's draws θ = m + ε/√(ess·(h + wd)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  g ← β₁g + (1 - β₁)ĝ,  v ← β₂v + (1 - β₂)ĝ²
        m ← (1 - lr·λ)m - lr·(g/(1 - β₁ᵗ))/(√v̂ + eps),  v̂ = v/(1 - β₂ᵗ)
        h = c·v̂

    The second moments of the minibatch gradient have the shape of the curvature, not its scale: c is measured. By
    Price's theorem E[ess·Σ(θ - m)∘∇ℓ̄(θ)] = Σ H/(h + wd), H the diagonal of the Hessian of ℓ̄, so one inner product of
    noise and gradient a step tells by how much h is wrong on average. c is the root of squared mean and variance of
    these estimates, weighed by their precision, see `vlearn.optim.updates.adam.Scale`. Its relative standard deviation
    is `diagnostics().scale_error`: at ρ = .02 some tenths after a thousand steps, .1 at last. Until then c is a guess,
    and so is the width of the posterior.

    The posterior precision is num_data·(h + wd) with wd = δ/num_data, δ the prior precision. It ranks examples, but a
    diagonal that did not shape the network by its draws is too wide where there are more weights than examples:
    leave-one-out losses are then many times too large, of which `vlearn.sweep` warns. For them fit a posterior at the
    end, `vlearn.posterior.fit` with the training time.

    The draws are narrower than the posterior, so that training is AdamW's: ess = n·c/ρ, n = Σ h/(h + wd) the effective
    number of parameters. Where h is the diagonal of a positive H, they add at most the share ρ to the variance of the
    minibatch's gradient, however the weights are correlated: Σⱼ Hᵢⱼ²/(ess·(hⱼ + wd)) ≤ hᵢ·n/ess = ρ·hᵢ/c = ρ·v̂ᵢ. They
    are never wider than the posterior. The first step is taken at the mean.

    Args:
        params: a model, which is then watched (training forwards draw, `sensitivities()` works), or anything that
            torch.optim takes.
        lr, betas, eps, weight_decay: AdamW's; weight_decay λ acts on the weights alone and is not the prior.
        num_data: number of training examples N, the scale of the posterior.
        prior_precision: δ of the Gaussian prior N(0, 1/δ) that the posterior has beside the data.
        prior: a posterior, N(m₀, P₀⁻¹), in the place of both N(0, 1/δ) and the weight decay of the parameters that it
            has, see `vlearn.optim.SharedOptions`. Unlike λ it acts on the weights by its own strength: after AdamW's
            step with λ = 0, m ← m - r(m - m₀), r = lr·w/(√v̂ + eps + lr·w), w = P₀/num_data, a proximal step, which is
            stable however large P₀ is and rests where ∇ℓ̄ + w(m - m₀) = 0.
        draw_variance: ρ, the share of the gradient's variance that the draws may add.
        ess: effective sample size of the draws in place of ρ; N draws from the posterior itself.
        mc_samples, sync, generator, foreach, nonfinite, shared_noise, batch_norm: as `vlearn.IVON` has them.

    Raises:
        ValueError: if an argument breaks its rule.

    Examples:
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
    _takes_shards = True
    _takes_prior = True

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
        prior: Gaussian | None = None,
        draw_variance: float = DRAW_VARIANCE,
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
            "prior": prior,
            **_width(ess, draw_variance),
            "scale": tuple(Scale()),
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
        """As every optimizer's; a group may have an `ess` or a `draw_variance` of its own."""
        if isinstance(param_group, dict) and not {"ess", "draw_variance"}.isdisjoint(param_group):
            width = _width(param_group.get("ess"), param_group.get("draw_variance", DRAW_VARIANCE))
            param_group = {**param_group, **width}
        super().add_param_group(param_group)

    def _check_group(self, group: Group) -> None:
        rho = group["draw_variance"]
        fixed = "must be finite and positive, or left to draw_variance: use the number of training examples"
        own = [
            ("ess", rho is not None or 0 < group["ess"] < math.inf, fixed),
            ("num_data", group["num_data"] is not None, "must be given: use the number of training examples"),
            ("eps", group["eps"] >= 0, "must not be negative: try 1e-8"),
            ("beta2", group["beta2"] < 1, "must be below 1: try 0.999"),
            ("prior_precision", group["prior_precision"] > 0, "must be positive: use 1"),
            ("draw_variance", rho is None or rho > 0, "must be positive: try 0.02"),
        ]
        # The Hessian starts from nothing.
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

    @property
    def _scale(self) -> Scale:
        return Scale(*self.param_groups[0]["scale"])

    def _prepare_update(self, draw: Draw, layer_statistics: dict[Any, Any]) -> None:
        self._estimate.start_step()
        for group in self.param_groups:  # one that was added later
            group["scale"] = self.param_groups[0]["scale"]

    def _update_block(self, update: BlockUpdate) -> None:
        group, estimate = update.group, self._estimate
        known = Scale(*group["scale"]).scale
        counts = share(update.slices[0].parameter, self._sampler.processes.mesh)
        for (means, momenta, hessians, gradients, statistics), decay, correction, rate in split_by_step(
            self._structure, update, rate_of_step
        ):
            if known:
                estimate.add(hessians, gradients, statistics, group["ess"], decay.rate, counts)
            else:
                estimate.add_first(means, gradients, counts)
            adam_step(
                means,
                momenta,
                hessians,
                gradients,
                scale=known or 1.0,
                lr=float(group["lr"]),
                beta1=float(group["beta1"]),
                rate=rate,
                eps=float(group["eps"]),
                decay=decay if isinstance(decay.rate, list) else Decay(float(group["weight_decay"])),
                correction=correction,
            )

    def _update_jointly(self, updates: list[BlockUpdate], prepared: Any) -> None:
        """Move the scale, and with it the Hessians and the width of the draws."""
        estimate, before = self._estimate, self._scale
        estimate.read()
        if (mesh := self._sampler.processes.mesh) is not None:
            estimate.sum_over(mesh)
        if not before.scale:
            scale = Scale.first(estimate.squared_gradient, estimate.squared_weight, estimate.count)
        else:
            scale = estimate.next(before, float(self.param_groups[0]["beta2"]))
        if not scale.scale:
            return
        factor = scale.scale / (before.scale or 1.0)
        torch._foreach_mul_([shard(h) for h in self._structure.diagonal_hessian().values()], factor)
        effective = estimate.effective or estimate.count
        for group in self.param_groups:
            group["scale"] = tuple(scale)
            if group["draw_variance"] is not None:
                group["ess"] = max(float(group["num_data"]), effective * scale.scale / group["draw_variance"])

    def root_second_moments(self) -> dict[Tensor, Tensor]:
        """√v̂ of each parameter that has been moved, as `vlearn.posterior.training_time` wants it."""
        scale = self._scale.scale
        if not scale:
            return {}
        hessians = self._structure.diagonal_hessian().items()
        return {p: (h / scale).sqrt() for p, h in hessians if int(self.state[p]["step"])}

    def _read_diagnostics(self) -> Diagnostics:
        """As every optimizer's, with the scale's error; from the first step on no start is left in the Hessian."""
        found = super()._read_diagnostics()
        return dataclasses.replace(
            found, hess_init_weight=float(found.step == 0), scale_error=self._scale.relative_error
        )


def _width(ess: float | None, draw_variance: float | None) -> dict[str, float | None]:
    """The settings of the draws' width: ess is given, or follows from draw_variance once the scale is known."""
    return {"ess": math.inf, "draw_variance": draw_variance} if ess is None else {"ess": ess, "draw_variance": None}
