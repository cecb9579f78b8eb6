"""How much of a Hessian is noise, where Price's theorem learns it from draws that are narrower than the posterior.

Price's estimate ĥ of an entry has the relative size x = ĥ/(h + wd), whose noise is √ess·g/√(h + wd) times a standard
normal number, g the minibatch's gradient: the narrower the draws, the larger. A step multiplies h + wd by about
1 + ρx + ½(ρx)² with ρ = 1 - β₂, and what it did is forgotten as h forgets. So

    ν ← β₂ν + ½ρ²·mean x²

is what squared noise has added to h + wd, in multiples of it, and of h + wd at rest also the relative variance. For
minibatches of B examples of a fitted network, where B·g² is about H, it comes to ½ρ·ess·H/(B·(h + wd)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn.optim.parameters.options import beta2_of_step
from vlearn.optim.parameters.parameters import Group, Parameters, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice

KEY = "hessian_noise"  # ν in a parameter's state; only there once its group was tempered
LIMIT = 0.5  # below it, self-influences were found within a factor of 1.6 of those by a Hessian without noise

NOISE = (
    "its Hessian was learned from draws narrower than the posterior, and is mostly their noise "
    "(diagnostics().hessian_noise is above 0.5), so self-influence and deviation rank the examples "
    "(sweep(..., loo_loss=False)) but have no size. Use VAdamW, fit a posterior to the trained model "
    "(vlearn.posterior.fit), or train with ess=num_data."
)


def is_measured(group: Group, slices: list[ParameterSlice], parameters: Parameters) -> bool:
    """Whether draws are narrower than the posterior, or have been while h was learned."""
    tempered = group["num_data"] is not None and group["ess"] > group["num_data"]
    return tempered or any(KEY in parameters.state[piece.parameter] for piece in slices)


def add_noise(
    parameters: Parameters, group: Group, slices: list[ParameterSlice], relative: list[Tensor], scale: float = 1.0
) -> None:
    """Count the noise of one step, before the step is counted.

    Args:
        relative: x/scale of each slice.
        scale: what they are to be multiplied with.
    """
    for piece, norm in zip(slices, torch._foreach_norm(relative), strict=True):
        p = piece.parameter
        state = parameters.state[p]
        keep = beta2_of_step(group, int(state["step"]) + piece.is_first)
        noise = state.setdefault(KEY, torch.zeros((), dtype=state_dtype(p), device=p.device))
        if piece.is_first:
            noise.mul_(keep)
        noise.add_(((1 - keep) * scale * norm).square_(), alpha=0.5 / state["momentum"].numel())


def hessian_noise(parameters: Parameters) -> float:
    """ν, the mean over all entries; 0 where it was not measured."""
    states = [state for p in parameters.every() if "momentum" in (state := parameters.state.get(p, {}))]
    measured = [state for state in states if KEY in state]
    if not measured:
        return 0.0
    device = measured[0][KEY].device
    sums = torch.stack([state[KEY].to(device) * state["momentum"].numel() for state in measured])
    return sum(sums.tolist()) / sum(state["momentum"].numel() for state in states)
