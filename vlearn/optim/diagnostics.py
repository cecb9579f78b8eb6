"""Whether a posterior learns: what its Hessian and its noise look like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SUBSAMPLE = 1_000_000  # entries that the medians and shares are taken over, at most
MOVED = 0.01  # relative change of the Hessian that counts as moved


@dataclass(frozen=True)
class Diagnostics:
    """Health of a diagonal posterior. Shares and medians are over an even subsample of a million entries.

    Attributes:
        step: updates so far.
        hess_init_weight: β₂ᵀ, what is left of hess_init in the Hessian after T steps; of the group where it is
            largest. Near 1, the posterior is what hess_init made it.
        hessian_min, hessian_median, hessian_max: of h, per example, without the weight decay.
        hessian_moved: share of entries of h that differ from hess_init by more than 1%.
        signal_to_noise: median of ``|m|/σ`` over the weights, σ the standard deviation of the draws.
        clipped: share of entries that clip_radius bounds in a step from the present state.
        nonfinite_count: steps skipped for a gradient that was not finite.
        decomposition_failures: eigendecompositions that failed, where an optimizer has any.
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


@torch.no_grad()
def diagnose(
    groups: list[tuple[dict[str, Any], list[tuple[Tensor, dict[str, Tensor]]]]], nonfinite_count: int
) -> Diagnostics:
    """Summarise the state of an optimizer with a diagonal Hessian.

    Args:
        groups: settings of each parameter group, and (mean, state) of its parameters.
        nonfinite_count: steps skipped.

    Raises:
        ValueError: if no parameter has a state.
    """
    states = [state for _, members in groups for _, state in members]
    if not states:
        raise ValueError("no parameter has a state, so there is nothing to diagnose: give some that require grad.")
    stride = max(1, -(-sum(state["hessian"].numel() for state in states) // SUBSAMPLE))
    columns = [_columns(group, mean, state, stride) for group, members in groups for mean, state in members]
    hessian, moved, ratio, clipped = (torch.cat(column).double() for column in zip(*columns, strict=True))
    lowest, highest = zip(*(state["hessian"].aminmax() for state in states), strict=True)
    return Diagnostics(
        step=max(int(state["step"]) for state in states),
        hess_init_weight=max(float(g["beta2"]) ** int(state["step"]) for g, members in groups for _, state in members),
        hessian_min=min(map(float, lowest)),
        hessian_median=float(hessian.median()),
        hessian_max=max(map(float, highest)),
        hessian_moved=float(moved.mean()),
        signal_to_noise=float(ratio.median()),
        clipped=float(clipped.mean()),
        nonfinite_count=nonfinite_count,
    )


def _columns(group: dict[str, Any], mean: Tensor, state: dict[str, Tensor], stride: int) -> tuple[Tensor, ...]:
    """(h, moved or not, |m|/σ, clipped or not) of every `stride`-th entry, on the CPU."""
    mean, momentum, hessian = (t.reshape(-1)[::stride] for t in (mean, state["momentum"], state["hessian"]))
    precision = hessian + group["weight_decay"]
    moved = (hessian - group["hess_init"]).abs() > MOVED * group["hess_init"]
    ratio = mean.abs() * (group["ess"] * precision).sqrt()
    steps = int(state["step"])
    correction = 1 - group["beta1"] ** steps if group["debias"] and steps else 1.0
    direction = (momentum / correction + group["weight_decay"] * mean) / precision
    clipped = direction.abs() > group.get("clip_radius", math.inf)
    return hessian.cpu(), moved.cpu(), ratio.cpu(), clipped.cpu()
