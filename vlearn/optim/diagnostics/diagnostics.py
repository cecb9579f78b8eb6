"""Whether a posterior learns: what its Hessian, its noise and its steps look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlearn._wide import widened
from vlearn.optim.diagnostics.advice import advise
from vlearn.optim.parameters.options import hess_init_weight, tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.structures.diagonal import momentum_correction
from vlearn.optim.structures.prior import rate_of
from vlearn.sharded.tensors import whole

SUBSAMPLE = 1_000_000  # entries that the medians and shares are taken over, at most
MOVED = 0.01  # relative change of the Hessian that counts as moved
SETTINGS = ("lr", "ess", "hess_init", "beta2", "weight_decay", "draw_variance")  # those that advice speaks of


@dataclass(frozen=True)
class Diagnostics:
    """Health of a diagonal posterior. Shares and medians are over an even subsample of a million entries.

    Attributes:
        step: updates so far.
        hess_init_weight: what is left of hess_init in the Hessian after T steps: β₂ᵀ, or with `beta2_warmup` the
            product of the steps' β₂, (t₀ - 1)/(T + t₀ - 1) in the warm-up; of the parameter where it is largest. Near
            1, the posterior is what hess_init made it. Every step of a parameter counts as if it had had an estimate:
            where only each k-th has (`watch(every=k)`), more is left.
        hessian_min, hessian_median, hessian_max: of h, per example, without the weight decay.
        hessian_moved: share of entries of h that differ from hess_init by more than 1%.
        signal_to_noise: median of ``|m|/σ`` over the weights, σ the standard deviation of the draws.
        clipped: share of entries that clip_radius bounds in a step from the present state.
        nonfinite_count: steps skipped for a gradient that was not finite.
        decomposition_failures: eigendecompositions that failed, where an optimizer has any.
        scale_error: relative standard deviation of the scale of h where that is measured, as VAdamW's is. Near 1, the
            width of the posterior is a guess.
        hessian_noise: what the noise of Price's estimates has added to the posterior precision, in multiples of it,
            where draws are narrower than the posterior (curvature="price" and ess above num_data); else 0. Above .5
            the Hessian is mostly noise, and the posterior refuses leave-one-out losses.
        step_size: root mean square of ``Δm·√(h + wd)`` of a step from the present state. Times √B, it is in multiples
            of the width of a posterior from B examples. In an eigenbasis it is that of the diagonal, roughly.
        batch: examples of the last recorded pass, else of the loader's first batch; None where neither is there.
        loss_at_mean, loss_at_draws: mean loss of a few hundred of the loader's examples, at the mean and over draws;
            None without a loader, as all that follow.
        num_examples: number of the loader's examples; None where it does not say. num_terms: times the entries of the
            loss that each has, as tokens; None also for a loss of one's own.
        residual_variance: mean squared residual at the mean where the loss is a squared error, and assumed_variance:
            that of the noise whose negative log-likelihood it is, 1/2 of `F.mse_loss` on one output. Else None.
        settings: those of the first parameter group that `advice` speaks of; with num_data, or None where it is
            unclear, and whether it was given.
    """

    step: int
    hess_init_weight: float
    hessian_min: float
    hessian_median: float
    hessian_max: float
    hessian_moved: float
    signal_to_noise: float
    clipped: float
    nonfinite_count: int
    decomposition_failures: int = 0
    scale_error: float = 0.0
    hessian_noise: float = 0.0
    step_size: float = 0.0
    batch: int | None = field(default=None, compare=False)  # not of the state
    loss_at_mean: float | None = None
    loss_at_draws: float | None = None
    num_examples: int | None = None
    num_terms: int | None = None
    residual_variance: float | None = None
    assumed_variance: float | None = None
    settings: dict[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def advice(self) -> list[str]:
        """What to change: sentences that each name a setting and a value to try; none where nothing is wrong.

        It sees, with no loader, a Hessian that is still hess_init after a hundred steps, a learning rate that is too
        high, and a num_data below the examples of one minibatch; with one also draws that are too wide, a num_data or
        ess that is not the number of examples, and a squared error whose scale is not that of the noise.
        """
        return advise(asdict(self))


@torch.no_grad()
def diagnose(
    parameters: Parameters,
    means: Mapping[str, Tensor],
    hessians: Mapping[Tensor, Tensor],
    nonfinite_count: int,
) -> Diagnostics:
    """Summarise the posterior of an optimizer by the diagonal of its Hessian.

    Args:
        parameters: those of the optimizer, with their state.
        means: the posterior mean by name.
        hessians: the diagonal of the Hessian of each parameter that has a state, in its shape.
        nonfinite_count: steps skipped.

    Raises:
        ValueError: if no parameter has a state.
    """
    if not hessians:
        raise ValueError("no parameter has a state, so there is nothing to diagnose: give some that require grad.")
    names = parameters.names()
    stride = max(1, -(-sum(hessian.numel() for hessian in hessians.values()) // SUBSAMPLE))
    columns, weights = [], []
    for group in parameters.groups:
        for p in group["params"]:
            if p in hessians:
                columns.append(_columns(parameters, group, p, means[names[p]], hessians[p], stride))
                weights.append(hess_init_weight(group, int(parameters.state[p]["step"])))
    hessian, moved, ratio, clipped, steps = (widened(torch.cat(column)) for column in zip(*columns, strict=True))
    lowest, highest = zip(*(whole(hessian).aminmax() for hessian in hessians.values()), strict=True)
    return Diagnostics(
        step=max(int(parameters.state[p]["step"]) for p in hessians),
        hess_init_weight=max(weights),
        hessian_min=min(map(float, lowest)),
        hessian_median=float(hessian.median()),
        hessian_max=max(map(float, highest)),
        hessian_moved=float(moved.mean()),
        signal_to_noise=float(ratio.median()),
        clipped=float(clipped.mean()),
        nonfinite_count=nonfinite_count,
        step_size=float(steps.square().mean().sqrt()),
        settings=_settings(parameters),
    )


def _columns(
    parameters: Parameters, group: Group, p: Tensor, mean: Tensor, hessian: Tensor, stride: int
) -> tuple[Tensor, ...]:
    """(h, moved or not, |m|/σ, clipped or not, Δm·√(h + wd)) of every `stride`-th entry, on the CPU."""
    ess, state, rate = tempered_ess_and_decay(group)[0], parameters.state[p], rate_of(parameters, group, p)
    mean, momentum, hessian = (whole(t).reshape(-1)[::stride] for t in (mean, state["momentum"], hessian))
    distance = mean - whole(state["prior_mean"]).reshape(-1)[::stride] if parameters.has_prior(p) else mean
    rate = rate.reshape(-1)[::stride] if isinstance(rate, Tensor) else rate
    precision = hessian + rate
    moved = (hessian - group["hess_init"]).abs() > MOVED * group["hess_init"]
    ratio = mean.abs() * (ess * precision).sqrt()
    correction = momentum_correction(group, state["step"]) if int(state["step"]) else 1.0
    direction = (momentum / correction + rate * distance) / precision
    bound = group.get("clip_radius", math.inf)
    step = _rate(group) * (direction * precision / _divisor(group, hessian, precision)).clamp(-bound, bound)
    columns = hessian, moved, ratio, direction.abs() > bound, step * precision.sqrt()
    hessian, moved, ratio, clipped, step = (column.cpu() for column in columns)
    return hessian, moved, ratio, clipped, step


def _rate(group: Group) -> float:
    """What multiplies the preconditioned gradient in a step."""
    scale = group["hess_init"] + group["weight_decay"] if group.get("rescale_lr", False) else 1.0
    return float(group["lr"]) * scale


def _divisor(group: Group, hessian: Tensor, precision: Tensor) -> Tensor:
    """What the gradient is divided by in a step: h + wd + damping, or VAdamW's √v̂ + eps, of which h = c·v̂."""
    if "scale" in group:
        scale = group["scale"][0]
        return (hessian / scale).sqrt() + group["eps"] if scale else torch.full_like(hessian, math.inf)
    return precision + group.get("damping", 0.0)


def _settings(parameters: Parameters) -> dict[str, Any]:
    group = parameters.groups[0]
    settings = {name: group.get(name) for name in SETTINGS}
    settings["lr"] = float(group["lr"])
    try:
        settings["num_data"] = parameters.num_data
    except ValueError:
        settings["num_data"] = None
    settings["num_data_given"] = group["num_data"] is not None
    return settings
