"""The online Newton step of a diagonal Hessian: h moves to its estimate, then m by the new h."""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn.optim.parameters.options import (
    SettingRule,
    beta2_of_step,
    common_rules,
    positive_precision_rules,
)
from vlearn.optim.parameters.parameters import Group
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.structures.prior import Decay, decay_of
from vlearn.optim.updates.block_update import BlockUpdate, split_by_step
from vlearn.optim.updates.hessian_noise import add_noise, is_measured


def newton_rules(group: Group) -> list[SettingRule]:
    """Rules of the settings of an online Newton step."""
    return [
        *common_rules(group),
        *positive_precision_rules(group),
        ("damping", group["damping"] >= 0, "must not be negative: use 0"),
    ]


def apply_newton_step(structure: DiagonalStructure, update: BlockUpdate, signed: bool) -> None:
    """One update of a block of parameters; without a curvature estimate h stays.

    Args:
        signed: estimates may be negative, see `newton_step`.
    """
    group, slices, _, estimates = update
    if signed and estimates and is_measured(group, slices, structure.parameters):
        rate = decay_of(structure.parameters, group, slices).rate
        relative = torch._foreach_add(structure.state_of(slices, "hessian"), rate)
        torch._foreach_reciprocal_(relative)
        torch._foreach_mul_(relative, estimates)
        add_noise(structure.parameters, group, slices, list(relative))
    for part, decay, correction, beta2 in split_by_step(structure, update, beta2_of_step):
        newton_step(
            *part,
            lr=float(group["lr"]),
            beta1=float(group["beta1"]),
            beta2=beta2,
            decay=decay,
            damping=float(group["damping"]),
            correction=correction,
            signed=signed,
        )


def newton_step(
    means: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    gradients: list[Tensor],
    estimates: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    decay: Decay,
    damping: float,
    correction: float,
    signed: bool,
) -> None:
    """h ← β₂h + (1 - β₂)ĥ,  g ← β₁g + (1 - β₁)ĝ,  m ← m - lr·(g/c + wd·m)/(h + wd + damping), all in place.

    Args:
        means: m, momenta: g, hessians: h, gradients: ĝ, estimates: ĥ; without any h stays.
        decay: wd, or a prior in its place.
        correction: c = 1 - β₁ᵗ.
        signed: estimates may be negative; then h + wd at most halves, so it stays positive.
    """
    if estimates:
        floors = torch._foreach_sub(hessians, decay.rate) if signed else []
        torch._foreach_lerp_(hessians, estimates, 1 - beta2)
        if signed:
            torch._foreach_mul_(floors, 0.5)  # (h + wd)/2 - wd
            torch._foreach_maximum_(hessians, floors)
    torch._foreach_lerp_(momenta, gradients, 1 - beta1)
    # Direction and step are c times too long and too short: a pass less.
    directions = decay.pull(means, correction)
    torch._foreach_add_(directions, momenta)
    precisions = torch._foreach_add(hessians, decay.damped(damping))
    torch._foreach_addcdiv_(means, directions, precisions, value=-lr / correction)
