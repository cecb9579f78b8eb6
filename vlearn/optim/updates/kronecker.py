"""A step of the Kronecker factors, their eigenbases and the mean of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlearn.gaussians.eigenbasis import eigen, product, rotate_diagonal, with_factored_damping
from vlearn.optim.distributed.factors import Key, averages
from vlearn.optim.parameters.options import beta2_of_step, log_kept_weights, tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.structures.diagonal import momentum_correction
from vlearn.optim.structures.kronecker import KroneckerStructure
from vlearn.optim.structures.prior import decay_of_whole
from vlearn.per_example.kronecker_factors import Layer

Gradients = dict[Tensor, list[tuple[ParameterSlice, Tensor]]]  # by parameter: its slices with their gradients


def averaged_statistics(
    structure: KroneckerStructure, drawn: Mapping[Key, list[Tensor]]
) -> dict[Layer, dict[str, Tensor]]:
    """The statistics of each layer, averaged over the step's draws, of all processes whose gradients are averaged.

    Args:
        drawn: those of each of this process's draws, by layer and name.
    """
    every, averaged = structure.parameters.every(), {}
    processes_of = {layer: structure.processes.group_over(layer.parameters) for layer, _ in drawn}
    for processes in dict.fromkeys(structure.processes.group_over([p]) for p in every):
        of_these = {key: statistics for key, statistics in drawn.items() if processes_of[key[0]] is processes}
        averaged |= averages(of_these, every, state_dtype, processes)
    by_layer: dict[Layer, dict[str, Tensor]] = {}
    for (layer, name), statistic in averaged.items():
        by_layer.setdefault(layer, {})[name] = statistic
    return by_layer


def update_factors(
    structure: KroneckerStructure,
    layers: list[Layer],
    gradients: Gradients,
    statistics_of: Mapping[Layer, Mapping[str, Tensor]],
) -> None:
    """Move the running means of the gradient, of the factors, and of EK-FAC's squares.

    A factor is a debiased running mean. A new value that comes k steps after the last is weighed by 1 - β₂ᵏ, β₂ᵏ the
    product of the k last momenta where they change, as if it had been seen at each of them. The number of a layer's
    step is the largest of its parameters'.
    """
    states = structure.parameters.state
    together: dict[tuple[int, int], tuple[Group, list[Layer]]] = {}  # layers of one group and step
    for layer in layers:
        group = structure.group_of(layer)
        for p in layer.parameters:
            for piece, gradient in gradients.get(p, ()):
                piece.of(states[p]["momentum"]).lerp_(gradient, 1 - float(group["beta1"]))
            if p in gradients:
                states[p]["step"] += 1
        if statistics_of.get(layer):
            together.setdefault((id(group), structure.num_updates(layer)), (group, []))[1].append(layer)
    for (_, steps), (group, these) in together.items():
        beta2 = beta2_of_step(group, steps)
        if beta2 != 1:
            pairs = [(states[layer.weight], statistics_of[layer]) for layer in these]
            _move_factors(group, steps, beta2, pairs)


def _move_factors(
    group: Group, steps: int, beta2: float, pairs: list[tuple[dict[str, Tensor], Mapping[str, Tensor]]]
) -> None:
    """The factors and squares of layers that are at the same step of one group.

    Args:
        pairs: the state of a layer's weight, and its new statistics.
    """
    torch._foreach_mul_([state["learned"] for state, _ in pairs], beta2)
    torch._foreach_add_([state["learned"] for state, _ in pairs], 1 - beta2)
    torch._foreach_add_([state[age] for state, _ in pairs for age in ("out_age", "in_age")], 1)
    news = [
        (state, name, statistics[name].to(state[name].dtype))
        for state, statistics in pairs
        for name in ("out_factor", "in_factor")
        if name in statistics
    ]
    if news:
        ages = [state[name.replace("factor", "age")] for state, name, _ in news]
        shares = log_kept_weights(group, steps, ages)  # 1 - β₂ᵃᵍᵉ = -(exp(log β₂ᵃᵍᵉ) - 1)
        torch._foreach_expm1_(shares)
        torch._foreach_mul_(shares, -1)
        torch._foreach_div_(shares, [state["learned"] for state, _, _ in news])
        torch._foreach_clamp_max_(shares, 1)
        for (state, name, new), share in zip(news, shares, strict=True):
            state[name].lerp_(new, share.to(new.dtype))
        torch._foreach_mul_(ages, 0)
    for state, statistics in pairs:
        if "squares" in statistics:
            state["hessian"].lerp_(statistics["squares"].to(state["hessian"].dtype), 1 - beta2)


def decomposed(structure: KroneckerStructure, factored_damping: bool, layer: Layer) -> list[Tensor] | None:
    """s in a new eigenbasis, and that; None if the decomposition fails.

    Args:
        factored_damping: s + wd is the product of two damped factors.
    """
    group, state = structure.group_of(layer), structure.parameters.state[layer.weight]
    before = structure.basis(layer)
    with torch.autocast(layer.weight.device.type, enabled=False):
        rows, columns = eigen(state["out_factor"], before[0]), eigen(state["in_factor"], before[1])
        if rows is None or columns is None:
            return None
        after = (rows[1], columns[1])
        if structure.eigenvalue_correction and any(basis is not None for basis in before):
            s = rotate_diagonal(state["hessian"], before, after)
        else:
            weight_decay = float(tempered_ess_and_decay(group)[1])
            s = (
                with_factored_damping(rows[0], columns[0], weight_decay)
                if factored_damping
                else product(rows[0], columns[0])
            )
            s.mul_(state["learned"]).add_(group["hess_init"] * (1 - state["learned"]))
    return [s, *(basis for basis in after if basis is not None)]


def move_mean(structure: KroneckerStructure, layer: Layer, gradients: Gradients) -> None:
    """m ← m - lr·Q_B[(Q_Bᵀ(g/(1 - β₁ᵗ) + wd·M)Q_A)/(s + wd + γ)]Q_Aᵀ; a parameter without a gradient stays."""
    states, group = structure.parameters.state, structure.group_of(layer)
    directions = []
    for p in layer.parameters:
        mean, decay = structure.parameters.mean_of(p), decay_of_whole(structure.parameters, group, p)
        momentum = states[p]["momentum"] / momentum_correction(group, states[p]["step"])
        if p not in gradients:
            directions.append(torch.zeros_like(mean))
        elif isinstance(decay.rate, float):
            directions.append(torch.add(momentum, mean, alpha=decay.rate))
        else:
            directions.append(decay.pull([mean])[0].add_(momentum))
    precision = states[layer.weight]["hessian"] + (structure.rate_of(layer) + float(group["damping"]))
    moves = structure.block(layer, precision.reciprocal_()).multiply([d.unsqueeze(0) for d in directions])
    for p, move in zip(layer.parameters, moves, strict=True):
        if p in gradients:
            structure.parameters.mean_of(p).sub_(move.squeeze(0), alpha=float(group["lr"]))
