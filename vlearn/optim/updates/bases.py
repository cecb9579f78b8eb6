"""New eigenbases for the layers of a rotated structure, the same in all processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from vlearn.collectives import compute_on_one_rank
from vlearn.optim.structures.rotated import RotatedStructure
from vlearn.per_example.kronecker_factors import Layer


def refresh_bases(
    structure: RotatedStructure, layers: list[Layer], decomposed: Callable[[Layer], list[Tensor] | None]
) -> None:
    """Make new eigenbases, with the Hessian in them; a layer keeps its own if that fails, which is counted.

    Args:
        decomposed: the Hessian in a layer's new basis, and that, of the sides that have one; None if there is none.
    """
    states = structure.parameters.state
    by_processes: dict[Any, list[Layer]] = {}
    for layer in layers:
        by_processes.setdefault(structure.processes.group_over(layer.parameters), []).append(layer)
    for processes, of_these in by_processes.items():
        likes = [list(_in_eigenbasis(structure, layer).values()) for layer in of_these]
        tasks = [partial(decomposed, layer) for layer in of_these]
        for layer, result in zip(of_these, compute_on_one_rank(tasks, likes, processes), strict=True):
            if result is None:
                structure.decomposition_failures += 1
            else:
                states[layer.weight].update(zip(_in_eigenbasis(structure, layer), result, strict=True))


def _in_eigenbasis(structure: RotatedStructure, layer: Layer) -> dict[str, Tensor]:
    """What a new basis changes in the state, and tensors of that shape."""
    state = structure.parameters.state[layer.weight]
    factors = {"out_basis": state.get("out_factor"), "in_basis": state.get("in_factor")}
    rotated = {name: factor for name, factor in factors.items() if factor is not None and factor.dim() == 2}
    return {"hessian": state["hessian"], **rotated}
