"""The step of IVON: a Newton step whose diagonal Hessian moves by the Riemannian rule, which keeps it positive.

Shen et al., 2024, arXiv:2402.17641, Algorithm 1; Lin, Schmidt, Khan, 2020, arXiv:2002.10060.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlearn.optim.parameters.options import beta2_of_step
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.structures.prior import Decay
from vlearn.optim.updates.block_update import BlockUpdate, split_by_step
from vlearn.optim.updates.hessian_noise import add_noise, is_measured

Tensors = list[Tensor] | tuple[Tensor, ...]


def ivon_settings(group: Group) -> dict[str, Any]:
    """What `ivon_step` takes from a parameter group, beside its weight decay."""
    return {
        "price": group["curvature"] == "price",
        "bounded": group.get("beta2_warmup") is not None,
        "ess": float(group["ess"]),  # a kernel is compiled anew where a float was an integer
        "beta1": float(group["beta1"]),
        "clip_radius": float(group["clip_radius"]),
        "lr": _rate(group) * (group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0),
    }


def _rate(group: Group) -> Any:
    """The learning rate, a number unless it is to stay on the device."""
    return group["lr"] if group.get("capturable", False) and isinstance(group["lr"], Tensor) else float(group["lr"])


def measures_noise(group: Group, slices: list[ParameterSlice], parameters: Parameters) -> bool:
    """Whether the noise of Price's estimate is counted, see `hessian_noise`."""
    return group["curvature"] == "price" and is_measured(group, slices, parameters)


def off_scale(groups: list[Group]) -> str | None:
    """Why a Hessian of squared minibatch gradients has no scale, of the first group that has one.

    Near the end of training the square of the mean of B examples' gradients is about 1/B of their mean square, so times
    ess it is ess/B times the curvature.
    """
    for group in groups:
        if group["curvature"] == "empirical":
            return (
                f"curvature='empirical' takes the minibatch's squared gradient times ess={group['ess']:g} for the "
                "Hessian, which of B examples is about ess/B times too large. Use VOGN, or curvature='price'."
            )
    return None


def apply_ivon_step(structure: DiagonalStructure, update: BlockUpdate) -> None:
    """One update of a block of parameters."""
    group, slices, _, statistics = update
    if statistics and measures_noise(group, slices, structure.parameters):
        add_noise(structure.parameters, group, slices, statistics, group["ess"])
    for part, decay, correction, beta2 in split_by_step(structure, update, beta2_of_step):
        ivon_step(*part, **ivon_settings(group), decay=decay, correction=correction, beta2=beta2)


def ivon_kernel(
    weights: Tensor,
    buffer: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    hessian: Tensor,
    mean_in_weights: bool,
    keep: bool,
    *,
    price: bool,
    bounded: bool,
    ess: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip_radius: float,
    lr: float,
    correction: float,
) -> None:
    """`ivon_step` of one tensor as one expression, to be compiled; the new mean goes into the weights.

    Where the draw is to be kept and is in the weights, the mean stays in the buffer.
    """
    mean, sample = (weights, buffer) if mean_in_weights else (buffer, weights)
    precision = hessian + weight_decay
    estimate = ess * precision * (sample - mean) * gradient if price else ess * gradient * gradient  # ĥ
    difference = hessian - estimate
    if bounded:  # as in `move_bounded`
        capped = ((1 - beta2) * difference / precision).clamp(max=1)
        within = capped.clamp(min=-1)
        moved = hessian + precision * (within * (0.5 * within - 1) - 2 * (capped - within))
    else:
        moved = hessian - (1 - beta2) * difference + 0.5 * (1 - beta2) ** 2 * difference * difference / precision
    averaged = beta1 * momentum + (1 - beta1) * gradient
    direction = (averaged / correction + weight_decay * mean) / (moved + weight_decay)
    if clip_radius < math.inf:
        direction = direction.clamp(-clip_radius, clip_radius)
    hessian.copy_(moved)
    momentum.copy_(averaged)
    (mean if keep else weights).copy_(mean - lr * direction)


def ivon_step(
    means: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    gradients: list[Tensor],
    statistics: list[Tensor],
    *,
    price: bool,
    bounded: bool,
    ess: float,
    beta1: float,
    beta2: float,
    decay: Decay,
    clip_radius: float,
    lr: Any,
    correction: float | list[Tensor],
) -> None:
    """The update of several tensors, in place, as `vlearn.IVON` states it.

    Args:
        means: m, momenta: g, hessians: h, gradients: ĝ, statistics: mean of noise∘gradient, or of gradient².
        bounded: the Riemannian term is bounded, see `move_bounded`.
        decay: wd, or a prior in its place.
        correction: c = 1 - β₁ᵗ; or, of each, a scalar on the device, where lr may be one too.
    """
    move_hessians(hessians, statistics, price=price, bounded=bounded, ess=ess, beta2=beta2, decay=decay.rate)
    torch._foreach_lerp_(momenta, gradients, 1 - beta1)
    if isinstance(correction, list):
        _move_means(means, momenta, torch._foreach_add(hessians, decay.rate), decay, clip_radius, lr, correction)
        return
    # Direction and step are c times too long and too short: a pass less.
    if len(means) == 1 and isinstance(decay.rate, float):
        directions = torch._foreach_add(momenta, means, alpha=decay.rate * correction)
    else:  # rounded twice, as in the runs on record
        directions = decay.pull(means, correction)
        torch._foreach_add_(directions, momenta)
    precisions = torch._foreach_add(hessians, decay.rate)
    if clip_radius < math.inf:
        torch._foreach_div_(directions, precisions)
        torch._foreach_clamp_max_(directions, clip_radius * correction)
        torch._foreach_clamp_min_(directions, -clip_radius * correction)
        torch._foreach_sub_(means, directions, alpha=lr / correction)
    else:
        torch._foreach_addcdiv_(means, directions, precisions, value=-lr / correction)


def _move_means(
    means: list[Tensor],
    momenta: list[Tensor],
    precisions: Tensors,
    decay: Decay,
    clip_radius: float,
    lr: float | Tensor,
    corrections: list[Tensor],
) -> None:
    """m ← m - lr·clip((g/c + wd·m)/(h + wd)), c of each on the device."""
    directions = torch._foreach_div(momenta, corrections)
    torch._foreach_add_(directions, decay.pull(means))
    torch._foreach_div_(directions, precisions)
    if clip_radius < math.inf:
        torch._foreach_clamp_max_(directions, clip_radius)
        torch._foreach_clamp_min_(directions, -clip_radius)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(means, directions)


def move_hessians(
    hessians: list[Tensor],
    statistics: list[Tensor],
    *,
    price: bool,
    bounded: bool,
    ess: float,
    beta2: float,
    decay: float | list[Tensor],
) -> None:
    """The Hessians' part of `ivon_step`: h ← β₂h + (1 - β₂)ĥ + ½(1 - β₂)²(h - ĥ)²/(h + wd), in place.

    Args:
        decay: wd, or P₀/N of each.
    """
    precisions = torch._foreach_add(hessians, decay)
    if price:
        differences = torch._foreach_addcmul(hessians, statistics, precisions, value=-ess)  # h - ĥ
    else:
        differences = torch._foreach_sub(hessians, statistics, alpha=ess)
    if bounded:
        move_bounded(hessians, differences, precisions, 1 - beta2)
    else:
        torch._foreach_sub_(hessians, differences, alpha=1 - beta2)
        torch._foreach_mul_(differences, differences)
        torch._foreach_addcdiv_(hessians, differences, precisions, value=0.5 * (1 - beta2) ** 2)


def move_bounded(hessians: list[Tensor], differences: Tensors, precisions: Tensors, rate: float) -> None:
    """h ← h + P(φ(x) - x), x = ρ(h - ĥ)/P, P = h + wd, in place, for rates ρ up to 1.

    φ is Huber's function, x²/2 for |x| ≤ 1 and |x| - ½ beyond: the Riemannian rule where x is small. P takes the factor
    1 - x + x²/2 for |x| ≤ 1, ½ for x > 1 and ½ + 2|x| for x < -1, where x²/2 would let a burst of noise blow it up.

    Args:
        differences: h - ĥ; destroyed.
    """
    torch._foreach_mul_(differences, rate)
    torch._foreach_div_(differences, precisions)
    torch._foreach_clamp_max_(differences, 1)
    # φ(x) - x = u(u/2 - 1) - 2·min(x + 1, 0), u = x in [-1, 1]: where x is huge, no difference of huge numbers.
    within = torch._foreach_clamp_min(differences, -1)
    torch._foreach_sub_(differences, within)
    torch._foreach_mul_(differences, -2)
    slopes = torch._foreach_mul(within, 0.5)
    torch._foreach_sub_(slopes, 1)
    torch._foreach_addcmul_(differences, within, slopes)
    torch._foreach_addcmul_(hessians, precisions, differences)
