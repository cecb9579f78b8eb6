"""New eigenbases for the layers of a rotated structure, the same in all processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from vlearn.collectives import compute_on_one_rank
from vlearn.optim.distributed.shards import of_first
from vlearn.optim.structures.rotated import RotatedStructure
from vlearn.per_example.kronecker_factors import Layer
from vlearn.sharded.tensors import is_dtensor, part_of, shard


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
        if is_dtensor(layer.weight):
            _refresh_shards(structure, layer, decomposed)
        else:
            by_processes.setdefault(structure.processes.group_over(layer.parameters), []).append(layer)
    for processes, of_these in by_processes.items():
        likes = [list(_in_eigenbasis(structure, layer).values()) for layer in of_these]
        tasks = [partial(decomposed, layer) for layer in of_these]
        for layer, result in zip(of_these, compute_on_one_rank(tasks, likes, processes), strict=True):
            if result is None:
                structure.decomposition_failures += 1
            else:
                states[layer.weight].update(zip(_in_eigenbasis(structure, layer), result, strict=True))


def _refresh_shards(
    structure: RotatedStructure, layer: Layer, decomposed: Callable[[Layer], list[Tensor] | None]
) -> None:
    """As `refresh_bases` for a layer that is sharded, which all processes decompose together."""
    changed = list(_in_eigenbasis(structure, layer).values())
    result = of_first(layer.weight.device_mesh, decomposed(layer), changed)  # pyright: ignore
    if result is None:
        structure.decomposition_failures += 1
    else:
        for tensor, value in zip(changed, result, strict=True):
            shard(tensor).copy_(part_of(tensor, value))


def _in_eigenbasis(structure: RotatedStructure, layer: Layer) -> dict[str, Tensor]:
    """What a new basis changes in the state; in the place of a basis that there is not yet a tensor of its shape."""
    state = structure.parameters.state[layer.weight]
    factors = {"out_basis": state.get("out_factor"), "in_basis": state.get("in_factor")}
    rotated = {name: factor for name, factor in factors.items() if factor is not None and factor.dim() == 2}
    return {"hessian": state["hessian"], **{name: state.get(name, factor) for name, factor in rotated.items()}}
