"""Whether a posterior learns: what its Hessian and its noise look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlearn.optim.parameters.options import hess_init_weight, tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.structures.diagonal import momentum_correction
from vlearn.optim.structures.prior import rate_of
from vlearn.sharded.tensors import whole

SUBSAMPLE = 1_000_000  # entries that the medians and shares are taken over, at most
MOVED = 0.01  # relative change of the Hessian that counts as moved


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


@torch.no_grad()
def diagnose(
    parameters: Parameters, means: Mapping[str, Tensor], hessians: Mapping[Tensor, Tensor], nonfinite_count: int
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
    hessian, moved, ratio, clipped = (torch.cat(column).double() for column in zip(*columns, strict=True))
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
    )


def _columns(
    parameters: Parameters, group: Group, p: Tensor, mean: Tensor, hessian: Tensor, stride: int
) -> tuple[Tensor, ...]:
    """(h, moved or not, |m|/σ, clipped or not) of every `stride`-th entry, on the CPU."""
    ess, state, rate = tempered_ess_and_decay(group)[0], parameters.state[p], rate_of(parameters, group, p)
    mean, momentum, hessian = (whole(t).reshape(-1)[::stride] for t in (mean, state["momentum"], hessian))
    distance = mean - whole(state["prior_mean"]).reshape(-1)[::stride] if parameters.has_prior(p) else mean
    rate = rate.reshape(-1)[::stride] if isinstance(rate, Tensor) else rate
    precision = hessian + rate
    moved = (hessian - group["hess_init"]).abs() > MOVED * group["hess_init"]
    ratio = mean.abs() * (ess * precision).sqrt()
    correction = momentum_correction(group, state["step"]) if int(state["step"]) else 1.0
    direction = (momentum / correction + rate * distance) / precision
    clipped = direction.abs() > group.get("clip_radius", math.inf)
    return hessian.cpu(), moved.cpu(), ratio.cpu(), clipped.cpu()
