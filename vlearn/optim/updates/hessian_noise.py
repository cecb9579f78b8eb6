"""How much of a Hessian is noise, where Price's theorem learns it from draws that are narrower than the posterior.

Price's estimate ĥ of an entry has the relative size x = ĥ/(h + wd), whose noise is √ess·g/√(h + wd) times a standard
normal number, g the minibatch's gradient: the narrower the draws, the larger. A step multiplies h + wd by about
1 + ρx + ½(ρx)² with ρ = 1 - β₂, and what it did is forgotten as h forgets. So

    ν ← β₂ν + ½ρ²·mean x²

is what squared noise has added to h + wd, in multiples of it, and of h + wd at rest also the relative variance. For
minibatches of B examples of a fitted network, where B·g² is about H, it comes to ½ρ·ess·H/(B·(h + wd)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlearn._wide import widened
from vlearn.optim.distributed.shards import share, sum_over
from vlearn.optim.kernels.multi_tensor import read
from vlearn.optim.parameters.options import beta2_of_step
from vlearn.optim.parameters.parameters import Group, Parameters, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.sharded.tensors import is_dtensor

KEY = "hessian_noise"  # ν in a parameter's state; only there once its group was tempered
LIMIT = 0.5  # below it, self-influences were found within a factor of 1.6 of those by a Hessian without noise

NOISE = (
    "its Hessian was learned from draws narrower than the posterior, and is mostly their noise "
    "(diagnostics().hessian_noise is above 0.5), so self-influence and deviation rank the examples "
    "(sweep(..., loo_loss=False)) but have no size. Train on where steps were few, fit a "
    "posterior to the trained model (vlearn.posterior.fit), or train with ess=num_data."
)


def is_measured(group: Group, slices: list[ParameterSlice], parameters: Parameters) -> bool:
    """Whether draws are narrower than the posterior, or have been while h was learned."""
    return _is_tempered(group) or any(KEY in parameters.state[piece.parameter] for piece in slices)


def _is_tempered(group: Group) -> bool:
    return group["num_data"] is not None and group["ess"] > group["num_data"]


def start_noise(parameters: Parameters, group: Group) -> None:
    """Give a group's parameters that have a state the one in which noise is counted, if it will be."""
    if _is_tempered(group):
        for p in group["params"]:
            if parameters.has_state(p):
                _noise_of(parameters, p)


def _noise_of(parameters: Parameters, p: Tensor) -> Tensor:
    state = parameters.state[p]
    if KEY not in state:
        state[KEY] = torch.zeros((), dtype=state_dtype(p), device=p.device)
    return state[KEY]


def add_noise(
    parameters: Parameters, group: Group, slices: list[ParameterSlice], relative: list[Tensor], scale: float = 1.0
) -> None:
    """Count the noise of one step, before the step is counted.

    Args:
        relative: x/scale of each slice.
        scale: what they are to be multiplied with.
    """
    states = [parameters.state[piece.parameter] for piece in slices]
    # A constant momentum needs no step, for which a step that is capturable may not wait.
    steps = [1] * len(states) if group.get("beta2_warmup") is None else read([state["step"] for state in states])
    keeps = [beta2_of_step(group, int(step) + piece.is_first) for piece, step in zip(slices, steps, strict=True)]
    added = torch._foreach_mul(torch._foreach_norm(relative), [(1 - keep) * scale for keep in keeps])
    torch._foreach_mul_(added, added)
    torch._foreach_mul_(added, [0.5 / state["momentum"].numel() for state in states])
    noises = [_noise_of(parameters, piece.parameter) for piece in slices]
    begun = [i for i, piece in enumerate(slices) if piece.is_first]
    if begun:
        torch._foreach_mul_([noises[i] for i in begun], [keeps[i] for i in begun])
    if not is_dtensor(slices[0].parameter):  # a block has one slice of a parameter, at most
        torch._foreach_add_(noises, added)
        return
    for piece, value in zip(slices, added, strict=True):
        p = piece.parameter
        parameters.noise_of_shards[p] = parameters.noise_of_shards.get(p, 0.0) + value


def add_noise_of_shards(parameters: Parameters, mesh: Any) -> None:
    """Count what `add_noise` has found of parameters of which other processes have parts too, in one message.

    Args:
        mesh: of these processes.
    """
    sharded, parameters.noise_of_shards = parameters.noise_of_shards, {}
    if sharded:
        own = torch.stack([widened(added) * share(p, mesh) for p, added in sharded.items()])
        for p, added in zip(sharded, sum_over(mesh, own), strict=True):
            _noise_of(parameters, p).add_(added)


def hessian_noise(parameters: Parameters) -> float:
    """ν, the mean over all entries; 0 where it was not measured."""
    states = [state for p in parameters.every() if "momentum" in (state := parameters.state.get(p, {}))]
    measured = [state for state in states if KEY in state]
    if not measured:
        return 0.0
    device = measured[0][KEY].device
    sums = torch.stack([state[KEY].to(device) * state["momentum"].numel() for state in measured])
    return sum(sums.tolist()) / sum(state["momentum"].numel() for state in states)
